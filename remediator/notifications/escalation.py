"""What is told again while a trouble lasts: to further channels where nobody acknowledged, and as a reminder.

That a person is needed is told again and again, whatever the routes say, until somebody has acknowledged it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, func, or_, select

from fleet.inventory.notify import NotificationKind, Notify, Route
from remediator.notifications import outbox
from remediator.record.schema import alerts, incidents, notices, stops

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


def look_after(connection: Connection, notify: Notify, now: float) -> bool:
    """Tell what is due; whether there was something."""
    written = _call_again(connection, notify, now)
    if not any(route.escalate or route.remind for route in notify.routes):
        return written > 0
    for some in _batched(_troubles(connection)):
        told = _told(connection, [trouble.about for trouble in some])
        due = [
            each
            for trouble in some
            if trouble.about in told
            for route in notify.routes_for(trouble.labels, trouble.kind)
            for each in _due(notify, route, trouble, told[trouble.about], now)
        ]
        known = _told(connection, [about for _, about, _, _, _ in due])
        for trouble, about, kind, channels, content in due:
            left = [channel for channel in channels if channel not in known.get(about, ((), 0.0))[0]]
            written += outbox.put(
                connection, notify, left, kind, about, trouble.labels, content, now,
                incident=trouble.incident, alert=trouble.alert,
            )  # fmt: skip
    return written > 0


def _call_again(connection: Connection, notify: Notify, now: float) -> int:
    """Tell again that a person is needed, where nobody has acknowledged it; how many notices were written."""
    # One that answers, or whose alerts are over, is watched: it needs nobody unless it goes down again.
    is_down = and_(func.coalesce(incidents.c.verb, "") != "nothing", func.coalesce(incidents.c.reason, "") != _UP)
    on_purpose = incidents.c.service.in_(select(stops.c.service))
    by_hand = func.coalesce(incidents.c.reason, "").in_(ON_PURPOSE)
    needed = and_(
        incidents.c.state == "open", incidents.c.acknowledged_at.is_(None), is_down, ~on_purpose, ~by_hand
    )  # fmt: skip
    told: Any = connection.execute(
        select(
            incidents.c.id, incidents.c.labels, incidents.c.person_needed_at, notices.c.channel,
            func.max(notices.c.created_at).label("last"),
        )
        .join(notices, notices.c.incident_id == incidents.c.id)
        .where(needed, notices.c.kind == "person_needed", notices.c.created_at >= incidents.c.person_needed_at)
        .group_by(incidents.c.id, notices.c.channel)
    ).all()  # fmt: skip
    return sum(_call_again_in(connection, notify, row, now) for row in told if row.channel in notify.channels)


def _call_again_in(connection: Connection, notify: Notify, row: Row[Any], now: float) -> int:
    """Tell one channel again, if it is time; how many notices were written."""
    labels = row.labels or {}
    if now - row.last < notify.reminder_interval(row.channel, labels, "person_needed", PERSON_NEEDED_EVERY):
        return 0
    about = outbox.about_person_needed(row.id, row.person_needed_at)
    content = connection.scalar(select(notices.c.content).where(notices.c.about == about).limit(1)) or {}
    return outbox.put(
        connection, notify, [row.channel], "person_needed", f"{about} again {now:.3f}", labels, content, now,
        incident=row.id,
    )  # fmt: skip


def _troubles(connection: Connection) -> list[Trouble]:
    """Open incidents of services that are down, and alerts that fire of what is not down."""
    on_purpose = incidents.c.service.in_(select(stops.c.service))
    by_hand = func.coalesce(incidents.c.reason, "").in_(ON_PURPOSE)
    down = select(incidents).where(incidents.c.state == "open", incidents.c.labels.is_not(None), ~on_purpose, ~by_hand)
    of_services = [
        Trouble(
            "down", outbox.about_incident(row.id), row.labels, {}, row.acknowledged_at is not None, row.id,
            person_needed=row.person_needed_at is not None and row.acknowledged_at is None,
        )
        for row in connection.execute(down)
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
            "alert", outbox.about_alert(row.fingerprint, row.starts_at, row.times), row.labels, row.annotations,
            (row.acknowledged_at or row.incident_acknowledged_at) is not None, row.incident_id, row.id,
        )
        for row in connection.execute(firing)
    ]  # fmt: skip
    return [*of_services, *others]


def _told(connection: Connection, abouts: Sequence[str]) -> dict[str, tuple[list[str], float]]:
    """By what it was about: the channels that were told, and when first."""
    found: dict[str, tuple[list[str], float]] = {}
    query = select(notices.c.about, notices.c.channel, notices.c.created_at).where(notices.c.about.in_(abouts))
    for about, channel, at in connection.execute(query.order_by(notices.c.id)):
        channels, first = found.setdefault(about, ([], at))
        channels.append(channel)
        found[about] = (channels, min(first, at))
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
