"""The exporter's API: the status of services, probes on request, and events."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

import httpx

from fleet.inventory.endpoints import Endpoint
from fleet.json_client import HttpStatusError, JsonClient, parsing_response
from fleet.pings import PingKind
from remediator.clients.exporter_services import check_services
from remediator.clients.token_auth import CALLER, TokenAuth
from remediator.policy.situation import STUCK, Observation
from runtime.access.roles import USER_HEADER
from runtime.payloads import replace_surrogates
from runtime.tokens import ConfiguredToken

MAX_EVENT_NAME, MAX_EVENT_DETAIL, MAX_CURSOR = 200, 1000, 1000  # characters


@dataclass(frozen=True)
class ExporterEvent:
    """A change of state, at a Unix time of the exporter's clock."""

    at: float
    kind: str
    host: str
    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class ExporterEvents:
    """A page of events, oldest first, and the cursor after them; `gap`: events before them were lost.

    `date` is the Unix time of the exporter's clock when it answered, in whole seconds.
    """

    cursor: str
    gap: bool
    events: Sequence[ExporterEvent]
    date: float


@dataclass(frozen=True)
class ServiceChanges:
    """Services that changed since an earlier answer, as JSON; all services if the list is `complete`."""

    cursor: str
    complete: bool
    services: Sequence[Mapping[str, Any]]


