"""The bodies of requests: reading them within a limit for all of them together, and what they say."""

import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from aiohttp import web

from gateway.errors import GatewayError
from runtime.payloads import decode_json, parse_body

PART = 64 * 1024  # bytes that are sent together
RETRY_AFTER = 1.0  # seconds
_OBJECT = re.compile(rb"\s*\{")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@dataclass(frozen=True, slots=True)
class Body:
    """A body as it was received, and what its JSON says, which itself would take many times the memory."""

    content: bytes = field(repr=False)
    model: str | None = None
    max_completion: int | None = None  # the largest number of tokens that the response may have

    async def with_model(self, model: str | None) -> bytes:
        """Return the content, written anew where another name replaces that of the model."""
        if model is None:
            return self.content
        return await parse_body(lambda content: _replace_model(content, model), self.content)


def _replace_model(content: bytes, model: str) -> bytes:
    return json.dumps({**decode_json(content), "model": model}, ensure_ascii=False).encode("utf-8", "surrogatepass")


class BodyMemory:
    """The memory for the bodies of all requests that wait or are being sent."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    @contextlib.asynccontextmanager
    async def read(self, request: web.Request) -> AsyncIterator[Body]:
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
            yield await _parse(request, content)
        finally:
            self.used -= size


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
    try:
        return await parse_body(read_body, content)
    except (ValueError, RecursionError):
        return Body(content)


def read_body(content: bytes) -> Body:
    """Read a JSON object. Raises ValueError and RecursionError."""
    value = decode_json(content)
    model = value.get("model")
    limits = [value[name] for name in _LIMITS if isinstance(value.get(name), int)]
    return Body(content, model if isinstance(model, str) else None, max(0, min(limits)) if limits else None)


def iterate_parts(content: bytes) -> Iterator[bytes]:
    """Yield a body in parts, if it is long."""
    if len(content) <= PART:
        yield content
        return
    view = memoryview(content)
    for start in range(0, len(view), PART):
        yield bytes(view[start : start + PART])
