"""Times as text."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def format_rfc3339(unix: float | None) -> str | None:
    """Return a Unix time in RFC 3339 format, in UTC, with microseconds; None for None."""
    return None if unix is None else datetime.fromtimestamp(unix, UTC).isoformat().replace("+00:00", "Z")


def parse_http_date(text: str) -> float | None:
    """Return the Unix time of a date in a header (RFC 9110, 5.6.7); None if it is none, or out of range."""
    try:
        parsed = parsedate_to_datetime(text)
        return (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)).timestamp()
    except (OverflowError, TypeError, ValueError):
        return None
