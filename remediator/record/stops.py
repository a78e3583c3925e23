"""Services that a person stopped through Defib: until they are up again, nothing is done and nobody is told."""

from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from remediator.record.schema import actions, incidents, stops


@dataclass(frozen=True)
class Stop:
    """A service that is stopped: when that was asked for, and when its command ended."""

    service: str
    at: float
    ended: float


def put(connection: Connection, services: Iterable[str], action: int, by: str, now: float) -> None:
    """Record that these services are stopped by an action; of one that is already, who stopped it first stays."""
    for service in services:
        row = {"service": service, "at": now, "asked_by": by, "action_id": action}
        connection.execute(insert(stops).values(**row).on_conflict_do_nothing())


def of(connection: Connection, service: str) -> str:
    """Who stopped a service through Defib, or nothing."""
    by: str | None = connection.scalar(select(stops.c.asked_by).where(stops.c.service == service))
    return "" if by is None else f"by {by}, through Defib"


def all_of(connection: Connection) -> list[str]:
    """The services that are stopped through Defib."""
    return list(connection.scalars(select(stops.c.service)))


def ended(connection: Connection) -> list[Stop]:
    """The services that are stopped, but for those whose stop is still under way."""
    rows = connection.execute(
        select(stops.c.service, stops.c.at, func.coalesce(actions.c.ended_at, stops.c.at).label("ended"))
        .join(actions, actions.c.id == stops.c.action_id, isouter=True)
        .where(func.coalesce(actions.c.state, "") != "running")
    )
    return [Stop(row.service, row.at, row.ended) for row in rows]


def remove(connection: Connection, services: Collection[str]) -> None:
    """Record that these services run again."""
    connection.execute(delete(stops).where(stops.c.service.in_(services)))
    _speak_again(connection, services)


def forget(connection: Connection, known: Container[str], before: float) -> None:
    """Delete the stops from before a time of services that are not `known` any more."""
    old = connection.scalars(select(stops.c.service).where(stops.c.at < before)).all()
    gone = [service for service in old if service not in known]
    connection.execute(delete(stops).where(stops.c.service.in_(gone)))


def withdraw(connection: Connection, action: int) -> None:
    """Record that a stop stopped nothing."""
    found = list(connection.scalars(select(stops.c.service).where(stops.c.action_id == action)))
    connection.execute(delete(stops).where(stops.c.action_id == action))
    _speak_again(connection, found)


def _speak_again(connection: Connection, services: Iterable[str]) -> None:
    """What comes of their open incidents from now on is told."""
    mine = incidents.c.service.in_(list(services)) & (incidents.c.state == "open")
    connection.execute(update(incidents).where(mine).values(quiet=0))
