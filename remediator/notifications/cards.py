"""Cards: what a message shows, independent of the channel, which turns it into its own format."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

VALUE_LIMIT = 2000  # characters of one printed value
Colour = Literal[
    "dark red", "red", "orange", "yellow", "green", "turquoise", "light blue", "blue", "violet", "grey"
]  # fmt: skip
ButtonStyle = Literal["default", "primary", "danger"]


@dataclass(frozen=True)
class Span:
    """A part of a line: a `label` is bold, a `value` must be escaped, `template` text is the template author's."""

    kind: Literal["label", "value", "template"]
    text: str


@dataclass(frozen=True)
class Line:
    """A line of a card."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, text: str) -> "Line":
        return cls((Span("value", text),))

    @property
    def plain(self) -> str:
        """The line without markup."""
        return "".join(f"{span.text}:" if span.kind == "label" else span.text for span in self.spans)


@dataclass(frozen=True)
class Button:
    """A link, or a button that sends `value` back when it is pressed."""

    text: str
    url: str = ""
    value: Mapping[str, Any] | None = None
    style: ButtonStyle = "default"


@dataclass(frozen=True)
class Card:
    """A title, lines, mentions and buttons.

    `state` is that of the notification that the title shows; `severity` and `colour` are the worst ones. `more` is the
    text for lines that were cut, with a place for their number. `mentions` are `all` and ids of users in the chat.
    """

    title: str
    state: str
    severity: str
    colour: Colour
    lines: tuple[Line, ...]
    more: str
    mentions: tuple[str, ...] = ()
    buttons: tuple[Button, ...] = ()

    def without_mentions(self) -> "Card":
        return replace(self, mentions=())

    def first_lines(self, count: int) -> "Card":
        """Return the card with at most `count` lines, and one that says how many were cut."""
        if len(self.lines) <= count:
            return self
        return replace(self, lines=(*self.lines[:count], Line.of(self.more.format(len(self.lines) - count))))


def to_single_line(text: str, limit: int = VALUE_LIMIT) -> str:
    """Return text in one line without unprintable characters, and with the number of characters that were cut."""
    printable = "".join(character if character.isprintable() else " " for character in text[:limit])
    return printable if len(text) <= limit else f"{printable}… (+{len(text) - limit})"
