"""The functions `search` and `match` of JSONPath with RE2: a server chooses the texts, but not the patterns."""

from functools import lru_cache
from typing import Any

import re2
from iregexp_check import check
from jsonpath_rfc9535 import JSONPathEnvironment
from jsonpath_rfc9535.exceptions import JSONPathTypeError
from jsonpath_rfc9535.filter_expressions import FilterExpressionLiteral
from jsonpath_rfc9535.function_extensions import ExpressionType, FilterFunction
from jsonpath_rfc9535.tokens import Token

from fleet.inventory.units import compile_pattern

PATTERN_LIMIT = 1000  # characters


class _Search(FilterFunction):
    """Whether a pattern is found in a text (RFC 9535, 2.4.7)."""

    arg_types = [ExpressionType.VALUE, ExpressionType.VALUE]
    return_type = ExpressionType.LOGICAL
    form = "%s"

    def __call__(self, text: object, pattern: object) -> bool:
        if not isinstance(text, str) or not isinstance(pattern, str):
            return False
        compiled = _compile(self.form % pattern) if _is_valid(pattern) else None
        return compiled is not None and compiled.search(text.encode("utf-8", "replace")) is not None


class _Match(_Search):
    """Whether a pattern matches a whole text (RFC 9535, 2.4.6)."""

    form = r"\A(?:%s)\z"


def _is_valid(pattern: str) -> bool:
    return len(pattern) <= PATTERN_LIMIT and check(pattern)


@lru_cache(maxsize=1000)
def _compile(pattern: str) -> Any:
    """Compile a pattern (RFC 9485), or return None if RE2 cannot."""
    try:
        return compile_pattern(_exclude_line_ends(pattern))
    except re2.error:
        return None


def _exclude_line_ends(pattern: str) -> str:
    """Return a pattern in whose texts a dot does not stand for a carriage return either."""
    parts, is_escaped, is_in_class = [], False, False
    for character in pattern:
        is_dot = character == "." and not is_escaped and not is_in_class
        parts.append(r"[^\n\r]" if is_dot else character)
        if not is_escaped and character in "[]":
            is_in_class = character == "["
        is_escaped = character == "\\" and not is_escaped
    return "".join(parts)


class _Environment(JSONPathEnvironment):
    """Refuses patterns that a response has: each could take a tenth of a second, and megabytes."""

    def validate_function_extension_signature(self, token: Token, args: list[Any]) -> list[Any]:
        checked = super().validate_function_extension_signature(token, args)
        if token.value in ("search", "match") and not isinstance(checked[1], FilterExpressionLiteral):
            raise JSONPathTypeError(f"the pattern of {token.value}() must be written in the path", token=token)
        return checked


def create_environment() -> JSONPathEnvironment:
    """Return what compiles JSONPaths."""
    environment = _Environment()
    environment.function_extensions |= {"search": _Search(), "match": _Match()}
    return environment
