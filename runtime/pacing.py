"""Connections that pass received data on in small parts, so that a fast peer does not block the event loop."""

import asyncio
from typing import Generic, TypeVar, cast

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
        if not self._waiting:
            if self._transport is not None:
                self._transport.pause_reading()
            self._loop.call_soon(self._pass_on)
        self._waiting += data

    def _pass_on(self) -> None:
        self._pass_part(PART)
        if self._waiting:
            self._loop.call_soon(self._pass_on)
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _pass_part(self, size: int) -> None:
        part = bytes(self._waiting[:size])
        del self._waiting[:size]
        if part:
            self.protocol.data_received(part)

    def eof_received(self) -> bool | None:
        self._pass_part(len(self._waiting))
        return self.protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pass_part(len(self._waiting))
        self.protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()
