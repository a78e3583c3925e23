"""Notices as rows: written in the transaction of what caused them, chosen by the sender, counted per bot.

A channel whose cards can be changed has one card for each trouble. What moves the trouble makes its card's row pending
again, and what a card shows by itself needs no notice of its own there.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, Row, and_, case, func, insert, or_, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fleet.notify import Notify, Told
from remediator.schema import notices, sends

PER_SECOND = 4  # Feishu takes 5
PER_MINUTE = 90  # Feishu takes 100
FOLD_OVER = 30  # notices that wait: more than these are not told one by one
FOLD_FROM = 3
CHANGE_AGAIN = 1.0  # seconds between two changes of one card
CHANGED_WITHIN = 13 * 86400.0  # Feishu lets a card be changed for 14 days
SEVERITIES = ("critical", "warning", "info")
BEGINNINGS = ("down", "alert")
SHOWN_BY_CARDS = ("restarted", "recovered", "unobserved", "alert_over")
State = Literal["pending", "sent", "dead"]
Form = Literal["one", "group", "summary"]


@dataclass(frozen=True)
class Notice:
    """A notice that is to be told now; times are of the record's clock."""

    id: int
    kind: Told
    severity: str
    incident_id: int | None
    alert_id: int | None
    content: Mapping[str, Any]
    created_at: float
    tries: int = 0
    card: bool = False
    version: int = 0


@dataclass(frozen=True)
class Batch:
    """What one message tells: a notice, or several alike; `told_by_it` need no message of their own any more."""

    notices: tuple[Notice, ...]
    form: Form = "one"
    told_by_it: tuple[int, ...] = field(default=())
    message_id: str | None = None  # the card that is to be changed
    reply_to: str | None = None  # the card in whose thread it is told
    uuid: str = ""  # the same as long as this may have been sent without our knowing
    degraded: bool = False
    signed_again: bool = False
    since: float = 0.0  # when it came to wait

    @property
    def first(self) -> Notice:
        return self.notices[0]

    @property
    def ids(self) -> list[int]:
        return [*(notice.id for notice in self.notices), *self.told_by_it]


def about_incident(incident: int) -> str:
    """What the notices of an incident's beginning are about."""
    return f"down incident {incident}"


def about_alert(fingerprint: str, starts_at: str, times: int) -> str:
    """What the notices of an alert are about that fires for the `times`th time."""
    return f"alert {fingerprint} {starts_at} {times}"


def tell(
    connection: Connection,
    notify: Notify,
    kind: Told,
    about: str,
    labels: Mapping[str, str],
    content: Mapping[str, Any],
    now: float,
    *,
    incident: int | None = None,
    alert: int | None = None,
) -> int:
    """Write a notice for each channel that the routes name for these labels."""
    channels = notify.channels_for(labels, kind)
    return put(connection, notify, channels, kind, about, labels, content, now, incident=incident, alert=alert)


def put(
    connection: Connection,
    notify: Notify,
    channels: Iterable[str],
    kind: Told,
    about: str,
    labels: Mapping[str, str],
    content: Mapping[str, Any],
    now: float,
    *,
    incident: int | None = None,
    alert: int | None = None,
) -> int:
    """Write a notice for each of `channels`; what one was told `about` it is not told again. How many were written.

    Alerts of no service of ours wait a little for others of their name, so as to be told together.
    """
    severity = labels.get("severity", "")
    stranger = incident is None and alert is not None
    written = 0
    for channel in channels:
        keeps = notify.keeps_cards(channel)
        if keeps and kind in SHOWN_BY_CARDS and _has_card(connection, channel, incident, alert):
            continue
        made = connection.execute(
            sqlite_insert(notices)
            .values(
                channel=channel,
                about=about,
                kind=kind,
                topic=labels.get("alertname", "") if stranger else "",
                severity=severity if severity in SEVERITIES else "info",
                incident_id=incident,
                alert_id=alert,
                content=dict(content) | {"labels": dict(labels)},
                created_at=now,
                pending_since=now,
                state="pending",
                tries=0,
                not_before=now + (notify.group_wait if stranger else 0.0),
                degraded=0,
                signed_again=0,
                card=int(keeps and kind in BEGINNINGS and not _is_told_in(connection, channel, kind, incident)),
                version=0,
            )
            .on_conflict_do_nothing()
        )
        written += made.rowcount
    return written


def _is_told_in(connection: Connection, channel: str, kind: Told, incident: int | None) -> bool:
    """Whether a further alert of an incident has the incident's card to be told under."""
    return kind != "down" and incident is not None and _has_card(connection, channel, incident, None)


def _has_card(connection: Connection, channel: str, incident: int | None, alert: int | None) -> bool:
    of = notices.c.incident_id == incident if incident is not None else notices.c.alert_id == alert
    card = and_(notices.c.channel == channel, of, notices.c.card == 1, notices.c.state != "dead")
    return connection.scalar(select(notices.c.id).where(card).limit(1)) is not None


def told(connection: Connection, about: str) -> list[str]:
    """The channels that were told about it, or will be."""
    return list(connection.scalars(select(notices.c.channel).where(notices.c.about == about)))


