"""Expectations of text and of JSON, shared by the probes that have them."""

import codecs
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any

import jsonpath_rfc9535
from jsonpath_rfc9535 import JSONPathError, JSONPathNodeList, JSONPathQuery
from pydantic import BeforeValidator, ValidationError

from exporter.results import ProbeFailure, Seen
from fleet.endpoints import Part
from fleet.units import Pattern, compile_pattern

SHOWN = 120
EXAMINED = 10_000
# Those of the WHATWG's Encoding Standard, by Python's names; Python knows others, some of them very slow.
CHARSETS = {
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "ascii", "gbk", "gb2312", "gb18030", "big5", "big5hkscs", "euc_jp",
    "euc_kr", "cp949", "shift_jis", "cp932", "iso2022_jp", "koi8-r", "koi8-u", "cp866", "mac-roman",
    *(f"iso8859-{number}" for number in range(1, 17)), *(f"cp{number}" for number in range(1250, 1259)), "cp874",
}  # fmt: skip


@lru_cache(maxsize=50_000)
def compiled(pattern: str) -> Any:
    return compile_pattern(pattern)


def matches(patterns: Iterable[str], text: bytes, what: str, seen: Seen) -> None:
    """Raise ProbeFailure unless every pattern is found in `text` (UTF-8)."""
    for pattern in patterns:
        if compiled(pattern).search(text) is None:
            raise ProbeFailure("body", f"{what} does not match {pattern!r}; it begins {excerpt(text, seen)}")


def lacks(patterns: Iterable[str], text: bytes, what: str, seen: Seen) -> None:
    """Raise ProbeFailure if any pattern is found in `text` (UTF-8)."""
    for pattern in patterns:
        found = compiled(pattern).search(text)
        if found is not None:
            raise ProbeFailure("body", f"{what} matches {pattern!r}, which it must not: {excerpt(found.group(), seen)}")


def excerpt(text: bytes, seen: Seen) -> str:
    """The beginning of what a peer said, quoted; secrets that it repeats are masked before it is cut."""
    shown = seen.redact(text[:EXAMINED].decode("utf-8", "replace"))
    return repr(shown[:SHOWN]) + ("…" if len(shown) > SHOWN else "")


def utf8(content_type: str | None, body: bytes) -> bytes:
    """The body as UTF-8, which is what patterns are matched against; a charset that no browser knows is UTF-8."""
    _, found, charset = (content_type or "").lower().partition("charset=")
    charset = charset.split(";")[0].strip(" \"'") if found else "utf-8"
    try:
        known = codecs.lookup(charset).name
    except (LookupError, ValueError):
        known = "utf-8"
    return body.decode(known if known in CHARSETS else "utf-8", "replace").encode("utf-8", "replace")


def _json_path(path: object) -> str:
    if not isinstance(path, str):
        raise ValueError("is not a JSONPath (write $.status)")  # noqa: TRY004 - pydantic reads ValueErrors
    try:
        compiled_path(path)
    except JSONPathError as error:
        raise ValueError(f"is not a JSONPath of RFC 9535: {error}") from None
    return path


@lru_cache(maxsize=10_000)
def compiled_path(path: str) -> JSONPathQuery:
    return jsonpath_rfc9535.compile(path)


JsonPath = Annotated[str, BeforeValidator(_json_path)]


class Condition(Part):
    """What a value of JSON must be, where it is not one certain value."""

    matches: Pattern | None = None
    above: float | None = None
    below: float | None = None

    def unmet(self, value: Any) -> str:
        """What was expected and is not so, or nothing."""
        if self.matches is not None and not (
            isinstance(value, str) and compiled(self.matches).search(value.encode("utf-8", "replace"))
        ):
            return f"a text that matches {self.matches!r}"
        if self.above is not None and not (_is_number(value) and value > self.above):
            return f"above {self.above:g}"
        if self.below is not None and not (_is_number(value) and value < self.below):
            return f"below {self.below:g}"
        return ""


def _expected(value: Any) -> Any:
    if isinstance(value, dict):
        if not value:
            raise ValueError("wants a value, or matches, above or below")
        try:
            return Condition.model_validate(value)
        except ValidationError as error:
            what = error.errors()[0]
            where = f"{what['loc'][0]}: " if what["loc"] else ""
            why = what["msg"].removeprefix("Value error, ")
            raise ValueError(f"wants a value, or matches, above, below ({where}{why[:1].lower()}{why[1:]})") from None
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("is not a value of JSON (quote it)") from None
    return value


JsonExpect = dict[JsonPath, Annotated[Any, BeforeValidator(_expected)]]


def parse_json(text: bytes) -> Any:
    """Raises ProbeFailure where `text` (UTF-8) is not JSON."""
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        raise ProbeFailure("json", f"the body is not JSON: {error}") from error


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no number")


def values_at(path: str, document: Any) -> JSONPathNodeList:
    """All that `path` finds. Raises ProbeFailure."""
    try:
        return compiled_path(path).find(document)
    except (JSONPathError, RecursionError) as error:
        raise ProbeFailure("json", f"{path} cannot be followed: {error}") from error


def judge_json(expect: Mapping[str, Any], document: Any, seen: Seen) -> None:
    """Raise ProbeFailure unless every path finds something, and all that it finds is as expected."""
    for path, wanted in expect.items():
        found = values_at(path, document)
        if not found:
            raise ProbeFailure("json", f"{path} finds nothing, expected {_shown(wanted, seen)}")
        for node in found:
            unmet = unmet_by(wanted, node.value, seen)
            if unmet:
                raise ProbeFailure("json", f"{path} is {_shown(node.value, seen)}, expected {unmet}")


def unmet_by(wanted: Any, value: Any, seen: Seen) -> str:
    """What was expected of `value` and is not so, or nothing."""
    if isinstance(wanted, Condition):
        return wanted.unmet(value)
    return "" if _same(wanted, value) else _shown(wanted, seen)


def _same(one: Any, other: Any) -> bool:
    """Equal, and of one type of JSON: true is not 1."""
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_same, one, other))
    if _is_number(one) or _is_number(other):
        return _is_number(one) and _is_number(other) and one == other
    return type(other) is (str if isinstance(one, str) else type(one)) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any, seen: Seen) -> str:
    if isinstance(value, Condition):
        return "a value"
    shown = seen.redact(json.dumps(value, ensure_ascii=False)[:EXAMINED])
    return shown[:SHOWN] + ("…" if len(shown) > SHOWN else "")
