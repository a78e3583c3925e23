"""HTTP requests of channels: within a deadline, with bounded responses and without redirects."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from runtime.payloads import ACCEPT_ENCODING, load_json, read_body

TIMEOUT = httpx.Timeout(10.0, connect=5.0)
DEADLINE = 15.0  # seconds for a whole exchange, however slowly the response arrives
RESPONSE_LIMIT = 64 * 1024  # bytes, after decoding
RETRY_AFTER_LIMIT = 3600.0  # seconds


@dataclass(frozen=True)
class HttpReply:
    """A response, or in `error` why there is none."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str = ""

    def parse_json(self) -> dict[str, Any]:
        """Return the JSON object in the body; an empty one if there is none."""
        try:
            parsed = load_json(self.body)
        except ValueError:
            return {}
        return parsed if isinstance(parsed, dict) else {}


async def send_request(
    client: httpx.AsyncClient, method: str, url: str, body: bytes, headers: Mapping[str, str]
) -> HttpReply:
    """Send one request and return the reply; never raises an HTTP error.

    The body may be incomplete: once the status is received, an error while reading the body does not change the reply.
    """
    status, response_headers, received = 0, httpx.Headers(), bytearray()
    sent_headers = {"Accept-Encoding": ACCEPT_ENCODING, **headers}
    try:
        async with (
            asyncio.timeout(DEADLINE),
            client.stream(
                method, url, content=body, headers=sent_headers, timeout=TIMEOUT, follow_redirects=False
            ) as response,
        ):
            status, response_headers = response.status_code, response.headers
            await read_body(response, received, RESPONSE_LIMIT)
    except (httpx.HTTPError, TimeoutError) as error:
        if not status:
            return HttpReply(error=_describe_error(urlsplit(url).netloc, error))
    return HttpReply(status, response_headers, bytes(received))


def _describe_error(server: str, error: Exception) -> str:
    """Describe an error without its own text, which may contain the URL, and so a token."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"cannot connect to {server}"
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return f"no response from {server} within the timeout"
    return f"no valid response from {server}: {type(error).__name__}"


def parse_seconds(text: str | None) -> float | None:
    """Parse a number of seconds to wait; None if there is none."""
    try:
        seconds = float(text) if text else math.nan
    except ValueError:
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), RETRY_AFTER_LIMIT)
