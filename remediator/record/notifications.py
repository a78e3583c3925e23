"""Notifications as rows, added in the transaction that causes them. `remediator.notifications` sends them.

On a channel that can update its cards, each incident has one card. A change of the incident makes the card pending
again, and what the card shows needs no notification of its own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Update, and_, bindparam, case, func, select, update
from sqlalchemy.dialects.sqlite import insert

from fleet.inventory.notify import NotificationKind
from remediator.record.schema import notifications
from remediator.record.transaction import Transaction

UPDATE_INTERVAL = 1.0  # seconds between two updates of one card
# The most severe first.
SEVERITIES = ("critical", "warning", "info")
OPENING_KINDS = ("down", "alert")  # kinds that create a card
FOLLOW_UP_KINDS = (
    "could_not_restart", "person_needed", "approval", "blind", "stopped_by_hand", "waiting", "reminder",
)  # fmt: skip
SHOWN_BY_CARDS = ("restarted", "recovered", "unobserved", "alert_over")
SEVERITY_RANK = case(
    {name: rank for rank, name in enumerate(SEVERITIES)}, value=notifications.c.severity, else_=len(SEVERITIES)
)
_INSERT = insert(notifications).on_conflict_do_nothing()
_SELECT_OF_INCIDENT = select(notifications.c.id).where(notifications.c.incident_id == bindparam("of")).limit(1)
_SELECT_CHANNELS = select(notifications.c.channel).where(notifications.c.key == bindparam("key"))


def severity_rank(severity: str) -> int:
    """Return the place of a severity in SEVERITIES; that of another text is the last."""
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def incident_key(incident: int) -> str:
    """Return the key of the first notification of an incident. A channel gets one notification per key."""
    return f"down incident {incident}"


def person_needed_key(incident: int, at: float) -> str:
    """Return the key of the notification that an operator is needed since `at`."""
    return f"person_needed incident {incident} {at:.3f}"


def alert_key(fingerprint: str, starts_at: str, times: int) -> str:
    """Return the key of the notification of an alert that fires for the `times`-th time."""
    return f"alert {fingerprint} {starts_at} {times}"


def notify(
    tx: Transaction,
    kind: NotificationKind,
    key: str,
    labels: Mapping[str, str],
    content: Mapping[str, Any],
    *,
    incident: int | None = None,
    alert: int | None = None,
) -> int:
    """Add a notification for each channel that the routes select; returns how many were added."""
    channels = tx.inventory.notify.channels_for(labels, kind)
    return add(tx, channels, kind, key, labels, content, incident=incident, alert=alert)


def add(
    tx: Transaction,
    channels: Iterable[str],
    kind: NotificationKind,
    key: str,
    labels: Mapping[str, str],
    content: Mapping[str, Any],
    *,
    incident: int | None = None,
    alert: int | None = None,
) -> int:
    """Add a notification for each of `channels` that has none with this key; returns how many were added.

    An alert of no service waits `notify.group_wait` for others with its name, to be sent in one message with them.
    """
    settings, severity = tx.inventory.notify, labels.get("severity", "")
    has_no_service = incident is None and alert is not None
    is_foreign = has_no_service and labels.get("host", "") not in tx.inventory.hosts
    added = 0
    for channel in channels:
        updates_cards = settings.can_update_cards(channel)
        if updates_cards and kind in SHOWN_BY_CARDS and _is_shown_by_card(tx, channel, kind, incident, alert):
            continue
        is_card = updates_cards and kind in OPENING_KINDS and not _belongs_to_card(tx, channel, kind, incident)
        row = {
            "channel": channel,
            "key": key,
            "kind": kind,
            "group_key": labels.get("alertname", "") if has_no_service else "",
            "severity": severity if severity in SEVERITIES else "info",
            "incident_id": incident,
            "alert_id": alert,
            "content": dict(content) | {"labels": dict(labels)},
            "created_at": tx.now,
            "pending_since": tx.now,
            "state": "pending",
            "tries": 0,
            "not_before": tx.now + (settings.group_wait if has_no_service else 0.0),
            "card": int(is_card),
            "version": 0,
            "replacements": 0,
            "foreign_alert": int(is_foreign),
        }
        added += tx.execute(_INSERT, row).rowcount
    return added


def _belongs_to_card(tx: Transaction, channel: str, kind: NotificationKind, incident: int | None) -> bool:
    """Whether this is a further alert of an incident that has a card, in whose thread it is sent."""
    return kind == "alert" and incident is not None and _has_card(tx, channel, incident, None, "down")


def _is_shown_by_card(
    tx: Transaction, channel: str, kind: NotificationKind, incident: int | None, alert: int | None
) -> bool:
    if kind == "alert_over":
        return _has_card(tx, channel, None, alert, "alert")
    return _has_card(tx, channel, incident, None, "down")


def _has_card(tx: Transaction, channel: str, incident: int | None, alert: int | None, kind: NotificationKind) -> bool:
    card = and_(
        notifications.c.channel == channel,
        _subject(incident, alert),
        notifications.c.card == 1,
        notifications.c.kind == kind,
        notifications.c.state != "dead",
    )
    return tx.scalar(select(notifications.c.id).where(card).limit(1)) is not None


def _subject(incident: int | None, alert: int | None) -> ColumnElement[bool]:
    return notifications.c.incident_id == incident if incident is not None else notifications.c.alert_id == alert


def notified_channels(tx: Transaction, key: str) -> list[str]:
    """Return the channels that have a notification with this key, sent or pending."""
    return list(tx.scalars(_SELECT_CHANNELS, {"key": key}))


def channels_notified_of(tx: Transaction, incident: int, kind: NotificationKind) -> list[str]:
    """Return the channels that have a notification of this kind about an incident, sent or pending."""
    is_match = and_(notifications.c.incident_id == incident, notifications.c.kind == kind)
    return list(tx.scalars(select(notifications.c.channel).where(is_match).distinct()))


def has_notifications(tx: Transaction, incident: int) -> bool:
    """Whether there is any notification about an incident, sent or pending."""
    return tx.scalar(_SELECT_OF_INCIDENT, {"of": incident}) is not None


def _update_of_cards(is_match: ColumnElement[bool]) -> Update:
    """Build the statement that makes cards pending again; its parameters are `of` and `now`."""
    is_sent = notifications.c.state == "sent"
    next_update: Any = func.max(bindparam("now"), func.coalesce(notifications.c.ended_at, 0.0) + UPDATE_INTERVAL)
    return (
        update(notifications)
        # Not `state in (sent, pending)`, for which SQLite would read the index of all that are sent.
        .where(is_match, notifications.c.card == 1, notifications.c.state != "dead")
        .values(
            version=notifications.c.version + 1,
            state="pending",
            tries=case((is_sent, 0), else_=notifications.c.tries),
            pending_since=case((is_sent, bindparam("now")), else_=notifications.c.pending_since),
            not_before=case((is_sent, next_update), else_=notifications.c.not_before),
        )
    )


# Built once, since every event of every incident executes them.
_UPDATE_INCIDENT_CARDS = _update_of_cards(
    and_(notifications.c.incident_id == bindparam("of"), notifications.c.kind == "down")
)
# An alert that fires again gets a new card: only the newest one is updated.
_NEWEST_ALERT_CARDS = (
    select(func.max(notifications.c.id))
    .where(notifications.c.alert_id == bindparam("of"), notifications.c.kind == "alert")
    .group_by(notifications.c.channel)
)
_UPDATE_ALERT_CARDS = _update_of_cards(
    and_(notifications.c.alert_id == bindparam("of"), notifications.c.id.in_(_NEWEST_ALERT_CARDS))
)


def update_cards(tx: Transaction, *, incident: int | None = None, alert: int | None = None) -> None:
    """Make the cards of an incident or of an alert pending again, because what they show has changed."""
    statement, subject = (_UPDATE_INCIDENT_CARDS, incident) if incident is not None else (_UPDATE_ALERT_CARDS, alert)
    tx.execute(statement, {"of": subject, "now": tx.now})


def drop_follow_ups(tx: Transaction, *, incident: int | None = None, alert: int | None = None) -> None:
    """Drop pending follow-ups of a closed incident or a resolved alert on channels whose card shows the end."""
    is_match = _subject(incident, alert)
    with_card = select(notifications.c.channel).where(
        is_match, notifications.c.card == 1, notifications.c.state != "dead"
    )
    is_follow_up = and_(
        is_match,
        notifications.c.card == 0,
        notifications.c.state == "pending",
        notifications.c.kind.in_(FOLLOW_UP_KINDS),
        notifications.c.channel.in_(with_card),
    )
    dropped = {
        "state": "sent",
        "ended_at": tx.now,
        "response": "not sent: the incident ended first, and its card shows it",
    }
    tx.execute(update(notifications).where(is_follow_up).values(**dropped))


def oldest_pending(tx: Transaction) -> float | None:
    """Return since when the oldest pending notification has been waiting."""
    is_pending = notifications.c.state == "pending"
    oldest: float | None = tx.scalar(select(func.min(notifications.c.pending_since)).where(is_pending))
    return oldest
