"""The gateway for programs: its status, and changes of its limits, as the console shows and makes them."""

from aiohttp import web

from fleet.gateway_limits import GatewayLimits
from remediator.gateway import GatewayOperations
from remediator.http.views import respond
from remediator.http.write_api import translating_errors
from remediator.record.database import Database
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.redaction import Redactor
from runtime.request_bodies import parse_request
from runtime.times import format_rfc3339
from runtime.web import add_route


def add_routes(app: web.Application, gateway: GatewayOperations, database: Database, redact: Redactor) -> None:
    api = _GatewayApi(gateway, database, redact)
    base = "/api/v1/gateway"
    add_route(app, "GET", base, api.read, AccessRequirement.VIEWER)
    add_route(app, "PUT", f"{base}/limits", translating_errors(api.change_limits), AccessRequirement.ADMIN)
    add_route(app, "POST", f"{base}/upstreams/{{name}}/reset", translating_errors(api.reset), AccessRequirement.ADMIN)


class _GatewayApi:
    def __init__(self, gateway: GatewayOperations, database: Database, redact: Redactor) -> None:
        self._gateway, self._database, self._redact = gateway, database, redact

    async def read(self, request: web.Request) -> web.Response:
        if not self._gateway.is_configured:
            raise ApiError(404, "not_configured", "no gateway is configured: gateway.upstreams is empty")
        reading, clock = await self._gateway.read(), self._database.clock
        if reading.status is None:
            raise ApiError(502, "gateway_unreachable", f"cannot read the gateway's status: {reading.problem}")
        status = {"at": format_rfc3339(clock.unix(clock.now())), **reading.status.model_dump()}
        return await respond(request, status, self._redact, clock)

    async def change_limits(self, request: web.Request) -> web.Response:
        limits = await parse_request(request, GatewayLimits)
        status = await self._gateway.change_limits(limits, get_identity(request))
        return await respond(request, status.model_dump(), self._redact, self._database.clock)

    async def reset(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        await self._gateway.reset(name, get_identity(request))
        return web.json_response({"upstream": name})
