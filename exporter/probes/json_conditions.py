"""Expectations of JSON: paths (RFC 9535), conditions on the values that they select, and how they are checked."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any

from jsonpath_rfc9535 import JSONPathError, JSONPathNodeList, JSONPathQuery
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from exporter.probes.expectations import EXCERPT_LENGTH, compile_cached
from exporter.probes.json_functions import create_environment
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import Pattern
from runtime.validation_messages import describe

JSON_LIMIT = 1024 * 1024  # bytes; parsing blocks the event loop, and the result takes many times as much memory
NODES_LIMIT = 10_000
_ENVIRONMENT = create_environment()
VISITS_LIMIT = 200_000  # values that all paths together may look at; a hundred thousand take up to a second
_QUOTED = re.compile(r"""\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'""")
_BROAD = re.compile(r"\.\.|[*?:]")  # what makes a path look at many values


def _json_path(path: object) -> str:
    if not isinstance(path, str):
        raise ValueError("must be a JSONPath (write $.status)")  # noqa: TRY004 - pydantic handles ValueError
    try:
        compile_json_path(path)
    except JSONPathError as error:
        raise ValueError(f"must be a JSONPath (RFC 9535): {error}") from None
    return path


@lru_cache(maxsize=10_000)
def compile_json_path(path: str) -> JSONPathQuery:
    return _ENVIRONMENT.compile(path)


JsonPath = Annotated[str, BeforeValidator(_json_path)]


def _number_or_path(value: object) -> object:
    return _json_path(value) if isinstance(value, str) else value


Bound = Annotated[
    Annotated[float, Field(strict=True, allow_inf_nan=False)] | str, BeforeValidator(_number_or_path)
]  # a path stands for a number elsewhere in the document


