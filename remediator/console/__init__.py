"""The console: open incidents and what is on record of one, as pages to read. Nothing on them acts."""

import asyncio
from dataclasses import asdict
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from remediator.http.views import without_private_texts
from remediator.notifications import rendering
from remediator.notifications.reader import in_language
from remediator.record import maintenance, queries
from remediator.record.automation import read_switch
from remediator.record.database import Database
from runtime.redaction import Redactor
from runtime.web import ApiError, Requirement, add_route, is_authenticated

SHOWN = 50
# Nothing is loaded from anywhere, and nothing runs.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def add_routes(app: web.Application, database: Database, redact: Redactor) -> None:
    console = _Console(database, redact)
    add_route(app, "GET", "/", console.index, Requirement.READ)
    add_route(app, "GET", "/incidents/{id:[0-9]{1,15}}", console.incident, Requirement.READ)


class _Console:
    def __init__(self, database: Database, redact: Redactor) -> None:
        self._database, self._redact = database, redact
        loader = PackageLoader("remediator", "console")
        self._templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)

    async def index(self, request: web.Request) -> web.Response:
        rows = await self._database.read(queries.open_incidents)
        latest = await self._database.read(queries.page_of_incidents, None, SHOWN)
        switch = await self._database.read(read_switch)
        held = await self._database.read(maintenance.current)
        automatic = switch.enabled and self._database.inventory.remediation.automatic
        closed = [each for each in latest if each["state"] != "open"]
        return await self._page(
            request,
            "index.html",
            open=rows,
            closed=closed,
            automatic=automatic,
            automation=asdict(switch),
            held=held,
        )

    async def incident(self, request: web.Request) -> web.Response:
        whole = await self._database.read(queries.read_incident, int(request.match_info["id"]))
        if whole is None:
            raise ApiError(404, "unknown_incident", "there is no such incident")
        return await self._page(request, "incident.html", incident=whole)

    async def _page(self, request: web.Request, name: str, **shown: Any) -> web.Response:
        whole = is_authenticated(request)
        found = self._redact.redact_all(shown if whole else without_private_texts(shown))
        text = await asyncio.to_thread(self._rendered, name, {**found, "whole": whole})
        return web.Response(text=text, content_type="text/html", headers=_HEADERS)

    def _rendered(self, name: str, shown: dict[str, Any]) -> str:
        inventory, clock = self._database.inventory, self._database.clock
        zone, words = ZoneInfo(inventory.notify.timezone), rendering.ours(inventory).words

        def time(at: float | None) -> str:
            return "" if at is None else datetime.fromtimestamp(clock.unix(at), zone).strftime("%Y-%m-%d %H:%M:%S")

        return self._templates.get_template(name).render(
            **shown, time=time, words=words, language=inventory.notify.language, services=inventory.services,
            said=lambda annotations: in_language(annotations, inventory.notify.language),
            lasted=lambda row: rendering.duration(
                words, (row["closed_at"] or clock.now()) - (row["down_at"] or row["opened_at"])
            ),
        )  # fmt: skip
