"""The gateway's own HTTP API: its state, its limits, reload."""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from aiohttp import web

from fleet.gateway_limits import GatewayLimits, UpstreamLimits
from fleet.inventory.gateway import PRIORITIES
from gateway.clients import Clients
from gateway.metrics import KINDS, GatewayMetrics
from gateway.proxy import PATH, Proxy
from gateway.upstreams import Upstream, Upstreams
from runtime.access.audit import AuditEntry, Outcome
from runtime.access.control import AccessControl, get_identity
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError, DefibError
from runtime.request_bodies import parse_request
from runtime.times import format_rfc3339
from runtime.web import add_route

_NONE = (0,) * len(PRIORITIES)


class GatewayApi:
    def __init__(
        self,
        upstreams: Upstreams,
        clients: Clients,
        metrics: GatewayMetrics,
        access: AccessControl,
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._upstreams, self._clients, self._metrics, self._access = upstreams, clients, metrics, access
        self._reload = reload
        self._started = time.time(), time.monotonic()

    async def show_status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._describe())

    def _describe(self) -> dict[str, Any]:
        totals = self._metrics.sum_up()
        return {
            "started_at": format_rfc3339(self._started[0]),
            "uptime_seconds": round(time.monotonic() - self._started[1], 1),
            "totals": {
                **_describe_totals(sum(totals.values(), Counter())),
                "passed_through": self._metrics.count_passed_through(),
            },
            "shared_limits_available": self._metrics.is_shared(),
            "upstreams": {each.name: _describe_upstream(each) for each in self._upstreams},
            "clients": self._describe_clients(totals),
        }

    def _describe_clients(self, totals: Mapping[str, Counter[str]]) -> dict[str, Any]:
        """Return what each client uses now, has used today, and how its requests since the start have ended."""
        traffics = [(each.admission.traffic, each.admission.clock.now()) for each in self._upstreams]
        sent, in_flight = Counter[str](), Counter[str]()
        for traffic, now in traffics:
            sent.update(traffic.count_sent(now))
            in_flight.update(traffic.count_in_flight())
        waiting = [each.admission.count_waiting() for each in self._upstreams]
        described = {}
        for client in self._clients.list_all():
            depths = [sum(by.get(client.name, _NONE)[rank] for by in waiting) for rank in range(len(PRIORITIES))]
            described[client.name] = {
                "priority": client.priority,
                "share": client.share,
                "waiting": sum(depths),
                "queue": dict(zip(PRIORITIES, depths, strict=True)),
                "in_flight": in_flight[client.name],
                "sent_last_minute": sent[client.name],
                "today": dict(self._clients.used_today(client.name)),
                "budget": client.budget.model_dump(),
                "totals": _describe_totals(totals.get(client.name, Counter())),
            }
        return described

    async def set_limits(self, request: web.Request) -> web.Response:
        """Change limits until the next reload or restart. All of them are checked before one is changed."""
        limits = await parse_request(request, GatewayLimits)
        for name in limits.upstreams:
            self._find(name)
        for upstream in self._upstreams:
            waiting = sum(upstream.admission.depths)
            if "queue_size" in limits.model_fields_set and limits.queue_size < waiting:
                message = f"{waiting} requests wait for {upstream.name}: the queue cannot be smaller"
                raise ApiError(409, "queue_in_use", message)
            if "queue_size" in limits.model_fields_set and limits.queue_size < upstream.admission.smallest_queue:
                raise ApiError(400, "bad_request", "queue_size: must be at least 1 with gateway.shared")
        for upstream in self._upstreams:
            _change_limits(upstream, limits, limits.upstreams.get(upstream.name, UpstreamLimits()))
        await self._audit(request, "change_limits", detail=limits.model_dump_json(exclude_unset=True))
        return web.json_response(self._describe())

    async def reset(self, request: web.Request) -> web.Response:
        """Return an upstream to its base rate, and end its pause."""
        upstream = self._find(request.match_info["name"])
        upstream.admission.reset()
        await self._audit(request, "reset_rate", upstream.name)
        return web.json_response(_describe_upstream(upstream))

    def _find(self, name: str) -> Upstream:
        for upstream in self._upstreams:
            if upstream.name == name:
                return upstream
        raise ApiError(404, "not_found", f"there is no upstream {name[:100]!r}")

    async def reload(self, request: web.Request) -> web.Response:
        try:
            await self._reload()
        except DefibError as error:
            await self._audit(request, "reload", outcome="refused")
            raise ApiError(400, "bad_configuration", f"the previous configuration stays in force: {error}") from error
        await self._audit(request, "reload")
        return web.json_response({"upstreams": len(self._upstreams)})

    async def _audit(
        self, request: web.Request, operation: str, target: str = "", detail: str = "", outcome: Outcome = "done"
    ) -> None:
        entry = AuditEntry.of(get_identity(request), operation, target, outcome=outcome, detail=detail)
        await self._access.write_audit(entry)


def _change_limits(upstream: Upstream, limits: GatewayLimits, own: UpstreamLimits) -> None:
    admission = upstream.admission
    if "rate" in own.model_fields_set:
        admission.retreat.configure(own.rate, admission.retreat.rules, admission.clock.now())
    changed = admission.limits
    if "tokens" in own.model_fields_set:
        changed = replace(changed, tokens=own.tokens)
    if "burst" in own.model_fields_set:
        changed = replace(changed, burst=own.burst)
    if "concurrency" in own.model_fields_set:
        changed = replace(changed, concurrency=own.concurrency)
    queue = admission.queue
    if "queue_size" in limits.model_fields_set:
        queue = replace(queue, size=limits.queue_size)
    if "when_full" in limits.model_fields_set:
        queue = replace(queue, when_full=limits.when_full)
    admission.configure(changed, queue)


def _describe_totals(counts: Counter[str]) -> dict[str, int]:
    return {"requests": counts.total(), **{kind: counts[kind] for kind in KINDS}}


def _describe_upstream(upstream: Upstream) -> dict[str, Any]:
    state, admission = upstream.describe(), upstream.admission
    now = admission.clock.now()
    return {
        "provider": upstream.provider,
        "rate_per_minute": round(state.rate, 3),
        "base_rate_per_minute": state.base_rate,
        "requests_in_window": round(admission.requests.used(now)),
        "requests_available": round(state.available),
        "tokens_per_minute": admission.limits.tokens,
        "tokens_in_window": round(admission.tokens.used(now)),
        "burst": admission.limits.burst,
        "concurrency": admission.limits.concurrency,
        "in_flight": state.in_flight,
        "queue": dict(zip(PRIORITIES, state.depths, strict=True)),
        "queue_size": admission.queue.size,
        "when_full": admission.queue.when_full,
        "retreat": admission.retreat.state,
        "paused_seconds": round(max(0.0, admission.paused_until - now), 1),
        "failing": admission.breaker.is_open,
        "sent_last_minute": admission.traffic.count_sent(now),
        "latency_seconds": admission.traffic.find_latencies(now),
    }


def add_routes(app: web.Application, api: GatewayApi, proxy: Proxy) -> None:
    add_route(app, "*", PATH, proxy.answer, AccessRequirement.UNCHECKED)  # but a client's token
    for path in ("/api/v1/status", "/status"):
        add_route(app, "GET", path, api.show_status, AccessRequirement.VIEWER)
    add_route(app, "PUT", "/api/v1/limits", api.set_limits, AccessRequirement.ADMIN)
    add_route(app, "POST", "/api/v1/upstreams/{name}/reset", api.reset, AccessRequirement.ADMIN)
    add_route(app, "POST", "/-/reload", api.reload, AccessRequirement.ADMIN)
