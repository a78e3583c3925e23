"""Explanations of YAML errors: the likely cause in place of libyaml's own message."""

import re
from collections.abc import Callable, Sequence

import yaml

_MISSING_SPACE = re.compile(r"^\s*(?:-\s+)?([A-Za-z_][\w.-]*):(?![\s/:]|$)")
_QUOTE_STARTS = "a value that starts with {0!r} must be in quotes"
_QUOTE_COLONS = "a value that contains ': ' must be in quotes"


def explain_yaml_error(source: bytes, error: yaml.YAMLError) -> tuple[int, str]:
    """Return the line, counted from 1, and the likely cause of an error that PyYAML raised for `source`."""
    if isinstance(error, yaml.reader.ReaderError):
        return source[: error.position].count(b"\n") + 1, _explain_character(error)
    if not isinstance(error, yaml.MarkedYAMLError):
        return 1, str(error)
    lines = source.decode("utf-8", "replace").splitlines() or [""]
    mark = error.problem_mark or error.context_mark
    line, column = (min(mark.line, len(lines) - 1), mark.column) if mark else (0, 0)
    problem = error.problem or "syntax error"
    for pattern, explain in _EXPLANATIONS:
        if re.match(pattern, problem):
            at, cause = explain(lines, line, column, error)
            return at + 1, cause
    return line + 1, problem


def _explain_character(error: yaml.reader.ReaderError) -> str:
    if "control characters" in error.reason:
        return "contains a control character; remove it"
    return f"is not UTF-8 text ({error.reason})"


Explanation = tuple[int, str]  # line, counted from 0, and cause
Explain = Callable[[Sequence[str], int, int, yaml.MarkedYAMLError], Explanation]


def _character(lines: Sequence[str], line: int, column: int) -> str:
    return lines[line][column : column + 1]


def _explain_start(lines: Sequence[str], line: int, column: int, _error: yaml.MarkedYAMLError) -> Explanation:
    character = _character(lines, line, column)
    if character == "\t":
        return line, "a tab is used for indentation; use spaces"
    return line, _QUOTE_STARTS.format(character)


def _explain_alias(lines: Sequence[str], line: int, column: int, error: yaml.MarkedYAMLError) -> Explanation:
    mark = error.context_mark
    column = mark.column if mark is not None else column
    character = _character(lines, line, column) or "*"
    if character == "%":
        return line, _QUOTE_STARTS.format(character)
    name = re.match(r"\*([\w-]+)", lines[line][column:])
    unknown = f" (there is no anchor &{name[1]})" if name is not None else ""
    return line, f"{_QUOTE_STARTS.format(character)}{unknown}"


def _explain_open_quote(_lines: Sequence[str], line: int, _column: int, error: yaml.MarkedYAMLError) -> Explanation:
    mark = error.context_mark
    return (mark.line if mark is not None else line), "the quote that starts here is not closed"


def _unclosed_quote(lines: Sequence[str], first: int, last: int) -> int | None:
    """Return the line of a quote that is not closed on its line, if there is one."""
    for number in range(first, last + 1):
        value = re.sub(r'\\.|\'[^\']*\'|"[^"\\]*(?:\\.[^"\\]*)*"', "", lines[number].partition(" #")[0])
        if re.search(r"""[:\-,\[{]\s*["'][^"']*$""", value):
            return number
    return None


def _explain_key(lines: Sequence[str], line: int, column: int, error: yaml.MarkedYAMLError) -> Explanation:
    first = error.context_mark.line if error.context_mark is not None else line
    before = lines[line][:column]
    if (quote := _unclosed_quote(lines, first, line - 1)) is not None:
        return quote, "the quote that starts on this line is not closed"
    if not before.strip():
        return line, f"the key is not indented like the keys of its map, which starts on line {first + 1}"
    if (opening := re.search(r":\s+(\{(?=.*\}\s*$)|\[(?=.*\]\s*$))", before)) is not None:
        return line, _QUOTE_STARTS.format(opening[1])
    if before.rstrip().endswith(("'", '"')):
        return line, "text follows a closing quote; put the whole value in one pair of quotes"
    return line, "a key is expected here"


