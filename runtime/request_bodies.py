"""Bodies of requests."""

from aiohttp import web

from runtime.errors import ApiError


async def read_request_body(request: web.Request, limit: int) -> bytes:
    """Return the body of a request. Raises ApiError 413 if it has more than `limit` bytes."""
    body = b""
    async for part in request.content.iter_any():
        body += part
        if len(body) > limit:
            raise ApiError(413, "too_large", f"the body is larger than {limit // 1024} KiB")
    return body
