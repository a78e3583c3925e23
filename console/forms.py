"""What the fields of forms contain."""

from fleet.inventory.units import parse_duration


def parse_number(text: str) -> int:
    """Return the number of an incident, an action or a maintenance; 0, which none has, for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0  # noqa: PLR2004 - digits


def parse_seconds(text: str) -> float:
    """Return the seconds of a duration, such as `1h30m`. Raises ValueError, also for none."""
    seconds = parse_duration(text.strip())
    if seconds <= 0:
        raise ValueError("the duration must not be zero")
    return seconds
