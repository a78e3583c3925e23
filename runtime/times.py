"""Points in time as text."""

from datetime import UTC, datetime


def format_rfc3339(unix: float | None) -> str | None:
    """A Unix time in RFC 3339, in UTC, to the microsecond."""
    return None if unix is None else datetime.fromtimestamp(unix, UTC).isoformat().replace("+00:00", "Z")
