"""What the answers of upstreams say about their limits.

The headers are those of OpenAI and its likes, and of RFC 9110: `Retry-After` in seconds or as a date, `Retry-After-Ms`,
`X-RateLimit-Remaining-Requests` and `X-RateLimit-Reset-Requests`.
"""

import json
import re
from collections.abc import Mapping

from runtime.times import parse_http_date

MAX_PAUSE = 86_400.0  # seconds
MAX_RESET = 60.0  # seconds: some servers say when they have forgotten everything, not when the next request fits
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
_UNITS = (3600.0, 60.0, 1.0, 0.001)
QUOTA = "insufficient_quota"


def find_retry_after(headers: Mapping[str, str], unix: float) -> float | None:
    """Return for how many seconds nothing should be sent, None if the headers do not say."""
    milliseconds = _parse_number(headers.get("Retry-After-Ms", ""))
    if milliseconds is not None:
        return min(milliseconds / 1000, MAX_PAUSE)
    text = headers.get("Retry-After", "").strip()
    seconds = _parse_number(text)
    if seconds is None and text:
        date = parse_http_date(text)
        seconds = None if date is None else max(0.0, date - unix)
    return min(seconds, MAX_PAUSE) if seconds is not None else find_exhaustion(headers)


def find_exhaustion(headers: Mapping[str, str]) -> float | None:
    """Return for how many seconds the upstream has no more requests left, None if it has."""
    if headers.get("X-RateLimit-Remaining-Requests", "").strip() != "0":
        return None
    text = headers.get("X-RateLimit-Reset-Requests", "").strip()
    number, match = _parse_number(text), _DURATION.fullmatch(text)
    if number is not None:
        return min(number, MAX_RESET)
    if not text or match is None:
        return None
    return min(sum(float(part or 0) * unit for part, unit in zip(match.groups(), _UNITS, strict=True)), MAX_RESET)


def _parse_number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text.strip()) and len(text) < 20 else None  # noqa: PLR2004 - no longer number is a time


def is_out_of_quota(body: bytes) -> bool:
    """Whether a 429 says that the account has no credit left, which waiting does not mend."""
    if QUOTA.encode() not in body:
        return False
    try:
        error = json.loads(body).get("error")
    except (ValueError, AttributeError, RecursionError):
        return False
    return isinstance(error, dict) and QUOTA in (error.get("code"), error.get("type"))
