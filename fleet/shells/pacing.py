"""Connections that pass received data on in small parts, so that a fast peer does not block the event loop."""

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

P = TypeVar("P", bound=asyncio.Protocol)
PART = 32 * 1024  # bytes that are processed in one turn of the event loop


class PacedProtocol(asyncio.Protocol, Generic[P]):
    """Passes everything on to another protocol, at most `PART` bytes in one turn of the event loop.

    The event loop reads up to 8 MiB in one turn. Processing that may take seconds, if it has many small packets.
    """

    def __init__(self, protocol: P) -> None:
        self.protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.protocol.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if not self._waiting and len(data) <= PART:
            self.protocol.data_received(data)
            return
        if not self._waiting and self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_soon(self._pass_on)
        self._waiting += data

    def _pass_on(self) -> None:
        part = bytes(self._waiting[:PART])
        del self._waiting[:PART]
        if part:
            self.protocol.data_received(part)
        if self._waiting:
            self._loop.call_soon(self._pass_on)
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def eof_received(self) -> bool | None:
        return self.protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._waiting.clear()
        self.protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()


class PacedConnector:
    """Opens connections for asyncssh, in the place of a tunnel."""

    async def create_connection(self, factory: Callable[[], Any], host: str, port: int) -> tuple[Any, Any]:
        loop = asyncio.get_running_loop()
        transport, paced = await loop.create_connection(lambda: PacedProtocol(factory()), host, port)
        return transport, paced.protocol
