"""Pressed buttons, recorded before their operation is carried out."""

from collections.abc import Mapping

from sqlalchemy import select, update
from sqlalchemy.dialects.sqlite import insert

from remediator.record.schema import alerts, button_presses, incidents, notifications
from remediator.record.transaction import Transaction


def add(
    tx: Transaction, *, event_id: str, channel: str, open_id: str, who: str, button: str, ids: Mapping[str, int]
) -> bool:
    """Record a press; False if it was recorded before."""
    row = {
        "event_id": event_id, "at": tx.now, "channel": channel, "open_id": open_id, "who": who, "button": button,
        "ids": dict(ids),
    }  # fmt: skip
    return bool(tx.execute(insert(button_presses).values(**row).on_conflict_do_nothing()).rowcount)


def set_outcome(tx: Transaction, event_id: str, outcome: str) -> None:
    tx.execute(update(button_presses).where(button_presses.c.event_id == event_id).values(outcome=outcome))


def ids_match_record(tx: Transaction, ids: Mapping[str, int]) -> bool:
    """Whether the ids of a button still match: another record, such as a restored one, has the same ids again.

    `since` is the time at which the incident, alert or notification was created, in whole seconds.
    """
    created = {
        "incident": incidents.c.opened_at, "alert": alerts.c.first_seen, "notification": notifications.c.created_at,
    }  # fmt: skip
    for name, column in created.items():
        if name in ids:
            at = tx.scalar(select(column).where(column.table.c.id == ids[name]))
            return at is not None and int(at) == ids.get("since")
    return True
