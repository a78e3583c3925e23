"""What people read: the stories of a message become a card."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fleet.inventory.notify import ButtonAction, Severity
from remediator.notifications.channels.feishu_cards import Button, Card
from remediator.notifications.outbox import Form
from remediator.notifications.reader import State, Story
from remediator.notifications.rendering import Templates

# What may call people: that somebody is needed.
CALLING: frozenset[State] = frozenset(
    {
        "down", "acting", "could_not_restart", "person_needed", "alert", "approval", "blind", "reminder",
        "watchdog_missing",
    }
)  # fmt: skip
STOPPED = ("stopped", "stopped-by-hand")  # reasons
CALLING_ALL: frozenset[State] = frozenset({"person_needed"})
_OVER = ("recovered", "alert_over", "unobserved")
_SEVERITY_COLOURS = {"critical": "red", "warning": "orange", "info": "blue"}
_COLOURS: Mapping[State, str] = {
    "acting": "yellow", "watched": "turquoise", "restarted": "orange", "could_not_restart": "red",
    "person_needed": "carmine", "approval": "violet", "waiting": "wathet", "blind": "red",
    "stopped_by_hand": "grey", "recovered": "green", "unobserved": "grey", "alert_over": "green",
    "test": "blue", "watchdog_missing": "red", "watchdog_back": "green", "automation_off": "orange",
    "automation_on": "green",
}  # fmt: skip
_LOOK: Mapping[ButtonAction, str] = {"acknowledge": "primary", "restart": "danger", "automation": "danger"}


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
    """Whom the card calls: nobody once somebody has acknowledged, or once it is over, or where it is to be quiet.

    All are called where a person is needed, and for nothing else.
    """
    names: dict[str, None] = {}
    for story in stories:
        if story.state not in CALLING or story.quiet or story.acknowledged is not None or story.lasted is not None:
            continue
        for name in mention.get(cast("Severity", story.severity), ()):
            if name == "on_call":
                names |= dict.fromkeys(each.open_id for each in story.on_call)
            elif name != "all" or story.state in CALLING_ALL:
                names[name] = None
    return list(names)


def _answers(
    stories: Sequence[Story], form: Form, words: Mapping[str, Any], notice: int, told_at: float
) -> list[Button]:
    found = stories[0].answers
    if form != "one":  # many are looked after by one press
        about = {"notice": notice, "since": int(told_at)}
        found = {"acknowledge": about} if any("acknowledge" in each.answers for each in stories) else {}
    # To restart what does not run on purpose is to start it.
    named = {**words["answers"], **({"restart": words["start"]} if stories[0].decision[1] in STOPPED else {})}
    return [
        Button(named[answer], value={"answer": answer, **about}, look=_LOOK.get(answer, "default"))
        for answer, about in found.items()
    ]


def _links(story: Story, form: Form, words: Mapping[str, Any]) -> list[Button]:
    shown = dict(story.links)
    if form != "one":  # what is about the first alone is of no use
        shown = {name: url.partition("incidents/")[0] for name, url in shown.items() if name in ("runbook", "console")}
    elif story.state in _OVER:
        shown.pop("silence", None)
    return [Button(words["links"][name], url=url) for name, url in shown.items()]
