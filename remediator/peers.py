"""The servers that the remediator asks: the exporter for fresh probes, Alertmanager for what fires."""

import contextlib
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
from pydantic import SecretStr

from fleet.endpoints import Endpoint
from remediator.policy import Observation
from runtime.errors import DefibError, StartError

TIMEOUT = httpx.Timeout(10.0, connect=3.0)


class PeerError(DefibError):
    """A server that we ask did not answer as it should."""

    retryable = True


class Peer:
    """JSON over HTTP with one server."""

    def __init__(self, endpoint: Endpoint, token: SecretStr | None = None) -> None:
        self._client = _client(endpoint, token)

    async def ask(self, method: str, path: str, timeout: float | None = None) -> Any:
        """The parsed answer. Raises PeerError."""
        limits = TIMEOUT if timeout is None else httpx.Timeout(timeout, connect=3.0)
        try:
            response = await self._client.request(method, path, timeout=limits)
            response.raise_for_status()
            return response.json()
        except httpx.HTTPStatusError as error:
            raise PeerError(f"HTTP {error.response.status_code}{_said(error.response)}") from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
            raise PeerError(f"{type(error).__name__}") from error

    async def close(self) -> None:
        await self._client.aclose()


def _said(response: httpx.Response) -> str:
    """The words of an error of ours."""
    try:
        return f": {str(response.json()['error']['message'])[:300]}"
    except (ValueError, KeyError, TypeError):
        return ""


def _client(endpoint: Endpoint, token: SecretStr | None) -> httpx.AsyncClient:
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
            return Observation(answer["up"], answer["success"], answer["reason"], answer["message"] or "")

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
    since = service["since"]
    return Observation(
        service["up"],
        last.get("success"),
        last.get("reason"),
        last.get("message") or "",
        datetime.fromisoformat(since).timestamp() if since else None,
    )


@dataclass(frozen=True)
class Listing:
    """Fingerprints of Alertmanager's alerts: those that are `active`, and all, silenced and inhibited ones too."""

    active: frozenset[str]
    listed: frozenset[str]
    up_for: float  # seconds since Alertmanager's start, before which it has forgotten everything


class Alertmanager:
    """What fires, by Alertmanager's own list."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._peer = Peer(endpoint)
        self.close = self._peer.close

    async def alerts(self, now: float) -> Listing:
        """What it knows. Raises PeerError."""
        alerts = await self._peer.ask("GET", "/api/v2/alerts")
        status = await self._peer.ask("GET", "/api/v2/status")
        with _understood():
            return Listing(
                frozenset(alert["fingerprint"] for alert in alerts if alert["status"]["state"] == "active"),
                frozenset(alert["fingerprint"] for alert in alerts),
                now - datetime.fromisoformat(status["uptime"]).timestamp(),
            )
