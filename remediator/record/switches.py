"""What people hold the remediator back with: automation off, maintenance."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, and_, insert, or_, select, update

from fleet.inventory.model import DAYS, Host, Inventory, MaintenanceWindow, Service
from fleet.inventory.notify import NotificationKind, Notify
from remediator.notifications import outbox
from remediator.record import timestamps
from remediator.record.clock import SteadyClock
from remediator.record.schema import maintenance

Scope = Literal["service", "host", "group"]
REMIND_EVERY = 6 * 3600.0
OFF_LABELS = {"alertname": "AutomationOff", "severity": "warning"}


@dataclass(frozen=True)
class Automation:
    enabled: bool
    at: float | None = None
    by: str = ""
    reason: str = ""


def automation(connection: Connection) -> Automation:
    """The switch as it was last set; on where it never was."""
    mark = timestamps.get(connection, "automation")
    return Automation(True) if mark is None else Automation(at=mark.at, **mark.detail)


def switch_automation(
    connection: Connection, notify: Notify, *, enabled: bool, by: str, reason: str, now: float
) -> Automation:
    """Set the switch, and tell people where that changes it."""
    if enabled is not automation(connection).enabled:
        timestamps.put(connection, "automation", now, enabled=enabled, by=by, reason=reason)
        kind: NotificationKind = "automation_on" if enabled else "automation_off"
        content = {"who": by, "why": reason}
        outbox.tell(connection, notify, kind, f"{kind} {now}", OFF_LABELS, content, now)
        timestamps.put(connection, "automation-told", now)
    return automation(connection)


def remind(connection: Connection, notify: Notify, now: float, *, automatic: bool) -> bool:
    """Tell people again, now and then, that automation is off; `automatic` is what the inventory says."""
    switch = automation(connection)
    told = timestamps.get(connection, "automation-told")
    if switch.enabled and automatic:
        if told is not None:
            timestamps.remove(connection, "automation-told")
        return False
    if told is None:
        timestamps.put(connection, "automation-told", now)  # by the inventory, which its owner has just written
        return False
    if now - told.at < REMIND_EVERY:
        return False
    since = {"since": switch.at} if switch.at is not None and not switch.enabled else {}
    content = {"who": switch.by if not switch.enabled else "", "why": switch.reason, **since}
    outbox.tell(connection, notify, "automation_off", f"automation_off still {now}", OFF_LABELS, content, now)
    timestamps.put(connection, "automation-told", now)
    return True


@dataclass(frozen=True)
class Maintenance:
    """What there is to say of the maintenance that something is in.

    `left` is how many seconds it lasts yet; with `notify` what happens in it calls people as usual.
    """

    why: str
    left: float
    notify: bool


@dataclass(frozen=True)
class Hold:
    """What people hold the remediator back with, for one service or host."""

    reason: Literal["maintenance", "automation-off"]
    why: str
    left: float | None
    notify: bool


def begin_maintenance(
    connection: Connection,
    scope: Scope,
    name: str,
    *,
    until: float,
    reason: str,
    by: str,
    now: float,
    notify: bool = False,
) -> int:
    made = connection.execute(
        insert(maintenance).values(
            scope=scope, name=name, until=until, reason=reason, asked_by=by, begun_at=now, notify=int(notify)
        )
    )
    return int(made.lastrowid)


def end_maintenance(connection: Connection, number: int, now: float) -> bool:
    """False where there is no such maintenance under way."""
    ended = connection.execute(
        update(maintenance)
        .where(maintenance.c.id == number, maintenance.c.ended_at.is_(None), maintenance.c.until > now)
        .values(ended_at=now)
    )
    return bool(ended.rowcount)


def maintenances(connection: Connection, now: float) -> list[dict[str, Any]]:
    """Those under way."""
    under_way = select(maintenance).where(maintenance.c.ended_at.is_(None), maintenance.c.until > now)
    rows = connection.execute(under_way.order_by(maintenance.c.id))
    return [dict(row._mapping) for row in rows]  # noqa: SLF001 - SQLAlchemy's public name


def hold_of(
    connection: Connection,
    inventory: Inventory,
    name: str,
    service: Service | None,
    host: Host | None,
    clock: SteadyClock,
) -> Hold | None:
    """What holds the remediator back from the service `name`, or from a host where that is empty."""
    now = clock.now()
    own = (host.name, host.group) if host is not None else ("", "")
    held = maintenance_of(connection, name, *own, now) or scheduled_now(inventory, name, host, clock.unix(now))
    if held is not None:
        return Hold("maintenance", held.why, held.left, held.notify)
    if service is None or service.on_failure != "restart":
        return None  # automation has no part in it
    switch = automation(connection)
    if not inventory.remediation.automatic:
        return Hold("automation-off", "remediation.automatic: false", None, notify=False)
    return (
        None if switch.enabled else Hold("automation-off", f"{switch.by}{_because(switch.reason)}", None, notify=False)
    )


def maintenance_of(connection: Connection, service: str, host: str, group: str, now: float) -> Maintenance | None:
    """The maintenance that a service is in by a person's word."""
    of_it = or_(
        *(
            and_(maintenance.c.scope == scope, maintenance.c.name == name)
            for scope, name in (("service", service), ("host", host), ("group", group))
            if name
        )
    )
    row = connection.execute(
        select(maintenance)
        .where(of_it, maintenance.c.ended_at.is_(None), maintenance.c.until > now)
        .order_by(maintenance.c.until.desc())
    ).first()
    if row is None:
        return None
    why = f"{row.scope} {row.name}, by {row.asked_by}: {row.reason}"
    return Maintenance(why, row.until - now, bool(row.notify))


def scheduled_now(inventory: Inventory, service: str, host: Host | None, unix: float) -> Maintenance | None:
    """The inventory's maintenance that a service is in at a Unix time."""
    windows = inventory.remediation.maintenance
    if not windows:
        return None
    return scheduled(windows, service, host, datetime.fromtimestamp(unix, ZoneInfo(inventory.notify.timezone)))


def scheduled(
    windows: Sequence[MaintenanceWindow], service: str, host: Host | None, at: datetime
) -> Maintenance | None:
    """The inventory's maintenance that a service is in at `at`, in the fleet's time zone."""
    names = {"service": service, "host": host.name if host else "", "group": host.group if host else ""}
    for window in windows:
        if window.options == names[window.kind] and _is_open(window, at):
            why = f"{window.kind} {window.options}, {window.from_} to {window.to}{_because(window.reason)}"
            return Maintenance(why, _left(window, at), window.notify)
    return None


def _left(window: MaintenanceWindow, at: datetime) -> float:
    """Seconds until an open window ends."""
    hour, minute = map(int, window.to.split(":"))
    ends = at.replace(hour=hour, minute=minute, second=0, microsecond=0, fold=0)
    if f"{at:%H:%M}" >= window.to:
        ends += timedelta(days=1)
    return ends.timestamp() - at.timestamp()


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _is_open(window: MaintenanceWindow, at: datetime) -> bool:
    now, begins, ends = f"{at:%H:%M}", window.from_, window.to
    if begins < ends:
        return _is_on(window.days, at) and begins <= now < ends
    # It ends on the day after the one that it belongs to.
    return (_is_on(window.days, at) and now >= begins) or (_is_on(window.days, at - timedelta(days=1)) and now < ends)


def _is_on(days: Iterable[str], at: datetime) -> bool:
    return DAYS[at.weekday()] in days
