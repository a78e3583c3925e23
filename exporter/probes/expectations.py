"""Expectations of text and of JSON, shared by the probes that have them."""

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from typing import Annotated, Any, ParamSpec, TypeVar

import jsonpath_rfc9535
from jsonpath_rfc9535 import JSONPathError, JSONPathNodeList, JSONPathQuery
from pydantic import BeforeValidator, Field, ValidationError

from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import Pattern, compile_pattern

SHOWN = 120
JSON_LIMIT = 1024 * 1024  # bytes: a parser lets nothing else run, and what it makes is many times as large
NODES_LIMIT = 10_000
EXAMINED = 10_000
# Those of the WHATWG's Encoding Standard, by Python's names; Python knows others, some of them very slow, and keeps
# every name that it was ever asked for.
_ISO_8859 = (*range(1, 12), *range(13, 17))
_CHARSETS = {
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "ascii", "gbk", "gb2312", "gb18030", "big5", "big5hkscs", "euc_jp",
    "euc_kr", "cp949", "shift_jis", "cp932", "iso2022_jp", "koi8-r", "koi8-u", "cp866", "mac-roman",
    *(f"iso8859-{number}" for number in _ISO_8859), *(f"cp{number}" for number in range(1250, 1259)), "cp874",
}  # fmt: skip
_ALIASES = {
    **{name.replace("_", "").replace("-", ""): name for name in _CHARSETS},
    **{f"windows{number}": f"cp{number}" for number in (*range(1250, 1259), 874)},
    **{f"latin{number}": f"iso8859-{part}" for number, part in enumerate((1, 2, 3, 4, 9, 10), 1)},
    **{f"iso8859{number}": f"iso8859-{number}" for number in _ISO_8859},
    "usascii": "ascii", "sjis": "shift_jis", "mskanji": "cp932", "windows31j": "cp932", "xgbk": "gbk", "cp936": "gbk",
    "ms936": "gbk", "eucjp": "euc_jp", "euckr": "euc_kr", "ksc56011987": "cp949", "uhc": "cp949", "ibm866": "cp866",
    "macintosh": "mac-roman", "utf16": "utf-16", "tis620": "cp874",
}  # fmt: skip


P = ParamSpec("P")
T = TypeVar("T")
_JUDGES = ThreadPoolExecutor(2, thread_name_prefix="judge")


async def apart(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do what takes long where it holds up neither the event loop nor what else wants a thread.

    It cannot be ended, so it must end by itself; what waits for its turn is given up with the probe.
    """
    return await asyncio.get_running_loop().run_in_executor(_JUDGES, partial(work, *args, **kwargs))


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
            # Masked as a whole first: what is found may be a part of a secret.
            shown = compiled(pattern).search(seen.redact(text.decode("utf-8", "replace")).encode())
            told = excerpt(shown.group(), seen) if shown is not None else "a secret"
            raise ProbeFailure("body", f"{what} matches {pattern!r}, which it must not: {told}")


def excerpt(text: bytes, seen: Seen) -> str:
    """The beginning of what a peer said, quoted; secrets that it repeats are masked before it is cut."""
    room = 4 * (SHOWN + seen.redact.longest)  # bytes of that many characters
    shown = seen.redact(text[:room].decode("utf-8", "replace"))
    return repr(shown[:SHOWN]) + ("…" if len(shown) > SHOWN else "")


def utf8(content_type: str | None, body: bytes) -> bytes:
    """The body as UTF-8, which is what patterns are matched against; a charset that no browser knows is UTF-8."""
    _, found, charset = (content_type or "").lower().partition("charset=")
    name = charset.split(";")[0][:40].strip(" \"'").replace("_", "").replace("-", "") if found else ""
    return body.decode(_ALIASES.get(name, "utf-8"), "replace").encode("utf-8", "replace")


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


class Condition(ConfigModel):
    """What a value of JSON must be, where it is not one certain value."""

    matches: Pattern | None = None
    above: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    below: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None

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
    """Raises ProbeFailure where `text` (UTF-8) is not JSON, or more than is read as such."""
    if len(text) > JSON_LIMIT:
        raise ProbeFailure("json", f"the body is longer than the {JSON_LIMIT} bytes that are read as JSON")
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        raise ProbeFailure("json", f"the body is not JSON: {error}") from error


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no number")


def values_at(path: str, document: Any) -> JSONPathNodeList:
    """All that `path` finds, within reason. Raises ProbeFailure."""
    try:
        found = JSONPathNodeList(islice(compiled_path(path).finditer(document), NODES_LIMIT + 1))
    except (JSONPathError, RecursionError) as error:
        raise ProbeFailure("json", f"{path} cannot be followed: {error}") from error
    if len(found) > NODES_LIMIT:
        raise ProbeFailure("json", f"{path} finds more than {NODES_LIMIT} values")
    return found


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
    try:
        shown = seen.redact(json.dumps(value, ensure_ascii=False)[:EXAMINED])
    except RecursionError:
        return "what is nested too deep to be shown"
    return shown[:SHOWN] + ("…" if len(shown) > SHOWN else "")
