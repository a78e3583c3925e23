"""The page of settings: automation, maintenance, sessions and API tokens."""

from collections.abc import Mapping

from aiohttp import web

from console.buttons import REASON_LIMIT, NotDone, not_done_because
from console.incidents import parse_number
from console.rendering import PageRenderer
from console.requests import SubmittedForms, answer_form
from fleet.inventory.units import parse_duration
from remediator.administration import Administration
from remediator.operations import OperationError, Operations
from remediator.record.database import Database
from remediator.record.maintenance import MaintenanceScope
from remediator.snapshot import SnapshotSource
from runtime.access.browser import read_form
from runtime.access.control import find_session, get_identity
from runtime.access.roles import AccessRequirement, Identity, permits
from runtime.web import add_route

SCOPES: tuple[MaintenanceScope, ...] = ("service", "host", "group")


class SettingsPage:
    def __init__(
        self,
        source: SnapshotSource,
        renderer: PageRenderer,
        operations: Operations,
        administration: Administration,
        database: Database,
    ) -> None:
        self._source, self._renderer, self._operations = source, renderer, operations
        self._administration, self._database = administration, database
        self._submitted = SubmittedForms()

    def add_routes(self, app: web.Application) -> None:
        add_route(app, "GET", "/settings", self.show, AccessRequirement.VIEWER)
        for button in ("begin-maintenance", "end-maintenance"):
            add_route(app, "POST", f"/settings/{button}", self.press, AccessRequirement.OPERATOR)
        for button in ("automation-on", "automation-off", "end-session", "revoke-token"):
            add_route(app, "POST", f"/settings/{button}", self.press, AccessRequirement.ADMIN)

    async def show(self, request: web.Request, not_done: NotDone | None = None) -> web.Response:
        snapshot = await self._source.get()
        inventory, own = self._database.inventory, find_session(request)
        is_admin = permits(get_identity(request).role, AccessRequirement.ADMIN)
        return await self._renderer.respond(
            request, "settings.html", {"not_done": not_done, "form_id": self._submitted.new_id()},
            status=409 if not_done else 200, snapshot=snapshot.describe(),
            is_automatic=inventory.remediation.automatic, scopes=SCOPES, own_session=own.number if own else "",
            sessions=[
                {"number": each.number, "user": each.user, "address": each.address, "browser": each.browser,
                 "created_at": each.created_at, "last_used_at": each.last_used_at}
                for each in self._administration.list_sessions()
            ] if is_admin else [],
            tokens=[
                {"name": each.name, "role": each.role, "created_at": each.created_at, "created_by": each.created_by,
                 "expires_at": each.expires_at, "last_used_at": each.last_used_at}
                for each in await self._administration.list_tokens()
            ] if is_admin else [],
            channels=[{"name": name, "kind": each.kind} for name, each in inventory.notify.channels.items()],
        )  # fmt: skip

    async def press(self, request: web.Request) -> web.Response:
        form, button = await read_form(request), request.path.rpartition("/")[2]
        not_done = await self._submitted.run_once(request, form, lambda: self._do(button, form, get_identity(request)))
        await self._source.refresh()
        return await answer_form(request, not_done, self.show, "settings")

    async def _do(self, button: str, form: Mapping[str, str], by: Identity) -> NotDone | None:
        reason, name = form.get("reason", "").strip()[:REASON_LIMIT], form.get("name", "")[:200]
        if button in ("automation-off", "begin-maintenance") and not reason:
            return NotDone(button, key="reason_missing")
        try:
            if button.startswith("automation-"):
                await self._operations.switch_automation(enabled=button == "automation-on", by=by, reason=reason)
            elif button == "begin-maintenance":
                scope = next((each for each in SCOPES if each == form.get("scope")), SCOPES[0])
                seconds = parse_duration(form.get("for", ""))
                await self._operations.begin_maintenance(
                    scope, name, seconds=seconds, reason=reason, by=by, notify=False
                )
            elif button == "end-maintenance":
                await self._operations.end_maintenance(parse_number(name), by)
            elif button == "end-session":
                await self._administration.end_session(name, by)
            else:
                await self._administration.revoke_token(name, by)
        except (OperationError, ValueError) as error:
            return not_done_because(button, error)
        return None
