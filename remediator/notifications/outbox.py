"""The outbox: choose the notifications that a channel's next message contains, within the rate limits of its bot.

On a channel whose messages can be updated, each incident has one card. A change of the incident makes the card's row
pending again, and what the card shows needs no notification of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import Row, Select, and_, or_, select, update

from fleet.inventory.notify import ChannelOptions, NotificationKind
from remediator.notifications.bursts import DIGESTED, Burst, find_burst
from remediator.record.notifications import SEVERITY_RANK, severity_rank
from remediator.record.schema import deliveries, notifications
from remediator.record.transaction import Transaction

FOLD_OVER = 30  # pending notifications of a channel; if there are more, those of one kind are combined
FOLD_FROM = 3
ROW_LIMIT = 1000  # notifications that are considered at once, and that one message contains; as many foreign alerts
MessageForm = Literal["one", "group", "summary"]


@dataclass(frozen=True)
class QueuedNotification:
    """A notification to send now; times are of the record's clock."""

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
    is_foreign: bool = False


@dataclass(frozen=True)
class Batch:
    """The content of one message: one notification, or several of one kind.

    `superseded` are earlier notifications of the same incident that need no message of their own. `key` stays the same
    as long as an earlier attempt may have sent the message without a recorded response.
    """

    channel: str
    notifications: tuple[QueuedNotification, ...]
    form: MessageForm = "one"
    superseded: tuple[int, ...] = field(default=())
    message_id: str | None = None  # the message to update
    reply_to: str | None = None  # the message to reply to
    key: str = ""
    retry_state: Mapping[str, Any] | None = None
    pending_since: float = 0.0
    tries: int = 0
    burst: Burst | None = None  # of which this is a digest

    @property
    def first(self) -> QueuedNotification:
        return self.notifications[0]

    @property
    def ids(self) -> list[int]:
        return [*(queued.id for queued in self.notifications), *self.superseded]


# The columns that the choice depends on; `content` is read only for what is sent.
_CHOICE_COLUMNS = tuple(
    notifications.c[name]
    for name in (
        "id", "kind", "group_key", "severity", "incident_id", "not_before", "pending_since", "message_id", "message_at",
        "tries", "card", "sent_with", "replacements", "alert_id", "foreign_alert",
    )
)  # fmt: skip
# New messages before updates, then by severity, then the oldest.
_ORDER = (notifications.c.message_id.is_not(None), SEVERITY_RANK, notifications.c.pending_since, notifications.c.id)


@dataclass(frozen=True)
class _WaitingDigest:
    """The rows of which the next digest of a burst consists."""

    burst: Burst
    rows: Sequence[Row[Any]]


def choose_batch(tx: Transaction, channel: str) -> Batch | float:
    """Return the channel's next message, or the time at which to look again."""
    known = tx.inventory.notify.channels.get(channel)
    if known is None:
        return math.inf
    options = known.settings
    pending = _read_pending(tx, channel)
    bursts = {foreign: find_burst(tx, channel, foreign=foreign) for foreign in (False, True)}
    digests = _collect_digests(pending, bursts)
    digested = {row.id for digest in digests for row in digest.rows}
    candidates = _without_waiting([row for row in pending if row.id not in digested])
    ready = [row for row in candidates if row.not_before <= tx.now]
    # A message that does not wait for a digest is sent before it, and updates after it.
    due = [each for each in digests if each.burst.next_digest <= tx.now and all(row.message_id for row in ready)]
    if not ready and not due:
        later = [row.not_before for row in candidates]
        return min([*later, *(each.burst.next_digest for each in digests)], default=math.inf)
    slot = next_delivery_time(recent_deliveries(tx, options.bot_id), tx.now, options)
    if slot > tx.now:
        return slot
    if due:
        return _build_digest(tx, channel, due[0])
    chosen = _choose_message(tx, channel, options, pending, candidates, ready[0])
    if isinstance(chosen, Batch) and chosen.form == "summary" and chosen.first.kind in DIGESTED:
        # An update of a digest, or one that could not be sent before.
        return replace(chosen, burst=bursts[bool(ready[0].foreign_alert)])
    return chosen


def _read_pending(tx: Transaction, channel: str) -> list[Row[Any]]:
    """Return what is pending in the order of sending; of equal severity, foreign alerts are the last."""
    is_pending = and_(notifications.c.channel == channel, notifications.c.state == "pending")
    order = (notifications.c.not_before > tx.now, *_ORDER)
    found: list[Row[Any]] = []
    for foreign in (0, 1):  # foreign alerts, which may be many, take no place of others
        query = select(*_CHOICE_COLUMNS).where(is_pending, notifications.c.foreign_alert == foreign)
        found += tx.execute(query.order_by(*order).limit(ROW_LIMIT)).all()
    return sorted(
        found, key=lambda row: (row.not_before > tx.now, row.message_id is not None, severity_rank(row.severity))
    )


