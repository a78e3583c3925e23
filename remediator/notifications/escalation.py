"""Escalation and reminders: notify again while a problem lasts.

Further channels are notified if nobody acknowledges a problem. That a person is needed is repeated until somebody
acknowledges it, whatever the routes say.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, or_, select

from fleet.inventory.notify import NotificationKind, Notify, Route
from remediator.record import notifications as notification_rows
from remediator.record.schema import alerts, incidents, notifications, stops
from remediator.record.transaction import Transaction

KEYS_PER_QUERY = 10_000
STOPPED_ON_PURPOSE = ("stopped", "stopped-by-hand")  # reasons
PERSON_NEEDED_INTERVAL = 1800.0  # seconds, unless the route has `remind`


@dataclass(frozen=True)
class OpenProblem:
    """An open incident of a service that is down, or an alert that fires without one."""

    kind: NotificationKind
    key: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    is_acknowledged: bool
    incident: int | None = None
    alert: int | None = None
    person_needed: bool = False


@dataclass(frozen=True)
class _Notified:
    """The channels that have a notification with a key, and the time of the first."""

    channels: Sequence[str] = ()
    since: float = 0.0


@dataclass(frozen=True)
class _Due:
    """A notification that a route requires now; channels that have one with this key are left out."""

    problem: OpenProblem
    key: str
    kind: NotificationKind
    channels: Sequence[str]
    content: Mapping[str, Any]


def add_escalations_and_reminders(tx: Transaction) -> bool:
    """Add the escalations and reminders that are due; False if there are none."""
    added = _repeat_person_needed(tx)
    if not any(route.escalate or route.remind for route in tx.inventory.notify.routes):
        return added > 0
    problems = _read_problems(tx)
    for start in range(0, len(problems), KEYS_PER_QUERY):
        added += _escalate(tx, problems[start : start + KEYS_PER_QUERY])
    return added > 0


def _escalate(tx: Transaction, problems: Sequence[OpenProblem]) -> int:
    notify = tx.inventory.notify
    notified = _read_notified(tx, [problem.key for problem in problems])
    due = [
        each
        for problem in problems
        if problem.key in notified
        for route in notify.routes_for(problem.labels, problem.kind)
        for each in _find_due(notify, route, problem, notified[problem.key], tx.now)
    ]
    existing = _read_notified(tx, [each.key for each in due])
    added = 0
    for each in due:
        channels = [name for name in each.channels if name not in existing.get(each.key, _Notified()).channels]
        added += notification_rows.add(
            tx, channels, each.kind, each.key, each.problem.labels, each.content, incident=each.problem.incident,
            alert=each.problem.alert,
        )  # fmt: skip
    return added


def _was_stopped_by_hand() -> ColumnElement[bool]:
    return func.coalesce(incidents.c.reason, "").in_(STOPPED_ON_PURPOSE)


def _was_stopped_through_defib() -> ColumnElement[bool]:
    return incidents.c.service.in_(select(stops.c.service))


def _repeat_person_needed(tx: Transaction) -> int:
    """Repeat that a person is needed where nobody acknowledged it; returns how many notifications were added."""
    # An incident without firing alerts, or whose service responds, needs nobody unless the service goes down again.
    is_down = and_(
        func.coalesce(incidents.c.verb, "") != "nothing", func.coalesce(incidents.c.reason, "") != "already-up"
    )
    is_open = and_(
        incidents.c.state == "open", incidents.c.acknowledged_at.is_(None), is_down, ~_was_stopped_through_defib(),
        ~_was_stopped_by_hand(),
    )  # fmt: skip
    rows: Any = tx.execute(
        select(
            incidents.c.id, incidents.c.labels, incidents.c.person_needed_at, notifications.c.channel,
            func.max(notifications.c.created_at).label("last"),
        )
        .join(notifications, notifications.c.incident_id == incidents.c.id)
        .where(
            is_open, notifications.c.kind == "person_needed",
            notifications.c.created_at >= incidents.c.person_needed_at,
        )
        .group_by(incidents.c.id, notifications.c.channel)
    ).all()  # fmt: skip
    return sum(_repeat_if_due(tx, row) for row in rows if row.channel in tx.inventory.notify.channels)


def _repeat_if_due(tx: Transaction, row: Row[Any]) -> int:
    """Repeat on one channel that a person is needed; returns how many notifications were added."""
    notify, labels = tx.inventory.notify, row.labels or {}
    if tx.now - row.last < notify.reminder_interval(row.channel, labels, "person_needed", PERSON_NEEDED_INTERVAL):
        return 0
    key = notification_rows.person_needed_key(row.id, row.person_needed_at)
    content = tx.scalar(select(notifications.c.content).where(notifications.c.key == key).limit(1)) or {}
    key = f"{key} again {tx.now:.3f}"
    return notification_rows.add(tx, [row.channel], "person_needed", key, labels, content, incident=row.id)


def _read_problems(tx: Transaction) -> list[OpenProblem]:
    is_down = and_(
        incidents.c.state == "open", incidents.c.labels.is_not(None), ~_was_stopped_through_defib(),
        ~_was_stopped_by_hand(),
    )  # fmt: skip
    down = [
        OpenProblem(
            "down", notification_rows.incident_key(row.id), row.labels, {}, row.acknowledged_at is not None, row.id,
            person_needed=row.person_needed_at is not None and row.acknowledged_at is None,
        )
        for row in tx.execute(select(incidents).where(is_down))
    ]  # fmt: skip
    firing = (
        select(alerts, incidents.c.acknowledged_at.label("incident_acknowledged_at"))
        .join(incidents, alerts.c.incident_id == incidents.c.id, isouter=True)
        .where(
            alerts.c.status == "firing",
            or_(alerts.c.incident_id.is_(None), and_(incidents.c.labels.is_(None), ~_was_stopped_through_defib())),
        )
    )
    other_alerts = [
        OpenProblem(
            "alert", notification_rows.alert_key(row.fingerprint, row.starts_at, row.times), row.labels,
            row.annotations, (row.acknowledged_at or row.incident_acknowledged_at) is not None, row.incident_id, row.id,
        )
        for row in tx.execute(firing)
    ]  # fmt: skip
    return [*down, *other_alerts]


def _read_notified(tx: Transaction, keys: Sequence[str]) -> dict[str, _Notified]:
    """Return by key which channels were notified."""
    notified: dict[str, _Notified] = {}
    query = select(notifications.c.key, notifications.c.channel, notifications.c.created_at)
    for row in tx.execute(query.where(notifications.c.key.in_(keys)).order_by(notifications.c.id)):
        earlier = notified.get(row.key, _Notified(since=row.created_at))
        notified[row.key] = _Notified([*earlier.channels, row.channel], min(earlier.since, row.created_at))
    return notified


def _find_due(notify: Notify, route: Route, problem: OpenProblem, notified: _Notified, now: float) -> Iterator[_Due]:
    """Return the escalations and the reminder that a route requires now."""
    content = {"annotations": dict(problem.annotations)}
    if route.escalate is not None and not problem.is_acknowledged:
        steps = int((now - notified.since) // route.escalate.after)
        waited = {"unacknowledged": steps * route.escalate.after}
        if steps:
            yield _Due(problem, problem.key, problem.kind, route.escalate.channels[:steps], content | waited)
    count = int((now - notified.since) // route.remind) if route.remind is not None else 0
    if count and not problem.person_needed:  # person_needed has its own repetition
        channels = [name for name in notified.channels if name in route.channels]
        reminded = notify.follow_up_channels(channels, problem.labels, "reminder")
        yield _Due(problem, f"reminder {count} of {problem.key}", "reminder", reminded, content)
