"""The console: pages with the open incidents and the details of one incident. They are read-only."""

from dataclasses import asdict

from aiohttp import web

from remediator.console.rendering import PageRenderer
from remediator.http.views import read_record
from remediator.record import maintenance, queries
from remediator.record.automation import read_switch
from remediator.record.database import Database
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.web import add_route

INCIDENTS_SHOWN = 50


def add_routes(app: web.Application, database: Database, renderer: PageRenderer) -> None:
    console = _Console(database, renderer)
    add_route(app, "GET", "/", console.show_index, AccessRequirement.VIEWER)
    add_route(app, "GET", "/incidents/{id:[0-9]{1,15}}", console.show_incident, AccessRequirement.VIEWER)


class _Console:
    def __init__(self, database: Database, renderer: PageRenderer) -> None:
        self._database, self._renderer = database, renderer

    async def show_index(self, request: web.Request) -> web.Response:
        open_incidents = await read_record(self._database, queries.open_incidents)
        latest = await read_record(self._database, queries.page_of_incidents, None, INCIDENTS_SHOWN)
        switch = await read_record(self._database, read_switch)
        return await self._renderer.respond(
            request,
            "index.html",
            open_incidents=open_incidents,
            closed_incidents=[incident for incident in latest if incident["state"] != "open"],
            is_automatic=switch.enabled and self._database.inventory.remediation.automatic,
            automation=asdict(switch),
            maintenance=await read_record(self._database, maintenance.current),
        )

    async def show_incident(self, request: web.Request) -> web.Response:
        incident = await read_record(self._database, queries.read_incident, int(request.match_info["id"]))
        if incident is None:
            raise ApiError(404, "unknown_incident", "there is no such incident")
        return await self._renderer.respond(request, "incident.html", incident=incident)