class Exporter:
    """The API; `redact` masks secrets in messages, which are stored."""

    def __init__(
        self, endpoint: Endpoint, token: ConfiguredToken, redact: Callable[[str], str] = lambda text: text
    ) -> None:
        self._redact = redact
        auth = TokenAuth(token, "exporter") if endpoint.auth is None else None
        self._client = JsonClient(endpoint, headers={USER_HEADER: CALLER}, auth=auth)
        self.close = self._client.close
        self._lock = asyncio.Lock()
        self._cursor = ""
        self._observed: dict[str, tuple[Observation, float]] = {}  # by service, with the time of the answer

    async def probe(self, service: str, timeout: float) -> Observation:
        """Probe a service after this call began; `timeout` is the probe's, in seconds. Raises ClientError."""
        # A probe in progress ends first, so the request may take two timeouts.
        response = await self._client.request("POST", f"/api/v1/services/{service}/probe", 2 * timeout + 10.0)
        with parsing_response():
            observed = Observation(
                response["up"], response["success"], response["reason"], self._redact(response["message"] or ""),
                digest=response.get("digest"), host_up=response.get("host_up"),
            )  # fmt: skip
            return _add_components(_add_agent(observed, response, self._redact), response)

    async def pause(self, scopes: Sequence[tuple[str, str]], seconds: float) -> None:
        """Have services, hosts and groups probed only on request for some seconds, and all others on schedule.

        `scopes` are pairs of a scope and a name. Raises ClientError.
        """
        body = {"scopes": [{"scope": scope, "name": name} for scope, name in scopes], "seconds": seconds}
        await self._client.request("PUT", "/api/v1/pauses", body=body)

    async def observe_all(self) -> Mapping[str, Observation]:
        """Return the last observation of every service, without probing. Raises ClientError.

        Only what has changed since the last call is transferred.
        """
        async with self._lock:
            changes = await self.list_changes(self._cursor)
            now = time.monotonic()
            with parsing_response():
                observed = {service["id"]: (self._parse_observation(service), now) for service in changes.services}
            self._observed = observed if changes.complete else self._observed | observed
            self._cursor = changes.cursor
        return {
            name: seen if seen.unchanged_for is None else replace(seen, unchanged_for=seen.unchanged_for + now - at)
            for name, (seen, at) in self._observed.items()
        }

    async def list_changes(self, cursor: str) -> ServiceChanges:
        """Return the services that changed since `cursor`; all of them if that is empty. Raises ClientError."""
        response = await self._client.request("GET", f"/api/v1/services?{urlencode({'after': cursor})}")
        with parsing_response():
            # Earlier versions answer with all services.
            return ServiceChanges(
                response.get("cursor", ""), response.get("complete", True), check_services(response["services"])
            )

    async def read(self, path: str) -> Mapping[str, Any]:
        """Return the JSON at a path, for pages. Raises ClientError."""
        found: Mapping[str, Any] = await self._client.request("GET", quote(path))
        return found

    async def read_ping_urls(self, service: str) -> Mapping[str, str]:
        """Return the URLs of a heartbeat by name, of which some are secrets. Raises ClientError."""
        response = await self._client.request("GET", f"/api/v1/heartbeats/{quote(service, safe='')}/urls")
        with parsing_response():
            return {name: str(url) for name, url in response.items()}

    async def ping(self, service: str, kind: PingKind, exit_status: int | None, message: str, by: str) -> PingKind:
        """Send a ping of a heartbeat in the name of a person, and return its kind. Raises ClientError."""
        body = {"kind": kind, "exit_status": exit_status, "message": message, "by": by[:MAX_EVENT_NAME]}
        path = f"/api/v1/heartbeats/{quote(service, safe='')}/ping"
        response = await self._client.request("POST", path, body=body)
        with parsing_response():
            sent: PingKind = response["kind"]
            return sent

    async def remove_heartbeat(self, service: str) -> None:
        """Remove a heartbeat that a job has created. Raises ClientError."""
        await self._client.request("DELETE", f"/api/v1/heartbeats/{quote(service, safe='')}")

    async def observe(self, service: str) -> Observation:
        """Return the last observation of a service, without probing. Raises ClientError."""
        response = await self._client.request("GET", f"/api/v1/services/{service}")
        with parsing_response():
            return self._parse_observation(*check_services([response]))

    def _parse_observation(self, service: Mapping[str, Any]) -> Observation:
        last = service["last"] or {}
        unchanged_for = service.get("unchanged_for_seconds")
        observed = Observation(
            service["up"],
            last.get("success"),
            last.get("reason"),
            self._redact(last.get("message") or ""),
            None if unchanged_for is None else float(unchanged_for),
            service.get("digest"),
            service.get("host_up"),
            paused=service.get("paused") is True,
        )
        return _add_components(_add_agent(observed, service, self._redact), service)

    async def read_events(self, after: str | None, limit: int) -> ExporterEvents | None:
        """Return events after a cursor, or from the first that the exporter has; None from an exporter without events.

        Raises ClientError.
        """
        path = f"/api/v1/events?limit={limit}"
        if after is not None:
            path += f"&after={quote(after, safe='')}"
        try:
            response, date = await self._client.request_with_date("GET", path)
        except HttpStatusError as error:
            if error.status == httpx.codes.NOT_FOUND:  # it is older than the remediator
                return None
            raise
        with parsing_response():
            events = [self._parse_event(event) for event in response["events"][: limit + 1]]
            if len(events) > limit:
                raise ValueError(f"more than {limit} events")
            cursor = replace_surrogates(response["cursor"])
            if len(cursor) > MAX_CURSOR:
                raise ValueError(f"a cursor of more than {MAX_CURSOR} characters")
            return ExporterEvents(cursor, response["gap"] is True, events, date)

    def _parse_event(self, event: Mapping[str, Any]) -> ExporterEvent:
        at = datetime.fromisoformat(event["at"])
        if at.tzinfo is None:
            raise ValueError(f"the time {event['at']!r} has no time zone")
        name, host, state = (_parse_text(event[key], MAX_EVENT_NAME) for key in ("name", "host", "state"))
        kind, detail = (
            _parse_text(event["kind"], MAX_EVENT_NAME),
            self._redact(_parse_text(event["detail"], MAX_EVENT_DETAIL)),
        )
        return ExporterEvent(at.timestamp(), kind, host, name, state, detail)


def _parse_text(text: str, limit: int) -> str:
    return replace_surrogates(text[:limit])


def _add_agent(observed: Observation, response: Mapping[str, Any], redact: Callable[[str], str]) -> Observation:
    """Return an agent that is stuck as failed: it is up, and does not do its work."""
    agent = response.get("agent") or {}
    if not agent.get("stuck") or not observed.up:
        return observed
    message, is_confirmed = redact(agent["stuck"]), agent["status"] == "confirmed"
    return replace(observed, up=False, success=False, reason=STUCK, message=message, confirmed=is_confirmed)


def _add_components(observed: Observation, response: Mapping[str, Any]) -> Observation:
    if "components" not in response:
        return observed
    states = {each["name"]: bool(each["up"]) for each in response["components"]}
    up = frozenset(name for name, is_up in states.items() if is_up)
    return replace(observed, components_up=up, components_down=frozenset(states) - up)
