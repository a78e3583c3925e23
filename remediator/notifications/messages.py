"""Render notifications as cards: title, colour, lines, mentions and buttons."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fleet.inventory.notify import ButtonAction, ChannelOptions, Severity
from remediator.notifications.cards import Button, ButtonStyle, Card, Colour
from remediator.notifications.content import Notification, NotificationState
from remediator.notifications.outbox import MessageForm
from remediator.notifications.rendering import Templates
from remediator.record.notifications import severity_rank

# States in which a person may be needed.
MENTIONING: frozenset[NotificationState] = frozenset(
    {
        "down", "acting", "could_not_restart", "person_needed", "alert", "approval", "blind", "reminder", "storm",
        "watchdog_missing",
    }
)  # fmt: skip
MENTIONING_ALL: frozenset[NotificationState] = frozenset({"person_needed"})
STOPPED = ("stopped", "stopped-by-hand")  # reasons

_SEVERITY_COLOURS: Mapping[str, Colour] = {"critical": "red", "warning": "orange", "info": "blue"}
_STATE_COLOURS: Mapping[NotificationState, Colour] = {
    "acting": "yellow", "watched": "turquoise", "restarted": "orange", "could_not_restart": "red",
    "person_needed": "dark red", "approval": "violet", "storm": "red", "waiting": "light blue", "blind": "red",
    "stopped_by_hand": "grey", "recovered": "green", "unobserved": "grey", "alert_over": "green",
    "test": "blue", "watchdog_missing": "red", "watchdog_back": "green", "automation_off": "orange",
    "automation_on": "green", "report": "blue",
}  # fmt: skip
# From the most urgent one.
_COLOUR_ORDER: Sequence[Colour] = (
    "dark red", "red", "orange", "violet", "yellow", "blue", "light blue", "turquoise", "grey", "green",
)  # fmt: skip
_BUTTON_STYLES: Mapping[ButtonAction, ButtonStyle] = {
    "acknowledge": "primary", "restart": "danger", "automation": "danger",
}  # fmt: skip


def render_card(
    notifications: Sequence[Notification],
    form: MessageForm,
    templates: Templates,
    options: ChannelOptions | None = None,
    *,
    is_update: bool = False,
    first_id: int = 0,
    created_at: float = 0.0,
) -> Card:
    """Render the card of one or several notifications for a channel. Raises TemplateError.

    An update mentions nobody. `first_id` and `created_at` identify the message's first notification for buttons.
    """
    first = notifications[0]
    words = templates.words
    if first.is_of_host_alert or first.is_of_stuck_agent:
        words = templates.host_alert_words if first.is_of_host_alert else templates.stuck_agent_words
    lasting = [each for each in notifications if not each.has_ended] or [first]
    buttons = _links(first, form, words)
    if options is not None and options.has_buttons:
        buttons = [*_buttons(notifications, form, words, first_id, created_at), *buttons]
    return Card(
        templates.render_title(notifications, form),
        lasting[0].state,
        min((each.severity for each in lasting), key=severity_rank),
        min(map(_colour, lasting), key=_COLOUR_ORDER.index),
        tuple(templates.render_body(notifications, form)),
        words["more"],
        () if options is None or is_update else tuple(_mentions(notifications, options)),
        tuple(buttons),
    )


def _colour(notification: Notification) -> Colour:
    return _STATE_COLOURS.get(notification.state) or _SEVERITY_COLOURS.get(notification.severity, "blue")


def _mentions(notifications: Sequence[Notification], options: ChannelOptions) -> list[str]:
    """Return who is mentioned: nobody for what is acknowledged, has ended or is quiet; `all` if a person is needed."""
    names: dict[str, None] = {}
    for each in notifications:
        if each.state not in MENTIONING or each.quiet or each.acknowledged is not None or each.duration is not None:
            continue
        for name in options.mentions(cast("Severity", each.severity)):
            if name == "on_call":
                names |= dict.fromkeys(person.open_id for person in each.on_call)
            elif name != "all" or each.state in MENTIONING_ALL:
                names[name] = None
    return list(names)


def _buttons(
    notifications: Sequence[Notification], form: MessageForm, words: Mapping[str, Any], first_id: int, created_at: float
) -> list[Button]:
    buttons = notifications[0].buttons
    if form != "one":  # one button acknowledges everything in the message
        ids = {"notification": first_id, "since": int(created_at)}
        buttons = {"acknowledge": ids} if any("acknowledge" in each.buttons for each in notifications) else {}
    # To restart a service that was stopped on purpose is to start it.
    is_stopped = notifications[0].decision[1] in STOPPED
    labels = {**words["answers"], **({"restart": words["start"]} if is_stopped else {})}
    return [
        Button(labels[action], value={"answer": action, **ids}, style=_BUTTON_STYLES.get(action, "default"))
        for action, ids in buttons.items()
    ]


def _links(notification: Notification, form: MessageForm, words: Mapping[str, Any]) -> list[Button]:
    links = dict(notification.links)
    if form != "one":  # only links that are not about the first notification alone
        links = {name: url.partition("incidents/")[0] for name, url in links.items() if name in ("runbook", "console")}
    elif notification.has_ended:
        links.pop("silence", None)
    return [Button(words["links"][name], url=url) for name, url in links.items()]
