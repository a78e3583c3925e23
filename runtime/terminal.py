"""Text from hosts, peers and people that is safe to print to a terminal."""

import re

# Characters that control a terminal, or the direction and visibility of other text: control characters except tabs and
# newlines, format characters (Unicode's category Cf), line separators, and halves of surrogate pairs.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)


def escape_controls(text: str) -> str:
    r"""Return text with unsafe characters escaped as in Python, such as `\x1b`."""
    return UNSAFE.sub(lambda match: repr(match[0])[1:-1], text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    r"""Return text with line breaks as `\n`, so that it cannot look like the lines of other entries."""
    return text.replace("\r\n", "\n").replace("\n", "\\n")
