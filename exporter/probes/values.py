"""Values that a probe reads, and which become `service_value`: from JSON, headers and texts."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from exporter.probes.expectations import compile_cached
from exporter.probes.json_conditions import JsonPath, Visits, find_values, parse_json
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import ChoiceModel
from fleet.inventory.units import Pattern

VALUES_LIMIT = 20  # of a service
KEPT_LIMIT = 8192  # characters of a value for later requests
_NUMBER = re.compile(r"[+-]?(?:\d++\.?+\d*+|\.\d++)(?:[eE][+-]?\d{1,3})?")
_TEXT_LIMIT = 64  # characters of a number
ValueName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,29}$")]


def _check_group(pattern: str) -> str:
    if compile_cached(pattern).groups != 1:
        raise ValueError(f"needs one group, around the value (write {r'free: ([0-9]+)'!r})")
    return pattern


ValuePattern = Annotated[Pattern, AfterValidator(_check_group)]


class HttpValue(ChoiceModel):
    """Where a value of an HTTP response is: what a path selects, a header, or what the group of a pattern matches."""

    choices: ClassVar[tuple[str, ...]] = ("path", "header", "body")
    path: JsonPath | None = None
    header: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    body: ValuePattern | None = None


def _expand_path(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


HttpValues = Annotated[
    dict[ValueName, Annotated[HttpValue, BeforeValidator(_expand_path, json_schema_input_type=str | HttpValue)]],
    Field(max_length=VALUES_LIMIT),
]
TextValues = Annotated[dict[ValueName, ValuePattern], Field(max_length=VALUES_LIMIT)]


def note_http_values(
    sources: Mapping[str, HttpValue], find_header: Callable[[str], str | None], body: bytes, details: ProbeDetails
) -> None:
    """Note the values of a response with a body in UTF-8; those that are missing or no numbers are left out."""
    _note(_find(sources, find_header, body), details)


def find_texts(
    sources: Mapping[str, HttpValue], find_header: Callable[[str], str | None], body: bytes
) -> dict[str, str]:
    """Return the values of a response that are texts, numbers, true or false, as they stand in JSON, by name."""
    found = _find(sources, find_header, body)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
    return {
        name: text
        for name, text in texts.items()
        if isinstance(found[name], str | int | float) and 0 < len(text) <= KEPT_LIMIT and _is_encodable(text)
    }


def _is_encodable(text: str) -> bool:
    """Whether a text can be sent: JSON may have half of a character."""
    return text.encode("utf-8", "replace").decode() == text


def _find(sources: Mapping[str, HttpValue], find_header: Callable[[str], str | None], body: bytes) -> Mapping[str, Any]:
    try:
        document = parse_json(body) if any(each.path is not None for each in sources.values()) else None
        has_document = True
    except ProbeFailure:
        document, has_document = None, False

    visits = Visits()

    def read(source: HttpValue) -> Any:
        if source.header is not None:
            return find_header(source.header)
        if source.body is not None:
            return _find_group(source.body, body)
        if source.path is None or not has_document:
            return None
        try:
            return next(iter(find_values(source.path, document, visits).values()), None)
        except ProbeFailure:
            return None

    return {name: read(source) for name, source in sources.items()}


def note_text_values(patterns: Mapping[str, str], text: bytes, details: ProbeDetails) -> None:
    """Note the values that patterns find in a text (UTF-8); those that are missing or no numbers are left out."""
    _note({name: _find_group(pattern, text) for name, pattern in patterns.items()}, details)


def _find_group(pattern: str, text: bytes) -> str | None:
    match = compile_cached(pattern).search(text)
    return match.group(1).decode("utf-8", "replace") if match is not None and match.group(1) is not None else None


def _note(found: Mapping[str, Any], details: ProbeDetails) -> None:
    numbers = {name: _parse_number(value) for name, value in found.items()}
    details.values = {name: number for name, number in numbers.items() if number is not None}
    missing = [name for name, number in numbers.items() if number is None]
    if missing:
        details.evidence["not found"] = ", ".join(missing)


def _parse_number(value: Any) -> float | None:
    """Return a JSON number or boolean, or the number that a text is, as a float; None for anything else."""
    if isinstance(value, str) and len(value) <= _TEXT_LIMIT and _NUMBER.fullmatch(value.strip()) is not None:
        value = float(value)
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
