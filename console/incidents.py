"""The pages of incidents: those that are open and those that ended recently, and one incident with its buttons."""

from collections.abc import Mapping
from urllib.parse import urlencode

from aiohttp import web

from console.buttons import REASON_LIMIT, NotDone, not_done_because, parse_gates
from console.forms import parse_number, parse_seconds
from console.rendering import PageRenderer
from console.requests import SubmittedForms, answer_form
from fleet.inventory.model import Inventory, Remediable
from remediator.http.views import read_record
from remediator.operations import OperationError, Operations
from remediator.record import queries
from remediator.record.database import Database
from remediator.snapshot import SnapshotSource
from runtime.access.browser import read_form
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement, Identity
from runtime.errors import ApiError
from runtime.web import add_route

OPEN_SHOWN, PAGE_SIZE = 500, 50
BUTTONS = ("restart", "acknowledge", "approve", "note", "silence")
TEXT_LIMIT = 100  # characters of a search
NOTE_LIMIT = 1000  # characters


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
        add_route(app, "POST", f"{incident}/{{button:{'|'.join(BUTTONS)}}}", self.press, AccessRequirement.OPERATOR)

    async def show_list(self, request: web.Request) -> web.Response:
        snapshot = await self._source.get()
        text = request.query.get("q", "")[:TEXT_LIMIT].strip()
        before = parse_number(request.query.get("before", "")) or None
        found, is_first = find_services(self._database.inventory, text), before is None
        opened = await read_record(self._database, queries.find_incidents, "open", found, None, OPEN_SHOWN)
        closed = await read_record(self._database, queries.find_incidents, "closed", found, before, PAGE_SIZE)
        return await self._renderer.respond(
            request, "incidents.html", {"text": text}, snapshot=snapshot.describe(), closed_incidents=closed,
            open_incidents=opened if is_first else [], is_first=is_first,
            older=urlencode({"q": text, "before": closed[-1]["id"]}) if len(closed) == PAGE_SIZE else "",
        )  # fmt: skip

    async def show_incident(self, request: web.Request, not_done: NotDone | None = None) -> web.Response:
        incident = await read_record(self._database, queries.read_incident, int(request.match_info["id"]))
        if incident is None:
            raise ApiError(404, "unknown_incident", "there is no such incident")
        snapshot, inventory = await self._source.get(), self._database.inventory
        service, row = inventory.find_subject(incident["service"]), snapshot.rows.get(incident["service"])
        return await self._renderer.respond(
            request, "incident.html", {"not_done": not_done, "form_id": self._submitted.new_id()},
            status=409 if not_done else 200, snapshot=snapshot.describe(), incident=incident,
            host=service.host if service is not None else "", can_restart=row is not None and "restart" in row.verbs,
            can_silence=inventory.remediator.alertmanager_url is not None,
        )  # fmt: skip

    async def press(self, request: web.Request) -> web.Response:
        """Do what a button says, once for each form, and show the incident again."""
        form, button, number = await read_form(request), request.match_info["button"], request.match_info["id"]
        by = get_identity(request)
        not_done = await self._submitted.run_once(request, form, lambda: self._press(button, int(number), form, by))
        await self._source.refresh()
        return await answer_form(request, not_done, self.show_incident, f"incidents/{number}")

    async def _press(self, button: str, incident: int, form: Mapping[str, str], by: Identity) -> NotDone | None:
        if button == "note" and not form.get("text", "").strip():
            return NotDone(button, key="note_missing")
        try:
            await self._do(button, incident, form, by)
        except (OperationError, ValueError) as error:
            return not_done_because(button, error, form)
        return None

    async def _do(self, button: str, incident: int, form: Mapping[str, str], by: Identity) -> None:
        """Do what a button says. Raises OperationError and ValueError."""
        operations = self._operations
        if button == "acknowledge":
            await operations.acknowledge("incident", incident, by)
        elif button == "note":
            await operations.add_note(incident, form.get("text", "").strip()[:NOTE_LIMIT], by)
        elif button == "silence":
            seconds = parse_seconds(form.get("for", ""))
            await operations.silence("incident", incident, seconds, by, form.get("reason", "")[:REASON_LIMIT])
        elif button == "approve":
            await operations.approve(parse_number(form.get("action", "")), by)
        elif (row := await read_record(self._database, queries.read_incident, incident)) is not None:
            await operations.start_action(row["service"], "restart", parse_gates(form), by)


def find_services(inventory: Inventory, text: str) -> list[str] | None:
    """Return the services, and alerts of hosts, whose id, name or host contains a text; None without a text."""
    if not text:
        return None
    words = text.lower().split()
    subjects: Mapping[str, Remediable] = {**inventory.services, **inventory.host_alerts}
    return [
        name for name, each in subjects.items()
        if all(word in f"{name} {each.title} {each.host}".lower() for word in words)
    ]  # fmt: skip
