"""Alertmanager's notifications, which the watcher passes on to its channels while the remediator may be down."""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import get_args
from zoneinfo import ZoneInfo

import structlog

from fleet.inventory.model import Inventory
from fleet.inventory.notify import Language, Severity
from remediator.clients.alerts import Alert, WebhookPayload
from remediator.notifications.cards import Card, Line, Span
from remediator.notifications.channels import ChannelClient, ChannelMessage, SendResult
from remediator.notifications.content import Notification, annotations_in_language
from remediator.notifications.links import build_links
from remediator.notifications.messages import render_card
from remediator.notifications.outbox import MessageForm
from remediator.notifications.rendering import shipped_templates
from runtime.errors import ApiError
from runtime.redaction import Redactor

MAX_BODY = 1024 * 1024  # bytes
PER_MINUTE = 10  # messages; of more notifications, one message names the alerts
MINUTE, CHECK_EVERY = 60.0, 1.0  # seconds
# Seconds in which a channel must accept a message: Alertmanager waits for 10 s or `group_interval`, then repeats it.
ACCEPT_WITHIN = 9.0
SAME_WITHIN = 300.0  # seconds in which an equal notification is a repetition of one whose answer was lost
MAX_RESENDS = 3  # in other forms, which a channel asks for
ALERTS_SHOWN = 20
NAMES_SHOWN = 10
log = structlog.get_logger()
TEXTS: Mapping[Language, Mapping[str, str]] = MappingProxyType(
    {
        "en": {
            "sender": "Sent by the watcher, which needs no remediator.",
            "others": "{} more alerts: see Alertmanager",
            "left_out": "{} more notifications about Defib",
            "alerts": "Alerts",
            "why": "They were not sent one by one, since there were more than {} in a minute. See Alertmanager.",
        },
        "zh": {
            "sender": "由监视端发送，不依赖 remediator。",
            "others": "另有 {} 条告警，请查看 Alertmanager",
            "left_out": "另有 {} 条关于 Defib 的通知",
            "alerts": "告警",
            "why": "一分钟内超过 {} 条，因此未逐条发送。请查看 Alertmanager。",
        },
    }
)


@dataclass(frozen=True)
class Destination:
    """The channels that are notified, and the inventory that they are in."""

    inventory: Inventory
    channels: Sequence[str]


@dataclass
class LeftOut:
    """Notifications that were not sent, since there were too many: since when, and their number by alert."""

    since: float
    numbers: Counter[str] = field(default_factory=Counter)


