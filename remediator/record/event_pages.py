"""One timeline of everything that happened, merged from several tables, newest first.

The order of rows is that of `(at, source, id)`, none of which changes: pages neither skip nor repeat rows while others
are added.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Row, and_, literal, or_, select

from remediator.record.event_sources import SOURCES, Condition, EventFilter, Source
from remediator.record.schema import incidents
from remediator.record.transaction import Transaction

SCAN = 20_000  # rows of a table in which one page searches for a text


class Position(NamedTuple):
    """A place in the timeline. A page begins with the newest row before it."""

    at: float
    source: int
    id: int

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Parse what `format` returned. Raises ValueError."""
        at, source, number = text.split("_")
        position = cls(float(at), int(source), int(number))
        if not math.isfinite(position.at) or not 0 <= position.id < 2**63:
            raise ValueError(text)
        return position

    def format(self) -> str:
        return f"{self.at!r}_{self.source}_{self.id}"


@dataclass(frozen=True)
class EventPage:
    """Rows, newest first, and the position of the next page; None if there are no older rows.

    Each row has `id` (a unique text), `at`, `last_at`, `kind`, `host`, `name`, `state`, `operation`, `detail`, `by`,
    `times`, `incident` and `action`. Times are of the record's clock; `last_at` is None but for collapsed events, of
    which there were `times`, and gaps. `operation` is what an action or an operation did, such as `restart`. `incident`
    and `action` are ids or None; the other values are texts, empty where there is nothing to say.
    """

    rows: Sequence[dict[str, Any]]
    next: Position | None


def page_of_events(tx: Transaction, wanted: EventFilter, before: Position | None, limit: int) -> EventPage:
    """Return the newest rows before a position, or the newest of all.

    A search for a text ends after `SCAN` rows of a table: then the page has fewer rows than `limit`, even none, but a
    next position.
    """
    alternatives = [
        (number, source, condition & _bounds(number, source, tx.now, wanted, before))
        for number, source in enumerate(SOURCES)
        if source.is_visible(wanted)
        for condition in source.conditions(tx.inventory, wanted)
    ]
    horizon = _find_horizon(tx, alternatives) if wanted.text else None
    streams = []
    for number, source, condition in alternatives:
        query = source.select(wanted).add_columns(literal(number).label("source")).where(condition)
        if horizon is not None:
            query = query.where(source.at >= horizon)
        query = query.order_by(source.at.desc(), source.table.c.id.desc()).limit(limit + 1)
        streams.append(tx.execute(query).all())
    rows: list[Row[Any]] = list(heapq.merge(*streams, key=lambda row: (row.at, row.source, row.id), reverse=True))
    shown = [_present(tx, row) for row in rows[:limit]]
    if len(rows) > limit:
        last = rows[limit - 1]
        return EventPage(shown, Position(last.at, last.source, last.id))
    return EventPage(shown, Position(horizon, -1, 0) if horizon is not None else None)


def _bounds(number: int, source: Source, now: float, wanted: EventFilter, before: Position | None) -> Condition:
    """Return a condition for the rows that have happened, are in the filter's time and before the position.

    It has one upper bound, since SQLite would use any one of several, and read all rows above the lowest.
    """
    last, is_included = now, True
    if wanted.until is not None and wanted.until <= last:
        last, is_included = wanted.until, False
    if before is not None and (before.at, number <= before.source) < (last, is_included):
        last, is_included = before.at, number <= before.source
    bounds = [source.at <= last if is_included else source.at < last]
    if before is not None and number == before.source:
        bounds.append(or_(source.at < before.at, source.table.c.id < before.id))
    if wanted.since is not None:
        bounds.append(source.at >= wanted.since)
    return and_(*bounds)


def _find_horizon(tx: Transaction, alternatives: Iterable[tuple[int, Source, Condition]]) -> float | None:
    """Return the time since which no table has more than `SCAN` rows to search; None if no table has more at all."""
    ends = [
        tx.scalar(select(source.at).where(condition).order_by(source.at.desc()).limit(1).offset(SCAN))
        for _, source, condition in alternatives
    ]
    return max((end for end in ends if end is not None), default=None)


def _present(tx: Transaction, row: Row[Any]) -> dict[str, Any]:
    """Return a row as `EventPage` documents it."""
    values = dict(row._mapping)  # noqa: SLF001 - public, but for its name
    source = SOURCES[values.pop("source")]
    if source.table is incidents and (service := tx.inventory.find_subject(row.name)) is not None:
        values["host"] = service.host
    return {**values, "id": f"{source.name}-{row.id}"}
