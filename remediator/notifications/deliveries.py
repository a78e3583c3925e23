"""Deliveries: reserve a place within the rate limits before a message is sent, and record the outcome after it."""

from collections.abc import Collection
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, case, insert, or_, update

from remediator.notifications.bursts import record_digest
from remediator.notifications.channels import SendResult
from remediator.notifications.outbox import Batch, next_delivery_time, recent_deliveries
from remediator.record.notifications import UPDATE_INTERVAL
from remediator.record.schema import deliveries, notifications
from remediator.record.transaction import Transaction

MAX_REPLACEMENTS = 2  # of a card that cannot be updated; after that further notifications are sent
DeliveryState = Literal["pending", "sent", "dead"]


def reserve_delivery(tx: Transaction, batch: Batch) -> int | None:
    """Count a delivery against its bot's limits before it is sent; returns its id, None if the limits are reached.

    From now on the message may have been sent, whatever happens to this process.
    """
    channel = tx.inventory.notify.channels.get(batch.channel)
    if channel is None:
        return None
    options = channel.settings
    if next_delivery_time(recent_deliveries(tx, options.bot_id), tx.now, options) > tx.now:
        return None
    delivery = tx.execute(insert(deliveries).values(notification_id=batch.first.id, bot=options.bot_id, at=tx.now))
    is_pending = and_(_is_in(batch), notifications.c.state == "pending")
    sent_with = case((notifications.c.id == batch.first.id, None), else_=batch.first.id)
    tx.execute(update(notifications).where(is_pending).values(tries=notifications.c.tries + 1, sent_with=sent_with))
    return int(delivery.lastrowid)


def _is_in(batch: Batch) -> ColumnElement[bool]:
    """Match the notifications of a batch, without those that were given up meanwhile."""
    return and_(notifications.c.id.in_(batch.ids), notifications.c.state != "dead")


def record_result(
    tx: Transaction,
    batch: Batch,
    delivery: int,
    result: SendResult,
    *,
    state: DeliveryState,
    not_before: float,
) -> None:
    """Record the result of a delivery, and the new state of its notifications."""
    outcome = {"outcome": result.outcome, "response": result.response}
    tx.execute(update(deliveries).where(deliveries.c.id == delivery).values(**outcome))
    if state == "sent":
        if batch.burst is not None and batch.message_id is None:
            record_digest(tx, batch.channel, batch.burst)
        _record_sent(tx, batch, result.response, result.message_id)
    elif state == "pending":
        _postpone(tx, batch, result.response, not_before)
        if result.retry_state is not None:
            tx.execute(update(notifications).where(_is_in(batch)).values(retry_state=dict(result.retry_state)))
    elif batch.message_id is not None or batch.reply_to is not None:
        _send_as_new_message(tx, batch, result.response)
    else:
        values = {"state": "dead", "ended_at": tx.now, "response": result.response}
        tx.execute(update(notifications).where(_is_in(batch)).values(**values))


def record_rendering_error(tx: Transaction, batch: Batch, response: str, not_before: float, *, max_tries: int) -> None:
    """Postpone a batch that could not be rendered, or give it up after `max_tries`."""
    _postpone(tx, batch, response, not_before)
    tx.execute(update(notifications).where(_is_in(batch)).values(tries=notifications.c.tries + 1))
    is_exhausted = and_(_is_in(batch), notifications.c.state == "pending", notifications.c.tries >= max_tries)
    tx.execute(update(notifications).where(is_exhausted).values(state="dead", ended_at=not_before))


def _postpone(tx: Transaction, batch: Batch, response: str, not_before: float) -> None:
    tx.execute(update(notifications).where(_is_in(batch)).values(not_before=not_before, response=response))


def _send_as_new_message(tx: Transaction, batch: Batch, response: str) -> None:
    """Make notifications pending again because the message to update or to reply to does not exist any more."""
    values: dict[str, Any] = {
        "message_id": None, "replacements": notifications.c.replacements + 1, "tries": 0, "sent_with": None,
        "retry_state": None, "not_before": tx.now, "response": response, "state": "pending",
    }  # fmt: skip
    is_needed = or_(notifications.c.state == "pending", notifications.c.card == 1)
    tx.execute(update(notifications).where(_is_in(batch), is_needed).values(**values))


def _record_sent(tx: Transaction, batch: Batch, response: str, message_id: str | None) -> None:
    values: dict[str, Any] = {"state": "sent", "ended_at": tx.now, "response": response, "retry_state": None}
    tx.execute(update(notifications).where(_is_in(batch)).values(**values))
    is_card = and_(_is_in(batch), notifications.c.card == 1)
    if message_id is not None and batch.message_id is None:
        tx.execute(update(notifications).where(is_card).values(message_id=message_id, message_at=tx.now))
    elif batch.message_id is None:
        tx.execute(update(notifications).where(is_card).values(card=0))  # without an id it cannot be updated
    _update_changed_cards(tx, batch)
    # A card that could not be updated several times is given up: later changes are separate notifications.
    is_given_up = and_(is_card, notifications.c.replacements >= MAX_REPLACEMENTS, notifications.c.state == "sent")
    tx.execute(update(notifications).where(is_given_up).values(card=0))


def _update_changed_cards(tx: Transaction, batch: Batch) -> None:
    """Make cards pending again that changed while they were sent.

    After several tries an earlier one may have arrived, with a card of before the last change.
    """
    by_version: dict[int, list[int]] = {}
    for queued in batch.notifications:
        if queued.card:
            is_certain = batch.tries == 0 or batch.message_id is not None
            by_version.setdefault(queued.version if is_certain else queued.version - 1, []).append(queued.id)
    for version, ids in by_version.items():
        is_newer = and_(
            notifications.c.id.in_(ids),
            notifications.c.card == 1,
            notifications.c.version > version,
            notifications.c.state == "sent",
        )
        again = {"state": "pending", "tries": 0, "pending_since": tx.now, "not_before": tx.now + UPDATE_INTERVAL}
        tx.execute(update(notifications).where(is_newer).values(**again))


def give_up_removed_channels(tx: Transaction, channels: Collection[str]) -> int:
    """Give up what is pending for other channels than these; returns how many notifications."""
    given_up = tx.execute(
        update(notifications)
        .where(notifications.c.state == "pending", notifications.c.channel.not_in(channels))
        .values(state="dead", ended_at=tx.now, response="the channel was removed")
    )
    return int(given_up.rowcount)


def stop_updating_cards(tx: Transaction, channels: Collection[str]) -> None:
    """Stop updating the cards of channels that cannot update messages, such as those whose type was changed."""
    is_card = and_(notifications.c.channel.in_(channels), notifications.c.card == 1)
    is_update = and_(is_card, notifications.c.state == "pending", notifications.c.message_id.is_not(None))
    tx.execute(update(notifications).where(is_update).values(state="sent"))
    tx.execute(update(notifications).where(is_card).values(card=0, message_id=None))