def changed(connection: Connection, now: float, *, incident: int | None = None, alert: int | None = None) -> None:
    """What the cards of an incident, or of an alert, show has changed."""
    of = notices.c.incident_id == incident if incident is not None else notices.c.alert_id == alert
    was_sent = notices.c.state == "sent"
    connection.execute(
        update(notices)
        .where(of, notices.c.card == 1, or_(was_sent, notices.c.state == "pending"))
        .values(
            version=notices.c.version + 1,
            state="pending",
            tries=case((was_sent, 0), else_=notices.c.tries),
            pending_since=case((was_sent, now), else_=notices.c.pending_since),
            not_before=case(
                (was_sent, func.max(now, func.coalesce(notices.c.ended_at, 0.0) + CHANGE_AGAIN)),
                else_=notices.c.not_before,
            ),
        )
    )


_LIGHT = (
    notices.c.id, notices.c.kind, notices.c.topic, notices.c.severity, notices.c.incident_id, notices.c.not_before,
    notices.c.pending_since, notices.c.message_id, notices.c.message_at, notices.c.tries, notices.c.card,
)  # fmt: skip


def choose(connection: Connection, channel: str, bot: str, now: float) -> Batch | float:
    """What is to be told next, the gravest first, then the oldest; or the time at which to look again."""
    waiting: Any = connection.execute(
        select(*_LIGHT).where(notices.c.channel == channel, notices.c.state == "pending").order_by(notices.c.id)
    ).all()
    ready, later = _ready(waiting, now)
    if not ready:
        return later
    at = next_slot(_sent_lately(connection, bot, now), now)
    if at > now:
        return at
    lead = ready[0]
    if lead.message_id is not None and lead.message_at > now - CHANGED_WITHIN:
        card = select(notices).where(notices.c.channel == channel, notices.c.message_id == lead.message_id)
        rows = connection.execute(card.order_by(notices.c.id)).all()
        form: Form = "one" if len(rows) == 1 else "group" if lead.topic else "summary"
        return _batch(rows, form, message_id=lead.message_id)
    if lead.topic:  # those that came after it, and still wait for others, have found it
        alike = [row for row in waiting if _alike(row, lead) and (row.not_before <= now or row.tries == 0)]
        return _batch(_whole(connection, alike), "group" if len(alike) > 1 else "one")
    alike = [row for row in ready if _alike(row, lead)]
    if len(ready) > FOLD_OVER and len(alike) >= FOLD_FROM:
        return _batch(_whole(connection, alike), "summary")
    story = _story(waiting, lead, now)
    return _batch(
        _whole(connection, story[-1:]), "one", told_by_it=tuple(row.id for row in story[:-1]),
        reply_to=_card_of(connection, channel, story[-1]),
    )  # fmt: skip


def _ready(waiting: Sequence[Row[Any]], now: float) -> tuple[list[Row[Any]], float]:
    """Notices that may go, in order, and when the next one may. One waits for those before it of its incident."""
    ready: list[Row[Any]] = []
    before: set[int] = set()
    later = math.inf
    for row in waiting:
        if row.incident_id in before:
            continue
        if row.not_before > now:
            later = min(later, row.not_before)
        else:
            ready.append(row)
        if row.incident_id is not None:
            before.add(row.incident_id)
    # A card that changes waits for those that are new.
    ready.sort(key=lambda row: (SEVERITIES.index(row.severity), row.message_id is not None, row.pending_since, row.id))
    return ready, later


def _alike(row: Row[Any], lead: Row[Any]) -> bool:
    return all(getattr(row, key) == getattr(lead, key) for key in ("kind", "topic", "severity", "message_id"))


def _story(waiting: Sequence[Row[Any]], lead: Row[Any], now: float) -> list[Row[Any]]:
    """The notices of one incident's course that may go: the last one tells what those before it would have told."""
    if lead.incident_id is None or lead.card or lead.kind.startswith("alert"):
        return [lead]
    course = [row for row in waiting if row.incident_id == lead.incident_id and not row.kind.startswith("alert")]
    ready = [row for row in course if row.not_before <= now]
    return ready if len(ready) == len(course) else [lead]


def _whole(connection: Connection, rows: Sequence[Row[Any]]) -> Sequence[Row[Any]]:
    ids = [row.id for row in rows]
    return connection.execute(select(notices).where(notices.c.id.in_(ids)).order_by(notices.c.id)).all()


def _card_of(connection: Connection, channel: str, row: Row[Any]) -> str | None:
    """The card under which a notice of an incident is told, where the incident has one."""
    if row.incident_id is None or row.card:
        return None
    card = and_(notices.c.channel == channel, notices.c.incident_id == row.incident_id, notices.c.card == 1)
    found: str | None = connection.scalar(
        select(notices.c.message_id)
        .where(card, notices.c.message_id.is_not(None))
        .order_by((notices.c.kind == "down").desc(), notices.c.id.desc())
        .limit(1)
    )
    return found


