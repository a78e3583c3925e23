"""Events copied from the exporter: each stored exactly once, many changes collapsed, and gaps where some were lost."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import bindparam, delete, func, insert, select, update

from remediator.record import timestamps
from remediator.record.schema import events
from remediator.record.timestamps import Timestamp
from remediator.record.transaction import Transaction

GAP: Literal["gap"] = "gap"
EVENT_KINDS = ("service", "host", "container", "unit", "program", "gpu")  # of the exporter
COLLAPSE_WITHIN = 60.0  # seconds
SEPARATE = 4  # rows of one service, host, … in that time; what changes more often is one row
BATCH = 5000  # events deleted by one transaction
_POSITION: Literal["exporter-events"] = "exporter-events"
_SELECT_RECENT = (
    select(events)
    .where(
        events.c.kind == bindparam("of_kind"),
        events.c.name == bindparam("of_name"),
        events.c.host == bindparam("of_host"),
        events.c.at > bindparam("after"),
        events.c.at < bindparam("before"),
    )
    .order_by(events.c.at.desc(), events.c.id.desc())
    .limit(SEPARATE)
)
_INSERT = insert(events)
_UPDATE = (
    update(events)
    .where(events.c.id == bindparam("of_id"))
    .values({name: bindparam(f"new_{name}") for name in ("last_at", "state", "detail", "times")})
)
_Key = tuple[str, str, str]


@dataclass(frozen=True)
class StateChange:
    """What became of a service, a host, a container, … at a time of the record's clock."""

    at: float
    kind: str
    host: str
    name: str
    state: str
    detail: str


@dataclass
class _Row:
    """A row to insert, or to update if it has an `id`."""

    at: float
    last_at: float | None
    times: int
    change: StateChange
    id: int | None = None

    def admits(self, change: StateChange) -> bool:
        return abs(change.at - self.at) < COLLAPSE_WITHIN

    def add(self, change: StateChange) -> None:
        # The exporter's clock may have been set back.
        self.last_at = max(change.at, self.at if self.last_at is None else self.last_at)
        self.times += 1
        self.change = change


def read_position(tx: Transaction) -> Timestamp | None:
    """Return when events were last copied, with the exporter's `cursor` after them; None if none were copied yet."""
    return timestamps.get(tx, _POSITION)


def store_copied(tx: Transaction, copied: Iterable[StateChange], *, cursor: str, asked_at: float, gap: bool) -> int:
    """Store changes, oldest first, and the exporter's cursor after them; returns how many rows were added.

    `asked_at` is when the exporter was asked for them, and `gap` whether it had lost events before them. The rows and
    the cursor are stored together: after a crash the same events are copied again, or the next ones.
    """
    changes = list(copied)
    rows: list[_Row] = []
    if gap:
        rows.append(_gap_row(tx, changes[0].at if changes else asked_at))
    recent: dict[_Key, list[_Row]] = {}
    placed = {id(row): row for row in (_place(tx, recent, change) for change in changes)}
    rows += placed.values()
    added = [row for row in rows if row.id is None]
    if added:
        tx.execute(_INSERT, [_values(row) for row in added])
    if changed := [row for row in rows if row.id is not None]:
        tx.execute(_UPDATE, [_changed_values(row) for row in changed])
    timestamps.put(tx, _POSITION, asked_at, cursor=cursor)
    _delete_excess(tx, tx.inventory.remediator.events.max_entries)
    return len(added)


def _place(tx: Transaction, recent: dict[_Key, list[_Row]], change: StateChange) -> _Row:
    """Return the row of a change: the newest of its subject if it repeats that, or there are several; else a new one.

    `recent` are the rows of subjects, newest first. Rows are in the order of changes, since a change goes into no older
    row.
    """
    key = change.kind, change.host, change.name
    if key not in recent:
        recent[key] = _find_recent(tx, change)
    rows = [row for row in recent[key] if row.admits(change)]
    if rows and (rows[0].change.state == change.state or len(rows) >= SEPARATE):
        rows[0].add(change)
        return rows[0]
    row = _Row(change.at, None, 1, change)
    recent[key] = [row, *rows]
    return row


def _gap_row(tx: Transaction, until: float) -> _Row:
    """Return the gap from the last copy until a time. A gap within a minute of the last one extends it."""
    position = read_position(tx)
    since = min(position.at, until) if position is not None else until
    change = StateChange(until, GAP, "", "exporter", "lost", "the exporter was restarted, or had too many events")
    found = _find_recent(tx, change)
    if not found:
        return _Row(since, until, 1, change)
    found[0].add(change)
    return found[0]


def _find_recent(tx: Transaction, change: StateChange) -> list[_Row]:
    """Return the stored rows of the same subject around the time of a change, newest first."""
    found = tx.execute(
        _SELECT_RECENT,
        {
            "of_kind": change.kind, "of_name": change.name, "of_host": change.host,
            "after": change.at - COLLAPSE_WITHIN, "before": change.at + COLLAPSE_WITHIN,
        },
    )  # fmt: skip
    return [
        _Row(row.at, row.last_at, row.times, replace(change, state=row.state, detail=row.detail), row.id)
        for row in found
    ]


def _values(row: _Row) -> dict[str, Any]:
    change = row.change
    return {
        "at": row.at, "last_at": row.last_at, "times": row.times, "kind": change.kind, "host": change.host,
        "name": change.name, "state": change.state, "detail": change.detail,
    }  # fmt: skip


def _changed_values(row: _Row) -> dict[str, Any]:
    return {
        "of_id": row.id, "new_last_at": row.last_at, "new_times": row.times, "new_state": row.change.state,
        "new_detail": row.change.detail,
    }  # fmt: skip


def delete_old(tx: Transaction, before: float, max_entries: int) -> int:
    """Delete a batch of events that are older than `before`, or too many; returns their number, 0 when none is left."""
    old = select(events.c.id).where(events.c.at < before).order_by(events.c.at).limit(BATCH)
    deleted = tx.execute(delete(events).where(events.c.id.in_(old))).rowcount
    return deleted + _delete_excess(tx, max_entries)


def _delete_excess(tx: Transaction, max_entries: int) -> int:
    # The newest id less the number of entries, since counting a million rows would take long.
    last = tx.scalar(select(func.max(events.c.id))) or 0
    excess = select(events.c.id).where(events.c.id <= last - max_entries).order_by(events.c.id).limit(BATCH)
    return tx.execute(delete(events).where(events.c.id.in_(excess))).rowcount
