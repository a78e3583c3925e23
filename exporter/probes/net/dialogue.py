"""Dialogues: steps that wait for a line, a message, a prompt or bytes, or send them."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, ClassVar, cast

from pydantic import BeforeValidator, WithJsonSchema

from exporter.probes.expectations import EXCERPT_LENGTH, compile_cached, quote_excerpt
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ChoiceModel
from fleet.inventory.units import Pattern

LINE_LIMIT = 64 * 1024
PROMPT_LIMIT = 4 * 1024  # bytes of an incomplete line in which a prompt is looked for, whenever more arrive
MESSAGES_PER_STEP = 1000  # lines or messages
_GROUP = re.compile(r"\{(\d)\}")
_BYTES_SHOWN = EXCERPT_LENGTH // 3  # in hexadecimal, with blanks


def _check_bytes(value: object) -> str:
    try:
        data = bytes.fromhex("".join(value.split())) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if not 0 < len(data) <= LINE_LIMIT:  # the value may be a secret
        raise ValueError(f'must be 1 to {LINE_LIMIT} bytes in hexadecimal, in quotes (write "00 1f")')
    return data.hex(" ")


# Validated as pairs of digits with blanks between them.
HexBytes = Annotated[
    str, BeforeValidator(_check_bytes), WithJsonSchema({"type": "string", "pattern": r"^\s*([0-9a-fA-F]\s*)+$"})
]


class DialogueStep(ChoiceModel):
    """One step: wait for a match, or send a text in which `{1}` stands for the first group of the last match."""

    choices: ClassVar[tuple[str, ...]] = ("expect", "send", "expect_bytes", "send_bytes")
    expect: Pattern | None = None
    send: Annotated[str | None, REFERENCES_ARE_SECRET] = None
    expect_bytes: HexBytes | None = None
    send_bytes: Annotated[HexBytes | None, REFERENCES_ARE_SECRET] = None


OnPartial = Callable[[bytes], None]
Receive = Callable[[OnPartial], Awaitable[bytes | None]]
FindEnd = Callable[[bytes], int | None]


def _quote_bytes(data: bytes, details: ProbeDetails) -> str:
    """Return the beginning of `data` in hexadecimal, or as text if it has a secret in one of these forms."""
    beginning = data[: 4 * (_BYTES_SHOWN + details.redact.longest)]
    digits, spaced = beginning.hex(), beginning.hex(" ")
    for form in (digits, spaced, digits.upper(), spaced.upper()):
        if details.redact(form) != form:
            return "bytes with a secret"
    text = beginning.decode("utf-8", "replace")
    if details.redact(text) != text:
        return quote_excerpt(data, details)
    return _format_bytes(data)


def _format_bytes(data: bytes) -> str:
    return data[:_BYTES_SHOWN].hex(" ") + (" …" if len(data) > _BYTES_SHOWN else "")


class Dialogue:
    """The state of a dialogue: the current step, and the groups of the last match.

    `receive` returns the next line or message, or None if the peer has closed the connection. It passes the beginning
    of an incomplete one to the function that it is called with.
    """

    def __init__(self, receive: Receive, details: ProbeDetails) -> None:
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

    def data_of(self, step: DialogueStep) -> bytes | None:
        """Return what a step sends, None if it sends nothing."""
        if step.send_bytes is not None:
            return bytes.fromhex(step.send_bytes)
        return None if step.send is None else self.fill_groups(step.send)

    async def await_step(self, step: DialogueStep) -> None:
        """Wait for what a step expects. Raises ProbeFailure."""
        if step.expect is not None:
            await self.expect(step.expect)
        elif step.expect_bytes is not None:
            await self.expect_bytes(bytes.fromhex(step.expect_bytes))

    async def expect(self, pattern: str) -> None:
        """Wait for a match of `pattern`; lines before it, as of a banner, are skipped. Raises ProbeFailure."""
        await self._wait(repr(pattern), self._receive, lambda text: self._matches(pattern, text), quote_excerpt)

    async def expect_bytes(self, expected: bytes) -> None:
        """Wait for a message that contains these bytes. Raises ProbeFailure."""
        await self._wait_for_bytes(expected, self._receive)

    async def _wait_for_bytes(self, expected: bytes, receive: Receive) -> None:
        await self._wait(f"the bytes {_format_bytes(expected)}", receive, lambda data: expected in data, _quote_bytes)

    def _matches(self, pattern: str, text: bytes) -> bool:
        match = compile_cached(pattern).search(text)
        if match:
            self._groups = match.groups()
        return bool(match)

    async def _wait(
        self,
        description: str,
        receive: Receive,
        is_expected: Callable[[bytes], bool],
        quote: Callable[[bytes, ProbeDetails], str],
    ) -> None:
        """Receive until something is as expected. Raises ProbeFailure."""
        expected = f"{self.step_name}: expected {description}"
        last: bytes | None = None
        self._details.timeout_failure = ProbeFailure("timeout", f"{expected}, but received nothing in time")

        def on_mismatch(text: bytes) -> None:
            # A peer that sent something else and then waits has given a wrong answer; it is not silent.
            received = quote(text, self._details)
            self._details.timeout_failure = ProbeFailure("protocol", f"{expected}, received {received}")

        for _ in range(MESSAGES_PER_STEP):
            try:
                message = await receive(on_mismatch)
            except (ValueError, OSError) as error:
                raise ProbeFailure("protocol", f"{expected}: {error}") from error
            await asyncio.sleep(0)  # a peer that never stops sending must not block other probes
            if message is None:
                break
            last = message
            self._details.evidence["received"] = quote(last, self._details)
            if is_expected(last):
                self._details.timeout_failure = None
                return
            on_mismatch(last)
        if last is None:
            raise ProbeFailure("protocol", f"{expected}, but the peer closed the connection")
        raise ProbeFailure("protocol", f"{expected}, received {quote(last, self._details)}")


class StreamDialogue(Dialogue):
    """A dialogue over a connection, whose bytes need not end with a newline."""

    def __init__(self, lines: "LineReader", details: ProbeDetails) -> None:
        super().__init__(lines.next, details)
        self._lines = lines

    async def expect_bytes(self, expected: bytes) -> None:
        """Wait for these bytes; others before them are skipped. Raises ProbeFailure."""
        await self._wait_for_bytes(expected, lambda on_partial: self._lines.read_past(expected, on_partial))

    async def prompt(self, pattern: str) -> None:
        """Wait for a match of `pattern`, in a line that need not be complete. Raises ProbeFailure.

        What follows the match is left for the next step, however the peer's text is split into packets.
        """
        match: Any = None

        def find_end(line: bytes) -> int | None:
            nonlocal match
            match = compile_cached(pattern).search(line)
            return match.end() if match else None

        await self._wait(
            f"the prompt {pattern!r}",
            lambda on_partial: self._lines.next(on_partial, find_end),
            lambda _line: bool(match),
            quote_excerpt,
        )
        self._groups = match.groups()


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

    async def next(self, on_partial: OnPartial, find_end: FindEnd | None = None) -> bytes | None:
        """Return the next line without its end, or None at the end. Raises ValueError if it is too long.

        If `find_end` returns an end within a line, which need not be complete, return the line up to there.
        """
        while True:
            line, newline, rest = self.unread.partition(b"\n")
            line = line.rstrip(b"\r") if newline else line
            if find_end is not None and (newline or self._closed or len(line) <= PROMPT_LIMIT):
                end = find_end(line)
                if end is not None:
                    self.unread = self.unread[end:]
                    return line[:end]
            if newline:
                self.unread = rest
                return line
            if len(self.unread) > LINE_LIMIT:
                raise ValueError(f"a line is longer than {LINE_LIMIT} bytes")
            if self._closed:
                self.unread = b""
                return line or None
            await self._wait_for_more(on_partial)

    async def read_past(self, wanted: bytes, on_partial: OnPartial) -> bytes | None:
        """Return what has arrived up to the end of `wanted`, or all at the end. Raises ValueError if it is too long."""
        searched = 0
        while True:
            at = self.unread.find(wanted, searched)
            if at >= 0 or self._closed:
                end = at + len(wanted) if at >= 0 else len(self.unread)
                received, self.unread = self.unread[:end], self.unread[end:]
                return received or None
            if len(self.unread) > LINE_LIMIT:
                raise ValueError(f"they are not among the first {LINE_LIMIT} bytes")
            searched = max(0, len(self.unread) - len(wanted) + 1)
            await self._wait_for_more(on_partial)

    async def _wait_for_more(self, on_partial: OnPartial) -> None:
        if self.unread:
            on_partial(self.unread)
        if self._transport is not None:
            self._transport.resume_reading()
        self._changed.clear()
        await self._changed.wait()
