"""The bodies of requests: reading them within a limit for all of them together, and what they say."""

import asyncio
import contextlib
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from aiohttp import web

from gateway.errors import GatewayError

PART = 64 * 1024  # bytes that are sent together
RETRY_AFTER = 1.0  # seconds
_OBJECT = re.compile(rb"\s*\{")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_NAMES = frozenset({"model", *_LIMITS})
# A longer body is not parsed: that would take time and memory, and nobody else would have a turn meanwhile.
_SHORT = 16 * 1024
_STEPS, _STEP = 500, 64 * 1024  # parts of a long body that are read in one turn of the event loop, and their bytes
_LONGEST = 4096  # bytes of a name in a long body
# What is between strings and brackets, and a part of a string. Both are limited: a match cannot be interrupted.
_BETWEEN = re.compile(rb'[^"\[\]{}]{1,65536}+')
_IN_STRING = re.compile(rb'(?:[^"\\]{1,256}+|\\.){1,256}+', re.DOTALL)
_COLON = re.compile(rb"[ \t\r\n]{0,100}+:[ \t\r\n]{0,100}+")
_NUMBER = re.compile(rb"-?\d{1,18}+(?=[ \t\r\n,}])")


@dataclass(frozen=True, slots=True)
class Body:
    """A body as it was received, and what its JSON says, which itself would take many times the memory."""

    content: bytes = field(repr=False)
    model: str | None = None
    max_completion: int | None = None  # the largest number of tokens that the response may have
    model_at: tuple[int, int] | None = None  # where a long body has the model

    def with_model(self, model: str | None) -> bytes:
        """Return the content, written anew where another name replaces that of the model."""
        if model is None:
            return self.content
        if self.model_at is not None:
            start, end = self.model_at
            return self.content[:start] + json.dumps(model).encode() + self.content[end:]
        values = {**json.loads(self.content), "model": model}
        return json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")


class BodyMemory:
    """The memory for the bodies of all requests that wait or are being sent."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by client

    @contextlib.asynccontextmanager
    async def read(self, request: web.Request, client: str) -> AsyncIterator[Body]:
        """Read a request's body, and keep room for it. Raises GatewayError."""
        parts: list[bytes] = []
        size = 0
        try:
            async for part in _iterate(request):
                size += len(part)
                self.used += len(part)
                if size > self.limit:
                    raise GatewayError(
                        413, "too_large", f"the body is larger than {self.limit} bytes (gateway.max_body)"
                    )
                if self.used > self.limit:
                    message = "the bodies of all requests are larger than gateway.max_body"
                    raise GatewayError(503, "overloaded", message, retry_after=RETRY_AFTER)
                parts.append(part)
            content = b"".join(parts)
            parts.clear()
            yield await self._parse(request, content, client)
        finally:
            self.used -= size

    async def _parse(self, request: web.Request, content: bytes, client: str) -> Body:
        """Read the JSON object, if the body is one: anything else is the upstream's affair."""
        if _OBJECT.match(content) is None or "Content-Encoding" in request.headers:
            return Body(content)
        try:
            if len(content) <= _SHORT:
                return read_body(content)
            async with self._turns[client]:  # so that nobody has the time of many
                return await read_long_body(content)
        except (ValueError, RecursionError):
            return Body(content)


async def _iterate(request: web.Request) -> AsyncIterator[bytes]:
    try:
        async for part in request.content.iter_any():
            yield part
    except (web.RequestPayloadError, ConnectionError) as error:  # the client has gone, or its chunks are malformed
        raise GatewayError(400, "bad_request", "cannot read the body") from error


def read_body(content: bytes) -> Body:
    """Read a JSON object. Raises ValueError and RecursionError."""
    value = json.loads(content)
    model = value.get("model")
    limits = [value[name] for name in _LIMITS if isinstance(value.get(name), int)]
    return Body(content, model if isinstance(model, str) else None, max(0, min(limits)) if limits else None)


async def read_long_body(content: bytes) -> Body:
    """Read what is needed of a JSON object, and give others their turns meanwhile. Raises ValueError."""
    members = _Members(content)
    turn = steps = 0
    for at in members.walk():
        steps += 1
        if steps >= _STEPS or at - turn >= _STEP:
            await asyncio.sleep(0)
            turn, steps = at, 0
    limits = [members.numbers[name] for name in _LIMITS if name in members.numbers]
    span = members.strings.get("model")
    model = None if span is None else _load_string(content[slice(*span)])
    return Body(content, model, max(0, min(limits)) if limits else None, span)


class _Members:
    """The members of a JSON object that are in `_NAMES`; the last one counts of those with the same name."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._name: str | None = None  # of the member whose string follows
        self.strings: dict[str, tuple[int, int]] = {}  # where they are, with their quotes
        self.numbers: dict[str, int] = {}

    def walk(self) -> Iterator[int]:
        """Go through the object, and yield each position where there may be a pause. Raises ValueError."""
        content, at, depth = self._content, 0, 0
        while at < len(content):
            yield at
            if (between := _BETWEEN.match(content, at)) is not None:
                at = between.end()
            elif content[at] == ord('"'):
                start, at = at, at + 1
                while content[at : at + 1] != b'"':
                    if (part := _IN_STRING.match(content, at)) is None:
                        raise ValueError("a string does not end")
                    at = part.end()
                    yield at
                at += 1
                if depth == 1:
                    self._note(start, at)
            else:
                depth += 1 if content[at] in b"[{" else -1
                at += 1
        if depth != 0:
            raise ValueError("brackets do not match")

    def _note(self, start: int, end: int) -> None:
        """Note a string of the object itself: the name of a member, or its value."""
        colon = _COLON.match(self._content, end)
        if colon is None:
            if self._name is not None:
                self.strings[self._name] = start, end
            self._name = None
            return
        name = _load_string(self._content[start:end])
        self._name = name if name in _NAMES else None
        if self._name is None:
            return
        self.strings.pop(self._name, None)
        self.numbers.pop(self._name, None)
        if (number := _NUMBER.match(self._content, colon.end())) is not None:
            self.numbers[self._name] = int(number[0])
        if self._content[colon.end() : colon.end() + 1] != b'"':
            self._name = None


def _load_string(content: bytes) -> str | None:
    """Return what a JSON string says, None if it is too long. Raises ValueError."""
    return str(json.loads(content.decode("utf-8", "surrogatepass"))) if len(content) <= _LONGEST else None


def iterate_parts(content: bytes) -> Iterator[bytes]:
    """Yield a body in parts, if it is long."""
    if len(content) <= PART:
        yield content
        return
    view = memoryview(content)
    for start in range(0, len(view), PART):
        yield bytes(view[start : start + PART])
