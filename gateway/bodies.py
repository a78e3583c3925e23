"""The bodies of requests: reading them within a limit for all of them together, and what they say."""

import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from gateway.errors import GatewayError
from runtime.payloads import decode_json, parse_body

PART = 64 * 1024  # bytes that are sent together
RETRY_AFTER = 1.0  # seconds
_OBJECT = re.compile(rb"\s*\{")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@dataclass(frozen=True)
class Body:
    """A body as it was received, and as JSON if it is an object."""

    content: bytes = field(repr=False)
    value: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> str | None:
        model = self.value.get("model")
        return model if isinstance(model, str) else None

    @property
    def max_completion(self) -> int | None:
        """The largest number of tokens that the response may have."""
        found = [self.value[name] for name in _LIMITS if isinstance(self.value.get(name), int)]
        return max(0, min(found)) if found else None

    def with_model(self, model: str | None) -> bytes:
        """Return the content, written anew where another name replaces that of the model."""
        if model is None:
            return self.content
        return json.dumps({**self.value, "model": model}, ensure_ascii=False).encode("utf-8", "surrogatepass")


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
            yield Body(content, await _parse(request, content))
        finally:
            self.used -= size


async def _iterate(request: web.Request) -> AsyncIterator[bytes]:
    try:
        async for part in request.content.iter_any():
            yield part
    except (web.RequestPayloadError, ConnectionError) as error:  # the client has gone, or its chunks are malformed
        raise GatewayError(400, "bad_request", "cannot read the body") from error


async def _parse(request: web.Request, content: bytes) -> dict[str, Any]:
    """Return the JSON object, empty if the body is anything else: that is the upstream's affair."""
    if _OBJECT.match(content) is None or "Content-Encoding" in request.headers:
        return {}
    try:
        value = await parse_body(decode_json, content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def iterate_parts(content: bytes) -> Iterator[bytes]:
    """Yield a long body in parts."""
    view = memoryview(content)
    for start in range(0, len(view), PART):
        yield bytes(view[start : start + PART])
