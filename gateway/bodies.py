"""The bodies of requests: reading them within a limit for all of them together, and what they say."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from gateway.body_scanner import TooLongError, TopLevel, scan
from gateway.errors import GatewayError

PART = 64 * 1024  # bytes that are sent together
RETRY_AFTER = 1.0  # seconds
PART_OF_CLIENT = 1 / 8  # of the memory for bodies
_OBJECT = re.compile(rb"[ \t\r\n]{0,1000}\{")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_WANTED = frozenset({"model", *_LIMITS})
SHORT = 32 * 1024  # bytes of a body that is parsed as a whole, which takes less than a millisecond


@dataclass(frozen=True, slots=True)
class Body:
    """A body as it was received, and what its JSON says, which itself would take many times the memory."""

    content: bytes = field(repr=False)
    model: str | None = None
    max_completion: int | None = None  # the largest number of tokens that the response may have

    async def with_model(self, model: str | None) -> bytes:
        """Return the content, in which another name replaces that of the model; all else stays as it is."""
        if model is None:
            return self.content
        found = await _scan(self.content)
        parts, at = [], 0
        for start, end in found.spans.get("model", ()):
            parts += [self.content[at:start], json.dumps(model).encode()]
            at = end
        return b"".join([*parts, self.content[at:]])


class BodyMemory:
    """The memory for the bodies of all requests that wait or are being sent.

    Each client may always use a part of it, however much the others use.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._used_by: dict[str, int] = {}  # by the name of the client

    async def read(self, request: web.Request, client: str) -> Body:
        """Read a request's body, and keep room for it until `release` is called. Raises GatewayError."""
        parts: list[bytes] = []
        size = 0
        try:
            async for part in _iterate(request):
                size += len(part)
                self._add(client, len(part))
                self._check(size, client)
                parts.append(part)
            content = b"".join(parts)
            parts.clear()
            return await _parse(request, content)
        except BaseException:
            self._add(client, -size)
            raise

    def _check(self, size: int, client: str) -> None:
        if size > self.limit:
            raise GatewayError(413, "too_large", f"the body is larger than {self.limit} bytes (gateway.max_body)")
        if self._used > self.limit and self._used_by[client] > self.limit * PART_OF_CLIENT:
            message = "the bodies of all requests are larger than gateway.max_body"
            raise GatewayError(503, "overloaded", message, retry_after=RETRY_AFTER)

    def release(self, body: Body, client: str) -> None:
        self._add(client, -len(body.content))

    def _add(self, client: str, size: int) -> None:
        self._used += size
        self._used_by[client] = self._used_by.get(client, 0) + size
        if not self._used_by[client]:
            del self._used_by[client]


async def _iterate(request: web.Request) -> AsyncIterator[bytes]:
    try:
        async for part in request.content.iter_any():
            yield part
    except (web.RequestPayloadError, ConnectionError) as error:  # the client has gone, or its chunks are malformed
        raise GatewayError(400, "bad_request", "cannot read the body") from error


async def _parse(request: web.Request, content: bytes) -> Body:
    """Read the JSON object, if the body is one: anything else is the upstream's affair."""
    if _OBJECT.match(content) is None or "Content-Encoding" in request.headers:
        return Body(content)
    return await read_body(content)


async def read_body(content: bytes) -> Body:
    """Read a body that begins as a JSON object does."""
    try:
        values = _load(content) if len(content) <= SHORT else (await _scan(content)).values
    except (ValueError, RecursionError, TooLongError):
        return Body(content)
    model = values.get("model")
    limits = [value for name in _LIMITS if isinstance(value := values.get(name), int)]
    return Body(content, model if isinstance(model, str) else None, max(0, *limits) if limits else None)


def _load(content: bytes) -> Mapping[str, Any]:
    value = json.loads(content)
    return value if isinstance(value, dict) else {}


async def _scan(content: bytes) -> TopLevel:
    """Read the top level of a long body, in turn with other requests. Raises TooLongError."""
    steps = scan(content, _WANTED)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            found: TopLevel = ended.value
            return found
        await asyncio.sleep(0)


def iterate_parts(content: bytes) -> Iterator[bytes]:
    """Yield a body in parts, if it is long."""
    if len(content) <= PART:
        yield content
        return
    view = memoryview(content)
    for start in range(0, len(view), PART):
        yield bytes(view[start : start + PART])
