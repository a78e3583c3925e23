"""What the record knows of a span: incidents, restarts and maintenance, as data with Unix times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, or_, select

from fleet.inventory.model import is_host_alert
from remediator.record.database import Database
from remediator.record.schema import actions, incidents, maintenance, timeline
from remediator.record.transaction import Transaction

PAGE = 1000  # rows of one transaction, since other readers wait for it
MOST_ROWS = 100_000  # incidents, and actions, that one report counts
RESTARTS = ("restart", "recreate")


@dataclass(frozen=True)
class PastIncident:
    """An incident: `ended` is when the service was up again or was removed, None while the incident is open."""

    service: str
    team: str  # of its first alert
    began: float
    ended: float | None
    state: str  # open, recovered, unobserved
    recovered_by: str
    person_needed: bool
    was_down: bool  # False: it had only alerts that are none of an outage, or is of a host's alert
    stopped: bool  # an operator had stopped the service, and nobody was notified


@dataclass(frozen=True)
class PastRestart:
    service: str
    automatic: bool
    helped: bool  # the service was up after it, and stayed up


@dataclass(frozen=True)
class PastMaintenance:
    """Maintenance that an operator began."""

    scope: str  # service, host, group
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Past:
    incidents: Sequence[PastIncident] = ()
    restarts: Sequence[PastRestart] = ()
    maintenance: Sequence[PastMaintenance] = ()
    is_complete: bool = True  # False: there is more than a report counts


async def read_past(database: Database, start: float, end: float) -> Past:
    """Read what happened between two Unix times, a page at a time. Raises StorageError."""
    open_in_span, are_all_incidents = await _read_all(database, _page_of_incidents, start, end)
    restarts, are_all_restarts = await _read_all(database, _page_of_restarts, start, end)
    held = await database.read_for_page(_read_maintenance, start, end)
    return Past(open_in_span, restarts, held, are_all_incidents and are_all_restarts)


async def _read_all(database: Database, read_page: Any, start: float, end: float) -> tuple[list[Any], bool]:
    found: list[Any] = []
    before: int | None = None
    while len(found) < MOST_ROWS:
        rows, before = await database.read_for_page(read_page, start, end, before)
        found += rows
        if before is None:
            return found, True
    return found, False


def _page_of_incidents(
    tx: Transaction, start: float, end: float, before: int | None
) -> tuple[list[PastIncident], int | None]:
    """Return the newest incidents that were open between two times, and the id at which the next page continues."""
    since, until = tx.clock.from_unix(start), tx.clock.from_unix(end)
    is_wanted = and_(
        func.coalesce(incidents.c.down_at, incidents.c.opened_at) < until,
        or_(incidents.c.closed_at.is_(None), incidents.c.closed_at > since),
    )
    watched = and_(timeline.c.incident_id == incidents.c.id, timeline.c.event == "incident_closed")
    query = (
        select(
            incidents.c.id, incidents.c.service, incidents.c.state, incidents.c.opened_at, incidents.c.down_at,
            incidents.c.closed_at, incidents.c.recovered_by, incidents.c.quiet,
            incidents.c.labels.is_not(None).label("was_down"),
            incidents.c.labels["team"].as_string().label("team"), timeline.c.detail.label("closing"),
        )
        .join(timeline, watched, isouter=True)
        .where(is_wanted, *_before(incidents.c.id, before))
        .order_by(incidents.c.id.desc())
        .limit(PAGE)
    )  # fmt: skip
    rows = tx.execute(query).all()
    needed = and_(
        timeline.c.event == "person_needed",
        timeline.c.incident_id.in_([row.id for row in rows]),
        timeline.c.at.between(since, until),
    )
    persons = set(tx.scalars(select(timeline.c.incident_id).where(needed)))
    past = [_describe_incident(tx, row, person_needed=row.id in persons) for row in rows]
    return [each for each in past if each.ended is None or each.ended > start], _next(rows)


def _describe_incident(tx: Transaction, row: Row[Any], *, person_needed: bool) -> PastIncident:
    watched = (row.closing or {}).get("watched", 0.0)
    return PastIncident(
        row.service,
        row.team or "",
        tx.clock.unix(row.opened_at if row.down_at is None else row.down_at),
        None if row.closed_at is None else tx.clock.unix(row.closed_at - watched),
        row.state,
        row.recovered_by or "",
        person_needed=person_needed,
        was_down=bool(row.was_down) and not is_host_alert(row.service),
        stopped=bool(row.quiet),
    )


def _page_of_restarts(
    tx: Transaction, start: float, end: float, before: int | None
) -> tuple[list[PastRestart], int | None]:
    """Return the newest restarts that began between two times, and the id at which the next page continues."""
    since, until = tx.clock.from_unix(start), tx.clock.from_unix(end)
    was_run = and_(actions.c.kind.in_(RESTARTS), actions.c.state.not_in(("queued", "cancelled")))
    query = (
        select(actions.c.id, actions.c.service, actions.c.requested_by, actions.c.state)
        .where(was_run, actions.c.claimed_at >= since, actions.c.claimed_at < until, *_before(actions.c.id, before))
        .order_by(actions.c.id.desc())
        .limit(PAGE)
    )
    rows = tx.execute(query).all()
    past = [PastRestart(row.service, row.requested_by == "alert", row.state == "succeeded") for row in rows]
    return past, _next(rows)


def _before(column: ColumnElement[int], before: int | None) -> list[ColumnElement[bool]]:
    return [] if before is None else [column < before]


def _next(rows: Sequence[Row[Any]]) -> int | None:
    return rows[-1].id if len(rows) == PAGE else None


def _read_maintenance(tx: Transaction, start: float, end: float) -> list[PastMaintenance]:
    ended = func.min(maintenance.c.until, func.coalesce(maintenance.c.ended_at, maintenance.c.until))
    query = select(maintenance.c.scope, maintenance.c.name, maintenance.c.begun_at, ended.label("ended")).where(
        maintenance.c.begun_at < tx.clock.from_unix(end), ended > tx.clock.from_unix(start)
    )
    return [
        PastMaintenance(row.scope, row.name, tx.clock.unix(row.begun_at), tx.clock.unix(row.ended))
        for row in tx.execute(query)
    ]
