"""The console: pages with the open incidents and the details of one incident. They are read-only."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from remediator.http.views import read_record, remove_private_texts
from remediator.notifications.content import annotations_in_language
from remediator.notifications.rendering import describe_event, format_duration, shipped_templates
from remediator.record import maintenance, queries
from remediator.record.automation import read_switch
from remediator.record.database import Database
from runtime.redaction import Redactor
from runtime.web import AccessRequirement, ApiError, add_route, is_authenticated

INCIDENTS_SHOWN = 50
# The pages load nothing and run no scripts.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def add_routes(app: web.Application, database: Database, redact: Redactor) -> None:
    console = _Console(database, redact)
    add_route(app, "GET", "/", console.show_index, AccessRequirement.READ)
    add_route(app, "GET", "/incidents/{id:[0-9]{1,15}}", console.show_incident, AccessRequirement.READ)


class _Console:
    def __init__(self, database: Database, redact: Redactor) -> None:
        self._database, self._redact = database, redact
        loader = PackageLoader("remediator", "console")
        self._templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)

    async def show_index(self, request: web.Request) -> web.Response:
        open_incidents = await read_record(self._database, queries.open_incidents)
        latest = await read_record(self._database, queries.page_of_incidents, None, INCIDENTS_SHOWN)
        switch = await read_record(self._database, read_switch)
        return await self._respond(
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
        return await self._respond(request, "incident.html", incident=incident)

    async def _respond(self, request: web.Request, template: str, **values: Any) -> web.Response:
        """Return a page, without private texts if the caller is not authenticated."""
        has_access = is_authenticated(request)
        visible = self._redact.redact_all(values if has_access else remove_private_texts(values))
        text = await asyncio.to_thread(self._render, template, {**visible, "has_access": has_access})
        return web.Response(text=text, content_type="text/html", headers=_HEADERS)

    def _render(self, template: str, values: Mapping[str, Any]) -> str:
        inventory, clock = self._database.inventory, self._database.clock
        notify, words = inventory.notify, shipped_templates(inventory).words
        zone = ZoneInfo(notify.timezone)

        def format_time(at: float | None) -> str:
            return "" if at is None else datetime.fromtimestamp(clock.unix(at), zone).strftime("%Y-%m-%d %H:%M:%S")

        def format_age(incident: Mapping[str, Any]) -> str:
            ended = incident["closed_at"] or clock.now()
            return format_duration(words, ended - (incident["down_at"] or incident["opened_at"]))

        def name_service(service: str) -> str:
            return inventory.services[service].title if service in inventory.services else service

        return self._templates.get_template(template).render(
            **values, words=words, language=notify.language, time=format_time, duration=format_age,
            service_name=name_service,
            summary=lambda annotations: annotations_in_language(annotations, notify.language).get("summary", ""),
            describe=lambda row: describe_event(words, row["event"], row["detail"]),
        )  # fmt: skip
