"""Notices as rows: written in the transaction of what caused them, chosen by the sender, counted per bot.

A channel whose cards can be changed has one card for each trouble. What moves the trouble makes its card's row pending
again, and what a card shows by itself needs no notice of its own there.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    Update,
    and_,
    bindparam,
    case,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fleet.inventory.notify import NotificationKind, Notify
from remediator.record.schema import notices, sends

PER_SECOND = 4  # Feishu takes 5
PER_MINUTE = 90  # Feishu takes 100
FOLD_OVER = 30  # notices that wait: more than these are not told one by one
FOLD_FROM = 3
AT_ONCE = 1000  # notices that are looked at, and told in one message, at most
RENEWALS = 2  # new cards in the place of one that cannot be changed; after that its story is told by notices
CHANGE_AGAIN = 1.0  # seconds between two changes of one card
CHANGED_WITHIN = 13 * 86400.0  # Feishu lets a card be changed for 14 days
SEVERITIES = ("critical", "warning", "info")
BEGINNINGS = ("down", "alert")
CALLS_OF_COURSE = (
    "could_not_restart", "person_needed", "approval", "blind", "stopped_by_hand", "waiting", "reminder",
)  # fmt: skip
SHOWN_BY_CARDS = ("restarted", "recovered", "unobserved", "alert_over")
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


def about_incident(incident: int) -> str:
    """What the notices of an incident's beginning are about."""
    return f"down incident {incident}"


def about_person_needed(incident: int, at: float) -> str:
    """What the notices are about that a person is needed, since `at`."""
    return f"person_needed incident {incident} {at:.3f}"


def about_alert(fingerprint: str, starts_at: str, times: int) -> str:
    """What the notices of an alert are about that fires for the `times`th time."""
    return f"alert {fingerprint} {starts_at} {times}"


def tell(
    connection: Connection,
    notify: Notify,
    kind: NotificationKind,
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
    kind: NotificationKind,
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
        keeps = notify.can_update_cards(channel)
        if keeps and kind in SHOWN_BY_CARDS and _is_shown(connection, channel, kind, incident, alert):
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
                renewed=0,
            )
            .on_conflict_do_nothing()
        )
        written += made.rowcount
    return written


def _is_told_in(connection: Connection, channel: str, kind: NotificationKind, incident: int | None) -> bool:
    """Whether a further alert of an incident has the incident's card to be told under."""
    return kind == "alert" and incident is not None and _has_card(connection, channel, incident, None, "down")


def _is_shown(
    connection: Connection, channel: str, kind: NotificationKind, incident: int | None, alert: int | None
) -> bool:
    """Whether a card that is there shows it: an incident's its course, an alert's its end."""
    if kind == "alert_over":
        return _has_card(connection, channel, None, alert, "alert")
    return _has_card(connection, channel, incident, None, "down")


def _has_card(
    connection: Connection, channel: str, incident: int | None, alert: int | None, kind: NotificationKind
) -> bool:
    of = notices.c.incident_id == incident if incident is not None else notices.c.alert_id == alert
    card = and_(
        notices.c.channel == channel, of, notices.c.card == 1, notices.c.kind == kind, notices.c.state != "dead"
    )
    return connection.scalar(select(notices.c.id).where(card).limit(1)) is not None


def told(connection: Connection, about: str) -> list[str]:
    """The channels that were told about it, or will be."""
    return list(connection.scalars(select(notices.c.channel).where(notices.c.about == about)))


def is_told(connection: Connection, incident: int) -> bool:
    """Whether anybody was told of an incident, or will be."""
    return connection.scalar(select(notices.c.id).where(notices.c.incident_id == incident).limit(1)) is not None


def told_of_incident(connection: Connection, incident: int, kind: NotificationKind) -> list[str]:
    """The channels that were told something of an incident, or will be."""
    of = and_(notices.c.incident_id == incident, notices.c.kind == kind)
    return list(connection.scalars(select(notices.c.channel).where(of).distinct()))


def _changes(of: ColumnElement[bool]) -> Update:
    """Makes the cards pending again that are `of` something which has changed `now`."""
    was_sent = notices.c.state == "sent"
    later: Any = func.max(bindparam("now"), func.coalesce(notices.c.ended_at, 0.0) + CHANGE_AGAIN)
    return (
        update(notices)
        .where(of, notices.c.card == 1, or_(was_sent, notices.c.state == "pending"))
        .values(
            version=notices.c.version + 1,
            state="pending",
            tries=case((was_sent, 0), else_=notices.c.tries),
            pending_since=case((was_sent, bindparam("now")), else_=notices.c.pending_since),
            not_before=case((was_sent, later), else_=notices.c.not_before),
        )
    )


