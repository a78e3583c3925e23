"""Maintenance that an operator began, and whether maintenance or the automation switch holds a service."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, and_, bindparam, func, insert, or_, select, update

from fleet.inventory.model import Host, Remediable
from remediator.policy.maintenance_windows import Maintenance, find_window
from remediator.record.automation import read_switch
from remediator.record.schema import maintenance
from remediator.record.transaction import Transaction

MaintenanceScope = Literal["service", "host", "group"]
# An empty name matches nothing, since maintenance always has a name.
_SELECT_OF_SERVICE = (
    select(maintenance)
    .where(
        or_(
            *(
                and_(maintenance.c.scope == scope, maintenance.c.name == bindparam(scope))
                for scope in get_args(MaintenanceScope)
            )
        ),
        maintenance.c.ended_at.is_(None),
        maintenance.c.until > bindparam("now"),
    )
    .order_by(maintenance.c.until.desc())
)


@dataclass(frozen=True)
class OperatorHold:
    """Why operators hold Defib back from a service or a host, and for how many more seconds if that is known."""

    reason: Literal["maintenance", "automation-off"]
    why: str
    remaining: float | None
    notify: bool


def begin(
    tx: Transaction,
    scope: MaintenanceScope,
    name: str,
    *,
    until: float,
    reason: str,
    by: str,
    notify: bool = False,
    pause_probing: bool = False,
) -> int:
    """Begin maintenance; returns its id."""
    row = {
        "scope": scope, "name": name, "until": until, "reason": reason, "asked_by": by, "begun_at": tx.now,
        "notify": int(notify), "pause_probing": int(pause_probing),
    }  # fmt: skip
    return int(tx.execute(insert(maintenance).values(**row)).lastrowid)


def end(tx: Transaction, number: int) -> bool:
    """End maintenance; False if there is no such maintenance now."""
    ended = tx.execute(update(maintenance).where(maintenance.c.id == number, _is_current(tx)).values(ended_at=tx.now))
    return bool(ended.rowcount)


def current(tx: Transaction) -> list[dict[str, Any]]:
    """Return the rows of the maintenance that is in effect now."""
    rows = tx.execute(select(maintenance).where(_is_current(tx)).order_by(maintenance.c.id))
    return [dict(row) for row in rows.mappings()]


def count_current(tx: Transaction) -> int:
    """Return how many maintenances are in effect now."""
    return int(tx.execute(select(func.count()).select_from(maintenance).where(_is_current(tx))).scalar_one())


def _is_current(tx: Transaction) -> ColumnElement[bool]:
    return and_(maintenance.c.ended_at.is_(None), maintenance.c.until > tx.now)


def paused_scopes(tx: Transaction) -> list[tuple[MaintenanceScope, str]]:
    """Return the scopes and names of the maintenance in which probing is paused."""
    return sorted({(row["scope"], row["name"]) for row in current(tx) if row["pause_probing"]})


def find_maintenance(tx: Transaction, service: str, host: str, group: str) -> Maintenance | None:
    """Return the maintenance that an operator began for a service, its host or its group."""
    row = tx.execute(_SELECT_OF_SERVICE, {"service": service, "host": host, "group": group, "now": tx.now}).first()
    if row is None:
        return None
    why = f"{row.scope} {row.name}, by {row.asked_by}: {row.reason}"
    return Maintenance(why, row.until - tx.now, bool(row.notify))


def find_operator_hold(
    tx: Transaction, name: str, service: Remediable | None, host: Host | None
) -> OperatorHold | None:
    """Return the hold of the service `name`, or of a host if that is empty."""
    host_name, group = (host.name, host.group) if host is not None else ("", "")
    held = find_maintenance(tx, name, host_name, group) or find_window(tx.inventory, name, host, tx.clock.unix(tx.now))
    if held is not None:
        return OperatorHold("maintenance", held.why, held.remaining, held.notify)
    if service is None or service.on_failure != "restart":
        return None
    if not tx.inventory.remediation.automatic:
        return OperatorHold("automation-off", "remediation.automatic: false", None, notify=False)
    switch = read_switch(tx)
    if switch.enabled:
        return None
    why = f"{switch.by}: {switch.reason}" if switch.reason else switch.by
    return OperatorHold("automation-off", why, None, notify=False)
