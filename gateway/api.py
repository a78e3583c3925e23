"""The gateway's own HTTP API: its state, its limits, reload."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from aiohttp import web
from pydantic import Field

from fleet.inventory.gateway import PRIORITIES, Rate, WhenFull
from gateway.clients import Clients
from gateway.proxy import PATH, Proxy
from gateway.upstreams import Upstream, Upstreams
from runtime.access.audit import AuditEntry, Outcome
from runtime.access.control import AccessControl, get_identity
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError, DefibError
from runtime.request_bodies import RequestBody, parse_request
from runtime.web import add_route


class UpstreamLimits(RequestBody):
    rate: Rate | None = None
    tokens: Rate | None = None
    concurrency: int | None = Field(None, ge=1)


class NewLimits(RequestBody):
    """What is left out stays as it is."""

    queue_size: int | None = Field(None, ge=0, le=100_000)
    when_full: WhenFull | None = None
    upstreams: dict[str, UpstreamLimits] = Field(default_factory=dict)


class GatewayApi:
    def __init__(
        self,
        upstreams: Upstreams,
        clients: Clients,
        access: AccessControl,
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._upstreams, self._clients, self._access = upstreams, clients, access
        self._reload = reload

    async def show_status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._describe())

    def _describe(self) -> dict[str, Any]:
        return {
            "upstreams": {each.name: _describe_upstream(each) for each in self._upstreams},
            "clients": {
                client.name: {
                    "priority": client.priority,
                    "share": client.share,
                    "waiting": sum(each.admission.count_waiting(client.name) for each in self._upstreams),
                    "today": dict(self._clients.used_today(client.name)),
                    "budget": client.budget.model_dump(),
                }
                for client in self._clients.list_all()
            },
        }

    async def set_limits(self, request: web.Request) -> web.Response:
        """Change limits until the next reload or restart. All of them are checked before one is changed."""
        limits = await parse_request(request, NewLimits)
        for name in limits.upstreams:
            self._find(name)
        for upstream in self._upstreams:
            waiting = sum(upstream.admission.depths)
            if limits.queue_size is not None and limits.queue_size < waiting:
                message = f"{waiting} requests wait for {upstream.name}: the queue cannot be smaller"
                raise ApiError(409, "queue_in_use", message)
        for upstream in self._upstreams:
            _change_limits(upstream, limits, limits.upstreams.get(upstream.name, UpstreamLimits()))
        await self._audit(request, "change_limits", detail=limits.model_dump_json(exclude_none=True))
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


def _change_limits(upstream: Upstream, limits: NewLimits, own: UpstreamLimits) -> None:
    admission = upstream.admission
    if own.rate is not None:
        admission.retreat.configure(own.rate, admission.retreat.rules, admission.clock.now())
    changed = admission.limits
    if own.tokens is not None:
        changed = replace(changed, tokens=own.tokens)
    if own.concurrency is not None:
        changed = replace(changed, concurrency=own.concurrency)
    queue = admission.queue
    if limits.queue_size is not None:
        queue = replace(queue, size=limits.queue_size)
    if limits.when_full is not None:
        queue = replace(queue, when_full=limits.when_full)
    admission.configure(changed, queue)


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
        "concurrency": admission.limits.concurrency,
        "in_flight": state.in_flight,
        "queue": dict(zip(PRIORITIES, state.depths, strict=True)),
        "queue_size": admission.queue.size,
        "when_full": admission.queue.when_full,
        "retreat": admission.retreat.state,
        "paused_seconds": round(max(0.0, admission.paused_until - now), 1),
        "failing": admission.breaker.is_open,
    }


def add_routes(app: web.Application, api: GatewayApi, proxy: Proxy) -> None:
    add_route(app, "*", PATH, proxy.answer, AccessRequirement.UNCHECKED)  # but a client's token
    for path in ("/api/v1/status", "/status"):
        add_route(app, "GET", path, api.show_status, AccessRequirement.VIEWER)
    add_route(app, "PUT", "/api/v1/limits", api.set_limits, AccessRequirement.ADMIN)
    add_route(app, "POST", "/api/v1/upstreams/{name}/reset", api.reset, AccessRequirement.ADMIN)
    add_route(app, "POST", "/-/reload", api.reload, AccessRequirement.ADMIN)