def _batch(
    rows: Sequence[Row[Any]],
    form: Form,
    *,
    told_by_it: tuple[int, ...] = (),
    message_id: str | None = None,
    reply_to: str | None = None,
) -> Batch:
    first = rows[0]
    return Batch(
        tuple(_notice(row) for row in rows), form, told_by_it, message_id, reply_to,
        # Ids begin anew in another record; times do not.
        uuid=f"{first.id}-{first.created_at:.3f}-{first.degraded}",
        degraded=any(row.degraded for row in rows),
        signed_again=bool(first.signed_again),
        since=min(row.pending_since for row in rows),
    )  # fmt: skip


def _notice(row: Row[Any]) -> Notice:
    return Notice(
        row.id, row.kind, row.severity, row.incident_id, row.alert_id, row.content, row.created_at, row.tries,
        bool(row.card), row.version,
    )  # fmt: skip


def _sent_lately(connection: Connection, bot: str, now: float) -> Sequence[float]:
    lately = select(sends.c.at).where(sends.c.bot == bot, sends.c.at > now - 60, sends.c.at <= now)
    return connection.scalars(lately.order_by(sends.c.at)).all()


def next_slot(recent: Sequence[float], now: float) -> float:
    """When the next send keeps to both limits; `recent` are the sends of the last minute, oldest first."""
    at = now
    for limit, span in ((PER_SECOND, 1.0), (PER_MINUTE, 60.0)):
        if len(recent) >= limit:
            at = max(at, recent[-limit] + span)
    return at


def reserve(connection: Connection, batch: Batch, bot: str, now: float) -> int | None:
    """Count a send against its bot's limits before it is made: its id, or None where there is no room any more."""
    if next_slot(_sent_lately(connection, bot, now), now) > now:
        return None
    made = connection.execute(insert(sends).values(notice_id=batch.first.id, bot=bot, at=now))
    return int(made.lastrowid)


def record(
    connection: Connection,
    batch: Batch,
    send: int,
    outcome: str,
    answer: str,
    *,
    state: State,
    not_before: float,
    now: float,
    message_id: str | None = None,
) -> None:
    """Keep an attempt's answer and what becomes of what it told."""
    connection.execute(update(sends).where(sends.c.id == send).values(outcome=outcome, answer=answer))
    settle(connection, batch, answer, state=state, not_before=not_before, now=now, message_id=message_id)
    if outcome in ("degrade", "sign again"):
        column = notices.c.degraded if outcome == "degrade" else notices.c.signed_again
        connection.execute(update(notices).where(notices.c.id.in_(batch.ids)).values({column: 1}))


def settle(
    connection: Connection,
    batch: Batch,
    answer: str,
    *,
    state: State,
    not_before: float,
    now: float,
    message_id: str | None = None,
) -> None:
    """Let the notices of a batch be sent, dead, or try again. One that was given up meanwhile stays so."""
    values: dict[str, Any] = {"tries": batch.first.tries + 1, "not_before": not_before, "answer": answer}
    mine = and_(notices.c.id.in_(batch.ids), notices.c.state != "dead")
    if state == "pending":
        connection.execute(update(notices).where(mine).values(**values))
        return
    values |= {"state": state, "ended_at": now}
    others = and_(mine, notices.c.id != batch.first.id)
    connection.execute(update(notices).where(mine).values(**values))
    connection.execute(update(notices).where(others).values(told_in=batch.first.id))
    if state != "sent":
        return
    if message_id is not None and batch.message_id is None:
        cards = and_(mine, notices.c.card == 1)
        connection.execute(update(notices).where(cards).values(message_id=message_id, message_at=now))
    # What changed while it was being told is still to be told; so is what an earlier try may have told otherwise.
    by_version: dict[int, list[int]] = {}
    for notice in batch.notices:
        if notice.card:
            known = notice.version if notice.tries == 0 or batch.message_id is not None else notice.version - 1
            by_version.setdefault(known, []).append(notice.id)
    for version, ids in by_version.items():
        newer = and_(notices.c.id.in_(ids), notices.c.version > version, notices.c.state == "sent")
        again = {"state": "pending", "tries": 0, "pending_since": now, "not_before": now + CHANGE_AGAIN}
        connection.execute(update(notices).where(newer).values(**again))


def bury(connection: Connection, channels: Collection[str], now: float) -> int:
    """Give up what is to be told where there is no channel any more; how many."""
    buried = connection.execute(
        update(notices)
        .where(notices.c.state == "pending", notices.c.channel.not_in(channels))
        .values(state="dead", ended_at=now, answer="the channel was removed")
    )
    return int(buried.rowcount)


def retire_cards(connection: Connection, channels: Collection[str]) -> None:
    """Let the cards of channels be that cannot change any there, such as those that have become a custom bot's."""
    cards = and_(notices.c.channel.in_(channels), notices.c.card == 1)
    told_before = and_(cards, notices.c.state == "pending", notices.c.message_id.is_not(None))
    connection.execute(update(notices).where(told_before).values(state="sent"))
    connection.execute(update(notices).where(cards).values(card=0, message_id=None))


def oldest_pending(connection: Connection) -> float | None:
    oldest: float | None = connection.scalar(
        select(func.min(notices.c.pending_since)).where(notices.c.state == "pending")
    )
    return oldest
