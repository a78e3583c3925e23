"""The servers that the remediator asks: the exporter for fresh probes, Alertmanager for what fires."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode

import httpx
import yaml
from pydantic import SecretStr

from fleet.inventory.endpoints import Endpoint
from remediator.clients.webhook import WATCHDOG, WEBHOOK, Alert, Listing
from remediator.policy import Observation
from runtime.errors import DefibError, StartError
from runtime.times import format_rfc3339

TIMEOUT = httpx.Timeout(10.0, connect=3.0)
NONE: Mapping[str, str] = MappingProxyType({})
SKEW_IGNORED = 2.0  # seconds; a date in a header has whole ones
LOOKED_UP_WITHIN = 3.0  # seconds that an action waits for Alertmanager's word


class PeerError(DefibError):
    """A server that we ask did not answer as it should."""

    retryable = True


class Refused(PeerError):  # noqa: N818 - what happened
    """It answered with an error."""


class Peer:
    """JSON over HTTP with one server."""

    def __init__(self, endpoint: Endpoint, token: SecretStr | None = None, headers: Mapping[str, str] = NONE) -> None:
        self._client = client_for(endpoint, token)
        self._client.headers.update(headers)

    async def ask(
        self,
        method: str,
        path: str,
        timeout: float | None = None,
        body: Any = None,
        form: Mapping[str, Any] | None = None,
    ) -> Any:
        """The parsed answer; `body` is sent as JSON. Raises PeerError."""
        answer, _ = await self.ask_dated(method, path, timeout, body, form)
        return answer

    async def ask_dated(
        self,
        method: str,
        path: str,
        timeout: float | None = None,
        body: Any = None,
        form: Mapping[str, Any] | None = None,
    ) -> tuple[Any, float]:
        """The parsed answer, and its Unix time by the server's own clock, or by ours where it has no date."""
        limits = TIMEOUT if timeout is None else httpx.Timeout(timeout, connect=3.0)
        try:
            response = await self._client.request(method, path, timeout=limits, json=body, data=form)
            response.raise_for_status()
            return response.json(), _date(response)
        except httpx.HTTPStatusError as error:
            raise Refused(f"HTTP {error.response.status_code}{_said(error.response)}") from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
            raise PeerError(f"{type(error).__name__}") from error

    async def close(self) -> None:
        await self._client.aclose()


def _date(response: httpx.Response) -> float:
    try:
        return parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (KeyError, ValueError):
        return time.time()


def _said(response: httpx.Response) -> str:
    """The words of an error of ours."""
    try:
        return f": {str(response.json()['error']['message'])[:300]}"
    except (ValueError, KeyError, TypeError):
        return ""


def client_for(endpoint: Endpoint, token: SecretStr | None = None) -> httpx.AsyncClient:
    """A client with the endpoint's address, credentials and TLS. Raises StartError."""
    auth = endpoint.auth
    headers: dict[str, str] = {}
    basic = None
    if auth is not None and auth.basic is not None:
        basic = httpx.BasicAuth(auth.basic.username, auth.basic.password.get_secret_value())
    elif (bearer := auth.bearer if auth is not None else token) is not None:
        headers["Authorization"] = f"Bearer {bearer.get_secret_value()}"
    verify: ssl.SSLContext | bool = False
    if endpoint.url.startswith("https:"):
        tls = endpoint.tls
        try:
            verify = ssl.create_default_context(cafile=str(tls.ca_file) if tls.ca_file else None)
            if tls.cert_file:
                verify.load_cert_chain(tls.cert_file, tls.key_file)
        except (OSError, ssl.SSLError) as error:
            raise StartError(f"{endpoint.url}: its certificate files cannot be used: {error}") from error
        if not tls.verify:
            verify.check_hostname, verify.verify_mode = False, ssl.CERT_NONE
    # What stands in the environment's proxy variables is not meant for our own servers.
    return httpx.AsyncClient(base_url=endpoint.base, auth=basic, headers=headers, verify=verify, trust_env=False)


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Whatever an answer lacks is the peer's fault, and no end of ours."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PeerError(f"an answer that is not understood ({type(error).__name__})") from error


class Exporter:
    """What the exporter says of services."""

    def __init__(self, endpoint: Endpoint, token: SecretStr | None) -> None:
        self._peer = Peer(endpoint, token)
        self.close = self._peer.close

    async def probe(self, service: str, timeout: float) -> Observation:
        """A probe made after this call began. Raises PeerError."""
        # One in flight is waited for first, so it may take two.
        answer = await self._peer.ask("POST", f"/api/v1/services/{service}/probe", 2 * timeout + 10.0)
        with _understood():
            return Observation(
                answer["up"], answer["success"], answer["reason"], answer["message"] or "",
                digest=answer.get("digest"), host_up=answer.get("host_up"),
            )  # fmt: skip

    async def observe_all(self) -> Mapping[str, Observation]:
        """Every service as it was last seen, without a probe. Raises PeerError."""
        answer = await self._peer.ask("GET", "/api/v1/services")
        with _understood():
            return {service["id"]: _observation(service) for service in answer["services"]}

    async def observe(self, service: str) -> Observation:
        """One service as it was last seen, without a probe. Raises PeerError."""
        answer = await self._peer.ask("GET", f"/api/v1/services/{service}")
        with _understood():
            return _observation(answer)


