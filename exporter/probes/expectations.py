"""Expectations of text and JSON that several probe kinds share, and how they are checked."""

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from typing import Annotated, Any, ParamSpec, TypeVar

import jsonpath_rfc9535
import webencodings
from jsonpath_rfc9535 import JSONPathError, JSONPathNodeList, JSONPathQuery
from pydantic import BeforeValidator, Field, ValidationError

from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import Pattern, compile_pattern

EXCERPT_LENGTH = 120  # characters
JSON_LIMIT = 1024 * 1024  # bytes; parsing blocks the event loop, and the result takes many times as much memory
NODES_LIMIT = 10_000
LABEL_LIMIT = 40  # characters of the name of a charset
EXAMINED = 10_000  # characters of a text that become evidence

P = ParamSpec("P")
T = TypeVar("T")
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="expectations")


async def run_in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread pool of its own, so that it blocks neither the event loop nor other users of threads.

    It cannot be cancelled once it runs, so it must be bounded; work that still waits is cancelled with the probe.
    """
    return await asyncio.get_running_loop().run_in_executor(_THREADS, partial(work, *args, **kwargs))


@lru_cache(maxsize=50_000)
def compile_cached(pattern: str) -> Any:
    """Compile an RE2 pattern, or return the cached result."""
    return compile_pattern(pattern)


def check_matches(patterns: Iterable[str], text: bytes, name: str, details: ProbeDetails) -> None:
    """Raise ProbeFailure unless every pattern matches `text` (UTF-8)."""
    for pattern in patterns:
        if compile_cached(pattern).search(text) is None:
            raise ProbeFailure(
                "body", f"{name} does not match {pattern!r}; it begins with {quote_excerpt(text, details)}"
            )


def check_lacks(patterns: Iterable[str], text: bytes, name: str, details: ProbeDetails) -> None:
    """Raise ProbeFailure if any pattern matches `text` (UTF-8)."""
    for pattern in patterns:
        if compile_cached(pattern).search(text) is not None:
            # Redact the whole text first: the match may be a part of a secret.
            match = compile_cached(pattern).search(details.redact(text.decode("utf-8", "replace")).encode())
            matched = quote_excerpt(match.group(), details) if match is not None else "a secret"
            raise ProbeFailure("body", f"{name} must not match {pattern!r}, but contains {matched}")


def quote_excerpt(text: bytes, details: ProbeDetails) -> str:
    """Return the beginning of `text`, quoted; secrets are redacted before it is cut."""
    limit = 4 * (EXCERPT_LENGTH + details.redact.longest)  # bytes; a character takes up to 4
    redacted = details.redact(text[:limit].decode("utf-8", "replace"))
    return repr(redacted[:EXCERPT_LENGTH]) + ("…" if len(redacted) > EXCERPT_LENGTH else "")


def recode_as_utf8(content_type: str | None, body: bytes) -> bytes:
    """Return the body in UTF-8, in which patterns are matched, without a byte order mark.

    The names of charsets, and that a byte order mark comes before them, are as in the WHATWG's Encoding Standard. An
    unknown charset is taken for UTF-8.
    """
    _, found, charset = (content_type or "").lower().partition("charset=")
    label = charset.split(";")[0].strip(" \"'")[:LABEL_LIMIT] if found else ""
    encoding = webencodings.lookup(label) or webencodings.UTF8
    # The standard decodes GBK as its superset.
    text, _ = webencodings.decode(body, "gb18030" if encoding.name == "gbk" else encoding, "replace")
    return text.encode("utf-8", "replace")


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
    return jsonpath_rfc9535.compile(path)


JsonPath = Annotated[str, BeforeValidator(_json_path)]


class JsonCondition(ConfigModel):
    """A condition on a JSON value, where no exact value is expected."""

    matches: Pattern | None = None
    above: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    below: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None

    def describe_mismatch(self, value: Any) -> str:
        """Return the part of the condition that `value` does not meet, or an empty string."""
        if self.matches is not None and not (
            isinstance(value, str) and compile_cached(self.matches).search(value.encode("utf-8", "replace"))
        ):
            return f"a string that matches {self.matches!r}"
        if self.above is not None and not (_is_number(value) and value > self.above):
            return f"above {self.above:g}"
        if self.below is not None and not (_is_number(value) and value < self.below):
            return f"below {self.below:g}"
        return ""


def _parse_expected(value: Any) -> Any:
    if isinstance(value, dict):
        if not value:
            raise ValueError("must be a value, or have at least one of matches, above, below")
        try:
            return JsonCondition.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = f"{first['loc'][0]}: " if first["loc"] else ""
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(
                f"must be a value, or a map of matches, above, below ({where}{reason[:1].lower()}{reason[1:]})"
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


def find_values(path: str, document: Any) -> JSONPathNodeList:
    """Return the values that `path` selects, at most NODES_LIMIT. Raises ProbeFailure."""
    try:
        nodes = JSONPathNodeList(islice(compile_json_path(path).finditer(document), NODES_LIMIT + 1))
    except (JSONPathError, RecursionError) as error:
        raise ProbeFailure("json", f"{path} cannot be evaluated: {error}") from error
    if len(nodes) > NODES_LIMIT:
        raise ProbeFailure("json", f"{path} selects more than {NODES_LIMIT} values")
    return nodes


def check_json(expect: Mapping[str, Any], document: Any, details: ProbeDetails) -> None:
    """Raise ProbeFailure unless every path selects at least one value, and all its values are as expected."""
    for path, expected in expect.items():
        nodes = find_values(path, document)
        if not nodes:
            raise ProbeFailure("json", f"{path} selects nothing, expected {_format_value(expected, details)}")
        for node in nodes:
            mismatch = describe_mismatch(expected, node.value, details)
            if mismatch:
                raise ProbeFailure("json", f"{path} is {_format_value(node.value, details)}, expected {mismatch}")


def describe_mismatch(expected: Any, value: Any, details: ProbeDetails) -> str:
    """Return what was expected instead of `value`, or an empty string if it is as expected."""
    if isinstance(expected, JsonCondition):
        return expected.describe_mismatch(value)
    return "" if _is_equal(expected, value) else _format_value(expected, details)


def _is_equal(one: Any, other: Any) -> bool:
    """Return whether two JSON values have the same type and value: true is not 1."""
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_is_equal, one, other))
    if _is_number(one) or _is_number(other):
        return _is_number(one) and _is_number(other) and one == other
    return type(other) is (str if isinstance(one, str) else type(one)) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _format_value(value: Any, details: ProbeDetails) -> str:
    if isinstance(value, JsonCondition):
        return "a value"
    try:
        text = details.redact(json.dumps(value, ensure_ascii=False)[:EXAMINED])
    except RecursionError:
        return "a value nested too deeply to be shown"
    return text[:EXCERPT_LENGTH] + ("…" if len(text) > EXCERPT_LENGTH else "")
