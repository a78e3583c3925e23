"""What is told again while a trouble lasts: to further channels where nobody acknowledged, and as a reminder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Connection, func, select

from fleet.notify import Notify, Route, Told
from remediator.notices import outbox
from remediator.schema import alerts, incidents, notices

AT_ONCE = 10_000  # abouts that one query looks up


@dataclass(frozen=True)
class Trouble:
    """What goes on, and of which people were told at the time `told_at`."""

    kind: Told
    about: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    acknowledged: bool
    incident: int | None = None
    alert: int | None = None
    told_at: float = 0.0


def look_after(connection: Connection, notify: Notify, now: float) -> bool:
    """Tell what is due; whether there was something."""
    if not any(route.escalate or route.remind for route in notify.routes):
        return False
    written = 0
    for trouble in list(_troubles(connection)):
        for route in notify.routes_for(trouble.labels, trouble.kind):
            written += _escalate(connection, notify, route, trouble, now)
            written += _remind(connection, notify, route, trouble, now)
    return written > 0


def _troubles(connection: Connection) -> Iterator[Trouble]:
    """Open incidents of services that are down, and firing alerts of no service of ours, that people were told of."""
    down = select(incidents).where(incidents.c.state == "open", incidents.c.labels.is_not(None))
    of_services = [
        Trouble("down", outbox.about_incident(row.id), row.labels, {}, row.acknowledged_at is not None, row.id)
        for row in connection.execute(down)
    ]
    firing = select(alerts).where(alerts.c.status == "firing", alerts.c.incident_id.is_(None))
    strangers = [
        Trouble(
            "alert", outbox.about_alert(row.fingerprint, row.starts_at, row.times), row.labels, row.annotations,
            row.acknowledged_at is not None, alert=row.id,
        )
        for row in connection.execute(firing)
    ]  # fmt: skip
    for some in _batched([*of_services, *strangers]):
        by_about = {trouble.about: trouble for trouble in some}
        told = select(notices.c.about, func.min(notices.c.created_at)).where(notices.c.about.in_(by_about))
        for about, at in connection.execute(told.group_by(notices.c.about)):
            yield replace(by_about[about], told_at=at)


def _batched(troubles: list[Trouble]) -> Iterator[list[Trouble]]:
    return (troubles[start : start + AT_ONCE] for start in range(0, len(troubles), AT_ONCE))


def _escalate(connection: Connection, notify: Notify, route: Route, trouble: Trouble, now: float) -> int:
    if route.escalate is None or trouble.acknowledged:
        return 0
    steps = int((now - trouble.told_at) // route.escalate.after)
    content = {"annotations": dict(trouble.annotations), "unacknowledged": steps * route.escalate.after}
    return outbox.put(
        connection, notify, route.escalate.channels[:steps], trouble.kind, trouble.about, trouble.labels, content, now,
        incident=trouble.incident, alert=trouble.alert,
    )  # fmt: skip


def _remind(connection: Connection, notify: Notify, route: Route, trouble: Trouble, now: float) -> int:
    if route.remind is None:
        return 0
    times = int((now - trouble.told_at) // route.remind)
    if times == 0:
        return 0
    begun = [name for name in outbox.told(connection, trouble.about) if name in route.channels]
    channels = notify.channels_after(begun, trouble.labels, "reminder")
    content = {"annotations": dict(trouble.annotations)}
    return outbox.put(
        connection, notify, channels, "reminder", f"reminder {times} of {trouble.about}", trouble.labels, content, now,
        incident=trouble.incident, alert=trouble.alert,
    )  # fmt: skip