def _observation(service: Mapping[str, Any]) -> Observation:
    last = service["last"] or {}
    unchanged_for = service.get("unchanged_for_seconds")
    return Observation(
        service["up"],
        last.get("success"),
        last.get("reason"),
        last.get("message") or "",
        None if unchanged_for is None else float(unchanged_for),
        service.get("digest"),
        service.get("host_up"),
    )


@dataclass(frozen=True)
class KnownAlert:
    """An alert of one service as Alertmanager knows it; `held_by` says what silences or inhibits it, if anything."""

    name: str
    held_by: str


@dataclass(frozen=True)
class OfService:
    """All alerts of one service, the silenced and inhibited ones too."""

    alerts: tuple[KnownAlert, ...]
    up_for: float


class Alertmanager:
    """What fires, by Alertmanager's own list."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._peer = Peer(endpoint)
        self.close = self._peer.close

    async def alerts(self) -> Listing:
        """What it knows. Raises PeerError."""
        alerts = await self._peer.ask("GET", "/api/v2/alerts")
        status, now = await self._peer.ask_dated("GET", "/api/v2/status")
        with _understood():
            sent = [now - _unix(each["updatedAt"]) for each in alerts if each["labels"].get("alertname") == WATCHDOG]
            return Listing(
                tuple(_listed(each) for each in alerts if each["status"]["state"] == "active"),
                {each["fingerprint"]: frozenset(one["name"] for one in each["receivers"]) for each in alerts},
                frozenset(alert["fingerprint"] for alert in alerts),
                now - _unix(status["uptime"]),
                _receivers_to_us(status),
                min(sent, default=None),
            )

    async def of_service(self, service: str) -> OfService:
        """What it knows of one service's alerts. Raises PeerError."""
        query = urlencode({"filter": f'service="{service}"'})
        alerts, (status, now) = await asyncio.gather(
            self._peer.ask("GET", f"/api/v2/alerts?{query}", LOOKED_UP_WITHIN),
            self._peer.ask_dated("GET", "/api/v2/status", LOOKED_UP_WITHIN),
        )
        with _understood():
            return OfService(
                tuple(KnownAlert(alert["labels"]["alertname"], _held_by(alert["status"])) for alert in alerts),
                now - _unix(status["uptime"]),
            )

    async def watchdog_sent_ago(self) -> float | None:
        """Seconds since Prometheus last sent it the Watchdog; None where it has none. Raises PeerError."""
        query = urlencode({"filter": f'alertname="{WATCHDOG}"'})
        alerts, now = await self._peer.ask_dated("GET", f"/api/v2/alerts?{query}", LOOKED_UP_WITHIN)
        with _understood():
            return min((now - _unix(each["updatedAt"]) for each in alerts), default=None)

    async def silence(self, labels: Mapping[str, str], begins: float, ends: float, by: str, comment: str) -> str:
        """Silence alerts with just these labels between two Unix times; the silence's id. Raises PeerError."""
        _, now = await self._peer.ask_dated("GET", "/api/v2/status", LOOKED_UP_WITHIN)
        skew = now - time.time()
        begins, ends = (begins + skew, ends + skew) if abs(skew) > SKEW_IGNORED else (begins, ends)
        body = {
            "matchers": [
                {"name": name, "value": value, "isRegex": False, "isEqual": True} for name, value in labels.items()
            ],
            "startsAt": format_rfc3339(begins), "endsAt": format_rfc3339(ends), "createdBy": by, "comment": comment,
        }  # fmt: skip
        answer = await self._peer.ask("POST", "/api/v2/silences", LOOKED_UP_WITHIN, body)
        with _understood():
            return str(answer["silenceID"])


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _listed(alert: Mapping[str, Any]) -> Alert:
    return Alert(
        alert["fingerprint"], alert["startsAt"], "", "firing", dict(alert["labels"]), dict(alert["annotations"])
    )


def _receivers_to_us(status: Mapping[str, Any]) -> frozenset[str]:
    """The receivers with a webhook whose address is ours; newer versions hide addresses."""
    try:
        receivers = (yaml.safe_load(status["config"]["original"]) or {}).get("receivers") or []
    except yaml.YAMLError:
        return frozenset()
    return frozenset(
        each["name"]
        for each in receivers
        if any(WEBHOOK in str(hook.get("url", "")) for hook in each.get("webhook_configs") or [])
    )


def _held_by(status: Mapping[str, Any]) -> str:
    for key, words in (("silencedBy", "silenced"), ("inhibitedBy", "inhibited"), ("mutedBy", "muted")):
        if status.get(key):
            return f"{words} by {status[key][0]}"
    return ""
