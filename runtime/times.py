"""Times as text."""

from datetime import UTC, datetime


def format_rfc3339(unix: float | None) -> str | None:
    """Return a Unix time in RFC 3339 format, in UTC, with microseconds; None for None."""
    return None if unix is None else datetime.fromtimestamp(unix, UTC).isoformat().replace("+00:00", "Z")