def _collect_digests(pending: Sequence[Row[Any]], bursts: Mapping[bool, Burst | None]) -> list[_WaitingDigest]:
    digests = [
        _WaitingDigest(burst, [row for row in pending if _is_digested(row, burst)])
        for burst in bursts.values()
        if burst is not None
    ]
    return [each for each in digests if each.rows]


def _choose_message(
    tx: Transaction,
    channel: str,
    options: ChannelOptions,
    pending: Sequence[Row[Any]],
    candidates: Sequence[Row[Any]],
    lead: Row[Any],
) -> Batch | float:
    """Return the message that begins with `lead`."""
    if lead.message_id is not None:
        return _choose_update(tx, channel, lead, options)
    combined = _tried_with(tx, channel, lead) if lead.tries else _combine(candidates, lead, tx.now)
    if len(combined) > 1:
        return _build_batch(tx, channel, _select_rows(combined))
    course = _course_of_incident(pending, lead, tx.now)
    superseded = tuple(row.id for row in course[:-1])
    reply_to = _find_card(tx, channel, course[-1]) if options.has_threads else None
    return _build_batch(tx, channel, _select_rows(course[-1:]), superseded=superseded, reply_to=reply_to)


def _is_digested(row: Row[Any], burst: Burst) -> bool:
    """Whether a row is one that a digest of the burst contains: it has no message yet, and none was tried."""
    is_of_burst = bool(row.foreign_alert) == burst.foreign and (burst.critical or row.severity != "critical")
    return is_of_burst and row.message_id is None and not row.tries and row.kind in DIGESTED


def _build_digest(tx: Transaction, channel: str, digest: _WaitingDigest) -> Batch:
    """Return a message with the newest notification of each incident and alert; the earlier ones need none.

    Further alerts of an incident are less important than what became of its service.
    """
    newest: dict[Any, tuple[bool, int]] = {}
    for row in digest.rows:
        key = _subject(row) or row.id
        found = (not row.kind.startswith("alert"), row.id)
        newest[key] = max(found, newest.get(key, found))
    # A card stands for its incident: it shows the present state.
    cards = {_subject(row): row.id for row in digest.rows if row.card}
    shown = {cards.get(key, number) for key, (_, number) in newest.items()}
    superseded = tuple(row.id for row in digest.rows if row.id not in shown)
    batch = _build_batch(tx, channel, select(notifications).where(notifications.c.id.in_(shown)), superseded=superseded)
    return replace(batch, burst=digest.burst)


def _choose_update(tx: Transaction, channel: str, lead: Row[Any], options: ChannelOptions) -> Batch | float:
    if lead.message_at <= tx.now - (options.updatable_for or 0.0):
        _replace_message(tx, channel, lead.message_id)
        return choose_batch(tx, channel)
    is_card = and_(notifications.c.channel == channel, notifications.c.message_id == lead.message_id)
    return _build_batch(tx, channel, select(notifications).where(is_card), message_id=lead.message_id)


def _replace_message(tx: Transaction, channel: str, message_id: str) -> None:
    """Send a new message instead of one that is too old to be updated."""
    is_card = and_(
        notifications.c.channel == channel, notifications.c.message_id == message_id, notifications.c.state != "dead"
    )
    tx.execute(update(notifications).where(is_card).values(message_id=None, state="pending", tries=0, sent_with=None))


def _without_waiting(pending: Sequence[Row[Any]]) -> list[Row[Any]]:
    """Return the rows that need not wait for earlier ones of their incident or alert; updates wait for nothing."""
    first: dict[tuple[str, int], int] = {}
    for row in pending:
        if (subject := _subject(row)) is not None and row.message_id is None:
            first[subject] = min(row.id, first.get(subject, row.id))
    return [
        row for row in pending
        if row.message_id is not None or (subject := _subject(row)) is None or row.id == first[subject]
    ]  # fmt: skip


def _subject(row: Row[Any]) -> tuple[str, int] | None:
    if row.incident_id is not None:
        return "incident", row.incident_id
    return ("alert", row.alert_id) if row.alert_id is not None else None


def _tried_with(tx: Transaction, channel: str, lead: Row[Any]) -> Sequence[Row[Any]]:
    """Return the rows that an earlier attempt sent together, since that message may have arrived."""
    first = lead.sent_with or lead.id
    is_new = and_(
        notifications.c.channel == channel, notifications.c.state == "pending", notifications.c.message_id.is_(None)
    )
    is_together = or_(notifications.c.sent_with == first, notifications.c.id == first)
    query = select(*_CHOICE_COLUMNS).where(is_new, notifications.c.tries > 0, is_together)
    tried: Any = tx.execute(query).all()
    is_course = lead.incident_id is not None and all(row.incident_id == lead.incident_id for row in tried)
    return [lead] if is_course or not tried else tried


