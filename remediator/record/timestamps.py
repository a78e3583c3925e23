"""Moments that are looked back to, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from remediator.record.schema import marks

# When the Watchdog came, when it ended, when people were told that it did not come; when automation was switched, and
# told of; which receivers of Alertmanager lead here.
Name = Literal["watchdog", "watchdog-over", "watchdog-missed", "automation", "automation-told", "receivers"]


@dataclass(frozen=True)
class Mark:
    at: float
    detail: Mapping[str, Any]


def get(connection: Connection, name: Name) -> Mark | None:
    row = connection.execute(select(marks).where(marks.c.name == name)).first()
    return Mark(row.at, row.detail) if row is not None else None


def put(connection: Connection, name: Name, at: float, **detail: Any) -> None:
    values = {"at": at, "detail": detail}
    connection.execute(
        insert(marks).values(name=name, **values).on_conflict_do_update(index_elements=["name"], set_=values)
    )


def remove(connection: Connection, name: Name) -> None:
    connection.execute(delete(marks).where(marks.c.name == name))
