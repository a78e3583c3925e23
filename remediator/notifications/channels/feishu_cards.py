"""Cards in Feishu's JSON, within its size limit.

Custom bots get cards of version 1.0; app bots get version 2.0, whose buttons can be pressed.
https://open.feishu.cn/document/feishu-cards/card-json-v2-structure
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from remediator.notifications.cards import Button, Card, Line, Span, to_single_line

SIZE_LIMIT = 19_000  # bytes of UTF-8; Feishu permits 20 KB, and signing and redaction may add some
PLAIN_LINES = 25
PLAIN_LINE_LIMIT = 200  # characters
_COLOURS = {"dark red": "carmine", "light blue": "wathet"}
_ENTITIES = str.maketrans({character: f"&#{ord(character)};" for character in "*<>[]()\\_~`&"})


def escape_markup(text: str) -> str:
    """Return text that a card shows literally: nothing in it is markup, a mention or a link."""
    return text.translate(_ENTITIES)


def format_line(line: Line) -> str:
    """Return a line as markup, in which only labels and template text are not literal."""
    return "".join(map(_format_span, line.spans))


def _format_span(span: Span) -> str:
    if span.kind == "template":
        return span.text
    return f"**{escape_markup(span.text)}**" if span.kind == "label" else escape_markup(span.text)


def simplify_card(card: Card) -> Card:
    """Return the card without what Feishu may reject: mentions, buttons, many lines."""
    return replace(card.first_lines(PLAIN_LINES), mentions=(), buttons=())


def shorten_to_fit(card: Card, wrap: Callable[[Card], dict[str, Any]]) -> dict[str, Any]:
    """Return what `wrap` makes of a card, with as many of its lines as the size limit permits."""
    wrapped = wrap(card)
    if message_size(wrapped) <= SIZE_LIMIT:
        return wrapped
    low, high = 0, len(card.lines)  # `low` lines fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if message_size(wrap(card.first_lines(middle))) <= SIZE_LIMIT:
            low = middle
        else:
            high = middle
    shortest = wrap(card.first_lines(low))
    if message_size(shortest) <= SIZE_LIMIT:
        return shortest
    return wrap(replace(card.first_lines(0), mentions=(), buttons=()))


def message_size(message: Mapping[str, Any]) -> int:
    """Return the size of a message in bytes, as it is sent."""
    return len(json.dumps(message, ensure_ascii=False).encode())


def render_version_1(card: Card) -> dict[str, Any]:
    """Return a card of version 1.0, whose buttons are links."""
    buttons = [
        {"tag": "button", "text": _plain_text(button.text), "url": button.url, "type": button.style}
        for button in card.buttons
        if button.url
    ]
    return {
        "config": {"wide_screen_mode": True},
        "header": _header(card),
        "elements": [
            *({"tag": "div", "text": {"tag": "lark_md", "content": content}} for content in _paragraphs(card)),
            *([{"tag": "action", "actions": buttons}] if buttons else []),
        ],
    }


def render_version_2(card: Card) -> dict[str, Any]:
    """Return a card of version 2.0, which can be updated, and whose buttons may send a value back."""
    columns = [{"tag": "column", "width": "auto", "elements": [_button(button)]} for button in card.buttons]
    return {
        "schema": "2.0",
        "config": {"update_multi": True},
        "header": _header(card),
        "body": {
            "elements": [
                *({"tag": "markdown", "content": content} for content in _paragraphs(card)),
                *([{"tag": "column_set", "flex_mode": "flow", "columns": columns}] if columns else []),
            ]
        },
    }


def render_plain_text(card: Card) -> str:
    """Return the card as plain text."""
    lines = [to_single_line(line.plain, PLAIN_LINE_LIMIT) for line in card.first_lines(PLAIN_LINES).lines]
    return _without_mentions("\n".join([card.title, *lines]))


def _header(card: Card) -> dict[str, Any]:
    return {
        "template": _COLOURS.get(card.colour, card.colour),
        "title": _plain_text(_without_mentions(card.title)),
    }


def _button(button: Button) -> dict[str, Any]:
    behavior: dict[str, Any] = (
        {"type": "callback", "value": dict(button.value)}
        if button.value is not None
        else {"type": "open_url", "default_url": button.url}
    )
    return {"tag": "button", "text": _plain_text(button.text), "type": button.style, "behaviors": [behavior]}


def _paragraphs(card: Card) -> list[str]:
    body = "\n".join(map(format_line, card.lines))
    mentions = " ".join(f"<at id={name}></at>" for name in card.mentions)
    return [paragraph for paragraph in (body, mentions) if paragraph]


def _plain_text(text: str) -> dict[str, str]:
    return {"tag": "plain_text", "content": text}


def _without_mentions(text: str) -> str:
    """Return text in which `<at …>`, which mentions people in plain text and titles, too, is literal."""
    return text.replace("<", "‹")
