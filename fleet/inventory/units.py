"""Durations, sizes and identifiers as people write them, as pydantic types."""

import re
from typing import Annotated, Any

import re2
from pydantic import BeforeValidator, PlainSerializer, StringConstraints, WithJsonSchema

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_WHOLE_DURATION = r"^(\d+(\.\d+)?(ms|s|m|h|d))+$"
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB)")
FOREVER = 366 * 86400.0


def parse_duration(value: object) -> float:
    """Seconds of `500ms`, `10s`, `1h30m`, `7d`. Raises ValueError."""
    if isinstance(value, str) and re.fullmatch(_WHOLE_DURATION, value):
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(value))
        if seconds > FOREVER:
            raise ValueError("is longer than a year")
        return seconds
    raise ValueError("is not a duration (write 500ms, 10s, 5m, 1h30m or 7d)")


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back."""
    left = round(seconds * 1000)
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def parse_size(value: object) -> int:
    """Bytes of `64KiB`, `10MiB`. Raises ValueError."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or not int(match[1]):
        raise ValueError("is not a size (write 64KiB or 10MiB)")
    return int(match[1]) * _BYTES[match[2]]


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise ValueError("must be longer than nothing")
    return seconds


def _pattern(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a regular expression (write it as text)")  # noqa: TRY004 - pydantic reads ValueErrors
    try:
        compile_pattern(value)
    except re2.error as error:
        why = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"is not a regular expression of RE2: {why}") from None
    return value


def compile_pattern(pattern: str) -> Any:
    """Compile with RE2: linear time, whatever the pattern and the text. Raises re2.error."""
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)


_AS_DURATION: Any = WithJsonSchema({"type": "string", "pattern": _WHOLE_DURATION})

Duration = Annotated[float, BeforeValidator(parse_duration), PlainSerializer(format_duration), _AS_DURATION]
PositiveDuration = Annotated[
    float,
    BeforeValidator(lambda value: _positive(parse_duration(value))),
    PlainSerializer(format_duration),
    _AS_DURATION,
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(lambda size: f"{size}B"),
    WithJsonSchema({"type": "string", "pattern": r"^\d+\s*(B|KiB|MiB|GiB)$"}),
]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Pattern = Annotated[str, BeforeValidator(_pattern), WithJsonSchema({"type": "string", "format": "regex"})]


def as_list(value: object) -> object:
    """One value stands for a list of one."""
    return value if isinstance(value, list) else [value]


_PATTERN_SCHEMA = {"type": "string", "format": "regex"}
Patterns = Annotated[
    list[Pattern],
    BeforeValidator(as_list),
    WithJsonSchema({"anyOf": [_PATTERN_SCHEMA, {"type": "array", "items": _PATTERN_SCHEMA}]}),
]
