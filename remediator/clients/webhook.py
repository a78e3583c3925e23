"""What Alertmanager tells: its webhook, version 4, from bytes to alerts, and what it lists.

Format: https://prometheus.io/docs/alerting/latest/configuration/#webhook_config
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from runtime.errors import DefibError

MAX_BODY = 10 * 1024 * 1024
MAX_ALERTS = 5000
WEBHOOK = "/webhook/alertmanager"
WATCHDOG = "Watchdog"
Status = Literal["firing", "resolved"]


class NotADelivery(DefibError):  # noqa: N818
    """The body is not a version-4 delivery."""


class TooManyAlerts(DefibError):  # noqa: N818
    """A delivery that would keep the record busy for too long."""


@dataclass(frozen=True)
class Alert:
    """One alert of a delivery; times are Alertmanager's own text."""

    fingerprint: str
    starts_at: str
    ends_at: str
    status: Status
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.labels.get("alertname", "")


@dataclass(frozen=True)
class Delivery:
    """Alerts, and how many Alertmanager has left out: those may fire, whatever the others do."""

    alerts: list[Alert]
    truncated: int = 0
    receiver: str = ""


@dataclass(frozen=True)
class Listing:
    """Alertmanager's alerts. All times are differences by its own clock, so that ours need not agree with it."""

    active: tuple[Alert, ...]  # those that neither a silence nor another alert mutes
    receivers: Mapping[str, frozenset[str]]  # by fingerprint: whom each is routed to
    listed: frozenset[str]  # all fingerprints, those of muted alerts too
    up_for: float  # seconds since Alertmanager's start, before which it has forgotten everything
    ours: frozenset[str]  # the receivers whose webhooks lead here, as far as its configuration shows them
    watchdog_sent_ago: float | None  # seconds since Prometheus last sent the Watchdog; None: it is not there


def parse(body: bytes) -> Delivery:
    """Read a delivery; unknown fields are let be. Raises NotADelivery and TooManyAlerts."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        raise NotADelivery("the body is not JSON") from None
    if not isinstance(payload, dict):
        raise NotADelivery("the body is not an object")
    if payload.get("version") != "4":
        raise NotADelivery("the version is not 4")
    alerts = payload.get("alerts")
    if not isinstance(alerts, list):
        raise NotADelivery("there is no list of alerts")
    if len(alerts) > MAX_ALERTS:
        raise TooManyAlerts(f"more than {MAX_ALERTS} alerts (set max_alerts in Alertmanager)")
    truncated = payload.get("truncatedAlerts")
    receiver = payload.get("receiver")
    return Delivery(
        [_alert(item) for item in alerts],
        truncated if type(truncated) is int and truncated > 0 else 0,
        # Alertmanager escapes it as for a regular expression.
        re.sub(r"\\(.)", r"\1", _clean(receiver)) if isinstance(receiver, str) else "",
    )


def _alert(item: Any) -> Alert:
    if not isinstance(item, dict):
        raise NotADelivery("an alert is not an object")
    status, fingerprint, starts_at = item.get("status"), item.get("fingerprint"), item.get("startsAt")
    if status not in ("firing", "resolved"):
        raise NotADelivery("an alert's status is neither firing nor resolved")
    if not isinstance(fingerprint, str) or not fingerprint or not isinstance(starts_at, str) or not starts_at:
        raise NotADelivery("an alert has no fingerprint or startsAt")
    ends_at = item.get("endsAt")
    return Alert(
        _clean(fingerprint),
        _clean(starts_at),
        _clean(ends_at) if isinstance(ends_at, str) else "",
        cast("Status", status),
        _texts(item.get("labels")),
        _texts(item.get("annotations")),
    )


def _texts(value: Any) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise NotADelivery("labels and annotations are maps of text")
    # A lone surrogate is valid JSON, and no text that can be stored or sent.
    return {_clean(key): _clean(text) for key, text in value.items()}


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
