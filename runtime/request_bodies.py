"""Bodies of requests."""

from aiohttp import web

from runtime.errors import ApiError


async def read_request_body(request: web.Request, limit: int) -> bytes:
    """Return the body of a request. Raises ApiError: 413 if it exceeds `limit` bytes, 400 if its end is missing."""
    body = b""
    try:
        async for part in request.content.iter_any():
            body += part
            if len(body) > limit:
                raise ApiError(413, "too_large", f"the body is larger than {limit // 1024} KiB")
    except (web.RequestPayloadError, ConnectionError) as error:  # the client has gone, or its chunks are malformed
        raise ApiError(400, "bad_request", "cannot read the body") from error
    return body
