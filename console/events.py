"""The page of events: everything that happened, newest first."""

from urllib.parse import urlencode

from aiohttp import web

from console.rendering import PageRenderer
from remediator.http.events_api import parse_events_query
from remediator.http.views import read_record
from remediator.record.database import Database
from remediator.record.event_pages import page_of_events
from remediator.record.event_sources import KINDS
from remediator.snapshot import SnapshotSource
from runtime.access.roles import AccessRequirement
from runtime.web import add_route

_FILTERS = ("kind", "host", "service", "text", "from", "to")


def add_routes(app: web.Application, source: SnapshotSource, renderer: PageRenderer, database: Database) -> None:
    async def show(request: web.Request) -> web.Response:
        query = parse_events_query(request, database.clock)
        page = await read_record(database, page_of_events, query.wanted, query.before, query.limit)
        snapshot = await source.get()
        chosen = {name: request.query.get(name, "") for name in _FILTERS}
        kept = {name: value for name, value in chosen.items() if value}
        older = urlencode({**kept, "before": page.next.format()}) if page.next is not None else ""
        return await renderer.respond(
            request, "events.html", {"chosen": chosen}, snapshot=snapshot.describe(), kinds=KINDS,
            events=page.rows, older=older, export=urlencode(kept),
        )  # fmt: skip

    add_route(app, "GET", "/events", show, AccessRequirement.VIEWER)