class LengthCondition(ConfigModel):
    """A condition on a number of characters, elements or members."""

    above: Annotated[int, Field(strict=True)] | None = None
    below: Annotated[int, Field(strict=True)] | None = None
    exactly: Annotated[int, Field(strict=True, ge=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "LengthCondition":
        if not self.model_fields_set:
            raise ValueError("needs at least one of above, below, exactly")
        return self

    def describe_mismatch(self, length: int) -> str:
        if self.exactly is not None and length != self.exactly:
            return f"a length of {self.exactly}"
        if self.above is not None and length <= self.above:
            return f"a length above {self.above}"
        return f"a length below {self.below}" if self.below is not None and length >= self.below else ""


def _expand_length(value: object) -> object:
    return {"exactly": value} if isinstance(value, int) else value


class JsonCondition(ConfigModel):
    """A condition on the JSON values that a path selects, where no exact value is expected.

    All values must meet it, with `any` at least one. `above`, `below` and `equal_to` may be paths.
    """

    matches: Pattern | None = None
    above: Bound | None = None
    below: Bound | None = None
    equal_to: JsonPath | None = None
    length: Annotated[
        LengthCondition | None,
        BeforeValidator(_expand_length, json_schema_input_type=int | LengthCondition | None),
    ] = None
    not_: Annotated[Any, Field(alias="not")] = None
    any_: Annotated[Any, Field(alias="any")] = None
    absent: bool | None = None

    @field_validator("not_", "any_", mode="before")
    @classmethod
    def _parse_nested(cls, value: Any) -> Any:
        nested = _parse_expected(value)
        if isinstance(nested, JsonCondition) and (nested.absent is not None or nested.has_any):
            raise ValueError("absent and any cannot stand in another condition")
        return nested

    @model_validator(mode="after")
    def _check(self) -> "JsonCondition":
        if not self.model_fields_set:
            raise ValueError(f"needs at least one of {', '.join(_CONDITIONS)}")
        if self.absent is not None and len(self.model_fields_set) > 1:
            raise ValueError("absent excludes all other conditions")
        return self

    @property
    def has_any(self) -> bool:
        return "any_" in self.model_fields_set

    def find_mismatches(self, value: Any, document: "_Document", details: ProbeDetails) -> Iterator[str]:
        """Yield each part of the condition that `value` does not meet. Raises ProbeFailure."""
        if self.matches is not None and not (
            isinstance(value, str) and compile_cached(self.matches).search(value.encode("utf-8", "replace"))
        ):
            yield f"a string that matches {self.matches!r}"
        for name, bound in (("above", self.above), ("below", self.below)):
            limit = document.find_number(bound) if isinstance(bound, str) else bound
            if limit is None:
                continue
            if not _is_number(value) or not (value > limit if name == "above" else value < limit):
                yield f"{name} {limit:g}" + (f" ({bound})" if isinstance(bound, str) else "")
        if self.equal_to is not None:
            other = document.find_one(self.equal_to)
            if not _is_equal(other, value):
                yield f"{document.show(self.equal_to, details)} ({self.equal_to})"
        if self.length is not None:
            has_length = isinstance(value, str | list | dict)
            yield self.length.describe_mismatch(len(value)) if has_length else "a value with a length"
        if "not_" in self.model_fields_set and not _describe_mismatch(self.not_, value, document, details):
            yield f"not {_format_value(self.not_, details)}"


_CONDITIONS = ("matches", "above", "below", "equal_to", "length", "not", "any", "absent")


def _parse_expected(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            return JsonCondition.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = f"{first['loc'][0]}: " if first["loc"] else ""
            reason = describe(first)
            raise ValueError(
                f"must be a value, or a map of {', '.join(_CONDITIONS)} ({where}{reason[:1].lower()}{reason[1:]})"
            ) from None
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must be a JSON value (quote it)") from None
    return value


JsonExpect = dict[JsonPath, Annotated[Any, BeforeValidator(_parse_expected)]]


def parse_json(text: bytes) -> Any:
    """Parse `text` (UTF-8). Raises ProbeFailure if it is not JSON or exceeds JSON_LIMIT."""
    if len(text) > JSON_LIMIT:
        raise ProbeFailure("json", f"the body is longer than {JSON_LIMIT} bytes, the limit for JSON")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProbeFailure("json", f"the body is not JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class Visits:
    """How many values the paths that are compared with one response may still look at."""

    def __init__(self) -> None:
        self._left = VISITS_LIMIT

    def take(self, path: str, document: Any) -> None:
        """Take what the evaluation of a path may look at, at most. Raises ProbeFailure."""
        unquoted = _QUOTED.sub("", path)
        broad = len(_BROAD.findall(unquoted))
        if not broad:
            return
        count, depth = _measure(document, self._left)
        # After the first `..`, each further one looks at the descendants of all ancestors of a value, and a filter may
        # look at many values from the root for each value.
        times = depth ** max(0, unquoted.count("..") - 1)
        _, _, from_root = unquoted[1:].partition("$")
        is_costly = _BROAD.search(from_root) is not None or ("(" in unquoted and from_root != "")
        self._left -= broad * count * times * (count if is_costly else 1)
        if self._left < 0:
            raise ProbeFailure("json", f"{path} and the paths before look at more than {VISITS_LIMIT} values")


def _measure(document: Any, limit: int) -> tuple[int, int]:
    """Return how many values a document has, and how deep they are nested; more than `limit` need not be counted."""
    count, depth, level = 0, 0, [document]
    while level and count <= limit:
        count, depth = count + len(level), depth + 1
        parts = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = list(itertools.chain.from_iterable(parts))
    return count + len(level), depth


def find_values(path: str, document: Any, visits: Visits) -> JSONPathNodeList:
    """Return the values that `path` selects, at most NODES_LIMIT. Raises ProbeFailure."""
    visits.take(path, document)
    try:
        nodes = JSONPathNodeList(islice(compile_json_path(path).finditer(document), NODES_LIMIT + 1))
    except (JSONPathError, RecursionError) as error:
        raise ProbeFailure("json", f"{path} cannot be evaluated: {error}") from error
    if len(nodes) > NODES_LIMIT:
        raise ProbeFailure("json", f"{path} selects more than {NODES_LIMIT} values")
    return nodes


def check_json(expect: Mapping[str, Any], document: Any, details: ProbeDetails) -> None:
    """Raise ProbeFailure unless every path selects at least one value, and all its values are as expected."""
    visits = Visits()
    for path, expected in expect.items():
        problem = find_json_problem(path, expected, document, visits, details)
        if problem:
            raise ProbeFailure("json", problem)


def find_json_problem(path: str, expected: Any, document: Any, visits: Visits, details: ProbeDetails) -> str:
    """Return how what `path` selects differs from what is expected, or an empty string. Raises ProbeFailure."""
    values = find_values(path, document, visits).values()
    compared = _Document(document, visits)
    if isinstance(expected, JsonCondition) and expected.absent is not None:
        return _find_presence_problem(path, values, details, is_absent=expected.absent)
    if not values:
        return f"{path} selects nothing, expected {_format_value(expected, details)}"
    if (
        isinstance(expected, JsonCondition)
        and expected.has_any
        and all(_describe_mismatch(expected.any_, value, compared, details) for value in values)
    ):
        return f"{path} selects no value that is {_format_value(expected.any_, details)}"
    for value in values:
        mismatch = _describe_mismatch(expected, value, compared, details)
        if mismatch:
            return f"{path} is {_format_value(value, details)}, expected {mismatch}"
    return ""


def _find_presence_problem(path: str, values: list[Any], details: ProbeDetails, *, is_absent: bool) -> str:
    if is_absent and values:
        return f"{path} is {_format_value(values[0], details)}, expected nothing"
    return f"{path} selects nothing, expected any value" if not is_absent and not values else ""


def _describe_mismatch(expected: Any, value: Any, document: "_Document", details: ProbeDetails) -> str:
    """Return what was expected instead of `value`, or an empty string if it is as expected. Raises ProbeFailure."""
    if isinstance(expected, JsonCondition):
        return next(filter(None, expected.find_mismatches(value, document, details)), "")
    return "" if _is_equal(expected, value) else _format_value(expected, details)


class _Document:
    """The document that paths of conditions are compared with: each is looked for once, not for each value."""

    def __init__(self, value: Any, visits: Visits) -> None:
        self._value, self._visits = value, visits
        self._found: dict[str, Any] = {}
        self._shown: dict[str, str] = {}

    def find_one(self, path: str) -> Any:
        """Return the only value that a path selects. Raises ProbeFailure."""
        if path not in self._found:
            values = find_values(path, self._value, self._visits).values()
            if len(values) != 1:
                count = len(values) or "no"
                raise ProbeFailure("json", f"{path} selects {count} values, expected one to compare with")
            self._found[path] = values[0]
        return self._found[path]

    def show(self, path: str, details: ProbeDetails) -> str:
        """Return the only value that a path selects, as a text for messages. Raises ProbeFailure."""
        if path not in self._shown:
            self._shown[path] = _format_value(self.find_one(path), details)
        return self._shown[path]

    def find_number(self, path: str) -> float:
        """Return the only value that a path selects, which must be a number. Raises ProbeFailure."""
        number = self.find_one(path)
        if not _is_number(number):
            raise ProbeFailure("json", f"{path} is no number to compare with")
        try:
            return float(number)
        except OverflowError:
            raise ProbeFailure("json", f"{path} is too large to compare with") from None


def _is_equal(one: Any, other: Any) -> bool:
    """Return whether two JSON values have the same type and value: true is not 1."""
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_is_equal, one, other))
    if isinstance(one, dict):
        is_same = isinstance(other, dict) and one.keys() == other.keys()
        return is_same and all(_is_equal(one[key], other[key]) for key in one)
    if _is_number(one) or _is_number(other):
        return _is_number(one) and _is_number(other) and one == other
    return type(other) is (str if isinstance(one, str) else type(one)) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _format_value(value: Any, details: ProbeDetails) -> str:
    if isinstance(value, JsonCondition):
        return "a value that meets the condition"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a value nested too deeply to be shown"
    return details.redact.redact_head(text, EXCERPT_LENGTH) + ("…" if len(text) > EXCERPT_LENGTH else "")
