"""Notices as rows: written in the transaction of what caused them, chosen by the sender, counted per bot.

A channel whose cards can be changed has one card for each trouble. What moves the trouble makes its card's row pending
again, and what a card shows by itself needs no notice of its own there.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    and_,
    case,
    insert,
    or_,
    select,
    update,
)

from fleet.inventory.notify import NotificationKind
from remediator.record.notifications import SEVERITIES, UPDATE_INTERVAL
from remediator.record.schema import deliveries, notifications
from remediator.record.transaction import Transaction

PER_SECOND = 4  # Feishu takes 5
PER_MINUTE = 90  # Feishu takes 100
FOLD_OVER = 30  # notices that wait: more than these are not told one by one
FOLD_FROM = 3
AT_ONCE = 1000  # notices that are looked at, and told in one message, at most
RENEWALS = 2  # new cards in the place of one that cannot be changed; after that its story is told by notices
CHANGED_WITHIN = 13 * 86400.0  # Feishu lets a card be changed for 14 days
State = Literal["pending", "sent", "dead"]
Form = Literal["one", "group", "summary"]


@dataclass(frozen=True)
class Notice:
    """A notice that is to be told now; times are of the record's clock."""

    id: int
    kind: NotificationKind
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
    degraded: int = 0
    signed_again: bool = False
    since: float = 0.0  # when it came to wait
    tries: int = 0

    @property
    def first(self) -> Notice:
        return self.notices[0]

    @property
    def ids(self) -> list[int]:
        return [*(notice.id for notice in self.notices), *self.told_by_it]


_LIGHT = tuple(
    notifications.c[name]
    for name in (
        "id", "kind", "topic", "severity", "incident_id", "not_before", "pending_since", "message_id", "message_at",
        "tries", "card", "told_in", "renewed", "alert_id",
    )
)  # fmt: skip


# What may go; of that what is new before cards that change, the gravest first, then the oldest.
_RANK = case(
    {name: rank for rank, name in enumerate(SEVERITIES)}, value=notifications.c.severity, else_=len(SEVERITIES)
)
_ORDER = (notifications.c.message_id.is_not(None), _RANK, notifications.c.pending_since, notifications.c.id)


def choose(tx: Transaction, channel: str, bot: str) -> Batch | float:
    """What is to be told next, the gravest first, then the oldest; or the time at which to look again."""
    pending = and_(notifications.c.channel == channel, notifications.c.state == "pending")
    order = (notifications.c.not_before > tx.now, *_ORDER)
    waiting: Any = tx.execute(select(*_LIGHT).where(pending).order_by(*order).limit(AT_ONCE)).all()
    free = _free(waiting)
    ready = [row for row in free if row.not_before <= tx.now]
    if not ready:
        return min((row.not_before for row in free), default=math.inf)
    at = next_slot(_sent_lately(tx, bot), tx.now)
    if at > tx.now:
        return at
    lead = ready[0]
    if lead.message_id is not None and lead.message_at <= tx.now - CHANGED_WITHIN:
        _begin_anew(tx, channel, lead.message_id)
        return choose(tx, channel, bot)
    if lead.message_id is not None:
        card = and_(notifications.c.channel == channel, notifications.c.message_id == lead.message_id)
        return _batch(tx, select(notifications).where(card), message_id=lead.message_id)
    alike = _tried_with(tx, channel, lead) if lead.tries else _alike(free, lead, tx.now)
    if len(alike) > 1:
        return _batch(tx, _whole(alike))
    story = _story(waiting, lead, tx.now)
    told_by_it = tuple(row.id for row in story[:-1])
    reply_to = _card_of(tx, channel, story[-1])
    return _batch(tx, _whole(story[-1:]), told_by_it=told_by_it, reply_to=reply_to)


