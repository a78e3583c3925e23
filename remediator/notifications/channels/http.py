"""HTTP requests of channels: within a deadline, with bounded responses and without redirects."""

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

TIMEOUT = httpx.Timeout(10.0, connect=5.0)
DEADLINE = 15.0  # seconds for a whole exchange, however slowly the response arrives
RESPONSE_LIMIT = 64 * 1024
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
            parsed = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}


async def exchange(
    client: httpx.AsyncClient, method: str, url: str, body: bytes, headers: Mapping[str, str]
) -> HttpReply:
    """Send one request and return the reply, whose body may be cut; never raises an HTTP error."""
    try:
        async with (
            asyncio.timeout(DEADLINE),
            client.stream(
                method, url, content=body, headers=dict(headers), timeout=TIMEOUT, follow_redirects=False
            ) as response,
        ):
            received = b""
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > RESPONSE_LIMIT:
                    break
            return HttpReply(response.status_code, response.headers, received)
    except (httpx.TimeoutException, TimeoutError):
        return HttpReply(error=f"no response from {urlsplit(url).netloc} within the timeout")
    except httpx.HTTPError as error:
        # The error's own text may contain the URL, and so a token.
        return HttpReply(error=f"cannot connect to {urlsplit(url).netloc}: {type(error).__name__}")


def parse_seconds(text: str | None) -> float | None:
    """Parse a number of seconds to wait; None if there is none."""
    try:
        seconds = float(text) if text else math.nan
    except ValueError:
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), RETRY_AFTER_LIMIT)
