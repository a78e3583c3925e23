"""A dialogue step by step: which step failed, what was expected there, and what came instead."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import ClassVar, cast

from exporter.probes.expectations import compiled, excerpt
from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import ChoiceModel
from fleet.inventory.units import Pattern

LINE_LIMIT = 64 * 1024
HEARD_LIMIT = 1000  # lines or messages in one step
_GROUP = re.compile(r"\{(\d)\}")


class Step(ChoiceModel):
    """One step: wait for what matches, or send; `{1}` in a text is the first group of the last match."""

    choices: ClassVar[tuple[str, ...]] = ("expect", "send")
    expect: Pattern | None = None
    send: str | None = None


Unfinished = Callable[[bytes], None]


class Dialogue:
    """Where a dialogue stands.

    `hear` gives the next line or message, or None when the peer has closed; what has come of one that is not yet whole
    it gives to the function that it is handed.
    """

    def __init__(self, hear: Callable[[Unfinished], Awaitable[bytes | None]], seen: Seen) -> None:
        self._hear, self._seen = hear, seen
        self._groups: tuple[bytes | None, ...] = ()
        self._step = 0

    def next(self) -> str:
        """Begin the next step; gives its name."""
        self._step += 1
        return self.where

    @property
    def where(self) -> str:
        return f"step {self._step} of the dialogue"

    def filled(self, text: str) -> bytes:
        """`text` as it is sent."""

        def group(found: re.Match[str]) -> str:
            number = int(found[1])
            if not 0 < number <= len(self._groups):
                return found[0]
            return (self._groups[number - 1] or b"").decode("utf-8", "surrogateescape")

        return _GROUP.sub(group, text).encode("utf-8", "surrogateescape")

    async def expect(self, pattern: str) -> None:
        """Wait for what matches; other lines may come first, as in a greeting of many. Raises ProbeFailure."""
        last: bytes | None = None
        self._seen.overdue = ProbeFailure("timeout", f"{self.where}: expected {pattern!r}, and nothing came in time")

        def other(text: bytes) -> None:
            # A peer that said something else and now waits has answered wrongly; it is not silent.
            came = excerpt(text, self._seen)
            self._seen.overdue = ProbeFailure("protocol", f"{self.where}: expected {pattern!r}, got {came}")

        for _ in range(HEARD_LIMIT):
            try:
                heard = await self._hear(other)
            except (ValueError, OSError) as error:
                raise ProbeFailure("protocol", f"{self.where}: expected {pattern!r}: {error}") from error
            await asyncio.sleep(0)  # a peer that never stops must not keep the others waiting
            if heard is None:
                break
            last = heard
            self._seen.evidence["received"] = excerpt(last, self._seen)
            found = compiled(pattern).search(last)
            if found:
                self._groups = found.groups()
                self._seen.overdue = None
                return
            other(last)
        came = "a closed connection" if last is None else excerpt(last, self._seen)
        raise ProbeFailure("protocol", f"{self.where}: expected {pattern!r}, got {came}")


class Lines(asyncio.Protocol):
    """A peer's lines, one after the other."""

    def __init__(self) -> None:
        self.unread = b""
        self._heard = self._closed = False
        self._more = asyncio.Event()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self.unread += data
        self._more.set()
        if len(self.unread) > LINE_LIMIT and self._transport is not None:
            self._transport.pause_reading()

    @property
    def ended_silently(self) -> bool:
        """Whether the peer closed the connection before it said anything."""
        return self._closed and not self._heard

    def eof_received(self) -> None:
        self._close()

    def connection_lost(self, _error: Exception | None) -> None:
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._more.set()

    async def next(self, unfinished: Unfinished) -> bytes | None:
        """The next line, without its end, or None where there is no more. Raises ValueError for one too long."""
        while True:
            line, found, rest = self.unread.partition(b"\n")
            if found:
                self.unread = rest
                return line.rstrip(b"\r")
            if len(self.unread) > LINE_LIMIT:
                raise ValueError(f"a line is longer than {LINE_LIMIT} bytes")
            if self._closed:
                self.unread = b""
                return line or None
            if line:
                unfinished(line)
            if self._transport is not None:
                self._transport.resume_reading()
            self._more.clear()
            await self._more.wait()
