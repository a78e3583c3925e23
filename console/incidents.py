"""The pages of incidents: those that are open and those that ended recently, and one incident."""

from aiohttp import web

from console.rendering import PageRenderer
from remediator.http.views import read_record
from remediator.record import queries
from remediator.record.database import Database
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.web import add_route

INCIDENTS_SHOWN = 50


def add_routes(app: web.Application, database: Database, renderer: PageRenderer) -> None:
    pages = _IncidentPages(database, renderer)
    add_route(app, "GET", "/incidents", pages.show_list, AccessRequirement.VIEWER)
    add_route(app, "GET", "/incidents/{id:[0-9]{1,15}}", pages.show_incident, AccessRequirement.VIEWER)


class _IncidentPages:
    def __init__(self, database: Database, renderer: PageRenderer) -> None:
        self._database, self._renderer = database, renderer

    async def show_list(self, request: web.Request) -> web.Response:
        open_incidents = await read_record(self._database, queries.open_incidents)
        latest = await read_record(self._database, queries.page_of_incidents, None, INCIDENTS_SHOWN)
        return await self._renderer.respond(
            request,
            "incidents.html",
            open_incidents=open_incidents,
            closed_incidents=[incident for incident in latest if incident["state"] != "open"],
        )

    async def show_incident(self, request: web.Request) -> web.Response:
        incident = await read_record(self._database, queries.read_incident, int(request.match_info["id"]))
        if incident is None:
            raise ApiError(404, "unknown_incident", "there is no such incident")
        return await self._renderer.respond(request, "incident.html", incident=incident)
