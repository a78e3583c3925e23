"""What is told again while a trouble lasts: to further channels where nobody acknowledged, and as a reminder.

That a person is needed is told again and again, whatever the routes say, until somebody has acknowledged it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, and_, func, or_, select

from fleet.inventory.notify import NotificationKind, Notify, Route
from remediator.record import notifications as notification_rows
from remediator.record.schema import alerts, incidents, notifications, stops
from remediator.record.transaction import Transaction

AT_ONCE = 10_000  # abouts that one query looks up
_UP = "already-up"
ON_PURPOSE = ("stopped", "stopped-by-hand")  # reasons
PERSON_NEEDED_EVERY = 1800.0  # where the route says nothing of reminders


@dataclass(frozen=True)
class Trouble:
    """What goes on, and whether somebody has said that they look after it."""

    kind: NotificationKind
    about: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    acknowledged: bool
    incident: int | None = None
    alert: int | None = None
    person_needed: bool = False


def notify_again(tx: Transaction) -> bool:
    """Tell what is due; whether there was something."""
    written = _call_again(tx)
    if not any(route.escalate or route.remind for route in tx.inventory.notify.routes):
        return written > 0
    for some in _batched(_troubles(tx)):
        told = _told(tx, [trouble.about for trouble in some])
        due = [
            each
            for trouble in some
            if trouble.about in told
            for route in tx.inventory.notify.routes_for(trouble.labels, trouble.kind)
            for each in _due(tx.inventory.notify, route, trouble, told[trouble.about], tx.now)
        ]
        known = _told(tx, [about for _, about, _, _, _ in due])
        for trouble, about, kind, channels, content in due:
            left = [channel for channel in channels if channel not in known.get(about, ((), 0.0))[0]]
            written += notification_rows.add(
                tx, left, kind, about, trouble.labels, content,
                incident=trouble.incident, alert=trouble.alert,
            )  # fmt: skip
    return written > 0


def _call_again(tx: Transaction) -> int:
    """Tell again that a person is needed, where nobody has acknowledged it; how many notices were written."""
    # One that answers, or whose alerts are over, is watched: it needs nobody unless it goes down again.
    is_down = and_(func.coalesce(incidents.c.verb, "") != "nothing", func.coalesce(incidents.c.reason, "") != _UP)
    on_purpose = incidents.c.service.in_(select(stops.c.service))
    by_hand = func.coalesce(incidents.c.reason, "").in_(ON_PURPOSE)
    needed = and_(
        incidents.c.state == "open", incidents.c.acknowledged_at.is_(None), is_down, ~on_purpose, ~by_hand
    )  # fmt: skip
    told: Any = tx.execute(
        select(
            incidents.c.id, incidents.c.labels, incidents.c.person_needed_at, notifications.c.channel,
            func.max(notifications.c.created_at).label("last"),
        )
        .join(notifications, notifications.c.incident_id == incidents.c.id)
        .where(
            needed, notifications.c.kind == "person_needed",
            notifications.c.created_at >= incidents.c.person_needed_at,
        )
        .group_by(incidents.c.id, notifications.c.channel)
    ).all()  # fmt: skip
    return sum(_call_again_in(tx, row) for row in told if row.channel in tx.inventory.notify.channels)


def _call_again_in(tx: Transaction, row: Row[Any]) -> int:
    """Tell one channel again, if it is time; how many notices were written."""
    labels = row.labels or {}
    if tx.now - row.last < tx.inventory.notify.reminder_interval(
        row.channel, labels, "person_needed", PERSON_NEEDED_EVERY
    ):
        return 0
    about = notification_rows.person_needed_key(row.id, row.person_needed_at)
    content = tx.scalar(select(notifications.c.content).where(notifications.c.about == about).limit(1)) or {}
    return notification_rows.add(
        tx, [row.channel], "person_needed", f"{about} again {tx.now:.3f}", labels, content,
        incident=row.id,
    )  # fmt: skip


def _troubles(tx: Transaction) -> list[Trouble]:
    """Open incidents of services that are down, and alerts that fire of what is not down."""
    on_purpose = incidents.c.service.in_(select(stops.c.service))
    by_hand = func.coalesce(incidents.c.reason, "").in_(ON_PURPOSE)
    down = select(incidents).where(incidents.c.state == "open", incidents.c.labels.is_not(None), ~on_purpose, ~by_hand)
    of_services = [
        Trouble(
            "down", notification_rows.incident_key(row.id), row.labels, {}, row.acknowledged_at is not None, row.id,
            person_needed=row.person_needed_at is not None and row.acknowledged_at is None,
        )
        for row in tx.execute(down)
    ]  # fmt: skip
    firing = (
        select(alerts, incidents.c.acknowledged_at.label("incident_acknowledged_at"))
        .join(incidents, alerts.c.incident_id == incidents.c.id, isouter=True)
        .where(
            alerts.c.status == "firing",
            or_(alerts.c.incident_id.is_(None), and_(incidents.c.labels.is_(None), ~on_purpose)),
        )
    )
    others = [
        Trouble(
            "alert", notification_rows.alert_key(row.fingerprint, row.starts_at, row.times), row.labels,
            row.annotations,
            (row.acknowledged_at or row.incident_acknowledged_at) is not None, row.incident_id, row.id,
        )
        for row in tx.execute(firing)
    ]  # fmt: skip
    return [*of_services, *others]


def _told(tx: Transaction, abouts: Sequence[str]) -> dict[str, tuple[list[str], float]]:
    """By what it was about: the channels that were told, and when first."""
    found: dict[str, tuple[list[str], float]] = {}
    query = select(notifications.c.about, notifications.c.channel, notifications.c.created_at).where(
        notifications.c.about.in_(abouts)
    )
    for row in tx.execute(query.order_by(notifications.c.id)):
        channels, first = found.setdefault(row.about, ([], row.created_at))
        channels.append(row.channel)
        found[row.about] = (channels, min(first, row.created_at))
    return found


def _due(
    notify: Notify, route: Route, trouble: Trouble, told: tuple[list[str], float], now: float
) -> Iterator[tuple[Trouble, str, NotificationKind, list[str], dict[str, Any]]]:
    """(trouble, about, kind, channels, content) of what a route says is to be told by now."""
    channels, at = told
    content = {"annotations": dict(trouble.annotations)}
    if route.escalate is not None and not trouble.acknowledged:
        steps = int((now - at) // route.escalate.after)
        waited = {"unacknowledged": steps * route.escalate.after}
        if steps:
            yield trouble, trouble.about, trouble.kind, route.escalate.channels[:steps], content | waited
    times = int((now - at) // route.remind) if route.remind is not None else 0
    if times and not trouble.person_needed:  # that is told again by itself
        begun = [name for name in channels if name in route.channels]
        reminded = notify.follow_up_channels(begun, trouble.labels, "reminder")
        yield trouble, f"reminder {times} of {trouble.about}", "reminder", reminded, content


def _batched(troubles: list[Trouble]) -> Iterator[list[Trouble]]:
    return (troubles[start : start + AT_ONCE] for start in range(0, len(troubles), AT_ONCE))
