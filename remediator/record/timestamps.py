"""Named points in time, each with details: when the last Watchdog alert was received, when automation was switched."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import bindparam, delete, select
from sqlalchemy.dialects.sqlite import insert

from remediator.record.schema import timestamps
from remediator.record.transaction import Transaction

TimestampName = Literal[
    "watchdog",  # the last firing Watchdog alert was received
    "watchdog-resolved",  # the Watchdog alert was received as resolved
    "watchdog-unlisted",  # Alertmanager did not have the Watchdog alert when its alerts were compared
    "watchdog-missed",  # a notification about a missing Watchdog was added
    "automation",  # the automation switch was set
    "automation-notified",  # the last notification that automation is off was added
    "exporter-events",  # events were last copied from the exporter; with the `cursor` from which to continue
    "storms",  # a storm held a service; with the time for each host group
    "storms-overruled",  # a person let automation continue in a storm; with the end for each host group
    "bursts",  # the last digest of a burst was sent; with the burst of each channel
    "foreign-bursts",  # the same for bursts of foreign alerts
    "reports",  # reports were last sent; with the `time` and the `end` of the last one by name
    "receivers",  # the Alertmanager receivers that deliver to this remediator were stored
]
_SELECT = select(timestamps).where(timestamps.c.name == bindparam("named"))


@dataclass(frozen=True)
class Timestamp:
    at: float
    detail: Mapping[str, Any]


def get(tx: Transaction, name: TimestampName) -> Timestamp | None:
    row = tx.execute(_SELECT, {"named": name}).first()
    return Timestamp(row.at, row.detail) if row is not None else None


def put(tx: Transaction, name: TimestampName, at: float, **detail: Any) -> None:
    values = {"at": at, "detail": detail}
    upsert = insert(timestamps).values(name=name, **values)
    tx.execute(upsert.on_conflict_do_update(index_elements=["name"], set_=values))


def remove(tx: Transaction, name: TimestampName) -> None:
    tx.execute(delete(timestamps).where(timestamps.c.name == name))