# Made once: every event of every incident executes them.
_OF_INCIDENT = _changes(and_(notices.c.incident_id == bindparam("of"), notices.c.kind == "down"))
# An alert that fires again has a card of its own for that; the one before is of what was.
_LATEST = select(func.max(notices.c.id)).where(notices.c.alert_id == bindparam("of"), notices.c.kind == "alert")
_OF_ALERT = _changes(notices.c.id.in_(_LATEST.group_by(notices.c.channel)))


def changed(connection: Connection, now: float, *, incident: int | None = None, alert: int | None = None) -> None:
    """What the card of an incident, or of an alert, shows has changed."""
    statement, of = (_OF_INCIDENT, incident) if incident is not None else (_OF_ALERT, alert)
    connection.execute(statement, {"of": of, "now": now})


def outgrown(connection: Connection, now: float, *, incident: int | None = None, alert: int | None = None) -> None:
    """What still waits to be told of something that is over, its card has said by being over."""
    of = notices.c.incident_id == incident if incident is not None else notices.c.alert_id == alert
    cards = select(notices.c.channel).where(of, notices.c.card == 1, notices.c.state != "dead")
    left = and_(of, notices.c.card == 0, notices.c.state == "pending", notices.c.kind.in_(CALLS_OF_COURSE))
    connection.execute(
        update(notices)
        .where(left, notices.c.channel.in_(cards))
        .values(state="sent", ended_at=now, answer="it was over before it could be told: its card says so")
    )


_LIGHT = (
    notices.c.id, notices.c.kind, notices.c.topic, notices.c.severity, notices.c.incident_id, notices.c.not_before,
    notices.c.pending_since, notices.c.message_id, notices.c.message_at, notices.c.tries, notices.c.card,
    notices.c.told_in, notices.c.renewed, notices.c.alert_id,
)  # fmt: skip


# What may go; of that what is new before cards that change, the gravest first, then the oldest.
_RANK = case({name: rank for rank, name in enumerate(SEVERITIES)}, value=notices.c.severity, else_=len(SEVERITIES))
_ORDER = (notices.c.message_id.is_not(None), _RANK, notices.c.pending_since, notices.c.id)


def choose(connection: Connection, channel: str, bot: str, now: float) -> Batch | float:
    """What is to be told next, the gravest first, then the oldest; or the time at which to look again."""
    pending = and_(notices.c.channel == channel, notices.c.state == "pending")
    order = (notices.c.not_before > now, *_ORDER)
    waiting: Any = connection.execute(select(*_LIGHT).where(pending).order_by(*order).limit(AT_ONCE)).all()
    free = _free(waiting)
    ready = [row for row in free if row.not_before <= now]
    if not ready:
        return min((row.not_before for row in free), default=math.inf)
    at = next_slot(_sent_lately(connection, bot, now), now)
    if at > now:
        return at
    lead = ready[0]
    if lead.message_id is not None and lead.message_at <= now - CHANGED_WITHIN:
        _begin_anew(connection, channel, lead.message_id)
        return choose(connection, channel, bot, now)
    if lead.message_id is not None:
        card = and_(notices.c.channel == channel, notices.c.message_id == lead.message_id)
        return _batch(connection, select(notices).where(card), message_id=lead.message_id)
    alike = _tried_with(connection, channel, lead) if lead.tries else _alike(free, lead, now)
    if len(alike) > 1:
        return _batch(connection, _whole(alike))
    story = _story(waiting, lead, now)
    told_by_it = tuple(row.id for row in story[:-1])
    reply_to = _card_of(connection, channel, story[-1])
    return _batch(connection, _whole(story[-1:]), told_by_it=told_by_it, reply_to=reply_to)


def _begin_anew(connection: Connection, channel: str, message_id: str) -> None:
    """A card is too old to be changed: what it tells is told by another."""
    card = and_(notices.c.channel == channel, notices.c.message_id == message_id, notices.c.state != "dead")
    connection.execute(update(notices).where(card).values(message_id=None, state="pending", tries=0, told_in=None))


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


def _tried_with(connection: Connection, channel: str, lead: Row[Any]) -> Sequence[Row[Any]]:
    """What was tried together stays together, since it may have been told."""
    whole = lead.told_in or lead.id
    mine = and_(notices.c.channel == channel, notices.c.state == "pending", notices.c.message_id.is_(None))
    together = and_(mine, notices.c.tries > 0, or_(notices.c.told_in == whole, notices.c.id == whole))
    tried: Any = connection.execute(select(*_LIGHT).where(together)).all()
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
    return select(notices).where(notices.c.id.in_([row.id for row in rows]))


def _card_of(connection: Connection, channel: str, row: Row[Any]) -> str | None:
    """The card under which a notice of an incident is told, where the incident has one."""
    if row.incident_id is None or row.card or row.renewed:
        return None
    of = and_(notices.c.channel == channel, notices.c.incident_id == row.incident_id)
    card = and_(of, notices.c.card == 1, notices.c.kind == "down", notices.c.state != "dead")
    found: str | None = connection.scalar(
        select(notices.c.message_id)
        .where(card, notices.c.message_id.is_not(None))
        .order_by(notices.c.id.desc())
        .limit(1)
    )
    return found


