"""Feishu's documented rules for cards, and cards as HTML, for the simulator."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any

TEMPLATES = frozenset(
    {"blue", "wathet", "turquoise", "green", "yellow", "orange", "red", "carmine", "violet", "purple", "indigo", "grey"}
)
ELEMENTS_LIMIT = 200
MENTION = re.compile(r"<at\s+[^>]*>")
VALID_MENTION = re.compile(r"<at id=(all|ou_[0-9A-Za-z_-]+)>")
_KNOWN: Mapping[str, frozenset[str]] = {
    "card": frozenset({"schema", "config", "header", "body", "card_link"}),
    "config": frozenset({"update_multi", "width_mode", "enable_forward", "summary", "streaming_mode"}),
    "header": frozenset({"title", "subtitle", "template", "text_tag_list", "icon", "padding"}),
    "body": frozenset({"elements", "direction", "padding", "vertical_spacing", "horizontal_spacing"}),
    "markdown": frozenset({"tag", "content", "text_align", "text_size", "icon", "margin", "element_id"}),
    "column_set": frozenset({"tag", "flex_mode", "columns", "background_style", "horizontal_spacing", "margin"}),
    "column": frozenset({"tag", "width", "weight", "elements", "vertical_align", "vertical_spacing"}),
    "button": frozenset({"tag", "text", "type", "size", "width", "behaviors", "confirm", "disabled", "name"}),
    "hr": frozenset({"tag", "margin"}),
}


def find_mentions(value: Any) -> list[str]:
    """Return every mention in a card or a text."""
    return MENTION.findall(json.dumps(value, ensure_ascii=False).replace('\\"', '"'))


def check_version_1(card: Any) -> str:
    """Return the error of a card of version 1.0, or an empty string; unknown properties are ignored."""
    if not isinstance(card, dict) or not isinstance(card.get("elements"), list):
        return "no elements"
    if not isinstance(card.get("header", {}).get("title", {}).get("content"), str):
        return "no title"
    return ""


def check_version_2(card: Any) -> str:
    """Return the error of a card of version 2.0, or an empty string; unknown properties are errors."""
    if not isinstance(card, dict) or card.get("schema") != "2.0":
        return "schema is not 2.0"
    body = card.get("body")
    if not isinstance(body, dict) or not isinstance(body.get("elements"), list):
        return "no body.elements"
    for name in ("card", "config", "header", "body"):
        unknown = set(card if name == "card" else card.get(name, {})) - _KNOWN[name]
        if unknown:
            return f"unknown property {', '.join(sorted(unknown))} of {name}"
    if card["header"].get("template", "blue") not in TEMPLATES:
        return "unknown template"
    if _count_elements(body["elements"]) > ELEMENTS_LIMIT:
        return "more than 200 elements"
    return next(filter(None, map(_check_element, body["elements"])), "")


def _check_element(element: Any) -> str:
    tag = str(element.get("tag")) if isinstance(element, dict) else ""
    if tag not in _KNOWN:
        return f"unsupported tag {tag}"
    unknown = set(element) - _KNOWN[tag]
    if unknown:
        return f"unknown property {', '.join(sorted(unknown))} of {tag}"
    if tag == "markdown" and not isinstance(element.get("content"), str):
        return "no content"
    if tag == "button" and not element.get("behaviors"):
        return "a button without behaviors"
    inner = element.get("columns" if tag == "column_set" else "elements", [])
    return next(filter(None, map(_check_element, inner)), "")


def _count_elements(elements: list[Any]) -> int:
    inner = (each.get("columns") or each.get("elements") or [] for each in elements if isinstance(each, dict))
    return len(elements) + sum(_count_elements(each) for each in inner)


def find_buttons(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every button of a card of either version."""
    rows = []
    left = _elements(card)
    while left:
        element = left.pop(0)
        if element.get("tag") == "button":
            rows.append(element)
        left += [*element.get("actions", []), *element.get("columns", []), *element.get("elements", [])]
    return rows


def _elements(card: Mapping[str, Any]) -> list[Any]:
    return [*card.get("elements", []), *card.get("body", {}).get("elements", [])]


def _contents(card: Mapping[str, Any]) -> list[str]:
    """Return the text of each element that has any."""
    texts = (each.get("content") or each.get("text", {}).get("content", "") for each in _elements(card))
    return [text for text in texts if text]


def extract_text(card: Mapping[str, Any]) -> str:
    """Return the text of a card, its title first."""
    return "\n".join([card["header"]["title"]["content"], *map(html.unescape, _contents(card))])


def render_html(card: Mapping[str, Any], press: str = "") -> str:
    """Return a card as HTML; its buttons post to URLs that begin with `press`."""
    shown = "".join(f"<p>{_render_markup(each)}</p>" for each in _contents(card))
    pressed = "".join(_render_button(each, press) for each in find_buttons(card))
    title, colour = card["header"]["title"]["content"], card["header"].get("template", "blue")
    head = f"<h2 class={html.escape(colour)}>{html.escape(title)}</h2>"
    return f"<article>{head}{shown}<form method=post>{pressed}</form></article>"


def _render_button(button: Mapping[str, Any], press: str) -> str:
    look, text = html.escape(button.get("type", "default")), html.escape(button["text"]["content"])
    does = button.get("behaviors", [{"default_url": button.get("url", "")}])[0]
    if "value" in does:
        return f'<button class={look} formaction="{press}{html.escape(does["value"]["answer"])}">{text}</button>'
    return f'<a class={look} href="{html.escape(does["default_url"])}">{text}</a>'


def _render_markup(content: str) -> str:
    """Convert bold text and mentions to HTML, and escape everything else."""
    parts = re.split(r"\*\*(.+?)\*\*", content)
    shown = "".join(
        f"<b>{html.escape(html.unescape(part))}</b>" if index % 2 else html.escape(html.unescape(part))
        for index, part in enumerate(parts)
    )
    shown = re.sub(r"&lt;at id=(\w+)&gt;&lt;/at&gt;", r"<i>@\1</i>", shown)
    return shown.replace("\n", "<br>")
