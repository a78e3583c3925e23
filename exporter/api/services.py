"""Services with their state and recent results, probe now, reload."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field

from exporter.heartbeats.agent import AgentStatus, describe_stuck
from exporter.results import ProbeResult
from exporter.scheduler.probe_scheduler import ProbeScheduler
from exporter.scheduler.probed_service import ProbedService
from fleet.inventory.model import Host, Service
from fleet.inventory.problems import ConfigurationError
from runtime.access.audit import AuditEntry, Outcome, write_to_log
from runtime.access.control import get_identity
from runtime.access.roles import Role
from runtime.errors import ApiError
from runtime.request_bodies import RequestBody, parse_request
from runtime.streaming import stream_list
from runtime.times import format_rfc3339

COMPONENTS_LISTED = 20  # of those that are down
REMEDIATOR = "remediator"  # the name of that caller with the local token
MAX_SCOPES, LONGEST_PAUSE = 500, 3600.0  # of one request; seconds


class _PausedScope(RequestBody):
    scope: Literal["service", "host", "group"]
    name: Annotated[str, Field(min_length=1, max_length=200)]


# The remediator repeats its pauses, and records who wants them.
LONGEST_PAUSE_OF_OPERATORS = 60.0  # seconds


class _PausesBody(RequestBody):
    scopes: Annotated[list[_PausedScope], Field(max_length=MAX_SCOPES)]
    seconds: Annotated[float, Field(gt=0, le=LONGEST_PAUSE, allow_inf_nan=False)]


class ServicesApi:
    def __init__(self, scheduler: ProbeScheduler, reload: Callable[[], Awaitable[None]]) -> None:
        self._scheduler, self._reload = scheduler, reload

    async def list_services(self, request: web.Request) -> web.StreamResponse:
        """Return all services, or with a valid cursor in `after` those that have changed since it was issued."""
        changes, services = self._scheduler.changes, self._scheduler.services
        # A service that changes while the response is being sent has changed after this cursor, too.
        cursor, changed = changes.cursor, changes.since(request.query.get("after", ""))
        names = list(services) if changed is None else changed

        def summaries() -> Iterator[dict[str, Any]]:
            for name in names:
                probed = services.get(name)
                if probed is not None:  # otherwise a reload has removed it
                    yield self._summary(probed)

        return await stream_list(request, {"cursor": cursor, "complete": changed is None}, "services", summaries())

    async def show_service(self, request: web.Request) -> web.Response:
        probed = self._find_service(request)
        results = [
            {
                "started_at": format_rfc3339(result.started_at),
                "success": result.reason is None,
                "reason": result.reason,
                "duration_seconds": result.duration,
            }
            for result in probed.recent_results
        ]
        failures = [result_json(failure) for failure in probed.recent_failures]
        seen: dict[str, Any] = {}
        if probed.last is not None:
            seen = {**probed.last.details.components_json(), **probed.last.details.certificate_json()}
        return web.json_response({**self._summary(probed), **seen, "results": results, "failures": failures})

    async def probe(self, request: web.Request) -> web.Response:
        probed = self._find_service(request)
        result = await self._scheduler.probe_now(probed)
        if get_identity(request).claimed_user != REMEDIATOR:  # which probes before and after each of its actions
            await self._audit(request, "probe", probed.service.id)
        return web.json_response(
            {
                "service": probed.service.id,
                "up": probed.state.up,
                **result_json(result),
                **result.details.components_json(),
                "digest": probed.digest,
                "host_up": self._scheduler.host_up(probed.service.host),
                **agent_json(probed.service, self._scheduler.heartbeats.find_agent_status(probed.service.id)),
            }
        )

    async def set_pauses(self, request: web.Request) -> web.Response:
        """Probe the services of some scopes only on request for a while, and all others on schedule."""
        body = await parse_request(request, _PausesBody)
        if body.seconds > LONGEST_PAUSE_OF_OPERATORS and get_identity(request).role is not Role.ADMIN:
            limit = f"{LONGEST_PAUSE_OF_OPERATORS:g} seconds"
            raise ApiError(403, "forbidden", f"only an admin may pause probing for more than {limit}; use maintenance")
        wanted = {(each.scope, each.name) for each in body.scopes}
        names = {name for name, probed in self._scheduler.services.items() if wanted & self._scopes_of(probed)}
        await self._scheduler.pause(names, body.seconds)
        if get_identity(request).claimed_user != REMEDIATOR:  # whose audit log has the maintenance
            await self._audit(request, "pause probing", f"{len(names)} services")
        return web.json_response({"services": len(names)})

    def _scopes_of(self, probed: ProbedService) -> set[tuple[str, str]]:
        name, host = probed.service.host, self._scheduler.hosts.get(probed.service.host)
        return {("service", probed.service.id), ("host", name), ("group", "" if host is None else host.group)}

    async def reload(self, request: web.Request) -> web.Response:
        try:
            await self._reload()
        except ConfigurationError as error:
            await self._audit(request, "reload", outcome="refused")
            raise ApiError(400, "bad_configuration", f"the previous configuration stays in force: {error}") from error
        await self._audit(request, "reload")
        return web.json_response({"services": len(self._scheduler.services)})

    @staticmethod
    async def _audit(request: web.Request, event: str, target: str = "", *, outcome: Outcome = "done") -> None:
        await write_to_log(AuditEntry.of(get_identity(request), event, target, outcome=outcome))

    def _summary(self, probed: ProbedService) -> dict[str, Any]:
        name = probed.service.host
        heartbeats = self._scheduler.heartbeats
        agent, heartbeat = heartbeats.find_agent_status(probed.service.id), heartbeats.find(probed.service.id)
        shown = service_json(probed, self._scheduler.hosts.get(name), self._scheduler.host_up(name), agent)
        if heartbeat is None:
            return shown
        started_at = heartbeat.state.last_start
        shown["job_started_at"] = None if started_at is None else format_rfc3339(heartbeats.to_unix(started_at))
        return {**shown, "created": True} if heartbeat.state.is_created else shown

    def _find_service(self, request: web.Request) -> ProbedService:
        probed = self._scheduler.services.get(request.match_info["id"])
        if probed is None:
            raise ApiError(404, "unknown_service", f"the inventory has no service {request.match_info['id']!r}")
        return probed


def service_json(
    probed: ProbedService, host: Host | None, host_up: bool | None, agent: AgentStatus | None = None
) -> dict[str, Any]:
    """Return the JSON representation of a service.

    `since` is the time at which `up` was first determined or last changed; `unchanged_for_seconds` is the time elapsed
    since then, unaffected by clock changes. `host_up` is whether the host's shell answered last, None if unknown.
    `agent` is what an agent does, None if the service is none or that is unknown.
    """
    service, (state, last) = probed.service, probed.visible_state
    now = asyncio.get_running_loop().time()
    return {
        "id": service.id,
        "name": service.title,
        "host": service.host,
        "group": "" if host is None else host.group,
        "provider": service.provider,
        "category": service.category,
        "team": service.team,
        "severity": service.severity,
        "automatic": service.on_failure == "restart",
        "every_seconds": None if probed.service.probe.is_reported else service.probe.every,
        "up": state.up,
        "paused": probed.is_paused,
        "since": format_rfc3339(state.last_change),
        "unchanged_for_seconds": None if probed.changed_at is None or state.up is None else now - probed.changed_at,
        "last_success": format_rfc3339(state.last_success),
        "consecutive_failures": state.failures_in_a_row,
        "last": None if last is None else result_json(last),
        "recent": probed.recent_results.marks,
        "components_down": [] if last is None else last.details.components_down[:COMPONENTS_LISTED],
        "digest": probed.digest if last is not None else service.digest,
        "host_up": host_up,
        **agent_json(service, agent),
    }


def agent_json(service: Service, status: AgentStatus | None) -> dict[str, Any]:
    """Return the JSON representation of what an agent does, as `agent`; empty if the service is none."""
    if service.agent is None:
        return {}
    return {"agent": {"status": status, "stuck": describe_stuck(service.agent, status)}}


def result_json(result: ProbeResult) -> dict[str, Any]:
    """Return the JSON representation of a probe result."""
    return {
        "success": result.success,
        "reason": result.reason,
        "message": result.message,
        "duration_seconds": result.duration,
        "phases": result.details.phases,
        "started_at": format_rfc3339(result.started_at),
    }
