"""What people read: stories become a card, and a card becomes Feishu's JSON, no larger than Feishu takes.

Custom bots get cards of version 1.0, which ignores what it does not know; app bots get version 2.0, whose buttons can
answer.
https://open.feishu.cn/document/feishu-cards/card-json-v2-structure
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from fleet.notify import Answer, Severity
from remediator.notices.outbox import Form
from remediator.notices.stories import State, Story
from remediator.notices.templates import Templates, clean

SIZE_LIMIT = 19_000  # bytes of UTF-8; Feishu takes 20 KB, signing and masking add some
TEXT_LINES = 25
# What may call people: that somebody is needed.
CALLING: frozenset[State] = frozenset(
    {"down", "acting", "could_not_restart", "gave_up", "alert", "approval", "blind", "reminder", "watchdog_missing"}
)
_OVER = ("recovered", "alert_over", "unobserved")
_SEVERITY_COLOURS = {"critical": "red", "warning": "orange", "info": "blue"}
_COLOURS: Mapping[State, str] = {
    "acting": "yellow", "watched": "turquoise", "restarted": "orange", "could_not_restart": "red", "gave_up": "carmine",
    "approval": "violet", "blind": "red", "recovered": "green", "unobserved": "grey", "alert_over": "green",
    "test": "blue", "watchdog_missing": "red", "watchdog_back": "green", "automation_off": "orange",
    "automation_on": "green",
}  # fmt: skip
_LOOK: Mapping[Answer, str] = {"acknowledge": "primary", "restart": "danger", "automation": "danger"}


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


def card(
    stories: Sequence[Story],
    form: Form,
    templates: Templates,
    mention: Mapping[Severity, Sequence[str]],
    *,
    answers: bool,
    notice: int = 0,
    told_at: float = 0.0,
) -> Card:
    """The card of one story, or of several. Raises TemplateError.

    `answers` says whether its buttons can answer; `notice` is what it tells first, made at `told_at` by the record's
    clock.
    """
    first, words = stories[0], templates.words
    return Card(
        templates.title(stories, form),
        _colour(stories),
        tuple(templates.body(stories, form)),
        tuple(templates.body(stories, form, plain=True)),
        words["more"],
        tuple(_calls(stories, mention)),
        (*(_answers(stories, form, words, notice, told_at) if answers else ()), *_links(first, form, words)),
    )


def _colour(stories: Sequence[Story]) -> str:
    """That of the gravest: green only once all are over."""
    lasting = [each for each in stories if each.state not in _OVER]
    worst = lasting[0] if lasting else stories[0]
    return _COLOURS.get(worst.state) or _SEVERITY_COLOURS.get(worst.severity, "blue")


def _calls(stories: Sequence[Story], mention: Mapping[Severity, Sequence[str]]) -> list[str]:
    """Whom the card calls: nobody once somebody has acknowledged, or once it is over."""
    names: dict[str, None] = {}
    for story in stories:
        if story.state in CALLING and story.acknowledged is None and story.lasted is None:
            for name in mention.get(cast("Severity", story.severity), ()):
                names |= dict.fromkeys([each.open_id for each in story.on_call] if name == "on_call" else [name])
    return list(names)


def _answers(
    stories: Sequence[Story], form: Form, words: Mapping[str, Any], notice: int, told_at: float
) -> list[Button]:
    found = stories[0].answers
    if form != "one":  # many are looked after by one press
        about = {"notice": notice, "since": int(told_at)}
        found = {"acknowledge": about} if any("acknowledge" in each.answers for each in stories) else {}
    return [
        Button(words["answers"][answer], value={"answer": answer, **about}, look=_LOOK.get(answer, "default"))
        for answer, about in found.items()
    ]


def _links(story: Story, form: Form, words: Mapping[str, Any]) -> list[Button]:
    shown = dict(story.links)
    if form != "one":  # what is about the first alone is of no use
        shown = {name: url.partition("incidents/")[0] for name, url in shown.items() if name in ("runbook", "console")}
    elif story.state in _OVER:
        shown.pop("silence", None)
    return [Button(words["links"][name], url=url) for name, url in shown.items()]


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
