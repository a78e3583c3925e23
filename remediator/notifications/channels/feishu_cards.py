"""A card in Feishu's JSON, no larger than Feishu takes.

Custom bots get cards of version 1.0, which ignores what it does not know; app bots get version 2.0, whose buttons can
answer.
https://open.feishu.cn/document/feishu-cards/card-json-v2-structure
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

SIZE_LIMIT = 19_000  # bytes of UTF-8; Feishu takes 20 KB, signing and masking add some
TEXT_LINES = 25
VALUE_LIMIT = 2000  # characters of one thing that is printed


def clean(text: str, limit: int = VALUE_LIMIT) -> str:
    """Text in one line, without what cannot be seen or turns the writing's direction; what is cut is counted."""
    shown = "".join(character if character.isprintable() else " " for character in text[:limit])
    return shown if len(text) <= limit else f"{shown}… (+{len(text) - limit})"


@dataclass(frozen=True)
class Button:
    """A link, or what pressing it sends back."""

    text: str
    url: str = ""
    value: Mapping[str, Any] | None = None
    look: str = "default"


@dataclass(frozen=True)
class Card:
    """A message before it takes Feishu's form; `body` is markup by lines, `text` the same as plain text."""

    title: str
    colour: str
    body: tuple[str, ...]
    text: tuple[str, ...]
    more: str  # what stands for lines that were cut, with a place for their number
    calls: tuple[str, ...] = ()
    buttons: tuple[Button, ...] = ()

    def without_calls(self) -> "Card":
        return replace(self, calls=())

    def plainer(self) -> "Card":
        """The same, with nothing in it that Feishu may refuse: no mentions, no buttons, less text."""
        return replace(self, body=cut(self.body, TEXT_LINES, self.more), calls=(), buttons=())


def cut(lines: Sequence[str], most: int, more: str) -> tuple[str, ...]:
    """No more than so many lines, and then how many were left out."""
    if len(lines) <= most:
        return tuple(lines)
    return (*lines[:most], more.format(len(lines) - most))


def fitted(made: Card, wrap: Callable[[Card], dict[str, Any]]) -> dict[str, Any]:
    """What `wrap` makes of a card, with as many of its lines as there is room for."""
    wrapped = wrap(made)
    if size(wrapped) <= SIZE_LIMIT:
        return wrapped
    low, high = 0, max(len(made.body), len(made.text))  # so many lines fit, and so many do not
    while high - low > 1:
        middle = (low + high) // 2
        if size(wrap(_shorter(made, middle))) <= SIZE_LIMIT:
            low = middle
        else:
            high = middle
    shortest = wrap(_shorter(made, low))
    return shortest if size(shortest) <= SIZE_LIMIT else wrap(replace(_shorter(made, 0), calls=(), buttons=()))


def _shorter(made: Card, lines: int) -> Card:
    return replace(made, body=cut(made.body, lines, made.more), text=cut(made.text, lines, made.more))


def size(message: Mapping[str, Any]) -> int:
    """Bytes that a message takes when it is sent."""
    return len(json.dumps(message, ensure_ascii=False).encode())


def version_1(made: Card) -> dict[str, Any]:
    """A card of version 1.0, whose buttons are links."""
    buttons = [
        {"tag": "button", "text": _plain(button.text), "url": button.url, "type": button.look}
        for button in made.buttons
        if button.url
    ]
    return {
        "config": {"wide_screen_mode": True},
        "header": {"template": made.colour, "title": _plain(made.title)},
        "elements": [
            *({"tag": "div", "text": {"tag": "lark_md", "content": content}} for content in _paragraphs(made)),
            *([{"tag": "action", "actions": buttons}] if buttons else []),
        ],
    }


def version_2(made: Card) -> dict[str, Any]:
    """A card of version 2.0, which can be changed later, and whose buttons may send a value back."""
    columns = [{"tag": "column", "width": "auto", "elements": [_button(button)]} for button in made.buttons]
    return {
        "schema": "2.0",
        "config": {"update_multi": True},
        "header": {"template": made.colour, "title": _plain(made.title)},
        "body": {
            "elements": [
                *({"tag": "markdown", "content": content} for content in _paragraphs(made)),
                *([{"tag": "column_set", "flex_mode": "flow", "columns": columns}] if columns else []),
            ]
        },
    }


def _button(button: Button) -> dict[str, Any]:
    does: dict[str, Any] = (
        {"type": "callback", "value": dict(button.value)}
        if button.value is not None
        else {"type": "open_url", "default_url": button.url}
    )
    return {"tag": "button", "text": _plain(button.text), "type": button.look, "behaviors": [does]}


def _paragraphs(made: Card) -> list[str]:
    called = " ".join(f"<at id={name}></at>" for name in made.calls)
    return [part for part in ("\n".join(made.body), called) if part]


def _plain(text: str) -> dict[str, str]:
    return {"tag": "plain_text", "content": text}


def text(made: Card) -> str:
    """The card as plain text that calls nobody: in text, too, `<at …>` would."""
    lines = cut(made.text, TEXT_LINES, made.more)
    return "\n".join([made.title, *(clean(line, 200) for line in lines)]).replace("<", "‹")
