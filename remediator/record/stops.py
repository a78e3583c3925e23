"""Services that an operator stopped through Defib. Until they are up again, there are no actions or notifications."""

from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from remediator.record.schema import actions, incidents, stops
from remediator.record.transaction import Transaction

_SELECT_STOP = select(stops.c.asked_by, stops.c.reason).where(stops.c.service == bindparam("of"))


@dataclass(frozen=True)
class Stop:
    """A stopped service, when the stop was requested, and when its command ended."""

    service: str
    at: float
    ended: float


def add(tx: Transaction, services: Iterable[str], action: int, by: str, reason: str = "") -> None:
    """Record that an action stops these services; an earlier stop of a service stays as it is."""
    for service in services:
        row = {"service": service, "at": tx.now, "asked_by": by, "action_id": action, "reason": reason}
        tx.execute(insert(stops).values(**row).on_conflict_do_nothing())


def describe_stop(tx: Transaction, service: str) -> str:
    """Return who stopped a service through Defib, and why; empty if it is not stopped."""
    row = tx.execute(_SELECT_STOP, {"of": service}).first()
    if row is None:
        return ""
    return f"by {row.asked_by}{f': {row.reason}' if row.reason else ''}"


def current(tx: Transaction) -> dict[str, dict[str, Any]]:
    """Return when each stopped service was stopped, by whom and why, by service."""
    return {row["service"]: dict(row) for row in tx.execute(select(stops)).mappings()}


def completed(tx: Transaction) -> list[Stop]:
    """Return the stopped services whose stop command has ended."""
    rows = tx.execute(
        select(stops.c.service, stops.c.at, func.coalesce(actions.c.ended_at, stops.c.at).label("ended"))
        .join(actions, actions.c.id == stops.c.action_id, isouter=True)
        .where(func.coalesce(actions.c.state, "") != "running")
    )
    return [Stop(row.service, row.at, row.ended) for row in rows]


def remove(tx: Transaction, services: Collection[str]) -> None:
    """Record that these services are up again."""
    tx.execute(delete(stops).where(stops.c.service.in_(services)))
    _unmute_incidents(tx, services)


def remove_of_action(tx: Transaction, action: int) -> None:
    """Record that a stop action did not stop anything."""
    services = list(tx.scalars(select(stops.c.service).where(stops.c.action_id == action)))
    tx.execute(delete(stops).where(stops.c.action_id == action))
    _unmute_incidents(tx, services)


def delete_removed(tx: Transaction, services: Container[str], before: float) -> None:
    """Delete the stops before a time of services that are no longer in the inventory."""
    old = tx.scalars(select(stops.c.service).where(stops.c.at < before)).all()
    removed = [service for service in old if service not in services]
    tx.execute(delete(stops).where(stops.c.service.in_(removed)))


def _unmute_incidents(tx: Transaction, services: Iterable[str]) -> None:
    """Notify of the open incidents of these services from now on."""
    is_open = incidents.c.service.in_(list(services)) & (incidents.c.state == "open")
    tx.execute(update(incidents).where(is_open).values(quiet=0))