def _begin_anew(tx: Transaction, channel: str, message_id: str) -> None:
    """A card is too old to be changed: what it tells is told by another."""
    card = and_(
        notifications.c.channel == channel, notifications.c.message_id == message_id, notifications.c.state != "dead"
    )
    tx.execute(update(notifications).where(card).values(message_id=None, state="pending", tries=0, told_in=None))


def _free(waiting: Sequence[Row[Any]]) -> list[Row[Any]]:
    """Notices that need not wait for those before them of their incident, or of their alert.

    What has begun a card is waited for; that it changes is not.
    """
    first: dict[tuple[str, int], int] = {}
    for row in waiting:
        if (of := _of_what(row)) is not None and row.message_id is None:
            first[of] = min(row.id, first.get(of, row.id))
    return [
        row for row in waiting
        if row.message_id is not None or (of := _of_what(row)) is None or row.id == first[of]
    ]  # fmt: skip


def _of_what(row: Row[Any]) -> tuple[str, int] | None:
    if row.incident_id is not None:
        return "incident", row.incident_id
    return ("alert", row.alert_id) if row.alert_id is not None else None


def _tried_with(tx: Transaction, channel: str, lead: Row[Any]) -> Sequence[Row[Any]]:
    """What was tried together stays together, since it may have been told."""
    whole = lead.told_in or lead.id
    mine = and_(
        notifications.c.channel == channel, notifications.c.state == "pending", notifications.c.message_id.is_(None)
    )
    together = and_(mine, notifications.c.tries > 0, or_(notifications.c.told_in == whole, notifications.c.id == whole))
    tried: Any = tx.execute(select(*_LIGHT).where(together)).all()
    of_one_story = lead.incident_id is not None and all(row.incident_id == lead.incident_id for row in tried)
    return [lead] if of_one_story or not tried else tried


def _alike(free: Sequence[Row[Any]], lead: Row[Any], now: float) -> Sequence[Row[Any]]:
    """What is told together with `lead`, that was not tried yet."""
    fresh = [row for row in free if not row.tries and row.message_id is None]
    ready = [row for row in fresh if row.not_before <= now]
    alike = [row for row in ready if _key(row) == _key(lead)]
    if len(ready) > FOLD_OVER and len(alike) >= FOLD_FROM:
        return alike
    if not lead.topic:
        return [lead]
    # Those that came after it, and still wait for others, have found it.
    return [row for row in fresh if _key(row) == _key(lead) and row.topic == lead.topic]


def _key(row: Row[Any]) -> tuple[Any, ...]:
    return row.kind, row.severity


def _story(waiting: Sequence[Row[Any]], lead: Row[Any], now: float) -> list[Row[Any]]:
    """The notices of one incident's course that may go: the last one tells what those before it would have told."""
    if lead.incident_id is None or lead.card or lead.kind.startswith("alert"):
        return [lead]
    course = [
        row for row in waiting
        if row.incident_id == lead.incident_id and row.message_id is None and not row.kind.startswith("alert")
    ]  # fmt: skip
    ready = sorted((row for row in course if row.not_before <= now), key=lambda row: row.id)
    return ready if len(ready) == len(course) else [lead]


def _whole(rows: Sequence[Row[Any]]) -> Select[Any]:
    return select(notifications).where(notifications.c.id.in_([row.id for row in rows]))


def _card_of(tx: Transaction, channel: str, row: Row[Any]) -> str | None:
    """The card under which a notice of an incident is told, where the incident has one."""
    if row.incident_id is None or row.card or row.renewed:
        return None
    of = and_(notifications.c.channel == channel, notifications.c.incident_id == row.incident_id)
    card = and_(of, notifications.c.card == 1, notifications.c.kind == "down", notifications.c.state != "dead")
    found: str | None = tx.scalar(
        select(notifications.c.message_id)
        .where(card, notifications.c.message_id.is_not(None))
        .order_by(notifications.c.id.desc())
        .limit(1)
    )
    return found


