"""What pydantic's validation errors say would be right, in words that people without Python understand."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

MESSAGES: Mapping[str, str] = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "must be a map"),
    "list_type": "must be a list",
    "string_type": "must be a string",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "string_pattern_mismatch": "must match {pattern}",
    "missing": "is missing",
    "extra_forbidden": "unknown key",
}
EMPTY = "must not be empty"
_SHOWN = 100  # characters of each part of a path


def describe(error: Mapping[str, Any], messages: Mapping[str, str] = MESSAGES) -> str:
    """Return the message for one of pydantic's errors by its type; pydantic's own where `messages` has none."""
    kind, context = error["type"], error.get("ctx", {})
    if kind not in messages:
        return str(error["msg"]).removeprefix("Value error, ")
    if kind.endswith("too_short") and context["min_length"] == 1:
        return EMPTY
    numbers = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    return messages[kind].format_map(numbers)


def describe_first(error: ValidationError, root: str, messages: Mapping[str, str] = MESSAGES) -> str:
    """Return the first problem with its path, or `root`; without the value, which may be a secret."""
    first = error.errors(include_input=False, include_url=False)[0]
    path = ".".join(str(part)[:_SHOWN] for part in first["loc"])
    return f"{path or root}: {describe(first, messages)}"
