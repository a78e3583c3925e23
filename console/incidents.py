"""The pages of incidents: those that are open and those that ended recently, and one incident with its buttons."""

from aiohttp import web

from console.buttons import NotDone, not_done_because
from console.rendering import PageRenderer
from console.requests import SubmittedForms, answer_form
from console.snapshot import SnapshotSource
from remediator.http.views import read_record
from remediator.operations import OperationError, Operations
from remediator.record import queries
from remediator.record.database import Database
from runtime.access.browser import read_form
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement, Identity
from runtime.errors import ApiError
from runtime.web import add_route

INCIDENTS_SHOWN = 50


class IncidentPages:
    def __init__(
        self, source: SnapshotSource, renderer: PageRenderer, operations: Operations, database: Database
    ) -> None:
        self._source, self._renderer, self._operations, self._database = source, renderer, operations, database
        self._submitted = SubmittedForms()

    def add_routes(self, app: web.Application) -> None:
        incident = "/incidents/{id:[0-9]{1,15}}"
        add_route(app, "GET", "/incidents", self.show_list, AccessRequirement.VIEWER)
        add_route(app, "GET", incident, self.show_incident, AccessRequirement.VIEWER)
        for button in ("acknowledge", "approve"):
            add_route(app, "POST", f"{incident}/{button}", self.press, AccessRequirement.OPERATOR)

    async def show_list(self, request: web.Request) -> web.Response:
        snapshot = await self._source.get()
        open_incidents = await read_record(self._database, queries.open_incidents)
        latest = await read_record(self._database, queries.page_of_incidents, None, INCIDENTS_SHOWN)
        return await self._renderer.respond(
            request,
            "incidents.html",
            snapshot=snapshot.describe(),
            open_incidents=open_incidents,
            closed_incidents=[incident for incident in latest if incident["state"] != "open"],
        )

    async def show_incident(self, request: web.Request, not_done: NotDone | None = None) -> web.Response:
        incident = await read_record(self._database, queries.read_incident, int(request.match_info["id"]))
        if incident is None:
            raise ApiError(404, "unknown_incident", "there is no such incident")
        snapshot = await self._source.get()
        return await self._renderer.respond(
            request,
            "incident.html",
            {"not_done": not_done, "form_id": self._submitted.new_id()},
            status=409 if not_done else 200,
            snapshot=snapshot.describe(),
            incident=incident,
        )

    async def press(self, request: web.Request) -> web.Response:
        """Do what a button says, once for each form, and show the incident again."""
        form, button, number = await read_form(request), request.path.rpartition("/")[2], request.match_info["id"]
        by, action = get_identity(request), form.get("action", "")
        not_done = await self._submitted.run_once(request, form, lambda: self._do(button, int(number), action, by))
        return await answer_form(request, not_done, self.show_incident, f"incidents/{number}")

    async def _do(self, button: str, incident: int, action: str, by: Identity) -> NotDone | None:
        try:
            if button == "acknowledge":
                await self._operations.acknowledge("incident", incident, by)
            elif action.isascii() and action.isdigit():
                await self._operations.approve(int(action[:15]), by)
        except OperationError as error:
            return not_done_because(button, error)
        return None
