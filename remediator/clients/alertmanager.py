"""Alertmanager's API, version 2: alerts, their silences and inhibitions."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

import yaml

from fleet.inventory.endpoints import Endpoint
from fleet.json_client import JsonClient, parsing_response
from remediator.clients.alerts import WATCHDOG, WEBHOOK_PATH, Alert, AlertList, cut_texts
from runtime.times import format_rfc3339

MAX_SKEW = 2.0  # seconds; a Date header has whole seconds
LOOKUP_TIMEOUT = 3.0  # seconds that an action waits for it


@dataclass(frozen=True)
class AlertState:
    """An alert of one service, of one of its components, or of a host.

    `muted_by` names the silence or the inhibition that mutes it, if any.
    """

    name: str
    muted_by: str
    component: str = ""


@dataclass(frozen=True)
class KnownAlerts:
    """The alerts with some labels, and for how many seconds Alertmanager has been running."""

    alerts: tuple[AlertState, ...]
    uptime: float


class Alertmanager:
    def __init__(self, endpoint: Endpoint) -> None:
        self._client = JsonClient(endpoint)
        self.close = self._client.close

    async def alerts(self) -> AlertList:
        """Return all alerts. Raises ClientError."""
        alerts = await self._client.request("GET", "/api/v2/alerts")
        status, now = await self._client.request_with_date("GET", "/api/v2/status")
        with parsing_response():
            return AlertList(
                tuple(_parse_alert(each) for each in alerts if each["status"]["state"] == "active"),
                {each["fingerprint"]: frozenset(one["name"] for one in each["receivers"]) for each in alerts},
                frozenset(alert["fingerprint"] for alert in alerts),
                now - _unix(status["uptime"]),
                _own_receivers(status),
                any(each["labels"].get("alertname") == WATCHDOG for each in alerts),
            )

    async def alerts_with(self, labels: Mapping[str, str]) -> KnownAlerts:
        """Return the alerts with these labels, of which an empty one is absent. Raises ClientError."""
        query = urlencode([("filter", f'{name}="{value}"') for name, value in labels.items()])
        alerts, (status, now) = await asyncio.gather(
            self._client.request("GET", f"/api/v2/alerts?{query}", LOOKUP_TIMEOUT),
            self._client.request_with_date("GET", "/api/v2/status", LOOKUP_TIMEOUT),
        )
        with parsing_response():
            return KnownAlerts(
                tuple(
                    AlertState(
                        alert["labels"]["alertname"], _muted_by(alert["status"]), alert["labels"].get("component", "")
                    )
                    for alert in alerts
                ),
                now - _unix(status["uptime"]),
            )

    async def silenced_services(self) -> frozenset[str]:
        """Return the services with a silenced alert. Raises ClientError."""
        query = urlencode({"active": "false", "inhibited": "false", "unprocessed": "false"})
        alerts = await self._client.request("GET", f"/api/v2/alerts?{query}", LOOKUP_TIMEOUT)
        with parsing_response():
            return frozenset(
                each["labels"]["service"]
                for each in alerts
                if each["status"]["silencedBy"] and "service" in each["labels"]
            )

    async def watchdog_age(self) -> float | None:
        """Return the seconds since Prometheus last sent the Watchdog; None if there is none. Raises ClientError."""
        query = urlencode({"filter": f'alertname="{WATCHDOG}"'})
        alerts, now = await self._client.request_with_date("GET", f"/api/v2/alerts?{query}", LOOKUP_TIMEOUT)
        with parsing_response():
            return min((now - _unix(each["updatedAt"]) for each in alerts), default=None)

    async def silence(self, labels: Mapping[str, str], begins: float, ends: float, by: str, comment: str) -> str:
        """Silence the alerts with exactly these labels between two Unix times; returns its id. Raises ClientError."""
        _, now = await self._client.request_with_date("GET", "/api/v2/status", LOOKUP_TIMEOUT)
        skew = now - time.time()
        begins, ends = (begins + skew, ends + skew) if abs(skew) > MAX_SKEW else (begins, ends)
        body = {
            "matchers": [
                {"name": name, "value": value, "isRegex": False, "isEqual": True} for name, value in labels.items()
            ],
            "startsAt": format_rfc3339(begins), "endsAt": format_rfc3339(ends), "createdBy": by, "comment": comment,
        }  # fmt: skip
        response = await self._client.request("POST", "/api/v2/silences", LOOKUP_TIMEOUT, body)
        with parsing_response():
            return str(response["silenceID"])


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _parse_alert(alert: Mapping[str, Any]) -> Alert:
    labels, annotations = dict(alert["labels"]), dict(alert["annotations"])
    return cut_texts(Alert(alert["fingerprint"], alert["startsAt"], "", "firing", labels, annotations))


def _own_receivers(status: Mapping[str, Any]) -> frozenset[str]:
    """Return the receivers with a webhook to the remediator; newer versions of Alertmanager hide the URLs."""
    try:
        receivers = (yaml.safe_load(status["config"]["original"]) or {}).get("receivers") or []
    except (yaml.YAMLError, RecursionError):
        return frozenset()
    return frozenset(
        each["name"]
        for each in receivers
        if any(WEBHOOK_PATH in str(hook.get("url", "")) for hook in each.get("webhook_configs") or [])
    )


def _muted_by(status: Mapping[str, Any]) -> str:
    for key, verb in (("silencedBy", "silenced"), ("inhibitedBy", "inhibited"), ("mutedBy", "muted")):
        if status.get(key):
            return f"{verb} by {status[key][0]}"
    return ""
