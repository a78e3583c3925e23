"""Send the notifications in the outbox, within the limits of each bot, until they are sent or given up."""

import asyncio
import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import structlog

from fleet.inventory.model import Inventory
from fleet.inventory.notify import Channel, ChannelOptions, Notify
from remediator.metrics import RemediatorMetrics
from remediator.notifications import content, deliveries, outbox
from remediator.notifications.cards import Card
from remediator.notifications.channels import ChannelClient, ChannelMessage, SendResult
from remediator.notifications.content import Notification
from remediator.notifications.deliveries import DeliveryState
from remediator.notifications.messages import render_card
from remediator.notifications.outbox import Batch
from remediator.notifications.rendering import Templates, load_templates, shipped_templates
from remediator.notifications.test_message import send_test
from remediator.record.database import Database, StorageError
from runtime.redaction import Redactor

CHECK_INTERVAL = 15.0
COALESCE_FOR = 0.05  # seconds in which changes are collected before the outbox is read
FIRST_RETRY = 2.0
MAX_RETRY = 300.0
MAX_PAUSE = 60.0
GIVE_UP_AFTER = 24 * 3600.0
RECORD_RETRY = 5.0
MAX_TRIES = 5  # of a message that cannot be rendered, or that gets unknown responses
_LOG_EVENTS: Mapping[DeliveryState, str] = {
    "sent": "notification_sent", "pending": "notification_postponed", "dead": "notification_rejected",
}  # fmt: skip
log = structlog.get_logger()


@dataclass
class _BotPause:
    """Until when all messages of a bot wait, because it is busy or cannot be reached."""

    until: float = 0.0
    failures: int = 0

    def update(self, result: SendResult, now: float) -> None:
        if result.outcome != "retry" or not result.pause_channel:
            self.failures = 0
            return
        pause = min(MAX_PAUSE, FIRST_RETRY * 2.0 ** min(self.failures, 16))
        self.until = now + max(result.retry_after or 0.0, pause)
        self.failures += 1


