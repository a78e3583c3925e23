"""What the JSON of a long body says at its top level, read in short steps.

A parser would build every value, and hold the event loop or a thread for as long as a client likes. This follows the
structure only, for the values of a few keys. It does not validate: that is the upstream's affair.
"""

import json
import re
from collections.abc import Generator
from dataclasses import dataclass, field

STEP = 64 * 1024  # bytes without structure that are passed over at once
MAX_STEPS = 500_000  # a body with more strings, objects and arrays is not read
SMALL = 1024  # bytes without structure, which take as long as a step
IN_A_TURN = 200  # steps, which take less than a millisecond
_STRUCTURE = re.compile(rb'["{}\[\]]')
_COLON = re.compile(rb"[ \t\r\n]{0,100}:[ \t\r\n]{0,100}")
_NUMBER = re.compile(rb"\d{1,15}(?=[ \t\r\n]{0,100}[,}])")
_MAX_TEXT = 8 * 1024  # bytes of a key, or of a text


@dataclass
class TopLevel:
    """The texts and whole numbers of the wanted keys, and where the texts stand; of a repeated key, the last value."""

    values: dict[str, str | int] = field(default_factory=dict)
    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


class TooLongError(Exception):
    """A body has too many values."""


def scan(content: bytes, wanted: frozenset[str]) -> Generator[None, None, TopLevel]:
    """Read a JSON object, and yield after a few steps, so that others can run. Raises TooLongError."""
    found = TopLevel()
    depth, at, key = 0, 0, ""
    opened: int | None = None  # where a string has begun
    is_escaped = False  # whether a backslash before `at` escapes what follows
    used = 0  # steps of this turn
    for _ in range(MAX_STEPS):
        used += 1
        if used >= IN_A_TURN:
            used = 0
            yield
        if opened is not None:
            if at >= len(content):
                return found
            end, has_ended, is_escaped = _follow_string(content, at, is_escaped)
            used += (end - at) // SMALL
            at = end
            if has_ended:
                if depth == 1:
                    key, at = _read_string(content, opened, at, key, wanted, found)
                opened = None
            continue
        match = _STRUCTURE.search(content, at, at + STEP)
        if match is None:
            at += STEP
            used += STEP // SMALL
            if at >= len(content):
                return found
            continue
        at = match.end()
        if match[0] == b'"':
            opened = match.start()
        else:
            depth += 1 if match[0] in b"{[" else -1
    raise TooLongError


def _read_string(
    content: bytes, start: int, end: int, key: str, wanted: frozenset[str], found: TopLevel
) -> tuple[str, int]:
    """Read a string of the top level: the value of `key`, or a key. Return the key whose text follows, and where."""
    colon = _COLON.match(content, end)
    if colon is None:
        text = _decode(content[start:end])
        if key and text is not None:
            found.values[key] = text
            found.spans.setdefault(key, []).append((start, end))
        return "", end
    name = _decode(content[start:end])
    if name not in wanted:
        return "", colon.end()
    number = _NUMBER.match(content, colon.end())
    if number is not None:
        found.values[name] = int(number[0])
    return name if content[colon.end() : colon.end() + 1] == b'"' else "", colon.end()


def _decode(text: bytes) -> str | None:
    """Return a string, None if it is too long or not valid."""
    if len(text) > _MAX_TEXT:
        return None
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def _follow_string(content: bytes, at: int, is_escaped: bool) -> tuple[int, bool, bool]:
    """Follow a string as far as its next quote, or a step.

    Return where that ends, whether the string ends there, and whether what follows is escaped, as `is_escaped` says it
    of the beginning.
    """
    quote = content.find(b'"', at, at + STEP)
    part = content[at : quote if quote >= 0 else at + STEP]
    backslashes = len(part) - len(part.rstrip(b"\\"))
    is_odd = backslashes % 2 == 1
    if backslashes == len(part):
        is_odd = is_odd != is_escaped
    return (quote + 1, not is_odd, False) if quote >= 0 else (at + STEP, False, is_odd)
