"""Data in small parts, and few requests at once, so that fast peers and many clients do not block the event loop."""

import asyncio
from collections import OrderedDict, deque
from typing import Any, Generic, TypeVar

P = TypeVar("P", bound=asyncio.Protocol)
PART = 32 * 1024  # bytes that are processed in one turn of the event loop


class RequestPacer:
    """Lets few requests begin in each turn of the event loop, those of each queue in turn."""

    def __init__(self, in_a_turn: int = 8) -> None:
        self._in_a_turn = in_a_turn
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._begun = 0  # in this turn
        self._is_scheduled = False

    async def wait(self, queue: str) -> None:
        """Wait until a request of this queue may begin."""
        loop = asyncio.get_running_loop()
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._begin_turn, loop)
        if self._begun < self._in_a_turn and not self._waiting:
            self._begun += 1
            return
        turn = loop.create_future()
        self._waiting.setdefault(queue, deque()).append(turn)
        await turn

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._begun = 0
        while self._waiting and self._begun < self._in_a_turn:
            name, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[name] = queue
            if not turn.done():  # else its client has gone
                turn.set_result(None)
                self._begun += 1
        self._is_scheduled = self._begun > 0
        if self._is_scheduled:
            loop.call_soon(self._begin_turn, loop)


class PacedProtocol(asyncio.Protocol, Generic[P]):
    """Passes everything on to another protocol, at most `PART` bytes in one turn of the event loop.

    The event loop reads up to 8 MiB in one turn. Processing that may take seconds, if it has many small packets.
    Nothing is read while something waits to be passed on, or while the other protocol has paused reading.
    """

    __slots__ = ("_is_paused", "_is_scheduled", "_loop", "_part", "_transport", "_waiting", "protocol")

    def __init__(self, protocol: P, part: int = PART) -> None:
        self.protocol, self._part = protocol, part
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None  # asyncio.Transport
        self._waiting = bytearray()
        self._is_scheduled = self._is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        limit = getattr(transport, "set_read_buffer_limits", None)  # of TLS, whose buffers have 256 KiB otherwise
        if limit is not None:
            limit(high=self._part)
        paced: Any = _PacedTransport(self._transport, self)
        self.protocol.connection_made(paced)

    def data_received(self, data: bytes) -> None:
        if self._waiting or self._is_paused or len(data) > self._part:
            self._waiting += data
            self._continue()
        else:
            self.protocol.data_received(data)

    def set_paused(self, *, paused: bool) -> None:
        """Pass nothing on until the pause ends."""
        self._is_paused = paused
        self._continue()

    @property
    def is_reading(self) -> bool:
        return not self._is_paused and self._transport is not None and not self._transport.is_closing()

    def _continue(self) -> None:
        """Pass on in the next turn what waits, and read if nothing does."""
        if self._waiting and not self._is_paused and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._pass_on)
        if self._transport is None or self._transport.is_closing():
            return
        if self._waiting or self._is_paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _pass_on(self) -> None:
        self._is_scheduled = False
        if not self._is_paused:
            self._pass_part(self._part)
            self._continue()

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
        if self._waiting:
            self._pass_part(len(self._waiting))
        self.protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()


class _PacedTransport:
    """A transport for the protocol behind a paced one, which also decides when to read."""

    __slots__ = ("_paced", "_transport")

    def __init__(self, transport: asyncio.Transport, paced: PacedProtocol[Any]) -> None:
        self._transport, self._paced = transport, paced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def pause_reading(self) -> None:
        self._paced.set_paused(paused=True)

    def resume_reading(self) -> None:
        self._paced.set_paused(paused=False)

    def is_reading(self) -> bool:
        return self._paced.is_reading

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        self._paced.protocol = protocol
