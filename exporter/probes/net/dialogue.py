"""Dialogues: steps that wait for a line or message, or send a text."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, ClassVar, cast

from exporter.probes.expectations import compile_cached, quote_excerpt
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ChoiceModel
from fleet.inventory.units import Pattern

LINE_LIMIT = 64 * 1024
MESSAGES_PER_STEP = 1000  # lines or messages
_GROUP = re.compile(r"\{(\d)\}")


class DialogueStep(ChoiceModel):
    """One step: wait for a match, or send a text in which `{1}` stands for the first group of the last match."""

    choices: ClassVar[tuple[str, ...]] = ("expect", "send")
    expect: Pattern | None = None
    send: Annotated[str | None, REFERENCES_ARE_SECRET] = None


OnPartial = Callable[[bytes], None]


class Dialogue:
    """The state of a dialogue: the current step, and the groups of the last match.

    `receive` returns the next line or message, or None if the peer has closed the connection. It passes the beginning
    of an incomplete one to the function that it is called with.
    """

    def __init__(self, receive: Callable[[OnPartial], Awaitable[bytes | None]], details: ProbeDetails) -> None:
        self._receive, self._details = receive, details
        self._groups: tuple[bytes | None, ...] = ()
        self._step = 0

    def next_step(self) -> str:
        """Begin the next step, and return its name for messages."""
        self._step += 1
        return self.step_name

    @property
    def step_name(self) -> str:
        return f"step {self._step} of the dialogue"

    def fill_groups(self, text: str) -> bytes:
        """Return `text` with `{1}` and so on replaced by the groups of the last match."""

        def group(placeholder: re.Match[str]) -> str:
            number = int(placeholder[1])
            if not 0 < number <= len(self._groups):
                return placeholder[0]
            return (self._groups[number - 1] or b"").decode("utf-8", "surrogateescape")

        return _GROUP.sub(group, text).encode("utf-8", "surrogateescape")

    async def expect(self, pattern: str) -> None:
        """Wait for a match of `pattern`; lines before it, as of a banner, are skipped. Raises ProbeFailure."""
        expected = f"{self.step_name}: expected {pattern!r}"
        last: bytes | None = None
        self._details.timeout_failure = ProbeFailure("timeout", f"{expected}, but received nothing in time")

        def on_mismatch(text: bytes) -> None:
            # A peer that sent something else and then waits has given a wrong answer; it is not silent.
            received = quote_excerpt(text, self._details)
            self._details.timeout_failure = ProbeFailure("protocol", f"{expected}, received {received}")

        for _ in range(MESSAGES_PER_STEP):
            try:
                message = await self._receive(on_mismatch)
            except (ValueError, OSError) as error:
                raise ProbeFailure("protocol", f"{expected}: {error}") from error
            await asyncio.sleep(0)  # a peer that never stops sending must not block other probes
            if message is None:
                break
            last = message
            self._details.evidence["received"] = quote_excerpt(last, self._details)
            match = compile_cached(pattern).search(last)
            if match:
                self._groups = match.groups()
                self._details.timeout_failure = None
                return
            on_mismatch(last)
        if last is None:
            raise ProbeFailure("protocol", f"{expected}, but the peer closed the connection")
        raise ProbeFailure("protocol", f"{expected}, received {quote_excerpt(last, self._details)}")


class LineReader(asyncio.Protocol):
    """Reads a peer's lines one by one."""

    def __init__(self) -> None:
        self.unread = b""
        self._received = self._closed = False
        self._changed = asyncio.Event()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received = True
        self.unread += data
        self._changed.set()
        if len(self.unread) > LINE_LIMIT and self._transport is not None:
            self._transport.pause_reading()

    @property
    def ended_silently(self) -> bool:
        """Whether the peer closed the connection without sending anything."""
        return self._closed and not self._received

    def eof_received(self) -> None:
        self._close()

    def connection_lost(self, _error: Exception | None) -> None:
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._changed.set()

    async def next(self, on_partial: OnPartial) -> bytes | None:
        """Return the next line without its end, or None at the end. Raises ValueError if it is too long."""
        while True:
            line, newline, rest = self.unread.partition(b"\n")
            if newline:
                self.unread = rest
                return line.rstrip(b"\r")
            if len(self.unread) > LINE_LIMIT:
                raise ValueError(f"a line is longer than {LINE_LIMIT} bytes")
            if self._closed:
                self.unread = b""
                return line or None
            if line:
                on_partial(line)
            if self._transport is not None:
                self._transport.resume_reading()
            self._changed.clear()
            await self._changed.wait()