def _explain_mapping(lines: Sequence[str], line: int, column: int, _error: yaml.MarkedYAMLError) -> Explanation:
    before = lines[line][:column]
    if ": " in before:
        return line, _QUOTE_COLONS
    above = _line_above(lines, line)
    if above is None:
        return line, "a key is not allowed here"
    if (unfinished := _explain_unfinished_key(lines, above)) is not None:
        return unfinished
    return line, f"the key is indented further than the keys above it (line {above + 1})"


def _explain_unfinished_key(lines: Sequence[str], line: int) -> Explanation | None:
    missing = _MISSING_SPACE.match(lines[line])
    if missing is not None:
        return line, f"a space is missing after the colon of {missing[1]!r}"
    text = lines[line].strip()
    if not re.search(r":(\s|$)", text):
        return line, f"a colon is missing after {text!r}"
    return None


def _explain_simple_key(lines: Sequence[str], line: int, _column: int, error: yaml.MarkedYAMLError) -> Explanation:
    first = error.context_mark.line if error.context_mark is not None else line
    return _explain_unfinished_key(lines, first) or (first, "a colon is missing after a key")


def _explain_flow(lines: Sequence[str], line: int, column: int, error: yaml.MarkedYAMLError) -> Explanation:
    mark = error.context_mark
    if mark is None:
        return line, "a comma or a closing bracket is missing"
    start = lines[mark.line][mark.column :]
    if re.match(r"\{(service|host\.\w+|\{)", start):
        return mark.line, _QUOTE_STARTS.format("{")
    if re.search(r"\{(service|host\.\w+)\}", lines[line]):
        return line, "a value that contains '{' must be in quotes"
    before = lines[line][mark.column if line == mark.line else 0 : column]
    if re.search(r":\s+[^,{}\[\]\"']+$", before) and lines[line][column : column + 1] == ":":
        return line, f"{_QUOTE_COLONS}, or a comma is missing"
    if (quote := _unclosed_quote(lines, mark.line, line - 1)) is not None:
        return quote, "the quote that starts on this line is not closed"
    closing = {"{": "}", "[": "]"}.get(start[:1], "}")
    return line, f"a comma is missing, or {closing!r} for the {start[:1]!r} on line {mark.line + 1}"


def _line_above(lines: Sequence[str], line: int) -> int | None:
    """Return the last line above `line` that is neither empty nor a comment."""
    above = (number for number in range(line - 1, -1, -1) if lines[number].split("#")[0].strip())
    return next(above, None)


def _fixed(cause: str) -> Explain:
    def explain(_lines: Sequence[str], line: int, _column: int, _error: yaml.MarkedYAMLError) -> Explanation:
        return line, cause

    return explain


_EXPLANATIONS: tuple[tuple[str, Explain], ...] = (
    ("found character .*cannot start any token", _explain_start),
    ("found undefined alias|did not find expected alphabetic or numeric character", _explain_alias),
    ("found unexpected (end of stream|document indicator)", _explain_open_quote),
    ("did not find expected key", _explain_key),
    ("mapping values are not allowed", _explain_mapping),
    ("could not find expected ':'", _explain_simple_key),
    ("did not find expected ',' or", _explain_flow),
    ("found unhashable key", _fixed(_QUOTE_STARTS.format("{"))),
    ("did not find expected comment or line break", _fixed("a value that starts with '|' or '>' must be in quotes")),
    ("block sequence entries are not allowed", _fixed("a list must start on the line below its key")),
    ("did not find expected '-' indicator", _fixed("expected another list item; indent it like the items above")),
    ("could not determine a constructor for the tag", _fixed(_QUOTE_STARTS.format("!"))),
    ("found invalid Unicode character escape code", _fixed("a \\u escape is half of a surrogate pair")),
    (
        "found unknown escape character|did not find expected hexdecimal number",
        _fixed(r"unknown escape in double quotes; write \\ for a backslash, or use single quotes"),
    ),
)