def _batch(
    tx: Transaction,
    query: Select[Any],
    *,
    told_by_it: tuple[int, ...] = (),
    message_id: str | None = None,
    reply_to: str | None = None,
) -> Batch:
    rows = tx.execute(query.order_by(notifications.c.id)).all()
    first = rows[0]
    form: Form = "one" if len(rows) == 1 else "group" if first.topic and _are_of_one_topic(rows) else "summary"
    return Batch(
        tuple(_notice(row) for row in rows), form, told_by_it, message_id, reply_to,
        # Ids begin anew in another record; times do not.
        uuid=f"{first.id}-{first.created_at:.3f}-{first.degraded}-{first.renewed}",
        degraded=max(row.degraded for row in rows),
        signed_again=bool(first.signed_again),
        tries=max((row.tries for row in rows if row.state == "pending"), default=0),
        since=min((row.pending_since for row in rows if row.state == "pending"), default=first.pending_since),
    )  # fmt: skip


def _are_of_one_topic(rows: Sequence[Row[Any]]) -> bool:
    return len({row.topic for row in rows}) == 1


def _notice(row: Row[Any]) -> Notice:
    return Notice(
        row.id, row.kind, row.severity, row.incident_id, row.alert_id, row.content, row.created_at, row.tries,
        bool(row.card), row.version,
    )  # fmt: skip


def _sent_lately(tx: Transaction, bot: str) -> Sequence[float]:
    lately = select(deliveries.c.at).where(
        deliveries.c.bot == bot, deliveries.c.at > tx.now - 60, deliveries.c.at <= tx.now
    )
    return tx.scalars(lately.order_by(deliveries.c.at)).all()


def next_slot(recent: Sequence[float], now: float) -> float:
    """When the next send keeps to both limits; `recent` are the sends of the last minute, oldest first."""
    at = now
    for limit, span in ((PER_SECOND, 1.0), (PER_MINUTE, 60.0)):
        if len(recent) >= limit:
            at = max(at, recent[-limit] + span)
    return at


def reserve(tx: Transaction, batch: Batch, bot: str) -> int | None:
    """Count a send against its bot's limits before it is made: its id, or None where there is no room any more.

    From now on it may have been told, whatever becomes of us.
    """
    if next_slot(_sent_lately(tx, bot), tx.now) > tx.now:
        return None
    made = tx.execute(insert(deliveries).values(notice_id=batch.first.id, bot=bot, at=tx.now))
    waiting = and_(_of(batch), notifications.c.state == "pending")
    told_in = case((notifications.c.id == batch.first.id, None), else_=batch.first.id)
    tx.execute(update(notifications).where(waiting).values(tries=notifications.c.tries + 1, told_in=told_in))
    return int(made.lastrowid)


def _of(batch: Batch) -> ColumnElement[bool]:
    """The notices of a batch, but for those that were given up meanwhile."""
    return and_(notifications.c.id.in_(batch.ids), notifications.c.state != "dead")


def record(
    tx: Transaction,
    batch: Batch,
    send: int,
    outcome: str,
    answer: str,
    *,
    state: State,
    not_before: float,
    message_id: str | None = None,
    degraded: int = 0,
) -> None:
    """Keep an attempt's answer and what becomes of what it told."""
    tx.execute(update(deliveries).where(deliveries.c.id == send).values(outcome=outcome, answer=answer))
    if state == "sent":
        _sent(tx, batch, answer, message_id)
    elif state == "pending":
        put_off(tx, batch, answer, not_before)
        if outcome in ("degrade", "sign again"):
            then: dict[str, Any] = {"degraded": degraded} if outcome == "degrade" else {"signed_again": 1}
            tx.execute(update(notifications).where(_of(batch)).values(**then))
    elif batch.message_id is not None or batch.reply_to is not None:
        _renew(tx, batch, answer)
    else:
        give_up(tx, batch, answer)


