"""The page of settings: automation, maintenance, channels, the health of all parts, sessions and API tokens."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from aiohttp import web

from console.buttons import REASON_LIMIT, NotDone, not_done_because
from console.forms import parse_number, parse_seconds
from console.history import History
from console.pipeline import read_deliveries, read_pipeline
from console.rendering import PageRenderer
from console.requests import SubmittedForms, answer_form
from remediator.administration import Administration, CreatedToken
from remediator.operations import OperationError, Operations
from remediator.record.database import Database
from remediator.record.maintenance import MaintenanceScope
from remediator.snapshot import SnapshotSource
from runtime import VERSION
from runtime.access.browser import read_form
from runtime.access.control import find_session, get_identity
from runtime.access.roles import AccessRequirement, Identity, UserRole, permits
from runtime.shared_reads import SharedReads
from runtime.web import add_route

SCOPES: tuple[MaintenanceScope, ...] = ("service", "host", "group")
USER_ROLES: tuple[UserRole, ...] = get_args(UserRole)
PATIENCE = 10.0  # seconds for the health of all parts, each of which has a deadline of its own
NEEDS_REASON = ("automation-off", "begin-maintenance")


@dataclass(frozen=True)
class TestedChannel:
    """The answer of a channel to a test message."""

    name: str
    sent: bool
    answer: str


Outcome = NotDone | CreatedToken | TestedChannel


class SettingsPage:
    def __init__(
        self,
        source: SnapshotSource,
        history: History,
        renderer: PageRenderer,
        operations: Operations,
        administration: Administration,
        database: Database,
    ) -> None:
        self._source, self._history, self._renderer, self._operations = source, history, renderer, operations
        self._administration, self._database = administration, database
        self._submitted = SubmittedForms()
        self._health = SharedReads(running=1, waiting=0, shared_for=1.0)

    def add_routes(self, app: web.Application) -> None:
        add_route(app, "GET", "/settings", self.show, AccessRequirement.VIEWER)
        for button in ("begin-maintenance", "end-maintenance", "test-channel"):
            add_route(app, "POST", f"/settings/{button}", self.press, AccessRequirement.OPERATOR)
        for button in ("automation-on", "automation-off", "end-session", "create-token", "revoke-token"):
            add_route(app, "POST", f"/settings/{button}", self.press, AccessRequirement.ADMIN)

    async def show(self, request: web.Request, outcome: Outcome | None = None) -> web.Response:
        """Return the page, with what came of a form: why it was not done, or what was created or tested."""
        snapshot = await self._source.get()
        inventory, clock, own = self._database.inventory, self._database.clock, find_session(request)
        is_admin = permits(get_identity(request).role, AccessRequirement.ADMIN)
        pipeline, last, (tokens, token_problem) = await asyncio.gather(
            self._health.read("", lambda: read_pipeline(self._source, self._history, self._database), PATIENCE),
            read_deliveries(self._database),
            self._list_tokens(is_admin=is_admin),
        )
        not_done = outcome if isinstance(outcome, NotDone) else None
        created = outcome if isinstance(outcome, CreatedToken) else None
        tested = asdict(outcome) if isinstance(outcome, TestedChannel) else None
        return await self._renderer.respond(
            request, "settings.html",
            {"not_done": not_done, "form_id": self._submitted.new_id(), "created": created},
            status=409 if not_done else 200, snapshot=snapshot.describe(), version=VERSION,
            tested=tested, pipeline=list(map(asdict, pipeline)),
            is_automatic=inventory.remediation.automatic, scopes=SCOPES, own_session=own.number if own else "",
            sessions=[
                {"number": each.number, "user": each.user, "address": each.address, "browser": each.browser,
                 "created_at": each.created_at, "last_used_at": each.last_used_at}
                for each in self._administration.list_sessions()
            ] if is_admin else [],
            tokens=tokens, token_problem=token_problem, roles=USER_ROLES,
            channels=[
                {"name": name, "kind": each.kind, "last": dict(last.get(name, {}))}
                for name, each in inventory.notify.channels.items()
            ],
            on_call=[
                {"calendar": name, "name": inventory.notify.name_of(each.person), "until": each.until}
                for name, each in inventory.notify.find_shifts(clock.unix(clock.now())).items()
            ],
        )  # fmt: skip

    async def _list_tokens(self, *, is_admin: bool) -> tuple[list[dict[str, Any]], str]:
        """Return the API tokens, or why they cannot be read."""
        if not is_admin:
            return [], ""
        try:
            tokens = await self._administration.list_tokens()
        except OperationError as error:
            return [], str(error)
        shown = ("name", "role", "created_at", "created_by", "expires_at", "last_used_at")
        return [{name: getattr(each, name) for name in shown} for each in tokens], ""

    async def press(self, request: web.Request) -> web.Response:
        form, button = await read_form(request), request.path.rpartition("/")[2]
        outcome: Outcome | None = await self._submitted.run_once(
            request, form, lambda: self._do(button, form, get_identity(request))
        )
        await self._source.refresh()
        return await answer_form(request, outcome, self.show, "settings")

    async def _do(self, button: str, form: Mapping[str, str], by: Identity) -> Outcome | None:
        if button in NEEDS_REASON and not form.get("reason", "").strip():
            return NotDone(button, key="reason_missing")
        try:
            return await self._change(button, form, by)
        except (OperationError, ValueError) as error:
            return not_done_because(button, error, form)

    async def _change(self, button: str, form: Mapping[str, str], by: Identity) -> CreatedToken | TestedChannel | None:
        """Do what a button says. Raises OperationError and ValueError."""
        operations, administration = self._operations, self._administration
        reason, name = form.get("reason", "").strip()[:REASON_LIMIT], form.get("name", "")[:200]
        if button.startswith("automation-"):
            await operations.switch_automation(enabled=button == "automation-on", by=by, reason=reason)
        elif button == "begin-maintenance":
            scope = next((each for each in SCOPES if each == form.get("scope")), SCOPES[0])
            seconds = parse_seconds(form.get("for", ""))
            await operations.begin_maintenance(
                scope, name, seconds=seconds, reason=reason, by=by, pause_probing="pause_probing" in form
            )
        elif button == "end-maintenance":
            await operations.end_maintenance(parse_number(name), by)
        elif button == "test-channel":
            result = await operations.test_channel(name, by)
            return TestedChannel(name, result.outcome == "sent", result.response)
        elif button == "end-session":
            await administration.end_session(name, by)
        elif button == "create-token":
            role = next((each for each in USER_ROLES if each == form.get("role")), USER_ROLES[0])
            lifetime = form.get("for", "").strip()
            expires_in = parse_seconds(lifetime) if lifetime else None
            return await administration.create_token(name, role, expires_in, by)
        else:
            await administration.revoke_token(name, by)
        return None
