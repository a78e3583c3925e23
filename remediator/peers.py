"""The servers that the remediator asks: the exporter for fresh probes, Alertmanager for what fires."""

import ssl
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import httpx
from pydantic import SecretStr

from fleet.endpoints import Endpoint
from remediator.policy import Observation
from runtime.errors import DefibError

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
            raise PeerError(f"HTTP {error.response.status_code}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise PeerError(f"{type(error).__name__}") from error

    async def close(self) -> None:
        await self._client.aclose()


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
        verify = ssl.create_default_context(cafile=str(tls.ca_file) if tls.ca_file else None)
        if not tls.verify:
            verify.check_hostname, verify.verify_mode = False, ssl.CERT_NONE
        if tls.cert_file:
            verify.load_cert_chain(tls.cert_file, tls.key_file)
    # What stands in the environment's proxy variables is not meant for our own servers.
    return httpx.AsyncClient(base_url=endpoint.base, auth=basic, headers=headers, verify=verify, trust_env=False)


class Exporter:
    """What the exporter says of services."""

    def __init__(self, endpoint: Endpoint, token: SecretStr | None) -> None:
        self._peer = Peer(endpoint, token)
        self.close = self._peer.close

    async def probe(self, service: str, timeout: float) -> Observation:
        """A probe made after this call began. Raises PeerError."""
        # One in flight is waited for first, so it may take two.
        answer = await self._peer.ask("POST", f"/api/v1/services/{service}/probe", 2 * timeout + 10.0)
        return Observation(answer["up"], answer["success"], answer["reason"], answer["message"] or "")

    async def observe_all(self) -> Mapping[str, Observation]:
        """Every service as it was last seen, without a probe. Raises PeerError."""
        answer = await self._peer.ask("GET", "/api/v1/services")
        return {service["id"]: _observation(service) for service in answer["services"]}

    async def observe(self, service: str) -> Observation:
        """One service as it was last seen, without a probe. Raises PeerError."""
        return _observation(await self._peer.ask("GET", f"/api/v1/services/{service}"))


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


class Alertmanager:
    """What fires, by Alertmanager's own list."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._peer = Peer(endpoint)
        self.close = self._peer.close

    async def active(self) -> list[tuple[str, str]]:
        """(fingerprint, startsAt) of every alert, the silenced and inhibited ones too. Raises PeerError."""
        answer = await self._peer.ask("GET", "/api/v2/alerts")
        return [(alert["fingerprint"], alert["startsAt"]) for alert in answer]
