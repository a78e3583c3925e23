r"""Values of labels that are safe to show: servers and hosts choose some of them, and tools show labels in terminals.

Control characters are escaped as everywhere else, such as `\x1b`. Different values stay different, else Prometheus
would refuse the page: backslashes before such a character, or before what looks like one that is escaped, are doubled.
"""

import re

from runtime.terminal import UNSAFE

_ESCAPED = "x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}"
# The look-behind keeps the time linear: a match begins at the first of several backslashes.
_TO_ESCAPE = re.compile(rf"(?<!\\)(\\*+)({UNSAFE.pattern})|(?<!\\)(\\++)(?={_ESCAPED})")
_TO_UNESCAPE = re.compile(rf"(?<!\\)(\\++)({_ESCAPED})")


def escape_value(value: str) -> str:
    """Return a value without control characters."""
    return value if value.isprintable() and "\\" not in value else _TO_ESCAPE.sub(_escape, value)


def _escape(match: re.Match[str]) -> str:
    before, unsafe, backslashes = match.groups()
    if unsafe is None:
        return str(backslashes) * 2
    # Paths of Windows have `\r`.
    return before * 2 + repr(unsafe)[1:-1].replace(r"\r", r"\x0d")


def unescape_value(value: str) -> str:
    """Return the value that was escaped."""
    return _TO_UNESCAPE.sub(_unescape, value) if "\\" in value else value


def _unescape(match: re.Match[str]) -> str:
    backslashes, escaped = match.groups()
    is_escaped = len(backslashes) % 2 == 1
    return "\\" * (len(backslashes) // 2) + (chr(int(escaped[1:], 16)) if is_escaped else escaped)
