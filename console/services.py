"""The pages of services: the list, one service, its logs, and the buttons that act on it."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from aiohttp import web
from markupsafe import Markup

from console.buttons import BUTTONS, NotDone, ServiceButtons, component_path
from console.history import SPANS, History
from console.rendering import PageRenderer, Reader
from console.requests import SubmittedForms, answer_form
from console.things import find_thing
from fleet.inventory.model import Service
from fleet.inventory.units import format_duration
from fleet.json_client import ClientError, parsing_response
from fleet.shells import OUTPUT_LIMIT, CompletedCommand
from remediator.clients.exporter_services import check_results
from remediator.filters import GROUPS, ORDERS, PAGE_SIZE, ServiceFilter, values_of
from remediator.http.views import read_record
from remediator.notifications.links import build_page_links
from remediator.operations import NotFoundError, OperationError, Operations
from remediator.policy.service_states import STATES, ServiceState
from remediator.record import queries
from remediator.record.database import Database
from remediator.record.transaction import Transaction
from remediator.snapshot import DEADLINE, ServiceRow, SnapshotSource, parse_time
from runtime.access.browser import read_form
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement, Identity
from runtime.errors import ApiError
from runtime.shared_reads import SharedReads
from runtime.web import add_route

INCIDENTS_SHOWN = 10
FEW_COMPONENTS = 20  # of more, those that are up are folded away
LOG_TIMEOUT = 60.0  # seconds
LOG_LIMIT = 2 * 1024 * 1024  # characters of a log that a page shows; the rest is downloaded
VIEWER, OPERATOR = AccessRequirement.VIEWER, AccessRequirement.OPERATOR


class ServicePages:
    def __init__(
        self,
        source: SnapshotSource,
        history: History,
        renderer: PageRenderer,
        operations: Operations,
        database: Database,
    ) -> None:
        self._source, self._history, self._renderer = source, history, renderer
        self._operations, self._database = operations, database
        self._buttons, self._submitted = ServiceButtons(operations, database), SubmittedForms()
        self._logs = SharedReads(running=4, waiting=40)

    def add_routes(self, app: web.Application) -> None:
        service = "/services/{id}"
        for method, path, handler, needs in (
            ("GET", "/", self.show_list, VIEWER),
            ("GET", service, self.show_service, VIEWER),
            ("GET", f"{service}/checks", self.show_checks, VIEWER),
            ("GET", f"{service}/logs", self.show_logs, OPERATOR),
            ("POST", f"{service}/{{button:{'|'.join(BUTTONS)}}}", self.press, OPERATOR),
            ("POST", f"{service}/components/{{component:[^/]+}}/restart", self.press, OPERATOR),
        ):
            add_route(app, method, path, handler, needs)

    async def show_list(self, request: web.Request) -> web.Response:
        snapshot = await self._source.get()
        chosen = ServiceFilter.parse(request.query)
        reader = self._renderer.find_reader(request)
        rows = chosen.select(snapshot.rows.values())
        shown = chosen.page_of(rows)
        groups = await self._renderer.run(self._render_groups, chosen, shown, reader)
        every = list(snapshot.rows.values())
        return await self._renderer.respond(
            request, "services.html", {"chosen": chosen, "groups": groups}, counts=dict(snapshot.counts),
            snapshot=snapshot.describe(), states=STATES, orders=list(ORDERS), groupings=list(GROUPS), total=len(rows),
            values={name: values_of(every, name) for name in ("provider", "category", "host", "group")},
            open_incidents=len(snapshot.overview.incidents), first=(chosen.page - 1) * PAGE_SIZE + 1,
            now=self._renderer.unix_now(), page_count=max(1, -(-len(rows) // PAGE_SIZE)),
        )  # fmt: skip

    def _render_groups(
        self, chosen: ServiceFilter, rows: Sequence[ServiceRow], reader: Reader
    ) -> list[tuple[str, int, Markup]]:
        """Return each group's name, number of services, and rendered rows."""
        render, history = self._renderer.render_row, self._history
        return [
            (name, len(group), Markup("").join(render(row, reader, history) for row in group))
            for name, group in chosen.grouped(rows)
        ]

    async def show_service(self, request: web.Request, not_done: NotDone | None = None) -> web.Response:
        service = self._find_service(request)
        snapshot = await self._source.get()
        row = snapshot.rows.get(service.id)
        if row is None:
            raise ApiError(404, "unknown_service", f"the inventory has no service {service.id!r}")
        span = request.query.get("span", "24h")
        observed, explanation, charts, (incidents, last_action) = await asyncio.gather(
            self._read_observed(service.id),
            self._explain(service.id),
            self._history.read_service(service.id, SPANS.get(span, SPANS["24h"])),
            self._read_record(service.id),
        )
        components = _list_components(service, observed)
        inventory = self._database.inventory
        rows = snapshot.rows
        dependents = [each.id for each in inventory.services.values() if service.id in each.depends_on]
        return await self._renderer.respond(
            request, "service.html", {"not_done": not_done, "form_id": self._submitted.new_id()},
            status=409 if not_done else 200, row=asdict(row), snapshot=snapshot.describe(), observed=observed,
            components=components, few_components=FEW_COMPONENTS,
            component_values=list(dict.fromkeys(name for each in components for name in each["values"])),
            explanation=explanation, charts=charts, spans=list(SPANS), span=span,
            incidents=incidents, last_action=last_action, service=self._describe(service),
            depends_on=list(service.depends_on), dependents=dependents,
            states={each: rows[each].state for each in (*service.depends_on, *dependents) if each in rows},
            can_silence=inventory.remediator.alertmanager_url is not None, links=build_page_links(inventory, service),
        )  # fmt: skip

    def _describe(self, service: Service) -> Mapping[str, Any]:
        return _describe(service, self._database.inventory.notify.timezone)

    async def show_checks(self, request: web.Request) -> web.Response:
        """Return the last checks, each of which a script shows at its bar of a strip."""
        observed = await self._read_observed(self._find_service(request).id)
        return await self._renderer.respond(request, "checks.html", checks=observed["checks"])

    async def show_logs(self, request: web.Request) -> web.Response:
        service = self._find_service(request)
        problem, output, is_cut = "", "", False
        try:
            completed = await self._read_logs(service.id, get_identity(request))
            output, is_cut = completed.output, len(completed.stdout.encode()) >= OUTPUT_LIMIT
            problem = "" if completed.status == 0 else f"{completed.why or completed.status}"
        except (OperationError, TimeoutError) as error:
            problem = str(error) or "no answer in time"
        if "download" in request.query and not problem:
            return self._renderer.respond_text(output, f"{service.id}.log")
        return await self._renderer.respond(
            request, "logs.html", service=self._describe(service), output=output[-LOG_LIMIT:], log_problem=problem,
            was_cut=len(output) > LOG_LIMIT or is_cut,
        )  # fmt: skip

    async def _read_logs(self, service: str, by: Identity) -> CompletedCommand:
        """Return the output of the control's `logs`; requests of a person at the same time share it."""
        return await self._logs.read(
            (service, by.label), lambda: self._operations.read_from_host(service, "logs", by), LOG_TIMEOUT
        )

    async def press(self, request: web.Request) -> web.Response:
        """Do what a button says, once for each form, and show the service again."""
        service, form, identity = self._find_service(request), await read_form(request), get_identity(request)
        button, component = request.match_info.get("button", "restart"), request.match_info.get("component", "")
        not_done = await self._submitted.run_once(
            request, form, lambda: self._buttons.press(button, service, form, identity, component)
        )
        await self._source.refresh()
        return await answer_form(request, not_done, self.show_service, f"services/{service.id}")

    async def _read_observed(self, service: str) -> Mapping[str, Any]:
        """Return what the exporter knows of the service, or why that cannot be read."""
        try:
            seen = await self._source.read_from_exporter(f"/api/v1/services/{service}")
            with parsing_response():
                results = check_results(seen["results"])
                return {
                    "failures": _collapse(check_results(seen["failures"])),
                    "checks": [{**each, "at": parse_time(each["started_at"])} for each in reversed(results)],
                    "components": [{"up": each["up"], "name": each["name"], "values": dict(each["values"])}
                                   for each in seen.get("components", [])],
                    "certificate": _describe_certificate(seen.get("certificate")),
                }  # fmt: skip
        except ClientError as error:
            return {"problem": str(error), "failures": [], "checks": [], "components": [], "certificate": None}

    async def _read_record(self, service: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Return the service's incidents and its last action; none if the record cannot be read, as a notice says."""
        try:
            return await read_record(self._database, _read_history, service)
        except ApiError:
            return [], None

    async def _explain(self, service: str) -> Mapping[str, Any]:
        """Return the gates of the service, or why they cannot be read."""
        try:
            async with asyncio.timeout(DEADLINE):
                return await self._operations.explain(service)
        except (OperationError, TimeoutError) as error:
            return {"problem": str(error) or "no answer in time"}

    def _find_service(self, request: web.Request) -> Service:
        try:
            return self._operations.get_service(request.match_info["id"])
        except NotFoundError as error:
            raise ApiError(404, error.code, str(error)) from error


def _describe_certificate(seen: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a certificate's issuer, when it ends in Unix time, and the seconds until then."""
    if seen is None:
        return None
    ends = parse_time(seen["not_after"]) or 0.0
    return {"issuer": seen["issuer"], "ends": ends, "left": ends - time.time()}


def _collapse(failures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return failures, the newest first; those that follow each other and look the same are one, with their number."""
    found: list[dict[str, Any]] = []
    for each in reversed(failures):
        at, last = parse_time(each["started_at"]), found[-1] if found else {}
        if (last.get("reason"), last.get("failure")) == (each["reason"], each["message"]):
            last |= {"first_at": at, "times": last["times"] + 1}
        else:
            found.append({**each, "at": at, "first_at": at, "failure": each["message"], "times": 1})
    return found


def _read_history(tx: Transaction, service: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the last incidents of a service, and its last action."""
    return queries.incidents_of_service(tx, service, INCIDENTS_SHOWN), queries.last_action_of(tx, service)


def _list_components(service: Service, observed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the components that were seen, and those that may be restarted and were not; the broken ones first."""
    seen = {each["name"]: each for each in observed["components"]}
    listed = dict.fromkeys(service.restartable_components)
    rows = [
        {
            "name": name, "state": _state_of_component(seen.get(name)), "values": seen.get(name, {}).get("values", {}),
            "restart": f"services/{service.id}/{component_path(name)}" if name in listed else "",
        }
        for name in seen | listed
    ]  # fmt: skip
    return sorted(rows, key=lambda row: STATES.index(row["state"]))


def _state_of_component(seen: Mapping[str, Any] | None) -> ServiceState:
    if seen is None:
        return "unknown"
    return "up" if seen["up"] else "down"


def _describe(service: Service, timezone: str) -> Mapping[str, Any]:
    """Return the settings of a service that its page shows, without secrets."""
    control = service.control
    return {
        "id": service.id, "title": service.title, "host": service.host, "on_failure": service.on_failure,
        "team": service.team, "target": service.target,
        "is_reported": service.probe.is_reported,
        "schedule": _describe_schedule(service.probe.options, timezone) if service.probe.is_reported else None,
        "kind": service.probe.kind, "every": service.probe.every, "timeout": service.probe.timeout,
        "fail_after": service.probe.fail_after, "recover_after": service.probe.recover_after,
        "control": control.kind if control is not None else "", "thing": find_thing(service),
        "verbs": list(control.options.verbs) if control is not None else [],
    }  # fmt: skip


def _describe_schedule(options: Any, timezone: str) -> Mapping[str, Any]:
    """Return when pings of a heartbeat are due; `timezone` applies where its options have none."""
    return {
        "every": None if options.every is None else format_duration(options.every),
        "cron": options.cron,
        "timezone": options.timezone or timezone,
        "grace": format_duration(options.grace),
    }
