"""A connection whose request is suspended."""

import asyncio
from typing import TYPE_CHECKING, cast

from runtime.connections.importance import Importance
from runtime.suspension import Work

if TYPE_CHECKING:
    from runtime.connections.registry import Connections


class SuspendedConnection(asyncio.Protocol):
    """A connection whose request is suspended: it only notices that its client leaves."""

    __slots__ = ("_connections", "_importance", "_transport", "address", "caller", "has_ended", "head", "work")
    head: bytes  # of the request
    work: Work
    _transport: asyncio.Transport

    def __init__(self, connections: "Connections", address: str, caller: str, importance: Importance) -> None:
        self._connections, self._importance = connections, importance
        self.address, self.caller = address, caller
        self.has_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Drop what follows the request: the connection is closed after the response."""

    def connection_lost(self, _exc: Exception | None) -> None:
        if not self.has_ended:
            self._end()

    def _end(self) -> None:
        self.has_ended = True
        self._connections.remove(self)
        self.work.close()

    def resume(self) -> None:
        """Go on with the request."""
        self._connections.resume(self)

    def release(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        """Give the transport to another protocol."""
        self.has_ended = True
        self._transport.set_protocol(protocol)
        return self._transport

    def drop(self, reason: str) -> None:
        self._connections.report_drop(self, reason)
        self.abort()

    def abort(self) -> None:
        """Close the connection, and end the request."""
        self._end()
        self._transport.abort()

    def importance(self, _now: float) -> Importance:
        return self._importance

    def drop_if_slow(self, _now: float) -> bool:
        return False
