"""Durations in the language of a reader."""

from collections.abc import Mapping
from typing import Any


def format_duration(words: Mapping[str, Any], seconds: float) -> str:
    """Format seconds with at most two units."""
    whole = max(0, round(seconds))
    short = max(0.0, round(seconds, 1))
    second, minute, hour, day = words["units"]
    if whole < 60:  # noqa: PLR2004 - seconds of a minute
        return str(second.format(f"{short:g}" if short < 10 else whole))  # noqa: PLR2004 - one digit
    if whole < 3600:  # noqa: PLR2004 - seconds of an hour
        return str(minute.format(*divmod(whole, 60)))
    if whole < 86400:  # noqa: PLR2004 - seconds of a day
        return str(hour.format(whole // 3600, whole % 3600 // 60))
    return str(day.format(whole // 86400, whole % 86400 // 3600))