def put_off(tx: Transaction, batch: Batch, why: str, not_before: float) -> None:
    """Let others go first."""
    tx.execute(update(notifications).where(_of(batch)).values(not_before=not_before, answer=why))


def broke(tx: Transaction, batch: Batch, why: str, not_before: float, *, most: int) -> None:
    """We could not even make a message of it: let others go first; after so many tries it is given up."""
    put_off(tx, batch, why, not_before)
    tx.execute(update(notifications).where(_of(batch)).values(tries=notifications.c.tries + 1))
    worn_out = and_(_of(batch), notifications.c.state == "pending", notifications.c.tries >= most)
    tx.execute(update(notifications).where(worn_out).values(state="dead", ended_at=not_before))


def give_up(tx: Transaction, batch: Batch, why: str) -> None:
    tx.execute(update(notifications).where(_of(batch)).values(state="dead", ended_at=tx.now, answer=why))


def _renew(tx: Transaction, batch: Batch, answer: str) -> None:
    """The card cannot be changed, or not be replied to any more: tell it by a message of its own."""
    values: dict[str, Any] = {
        "message_id": None, "renewed": notifications.c.renewed + 1, "tries": 0, "told_in": None, "degraded": 0,
        "signed_again": 0, "not_before": tx.now, "answer": answer,
    }  # fmt: skip
    lives = or_(notifications.c.state == "pending", notifications.c.card == 1)
    tx.execute(update(notifications).where(_of(batch), lives).values(**values, state="pending"))


def _sent(tx: Transaction, batch: Batch, answer: str, message_id: str | None) -> None:
    values: dict[str, Any] = {"state": "sent", "ended_at": tx.now, "answer": answer, "degraded": 0, "signed_again": 0}
    tx.execute(update(notifications).where(_of(batch)).values(**values))
    cards = and_(_of(batch), notifications.c.card == 1)
    if message_id is not None and batch.message_id is None:
        tx.execute(update(notifications).where(cards).values(message_id=message_id, message_at=tx.now))
    elif batch.message_id is None:
        tx.execute(update(notifications).where(cards).values(card=0))  # it cannot be found again to be changed
    # What changed while it was being told is still to be told; so is what an earlier try may have told otherwise.
    by_version: dict[int, list[int]] = {}
    for notice in batch.notices:
        if notice.card:
            known = notice.version if batch.tries == 0 or batch.message_id is not None else notice.version - 1
            by_version.setdefault(known, []).append(notice.id)
    for version, ids in by_version.items():
        newer = and_(
            notifications.c.id.in_(ids),
            notifications.c.card == 1,
            notifications.c.version > version,
            notifications.c.state == "sent",
        )
        again = {"state": "pending", "tries": 0, "pending_since": tx.now, "not_before": tx.now + UPDATE_INTERVAL}
        tx.execute(update(notifications).where(newer).values(**again))
    # One that could never be changed is not tried for ever: how it goes on is told by notices.
    given_up = and_(cards, notifications.c.renewed >= RENEWALS, notifications.c.state == "sent")
    tx.execute(update(notifications).where(given_up).values(card=0))


def bury(tx: Transaction, channels: Collection[str]) -> int:
    """Give up what is to be told where there is no channel any more; how many."""
    buried = tx.execute(
        update(notifications)
        .where(notifications.c.state == "pending", notifications.c.channel.not_in(channels))
        .values(state="dead", ended_at=tx.now, answer="the channel was removed")
    )
    return int(buried.rowcount)


def retire_cards(tx: Transaction, channels: Collection[str]) -> None:
    """Let the cards of channels be that cannot change any there, such as those that have become a custom bot's."""
    cards = and_(notifications.c.channel.in_(channels), notifications.c.card == 1)
    told_before = and_(cards, notifications.c.state == "pending", notifications.c.message_id.is_not(None))
    tx.execute(update(notifications).where(told_before).values(state="sent"))
    tx.execute(update(notifications).where(cards).values(card=0, message_id=None))
