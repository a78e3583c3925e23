"""The page of the gateway: who uses up the rate of each model API, and its limits, which admins change there."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args

from aiohttp import web

from console.gateway_history import read_gateway
from console.history import HOST_SPANS, ChartGroup, History
from console.rendering import PageRenderer
from console.requests import SubmittedForms, answer_form
from fleet.gateway_limits import GatewayLimits
from fleet.inventory.gateway import PRIORITIES, WhenFull, format_rate
from remediator.clients.gateway import ClientStatus, UpstreamStatus
from remediator.gateway import GatewayOperations, GatewayReading
from remediator.operations import OperationError
from remediator.snapshot import SnapshotSource
from runtime.access.browser import read_form
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement, Identity
from runtime.errors import ApiError
from runtime.request_bodies import validate_body
from runtime.web import add_route

CLIENTS_SHOWN, UPSTREAMS_SHOWN = 200, 50
USERS_SHOWN = 5  # clients that have used an upstream in the last minute
WHEN_FULL: tuple[WhenFull, ...] = get_args(WhenFull)
SPAN = "1h"
_FIELD = 100  # characters


@dataclass(frozen=True)
class Refused:
    """A form that was refused: where it was sent, what was entered, why, and the code of the reason."""

    path: str
    entered: Mapping[str, str]
    text: str
    code: str = ""


class GatewayPage:
    def __init__(
        self, source: SnapshotSource, history: History, renderer: PageRenderer, gateway: GatewayOperations
    ) -> None:
        self._source, self._history, self._renderer, self._gateway = source, history, renderer, gateway
        self._submitted = SubmittedForms()

    def add_routes(self, app: web.Application) -> None:
        add_route(app, "GET", "/gateway", self.show, AccessRequirement.VIEWER)
        for path in ("queue", "upstreams/{name}/limits", "upstreams/{name}/reset"):
            add_route(app, "POST", f"/gateway/{path}", self.press, AccessRequirement.ADMIN)

    async def show(self, request: web.Request, refused: Refused | None = None) -> web.Response:
        """Return the page; with `now` in the query, without what is not about this moment."""
        is_partial = "now" in request.query and refused is None
        span = request.query.get("span", SPAN)
        reading, charts, snapshot = await asyncio.gather(
            self._read(), self._read_charts(span, is_shown=not is_partial), self._source.get()
        )
        return await self._renderer.respond(
            request, "gateway.html", {"refused": refused, "form_id": self._submitted.new_id()},
            status=409 if refused else 200, snapshot=snapshot.describe(), is_partial=is_partial,
            gateway=_describe(reading), charts=charts, spans=list(HOST_SPANS), span=span,
            priorities=PRIORITIES, policies=WHEN_FULL,
        )  # fmt: skip

    async def _read(self) -> GatewayReading | None:
        return await self._gateway.read() if self._gateway.is_configured else None

    async def _read_charts(self, span: str, *, is_shown: bool) -> ChartGroup:
        if not is_shown or not self._gateway.is_configured:
            return ChartGroup()
        return await read_gateway(self._history, HOST_SPANS.get(span, HOST_SPANS[SPAN]))

    async def press(self, request: web.Request) -> web.Response:
        form = await read_form(request)
        path, name = request.path.removeprefix("/gateway/"), request.match_info.get("name", "")
        refused: Refused | None = await self._submitted.run_once(
            request, form, lambda: self._do(path, name, form, get_identity(request))
        )
        return await answer_form(request, refused, self.show, "gateway")

    async def _do(self, path: str, name: str, form: Mapping[str, str], by: Identity) -> Refused | None:
        entered = {key: value[:_FIELD] for key, value in form.items()}
        try:
            if path.endswith("/reset"):
                await self._gateway.reset(name, by)
            elif changed := _find_changes(entered):
                body = {"upstreams": {name: changed}} if name else changed
                await self._gateway.change_limits(validate_body(body, GatewayLimits), by)
        except OperationError as error:
            return Refused(path, entered, str(error), error.code)
        except ApiError as error:
            return Refused(path, entered, error.message)
        return None


def _find_changes(form: Mapping[str, str]) -> dict[str, object]:
    """Return the fields whose values are others than those that the form was filled with."""
    return {
        name: _parse_field(name, form[name])
        for name in ("queue_size", "when_full", "rate", "tokens", "burst", "concurrency")
        if name in form and form[name].strip() != form.get(f"was_{name}")
    }


def _parse_field(name: str, value: str) -> object:
    """Return the value of a field as JSON has it; an empty one is no limit."""
    text = value.strip()
    if not text and name in ("tokens", "burst", "concurrency"):
        return None
    return int(text) if text.isascii() and text.isdigit() and name in ("queue_size", "burst", "concurrency") else text


def _describe(reading: GatewayReading | None) -> dict[str, Any]:
    """Return what the page shows of the gateway: nothing but the problem, if it does not answer."""
    if reading is None:
        return {"state": "absent"}
    if reading.status is None:
        return {"state": "unavailable", "problem": reading.problem, "since": reading.since}
    status = reading.status
    clients = sorted(status.clients.items(), key=_by_use)
    sent = sum(each.sent_last_minute for _, each in clients)
    return {
        "state": "answers",
        "since": datetime.fromisoformat(status.started_at).timestamp(),
        "totals": status.totals.model_dump(),
        "upstreams": [_describe_upstream(*each) for each in list(status.upstreams.items())[:UPSTREAMS_SHOWN]],
        "clients": [_describe_client(name, each, sent) for name, each in clients[:CLIENTS_SHOWN]],
        "more_clients": len(clients) - CLIENTS_SHOWN,
    }


def _by_use(client: tuple[str, ClientStatus]) -> tuple[int, int, str]:
    """The order of clients: those that use most of the rate first."""
    name, status = client
    return -status.sent_last_minute, -status.waiting, name


def _describe_upstream(name: str, upstream: UpstreamStatus) -> dict[str, Any]:
    sent = sorted(upstream.sent_last_minute.items(), key=lambda each: (-each[1], each[0]))
    total, shown = sum(upstream.sent_last_minute.values()), sent[:USERS_SHOWN]
    others = total - sum(number for _, number in shown)
    waiting = sum(upstream.queue.model_dump().values())
    return {
        **upstream.model_dump(),
        "name": name,
        "waiting": waiting,
        "rate": format_rate(upstream.base_rate_per_minute),
        "tokens": "" if upstream.tokens_per_minute is None else format_rate(upstream.tokens_per_minute),
        "users": [{"name": each, "sent": number, "share": number / total} for each, number in shown if total],
        "others": others,
    }


def _describe_client(name: str, client: ClientStatus, sent: int) -> dict[str, Any]:
    """Return a client with its share of what all of them have sent in the last minute."""
    return {**client.model_dump(), "name": name, "use": client.sent_last_minute / sent if sent else None}