class Sender:
    """Sends the notifications of every channel, in one task per channel."""

    def __init__(
        self,
        database: Database,
        client: httpx.AsyncClient,
        metrics: RemediatorMetrics,
        redact: Redactor,
        read_details: Callable[[Batch], Awaitable[Mapping[str, Any]]],
    ) -> None:
        self._database, self._channels = database, ChannelClient(client)
        self._metrics, self._redact, self._read_details = metrics, redact, read_details
        self._now = database.clock.now
        self._pauses: defaultdict[str, _BotPause] = defaultdict(_BotPause)
        self._sending: set[asyncio.Task[None]] = set()
        self._wakes: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._prepared_for: Notify | None = None  # the configuration that the outbox was prepared for
        self._is_stopping = False

    def wake(self) -> None:
        """Look for new notifications and new channels."""
        self._changed.set()
        for wake in self._wakes.values():
            wake.set()

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                await self._prepare_outbox()
                for name in self._database.inventory.notify.channels.keys() - self._wakes.keys():
                    self._wakes[name] = asyncio.Event()
                    group.create_task(self._run_channel(name, self._wakes[name]), name=f"send {name}")
                await self._changed.wait()
                await asyncio.sleep(COALESCE_FOR)

    async def _prepare_outbox(self) -> None:
        """Give up what cannot be sent with the present channels."""
        notify = self._database.inventory.notify
        try:
            given_up = await self._database.write(deliveries.give_up_removed_channels, list(notify.channels))
            if notify is not self._prepared_for:
                without_updates = [name for name in notify.channels if not notify.can_update_cards(name)]
                await self._database.write(deliveries.stop_updating_cards, without_updates)
                self._prepared_for = notify
        except StorageError as error:
            log.error("outbox_not_available", error=str(error))  # noqa: TRY400 - no traceback needed
        else:
            if given_up:
                log.warning("notifications_of_removed_channels_given_up", notifications=given_up)

    async def _run_channel(self, name: str, wake: asyncio.Event) -> None:
        for outcome in ("sent", "retried", "dead"):
            self._metrics.notifications.labels(name, outcome)  # so that its first increase is seen
        while name in self._database.inventory.notify.channels:
            wake.clear()
            pause = await self._send_pending(name)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()
                    await asyncio.sleep(COALESCE_FOR)
        del self._wakes[name]

    async def _send_pending(self, name: str) -> float:
        """Send what is pending for a channel; returns the seconds after which to look again."""
        try:
            while not self._is_stopping and (channel := self._database.inventory.notify.channels.get(name)) is not None:
                batch = await self._database.write(outbox.choose_batch, name)
                pause = self._pauses[channel.settings.bot_id]
                if isinstance(batch, Batch) and pause.until > self._now():
                    batch = pause.until
                if not isinstance(batch, Batch):
                    return min(max(batch - self._now(), 0.01), CHECK_INTERVAL)
                # A delivery that has begun is completed and recorded, also at shutdown; else it would be sent twice.
                task = asyncio.create_task(self._try_to_send(channel, batch))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
                await asyncio.shield(task)
        except StorageError as error:
            log.error("outbox_not_available", error=str(error))  # noqa: TRY400 - no traceback needed
        return CHECK_INTERVAL

    async def send_test(self, name: str, by: str) -> SendResult:
        """Send a test message to a channel of the inventory, beside the outbox."""
        inventory = self._database.inventory
        return await send_test(self._channels, inventory, inventory.notify.channels[name], by)

    async def drain(self) -> None:
        """Begin no further deliveries, and wait for those that have begun."""
        self._is_stopping = True
        if self._sending:
            await asyncio.wait(self._sending)

    async def _try_to_send(self, channel: Channel, batch: Batch) -> None:
        """Send a batch; one that cannot be rendered must not hold up others."""
        try:
            await self._send(channel, batch)
        except StorageError:
            raise
        except Exception:  # a delivery is where a task begins
            log.exception("sending_failed", channel=batch.channel, notification=batch.first.id)
            response, later = "internal error; see the log", self._now() + CHECK_INTERVAL
            await self._database.write(deliveries.record_rendering_error, batch, response, later, max_tries=MAX_TRIES)

    async def _send(self, channel: Channel, batch: Batch) -> None:
        options = channel.settings
        notifications = await self._database.read(content.read_notifications, batch)
        details = await self._read_details(batch)
        detailed = [replace(each, details={**each.details, **details}) for each in notifications]
        masked = await asyncio.to_thread(lambda: [self._mask(each) for each in detailed])
        card = await asyncio.to_thread(_render, masked, batch, self._database.inventory, options)
        # Checking the limits comes last, so that nothing delays the delivery after that.
        delivery = await self._database.write(deliveries.reserve_delivery, batch)
        if delivery is None:
            return
        key = hashlib.sha256(batch.key.encode()).hexdigest()[:40]
        message = ChannelMessage(card, masked, batch.form, key, batch.message_id, batch.reply_to, batch.retry_state)
        result = await self._channels.send(channel, message, time.time())
        self._pauses[options.bot_id].update(result, self._now())
        state, delay = self._next_state(batch, result)
        self._metrics.notifications.labels(batch.channel, state if state != "pending" else "retried").inc()
        if result.clock_offset is not None:
            self._metrics.clock_offset.set(result.clock_offset)
        level = log.info if state == "sent" else log.warning
        level(
            _LOG_EVENTS[state], notification=batch.first.id, kind=batch.first.kind, notifications=len(batch.ids),
            channel=batch.channel, response=result.response,
        )  # fmt: skip
        await self._record(batch, delivery, result, state, delay)

    def _mask(self, notification: Notification) -> Notification:
        """Mask secrets in texts from outside, before a channel escapes them."""
        mask = self._redact
        return replace(
            notification,
            labels=mask.redact_all(notification.labels), annotations=mask.redact_all(notification.annotations),
            details=mask.redact_all(notification.details), decision=mask.redact_all(notification.decision),
            links=mask.redact_all(notification.links),
            attempts=[replace(each, why=mask(each.why)) for each in notification.attempts],
        )  # fmt: skip

    async def _record(
        self, batch: Batch, delivery: int, result: SendResult, state: DeliveryState, delay: float
    ) -> None:
        """Record the outcome of a delivery, and retry until the database accepts it."""
        masked = replace(result, response=self._redact(result.response))
        while True:
            try:
                await self._database.write(
                    deliveries.record_result, batch, delivery, masked, state=state, not_before=self._now() + delay
                )
            except StorageError as error:
                log.error("delivery_not_recorded", error=str(error))  # noqa: TRY400 - no traceback needed
                await asyncio.sleep(RECORD_RETRY)
            else:
                return

    def _next_state(self, batch: Batch, result: SendResult) -> tuple[DeliveryState, float]:
        """Return the state of the notifications after a delivery, and the seconds to wait."""
        if result.outcome == "sent":
            return "sent", 0.0
        if result.outcome == "reject" or self._now() - batch.pending_since > GIVE_UP_AFTER:
            return "dead", 0.0
        if result.outcome == "unknown" and batch.tries + 1 >= MAX_TRIES:
            return "dead", 0.0
        if result.outcome == "resend":
            return "pending", 0.0
        pause = min(MAX_RETRY, FIRST_RETRY * 2.0 ** min(batch.tries, 16))
        return "pending", max(pause, result.retry_after or 0.0)


def _render(notifications: Sequence[Notification], batch: Batch, inventory: Inventory, options: ChannelOptions) -> Card:
    """Render a batch; with the shipped templates if the user's fail."""

    def render(templates: Templates) -> Card:
        return render_card(
            notifications, batch.form, templates, options, is_update=batch.message_id is not None,
            first_id=batch.first.id, created_at=batch.first.created_at,
        )  # fmt: skip

    try:
        return render(load_templates(inventory))
    except Exception:
        if inventory.notify.templates is None:
            raise
        log.exception("custom_templates_failed", form=batch.form, hint="run `defib check`")
        return render(shipped_templates(inventory.notify.language))