def _combine(candidates: Sequence[Row[Any]], lead: Row[Any], now: float) -> Sequence[Row[Any]]:
    """Return the rows that are sent in one message with `lead`, which was not tried yet."""
    untried = [row for row in candidates if not row.tries and row.message_id is None]
    ready = [row for row in untried if row.not_before <= now]
    similar = [row for row in ready if _is_similar(row, lead)]
    if len(ready) > FOLD_OVER and len(similar) >= FOLD_FROM:
        return similar
    if not lead.group_key:
        return [lead]
    # Also those that arrived later and whose `group_wait` has not passed.
    return [row for row in untried if _is_similar(row, lead) and row.group_key == lead.group_key]


def _is_similar(row: Row[Any], lead: Row[Any]) -> bool:
    return bool(row.kind == lead.kind and row.severity == lead.severity and row.foreign_alert == lead.foreign_alert)


def _course_of_incident(pending: Sequence[Row[Any]], lead: Row[Any], now: float) -> list[Row[Any]]:
    """Return the pending notifications of an incident, of which only the last one is sent; `lead` if one must wait."""
    if lead.incident_id is None or lead.card or lead.kind.startswith("alert"):
        return [lead]
    course = [
        row for row in pending
        if row.incident_id == lead.incident_id and row.message_id is None and not row.kind.startswith("alert")
    ]  # fmt: skip
    ready = sorted((row for row in course if row.not_before <= now), key=lambda row: row.id)
    return ready if len(ready) == len(course) else [lead]


def _select_rows(rows: Sequence[Row[Any]]) -> Select[Any]:
    return select(notifications).where(notifications.c.id.in_([row.id for row in rows]))


def _find_card(tx: Transaction, channel: str, row: Row[Any]) -> str | None:
    """Return the message id of the incident's card, to which a notification is a reply; None if there is none."""
    if row.incident_id is None or row.card or row.replacements:
        return None
    of_incident = and_(notifications.c.channel == channel, notifications.c.incident_id == row.incident_id)
    is_card = and_(of_incident, notifications.c.card == 1, notifications.c.kind == "down")
    message_id: str | None = tx.scalar(
        select(notifications.c.message_id)
        .where(is_card, notifications.c.state != "dead", notifications.c.message_id.is_not(None))
        .order_by(notifications.c.id.desc())
        .limit(1)
    )
    return message_id


def _build_batch(
    tx: Transaction,
    channel: str,
    query: Select[Any],
    *,
    superseded: tuple[int, ...] = (),
    message_id: str | None = None,
    reply_to: str | None = None,
) -> Batch:
    rows = tx.execute(query.order_by(notifications.c.id)).all()
    first, pending = rows[0], [row for row in rows if row.state == "pending"]
    is_group = bool(first.group_key) and len({row.group_key for row in rows}) == 1
    return Batch(
        channel,
        tuple(_queued_notification(row) for row in rows),
        "one" if len(rows) == 1 else "group" if is_group else "summary",
        superseded,
        message_id,
        reply_to,
        # A restored record may have the same ids again, but not the same times.
        key=f"{channel} {first.id}-{first.created_at:.3f}-{first.replacements}",
        retry_state=next((row.retry_state for row in rows if row.retry_state is not None), None),
        pending_since=min((row.pending_since for row in pending), default=first.pending_since),
        tries=max((row.tries for row in pending), default=0),
    )


def _queued_notification(row: Row[Any]) -> QueuedNotification:
    return QueuedNotification(
        row.id, row.kind, row.severity, row.incident_id, row.alert_id, row.content, row.created_at, row.tries,
        bool(row.card), row.version, bool(row.foreign_alert),
    )  # fmt: skip


def recent_deliveries(tx: Transaction, bot: str) -> Sequence[float]:
    """Return the times of the bot's deliveries in the last minute, oldest first."""
    is_recent = and_(deliveries.c.bot == bot, deliveries.c.at > tx.now - 60, deliveries.c.at <= tx.now)
    return tx.scalars(select(deliveries.c.at).where(is_recent).order_by(deliveries.c.at)).all()


def next_delivery_time(recent: Sequence[float], now: float, options: ChannelOptions) -> float:
    """Return when the rate limits permit the next delivery; `recent` are those of the last minute, oldest first."""
    at = now
    for limit, span in ((options.per_second, 1.0), (options.per_minute, 60.0)):
        if len(recent) >= limit:
            at = max(at, recent[-limit] + span)
    return at