def _batch(
    connection: Connection,
    query: Select[Any],
    *,
    told_by_it: tuple[int, ...] = (),
    message_id: str | None = None,
    reply_to: str | None = None,
) -> Batch:
    rows = connection.execute(query.order_by(notices.c.id)).all()
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
    """Count a send against its bot's limits before it is made: its id, or None where there is no room any more.

    From now on it may have been told, whatever becomes of us.
    """
    if next_slot(_sent_lately(connection, bot, now), now) > now:
        return None
    made = connection.execute(insert(sends).values(notice_id=batch.first.id, bot=bot, at=now))
    waiting = and_(_of(batch), notices.c.state == "pending")
    told_in = case((notices.c.id == batch.first.id, None), else_=batch.first.id)
    connection.execute(update(notices).where(waiting).values(tries=notices.c.tries + 1, told_in=told_in))
    return int(made.lastrowid)


def _of(batch: Batch) -> ColumnElement[bool]:
    """The notices of a batch, but for those that were given up meanwhile."""
    return and_(notices.c.id.in_(batch.ids), notices.c.state != "dead")


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
    degraded: int = 0,
) -> None:
    """Keep an attempt's answer and what becomes of what it told."""
    connection.execute(update(sends).where(sends.c.id == send).values(outcome=outcome, answer=answer))
    if state == "sent":
        _sent(connection, batch, answer, now, message_id)
    elif state == "pending":
        put_off(connection, batch, answer, not_before)
        if outcome in ("degrade", "sign again"):
            then: dict[str, Any] = {"degraded": degraded} if outcome == "degrade" else {"signed_again": 1}
            connection.execute(update(notices).where(_of(batch)).values(**then))
    elif batch.message_id is not None or batch.reply_to is not None:
        _renew(connection, batch, answer, now)
    else:
        give_up(connection, batch, answer, now)


def put_off(connection: Connection, batch: Batch, why: str, not_before: float) -> None:
    """Let others go first."""
    connection.execute(update(notices).where(_of(batch)).values(not_before=not_before, answer=why))


def broke(connection: Connection, batch: Batch, why: str, not_before: float, *, most: int) -> None:
    """We could not even make a message of it: let others go first; after so many tries it is given up."""
    put_off(connection, batch, why, not_before)
    connection.execute(update(notices).where(_of(batch)).values(tries=notices.c.tries + 1))
    worn_out = and_(_of(batch), notices.c.state == "pending", notices.c.tries >= most)
    connection.execute(update(notices).where(worn_out).values(state="dead", ended_at=not_before))


def give_up(connection: Connection, batch: Batch, why: str, now: float) -> None:
    connection.execute(update(notices).where(_of(batch)).values(state="dead", ended_at=now, answer=why))


def _renew(connection: Connection, batch: Batch, answer: str, now: float) -> None:
    """The card cannot be changed, or not be replied to any more: tell it by a message of its own."""
    values: dict[str, Any] = {
        "message_id": None, "renewed": notices.c.renewed + 1, "tries": 0, "told_in": None, "degraded": 0,
        "signed_again": 0, "not_before": now, "answer": answer,
    }  # fmt: skip
    lives = or_(notices.c.state == "pending", notices.c.card == 1)
    connection.execute(update(notices).where(_of(batch), lives).values(**values, state="pending"))


def _sent(connection: Connection, batch: Batch, answer: str, now: float, message_id: str | None) -> None:
    values: dict[str, Any] = {"state": "sent", "ended_at": now, "answer": answer, "degraded": 0, "signed_again": 0}
    connection.execute(update(notices).where(_of(batch)).values(**values))
    cards = and_(_of(batch), notices.c.card == 1)
    if message_id is not None and batch.message_id is None:
        connection.execute(update(notices).where(cards).values(message_id=message_id, message_at=now))
    elif batch.message_id is None:
        connection.execute(update(notices).where(cards).values(card=0))  # it cannot be found again to be changed
    # What changed while it was being told is still to be told; so is what an earlier try may have told otherwise.
    by_version: dict[int, list[int]] = {}
    for notice in batch.notices:
        if notice.card:
            known = notice.version if batch.tries == 0 or batch.message_id is not None else notice.version - 1
            by_version.setdefault(known, []).append(notice.id)
    for version, ids in by_version.items():
        newer = and_(notices.c.id.in_(ids), notices.c.card == 1, notices.c.version > version, notices.c.state == "sent")
        again = {"state": "pending", "tries": 0, "pending_since": now, "not_before": now + CHANGE_AGAIN}
        connection.execute(update(notices).where(newer).values(**again))
    # One that could never be changed is not tried for ever: how it goes on is told by notices.
    given_up = and_(cards, notices.c.renewed >= RENEWALS, notices.c.state == "sent")
    connection.execute(update(notices).where(given_up).values(card=0))


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
