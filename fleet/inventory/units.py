"""Durations, times of day, sizes, ratios, identifiers and patterns of the configuration, as pydantic types."""

import re
from typing import Annotated, Any, Literal

import re2
from pydantic import BeforeValidator, PlainSerializer, StringConstraints, WithJsonSchema

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_WHOLE_DURATION = r"^(\d+(\.\d+)?(ms|s|m|h|d))+$"
_RATIO = re.compile(r"(\d+(?:\.\d+)?)(%?)")
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB|TiB)")
SIZE_SCHEMA = {"type": "string", "pattern": r"^\d+\s*(B|KiB|MiB|GiB|TiB)$"}
MAX_DURATION = 366 * 86400.0
SHOWN_LENGTH = 60  # characters of a value in an error message


def format_value(value: object) -> str:
    """Return a value for an error message."""
    text = repr(str(value) if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"


def parse_duration(value: object) -> float:
    """Return the seconds of `500ms`, `10s`, `1h30m` or `7d`. Raises ValueError."""
    if isinstance(value, str) and re.fullmatch(_WHOLE_DURATION, value):
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(value))
        if seconds > MAX_DURATION:
            raise ValueError(f"{value} is longer than a year (366d)")
        return seconds
    raise ValueError(f"{format_value(value)} is not a duration; write 500ms, 10s, 5m, 1h30m or 7d")


def format_duration(seconds: float) -> str:
    """Return the shortest text that `parse_duration` accepts."""
    left = round(seconds * 1000)
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def parse_size(value: object) -> int:
    """Return the bytes of `64KiB` or `10MiB`. Raises ValueError."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or not int(match[1]):
        raise ValueError(f"{format_value(value)} is not a size; write 64KiB or 10MiB")
    return int(match[1]) * _BYTES[match[2]]


def format_size(size: float) -> str:
    """Return a text that `parse_size` accepts, in the largest unit without a fraction."""
    unit = next(unit for unit, factor in reversed(_BYTES.items()) if size % factor == 0)
    return f"{int(size) // _BYTES[unit]}{unit}"


def parse_ratio(value: object) -> float:
    """Return the ratio of `80%` or `0.8`, between 0 and 1. Raises ValueError."""
    text = "" if isinstance(value, bool) else str(value)
    match = _RATIO.fullmatch(text)
    ratio = float(f"{match[1]}e-2" if match[2] else match[1]) if match is not None else 0.0
    if not 0 < ratio < 1:
        raise ValueError(f"must be more than 0% and less than 100%, such as 80% or 0.8, not {format_value(value)}")
    return ratio


def format_ratio(ratio: float) -> str:
    """Return a text that `parse_ratio` accepts."""
    return f"{ratio * 100:.10g}%"


def parse_positive_duration(value: object) -> float:
    """As `parse_duration`, but refuse `0s`. Raises ValueError."""
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError("must be greater than 0")
    return seconds


def _check_pattern(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{format_value(value)} is not a regular expression; write it in quotes")  # noqa: TRY004 - for pydantic
    try:
        compile_pattern(value)
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"{value!r} is not an RE2 regular expression: {reason}") from None
    return value


def compile_pattern(pattern: str) -> Any:
    """Compile a pattern with RE2, which matches in linear time. Raises re2.error."""
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)


DURATION_SCHEMA = {"type": "string", "pattern": _WHOLE_DURATION}
_AS_DURATION: Any = WithJsonSchema(DURATION_SCHEMA)

Duration = Annotated[float, BeforeValidator(parse_duration), PlainSerializer(format_duration), _AS_DURATION]
PositiveDuration = Annotated[
    float,
    BeforeValidator(parse_positive_duration),
    PlainSerializer(format_duration),
    _AS_DURATION,
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(lambda size: f"{size}B"),
    WithJsonSchema(SIZE_SCHEMA),
]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
TIME_OF_DAY = "([01][0-9]|2[0-3]):[0-5][0-9]"


def _time_of_day(value: object) -> str:
    if not isinstance(value, str) or re.fullmatch(TIME_OF_DAY, value) is None:
        raise ValueError(f"{format_value(value)} is not a time of day; write '02:30', in quotes")
    return value


TimeOfDay = Annotated[str, BeforeValidator(_time_of_day)]
IDENTIFIER = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Identifier = Annotated[str, StringConstraints(pattern=IDENTIFIER)]
Pattern = Annotated[str, BeforeValidator(_check_pattern), WithJsonSchema({"type": "string", "format": "regex"})]


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and any other value as a list of one."""
    return value if isinstance(value, list) else [value]


_PATTERN_SCHEMA = {"type": "string", "format": "regex"}
Patterns = Annotated[
    list[Pattern],
    BeforeValidator(as_list),
    WithJsonSchema({"anyOf": [_PATTERN_SCHEMA, {"type": "array", "items": _PATTERN_SCHEMA}]}),
]
