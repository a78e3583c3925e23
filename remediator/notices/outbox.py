"""Notices as rows: written in the transaction of what caused them, taken by the sender, counted per bot."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, and_, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fleet.model import Notify
from remediator.schema import notices, sends

PER_SECOND = 4  # Feishu takes 5
PER_MINUTE = 90  # Feishu takes 100
SEVERITIES = ("critical", "warning", "info")
State = Literal["pending", "sent", "dead"]


@dataclass(frozen=True)
class Notice:
    """A notice that is to be sent now."""

    id: int
    kind: str
    severity: str
    incident_id: int | None
    content: Mapping[str, Any]
    created_at: float
    tries: int


def tell(
    connection: Connection,
    notify: Notify,
    kind: str,
    about: str,
    labels: Mapping[str, str],
    content: Mapping[str, Any],
    now: float,
    incident: int | None,
) -> None:
    """Write a notice for each channel that the routes name for these labels."""
    put(connection, notify.channels_for(labels), kind, about, labels, content, now, incident)


def put(
    connection: Connection,
    channels: Iterable[str],
    kind: str,
    about: str,
    labels: Mapping[str, str],
    content: Mapping[str, Any],
    now: float,
    incident: int | None,
) -> int:
    """Write a notice for each of `channels`; what one was told `about` it is not told again. How many were written."""
    severity = labels.get("severity", "")
    written = 0
    for channel in channels:
        made = connection.execute(
            sqlite_insert(notices)
            .values(
                channel=channel,
                about=about,
                kind=kind,
                severity=severity if severity in SEVERITIES else "info",
                incident_id=incident,
                content=dict(content) | {"labels": dict(labels)},
                created_at=now,
                state="pending",
                tries=0,
                not_before=now,
            )
            .on_conflict_do_nothing()
        )
        written += made.rowcount
    return written


def told(connection: Connection, about: str) -> list[str]:
    """The channels that were told about it, or will be."""
    return list(connection.scalars(select(notices.c.channel).where(notices.c.about == about)))


def pending(connection: Connection, channel: str, now: float) -> tuple[list[Notice], float | None]:
    """Notices of a channel that may go now, oldest first, and when the next one may if there are none.

    A notice waits for earlier ones of its incident, so that the story is told in order.
    """
    rows = connection.execute(
        select(notices)
        .where(notices.c.channel == channel, notices.c.state == "pending")
        .order_by(notices.c.id)
        .limit(200)
    ).all()
    ready: list[Notice] = []
    waiting: set[int] = set()
    later: list[float] = []
    for row in rows:
        if row.incident_id in waiting:
            continue
        if row.not_before > now:
            later.append(row.not_before)
        else:
            ready.append(
                Notice(row.id, row.kind, row.severity, row.incident_id, row.content, row.created_at, row.tries)
            )
        if row.incident_id is not None:
            waiting.add(row.incident_id)
    return ready, min(later, default=None)


def reserve(connection: Connection, notice: int, bot: str, now: float) -> tuple[int | None, float]:
    """Count a send against its bot's limits before it is made: (its id, now), or (None, when there is room)."""
    recent = connection.scalars(
        select(sends.c.at).where(sends.c.bot == bot, sends.c.at > now - 60, sends.c.at <= now).order_by(sends.c.at)
    ).all()
    at = next_slot(recent, now)
    if at > now:
        return None, at
    made = connection.execute(insert(sends).values(notice_id=notice, bot=bot, at=now))
    return int(made.lastrowid), now


def next_slot(recent: Sequence[float], now: float) -> float:
    """When the next send keeps to both limits; `recent` are the sends of the last minute, oldest first."""
    at = now
    for limit, span in ((PER_SECOND, 1.0), (PER_MINUTE, 60.0)):
        if len(recent) >= limit:
            at = max(at, recent[-limit] + span)
    return at


def record(
    connection: Connection,
    notice: Notice,
    send: int,
    outcome: str,
    answer: str,
    *,
    state: State,
    not_before: float,
    now: float,
    content: Mapping[str, Any] | None = None,
) -> None:
    """Keep an attempt's answer and what becomes of the notice."""
    connection.execute(update(sends).where(sends.c.id == send).values(outcome=outcome, answer=answer))
    values: dict[str, Any] = {
        "state": state,
        "tries": notice.tries + 1,
        "not_before": not_before,
        "answer": answer,
        "ended_at": now if state != "pending" else None,
    }
    if content is not None:
        values["content"] = dict(content)
    # One that was given up while it was being sent stays so.
    mine = and_(notices.c.id == notice.id, notices.c.state == "pending")
    connection.execute(update(notices).where(mine).values(**values))


def put_off(connection: Connection, notice: Notice, not_before: float, *, dead: bool, why: str) -> None:
    """Let others go first; or, with `dead`, give a notice up."""
    values: dict[str, Any] = {"tries": notice.tries + 1, "not_before": not_before, "answer": why}
    if dead:
        values |= {"state": "dead", "ended_at": not_before}
    connection.execute(update(notices).where(notices.c.id == notice.id).values(**values))


def bury(connection: Connection, channels: Collection[str], now: float) -> int:
    """Give up what is to be told where there is no channel any more; how many."""
    buried = connection.execute(
        update(notices)
        .where(notices.c.state == "pending", notices.c.channel.not_in(channels))
        .values(state="dead", ended_at=now, answer="the channel was removed")
    )
    return int(buried.rowcount)


def oldest_pending(connection: Connection) -> float | None:
    oldest: float | None = connection.scalar(select(func.min(notices.c.created_at)).where(notices.c.state == "pending"))
    return oldest