class AlertRelay:
    """Sends what Alertmanager notifies of to all channels. `destination` is replaced by a reload."""

    def __init__(self, destination: Destination, client: ChannelClient, redact: Redactor) -> None:
        self.destination = destination
        self._client, self._redact = client, redact
        self._accepted: dict[str, float] = {}  # when messages of the last minutes were accepted, by their keys
        self._sending: dict[str, asyncio.Task[bool]] = {}
        self._left_out: LeftOut | None = None

    async def deliver(self, payload: WebhookPayload) -> bool:
        """Send a notification; return False if it is only counted, since there are too many.

        Raises ApiError unless a channel has accepted it: Alertmanager then repeats it.
        """
        if not payload.alerts:
            raise ApiError(400, "not_a_delivery", "`alerts` is empty")
        if not self.destination.channels:
            raise ApiError(503, "no_channel", "the configuration of the watcher has no channel")
        key = _digest(payload)
        now = time.monotonic()
        self._accepted = {each: at for each, at in self._accepted.items() if now - at < SAME_WITHIN}
        if key in self._accepted:
            return True
        if key not in self._sending:
            recent = sum(now - at < MINUTE for at in self._accepted.values())
            if recent >= PER_MINUTE:
                self._leave_out(payload, now)
                return False
            if recent + len(self._sending) >= PER_MINUTE:
                raise ApiError(503, "busy", "too many messages are being sent; send it again", {"Retry-After": "5"})
            # It is sent to the end if Alertmanager does not wait, which would repeat it otherwise.
            self._sending[key] = asyncio.create_task(self._send_alerts(key, payload), name="send alerts")
        if not await asyncio.shield(self._sending[key]):
            raise ApiError(502, "not_accepted", "no channel has accepted the message; see the log")
        return True

    def _leave_out(self, payload: WebhookPayload, now: float) -> None:
        if self._left_out is None:
            self._left_out = LeftOut(now)
            log.warning("notifications_left_out", limit=f"{PER_MINUTE} a minute")
        for name in {alert.name for alert in payload.alerts}:
            known = name in self._left_out.numbers or len(self._left_out.numbers) < NAMES_SHOWN
            self._left_out.numbers[name if known else "…"] += 1

    async def _send_alerts(self, key: str, payload: WebhookPayload) -> bool:
        try:
            inventory = self.destination.inventory
            # In a thread, since it reads templates.
            message = await asyncio.to_thread(build_message, payload, inventory, time.time(), self._redact, key)
            sent = await self._send(message)
        finally:
            del self._sending[key]
        if sent:
            self._accepted[key] = time.monotonic()
        return sent

    async def run(self) -> None:
        """Send messages about notifications that were left out, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_EVERY)
            await self._send_left_out()

    async def _send_left_out(self) -> None:
        """Send one message about the notifications that were left out in the last minute, if there are any."""
        left_out = self._left_out
        if left_out is None or time.monotonic() - left_out.since < MINUTE:
            return
        self._left_out = None
        inventory = self.destination.inventory
        message = await asyncio.to_thread(build_summary, left_out.numbers, inventory, time.time(), self._redact)
        if await self._send(message):
            return
        added: Counter[str] = self._left_out.numbers if self._left_out is not None else Counter()
        self._left_out = LeftOut(time.monotonic(), left_out.numbers + added)  # to be tried again in a minute

    async def _send(self, message: ChannelMessage) -> bool:
        """Send a message to all channels; return whether one has accepted it."""
        inventory = self.destination.inventory
        names = [name for name in self.destination.channels if name in inventory.notify.channels]
        results = await asyncio.gather(*(self._send_to(name, inventory, message) for name in names))
        for name, result in zip(names, results, strict=True):
            level = log.info if result.outcome == "sent" else log.warning
            level(f"alert_{result.outcome}", channel=name, response=self._redact(result.response))
        return any(result.outcome == "sent" for result in results)

    async def _send_to(self, name: str, inventory: Inventory, message: ChannelMessage) -> SendResult:
        channel, result = inventory.notify.channels[name], SendResult("retry", "no response in time")
        try:
            async with asyncio.timeout(ACCEPT_WITHIN):
                for _ in range(MAX_RESENDS):
                    result = await self._client.send(channel, message, time.time())
                    if result.outcome != "resend":
                        break
                    message = replace(message, retry_state=result.retry_state)
        except TimeoutError:
            return SendResult("retry", "no response in time")
        return result


def build_message(
    payload: WebhookPayload, inventory: Inventory, now: float, redact: Redactor, key: str
) -> ChannelMessage:
    """Return the message about the alerts of a notification."""
    language = inventory.notify.language
    shown = payload.alerts[:ALERTS_SHOWN]
    notifications = [_describe(alert, inventory, now, redact) for alert in shown]
    form: MessageForm = "one" if len(shown) == 1 else "group" if len({each.name for each in shown}) == 1 else "summary"
    card = render_card(notifications, form, shipped_templates(language))
    others = len(payload.alerts) - len(shown) + payload.truncated
    lines = [Line.of(TEXTS[language]["others"].format(others))] if others else []
    return ChannelMessage(
        replace(card, lines=(*card.lines, *lines, Line.of(TEXTS[language]["sender"]))), notifications, form, key
    )


def build_summary(numbers: Mapping[str, int], inventory: Inventory, now: float, redact: Redactor) -> ChannelMessage:
    """Return the message about notifications that were left out, with their number by alert."""
    language = inventory.notify.language
    texts, templates = TEXTS[language], shipped_templates(language)
    names = redact(", ".join(f"{name} × {number}" for name, number in numbers.items()))
    at = datetime.fromtimestamp(now, ZoneInfo(inventory.notify.timezone))
    notification = Notification("alert", "warning", {}, {}, None, at, None, 0.0, [], {})
    lines = (
        Line((Span("label", texts["alerts"]), Span("value", f" {names}"))),
        Line.of(texts["why"].format(PER_MINUTE)),
        Line.of(texts["sender"]),
    )
    title = texts["left_out"].format(sum(numbers.values()))
    card = Card(title, "alert", "warning", "orange", lines, templates.words["more"])
    return ChannelMessage(card, [notification], key=hashlib.sha256(f"{now} {names}".encode()).hexdigest()[:32])


def _describe(alert: Alert, inventory: Inventory, now: float, redact: Redactor) -> Notification:
    """Return an alert as notifications show it, without secrets."""
    labels = redact.redact_all(alert.labels)
    annotations = annotations_in_language(redact.redact_all(alert.annotations), inventory.notify.language)
    severity: Severity = next((each for each in get_args(Severity) if each == labels.get("severity")), "warning")
    is_resolved = alert.status == "resolved"
    began = _parse_time(alert.starts_at, now)
    duration = max(0.0, _parse_time(alert.ends_at, now) - began) if is_resolved else None
    links = build_links(inventory, None, labels, annotations, None)
    return Notification(
        "alert_over" if is_resolved else "alert",
        severity,
        labels,
        annotations,
        None,
        datetime.fromtimestamp(began, ZoneInfo(inventory.notify.timezone)),
        duration,
        max(0.0, now - began),
        [],
        {},
        # The console is the remediator's.
        links=redact.redact_all({name: url for name, url in links.items() if name == "runbook"}),
    )


def _parse_time(text: str, now: float) -> float:
    """Return a time of Alertmanager's; now for what is none, such as the year 1, or lies in the future."""
    try:
        at = datetime.fromisoformat(text)
        return min(max(at.timestamp(), 0.0), now) if at.tzinfo is not None else now
    except (ValueError, OverflowError):
        return now


def _digest(payload: WebhookPayload) -> str:
    """Return what equal notifications have in common."""
    alerts = sorted((alert.fingerprint, alert.status, alert.starts_at) for alert in payload.alerts)
    return hashlib.sha256(json.dumps([alerts, payload.truncated]).encode()).hexdigest()[:32]
