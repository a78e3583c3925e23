"""What the watcher sends: that pings are missing, and that they have returned."""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from zoneinfo import ZoneInfo

from defib.deadman.watch import Watch
from fleet.inventory.model import Inventory
from fleet.inventory.notify import Language
from remediator.notifications.cards import Card, Colour, Line, Span
from remediator.notifications.channels import ChannelMessage
from remediator.notifications.content import Notification, NotificationState
from remediator.notifications.durations import format_duration
from remediator.notifications.rendering import Templates, shipped_templates

TEXTS: Mapping[Language, Mapping[str, str]] = MappingProxyType(
    {
        "en": {
            "missing": "Defib does not respond",
            "back": "Defib responds again",
            "last": "Last ping",
            "never": "none since the watcher was started at {}",
            "cause": "Services may fail without a notification: the remediator is down, or cannot reach Prometheus, "
            "Alertmanager, the exporter or any channel, or this watcher. Look at the machine of the remediator.",
            "missing_for": "Without pings",
        },
        "zh": {
            "missing": "Defib 失联",
            "back": "Defib 已恢复响应",
            "last": "最近一次心跳",
            "never": "自监视端 {} 启动以来从未收到",
            "cause": "服务故障可能无人收到通知：remediator 已停止，或无法连接 Prometheus、Alertmanager、exporter、"
            "所有通知渠道或本监视端。请检查 remediator 所在的机器。",
            "missing_for": "无心跳时长",
        },
    }
)

_LABELS: Mapping[str, str] = MappingProxyType({"alertname": "DeadMan", "severity": "critical"})
_COLOURS: Mapping[NotificationState, Colour] = {"watchdog_missing": "red", "watchdog_back": "green"}


def build_message(watch: Watch, inventory: Inventory, now: float) -> ChannelMessage:
    """Return the message about missing pings, or about their return if they are not missing."""
    zone, language = ZoneInfo(inventory.notify.timezone), inventory.notify.language
    templates = shipped_templates(language)
    since = watch.last if watch.missing_since is None else watch.missing_since
    state: NotificationState = "watchdog_missing" if watch.is_missing else "watchdog_back"
    duration = None if watch.is_missing else (watch.returned_at or now) - since
    began = datetime.fromtimestamp(since, zone)
    notification = Notification(state, "critical", _LABELS, {}, None, began, duration, now - since, [], {})
    texts = TEXTS[language]
    lines = _missing_lines(watch, texts, zone) if watch.is_missing else _back_lines(duration or 0.0, texts, templates)
    title, colour = texts["missing" if watch.is_missing else "back"], _COLOURS[state]
    card = Card(title, state, "critical", colour, lines, templates.words["more"])
    key = hashlib.sha256(f"{state} {since}".encode()).hexdigest()[:32]
    return ChannelMessage(card, [notification], key=key)


def _missing_lines(watch: Watch, texts: Mapping[str, str], zone: ZoneInfo) -> tuple[Line, ...]:
    def format_time(at: float) -> str:
        return f"{datetime.fromtimestamp(at, zone):%Y-%m-%d %H:%M:%S %Z}"

    last = texts["never"].format(format_time(watch.since)) if watch.pinged_at is None else format_time(watch.pinged_at)
    return _line(texts["last"], last), Line.of(texts["cause"])


def _back_lines(duration: float, texts: Mapping[str, str], templates: Templates) -> tuple[Line, ...]:
    return (_line(texts["missing_for"], format_duration(templates.words, duration)),)


def _line(label: str, value: str) -> Line:
    return Line((Span("label", label), Span("value", f" {value}")))
