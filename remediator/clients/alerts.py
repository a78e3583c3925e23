"""Alerts as Alertmanager sends them: the webhook's payload, version 4.

Format: https://prometheus.io/docs/alerting/latest/configuration/#webhook_config
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from runtime.errors import DefibError
from runtime.payloads import TooManyValuesError, decode_json, replace_surrogates

MAX_BODY = 4 * 1024 * 1024  # bytes
MAX_ALERTS = 5000
MAX_LABELS = 500  # labels, or annotations, of an alert
MAX_IDENTITY = 200  # characters of a fingerprint or a time
# Characters of a value, and of all names and values of an alert. Longer ones are cut: each notification contains them,
# and Alertmanager does not send again what is refused.
VALUE_LIMIT, ALERT_LIMIT = 4096, 32 * 1024
MAX_TRUNCATED = 10**9  # a larger number is none that Alertmanager sends
WEBHOOK_PATH = "/webhook/alertmanager"
WATCHDOG = "Watchdog"
Status = Literal["firing", "resolved"]


class InvalidPayloadError(DefibError):
    """The body is not a version-4 payload."""


class PayloadTooLargeError(DefibError):
    """The payload has more alerts or labels than the record can store in reasonable time."""


@dataclass(frozen=True)
class Alert:
    """One alert; times are Alertmanager's own text."""

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
class WebhookPayload:
    """The alerts, and how many Alertmanager left out (`max_alerts`), whose status is unknown."""

    alerts: list[Alert]
    truncated: int = 0
    receiver: str = ""
    cut: int = 0  # alerts whose labels or annotations were cut


@dataclass(frozen=True)
class AlertList:
    """The alerts in Alertmanager's API. Times are differences by Alertmanager's clock, which may differ from ours."""

    active: tuple[Alert, ...]  # neither silenced nor inhibited
    receivers: Mapping[str, frozenset[str]]  # the names of the receivers that an alert is routed to, by fingerprint
    fingerprints: frozenset[str]  # of all alerts, including silenced and inhibited ones
    uptime: float  # seconds since Alertmanager started, without its earlier alerts
    own_receivers: frozenset[str]  # receivers with a webhook to this remediator, as far as the configuration shows
    has_watchdog: bool  # also if it is silenced or inhibited


def parse_webhook(body: bytes) -> WebhookPayload:
    """Parse a webhook's body; unknown fields are ignored. Raises InvalidPayloadError and PayloadTooLargeError."""
    try:
        payload = decode_json(body)
    except TooManyValuesError as error:
        raise PayloadTooLargeError(str(error)) from None
    except (ValueError, RecursionError):
        raise InvalidPayloadError("the body is not JSON") from None
    if not isinstance(payload, dict):
        raise InvalidPayloadError("the body is not a JSON object")
    if payload.get("version") != "4":
        raise InvalidPayloadError("`version` is not 4")
    alerts = payload.get("alerts")
    if not isinstance(alerts, list):
        raise InvalidPayloadError("`alerts` is not a list")
    if len(alerts) > MAX_ALERTS:
        raise PayloadTooLargeError(f"more than {MAX_ALERTS} alerts; set max_alerts in Alertmanager")
    truncated = payload.get("truncatedAlerts")
    receiver = payload.get("receiver")
    parsed = [_parse_alert(item) for item in alerts]
    return WebhookPayload(
        [alert for alert, _ in parsed],
        min(truncated, MAX_TRUNCATED) if type(truncated) is int and truncated > 0 else 0,
        # Alertmanager escapes it as for a regular expression.
        re.sub(r"\\(.)", r"\1", replace_surrogates(receiver)[:MAX_IDENTITY]) if isinstance(receiver, str) else "",
        sum(was_cut for _, was_cut in parsed),
    )


def _parse_alert(item: Any) -> tuple[Alert, bool]:
    """Return an alert, and whether its labels or annotations were cut."""
    if not isinstance(item, dict):
        raise InvalidPayloadError("an alert is not a JSON object")
    status, fingerprint, starts_at = item.get("status"), item.get("fingerprint"), item.get("startsAt")
    if status not in ("firing", "resolved"):
        raise InvalidPayloadError("the `status` of an alert is neither firing nor resolved")
    if not isinstance(fingerprint, str) or not fingerprint or not isinstance(starts_at, str) or not starts_at:
        raise InvalidPayloadError("an alert has no `fingerprint` or no `startsAt`")
    ends_at = item.get("endsAt")
    if max(len(fingerprint), len(starts_at)) > MAX_IDENTITY:
        raise InvalidPayloadError(f"the `fingerprint` or `startsAt` of an alert is longer than {MAX_IDENTITY}")
    alert = Alert(
        replace_surrogates(fingerprint),
        replace_surrogates(starts_at),
        replace_surrogates(ends_at)[:MAX_IDENTITY] if isinstance(ends_at, str) else "",
        cast("Status", status),
        _parse_map(item.get("labels")),
        _parse_map(item.get("annotations")),
    )
    cut = cut_texts(alert)
    return cut, cut != alert


def cut_texts(alert: Alert) -> Alert:
    """Return an alert with labels and annotations of limited length."""
    labels = _cut(alert.labels, ALERT_LIMIT)
    return replace(alert, labels=labels, annotations=_cut(alert.annotations, ALERT_LIMIT - _length(labels)))


def _cut(texts: Mapping[str, str], limit: int) -> Mapping[str, str]:
    """Return texts with values of at most VALUE_LIMIT characters, without the longest ones beyond `limit` in all."""
    if _length(texts) <= min(VALUE_LIMIT, limit):
        return texts
    kept: dict[str, str] = {}
    # The short ones first: what identifies a service is short.
    for name, text in sorted(texts.items(), key=lambda item: len(item[1])):
        value = text if len(text) <= VALUE_LIMIT else f"{text[: VALUE_LIMIT - 1]}…"
        limit -= len(name) + len(value)
        if limit >= 0:
            kept[name] = value
    return kept


def _length(texts: Mapping[str, str]) -> int:
    return sum(map(len, texts)) + sum(map(len, texts.values()))


def _parse_map(value: Any) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InvalidPayloadError("`labels` and `annotations` must map strings to strings")
    if len(value) > MAX_LABELS:
        raise PayloadTooLargeError(f"an alert has more than {MAX_LABELS} labels or annotations")
    return {replace_surrogates(key): replace_surrogates(text) for key, text in value.items()}
