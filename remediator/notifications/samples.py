"""Made-up stories, one for each state: what templates are checked with, and what a test of a channel tells."""

from collections.abc import Iterator
from datetime import datetime
from typing import get_args
from zoneinfo import ZoneInfo

from fleet.inventory.model import Inventory, Service
from fleet.inventory.notify import NotificationKind, Person
from remediator.notifications import rendering
from remediator.notifications.outbox import Form
from remediator.notifications.reader import Attempt, State, Story, links

STATES: tuple[State, ...] = (*get_args(NotificationKind), "acting", "watched", "test")
_OVER = ("recovered", "unobserved", "alert_over")


def story(state: State, inventory: Inventory, service: Service | None, at: datetime) -> Story:
    """A story in which everything is known that can be."""
    labels = {"alertname": "ServiceDown", "severity": "critical", "team": "docs", "instance": "host:9100"}
    if service is not None:
        labels |= {"service": service.id, "host": service.host}
    annotations = {"summary": "No answer", "description": "Nothing came within 10 s", "runbook_url": "https://wiki/x"}
    attempts = [
        Attempt("restart", "failed", "exit status 1", "", at, None),
        Attempt("recreate", "succeeded", "", "ann", at, 3.2),
    ]
    return Story(
        state, "critical", labels, annotations, service, at, 41.0 if state in _OVER else None, 4000.0,
        [Person(open_id="ou_somebody", name="Somebody")],
        {
            "probe": "timeout: no answer within 10 s", "why": "exit status 1", "output": "line\nline", "who": "ann",
            "seconds": 3.2, "action": 3, "kind": "recreate", "reason": "attempts-used-up", "unacknowledged": 600.0,
            "until": at,
        },
        attempts, 2, (2, 3), ("wait", "storm", "3 of 4"), at, ("maintenance", "host h, by ann: disks"), False,
        "defib", ("ann", at), ["ServiceDown", "ServiceSlow"], 7,
        links(inventory, service, labels, annotations, 7), {"acknowledge": {"incident": 7}},
    )  # fmt: skip


def check(inventory: Inventory) -> Iterator[str]:
    """What is wrong with the user's templates, once for each place."""
    own = inventory.notify.templates
    if own is None:
        return
    told: set[str] = set()
    for wrong in _wrongs(inventory):
        said = rendering.fault(wrong, own)
        if said not in told:
            told.add(said)
            yield said


def _wrongs(inventory: Inventory) -> Iterator[Exception]:
    try:
        made = rendering.of(inventory)
    except Exception as error:  # noqa: BLE001 - an expression in a template may do anything wrong
        yield error
        return
    at = datetime.now(ZoneInfo(inventory.notify.timezone))
    forms: tuple[Form, ...] = get_args(Form)
    for service in (None, next(iter(inventory.services.values()), None)):
        for state in STATES:
            for form in forms:
                stories = [story(state, inventory, service, at)] * (1 if form == "one" else 3)
                try:
                    made.title(stories, form)
                    made.body(stories, form)
                    made.body(stories, form, plain=True)
                except Exception as error:  # noqa: BLE001
                    yield error
