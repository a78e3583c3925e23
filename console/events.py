"""The page of events: everything that happened, newest first."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from urllib.parse import urlencode

from aiohttp import web

from console.rendering import PageRenderer
from fleet.inventory.model import Remediable
from remediator.http.events_api import parse_events_query
from remediator.http.views import read_record
from remediator.record.database import Database
from remediator.record.event_pages import page_of_events
from remediator.record.event_sources import KINDS
from remediator.snapshot import SnapshotSource
from runtime.access.roles import AccessRequirement
from runtime.web import add_route

MOST = 200  # events on a page, whatever its address asks for
SUGGESTED = 500  # services and hosts, while somebody types
_FILTERS = ("kind", "host", "service", "text", "from", "to")


def add_routes(app: web.Application, source: SnapshotSource, renderer: PageRenderer, database: Database) -> None:
    async def show(request: web.Request) -> web.Response:
        query = parse_events_query(request, database.clock)
        wanted, inventory = query.wanted, database.inventory
        subjects: Mapping[str, Remediable] = {**inventory.services, **inventory.host_alerts}
        names = {name: each.title for name, each in subjects.items()}
        service, host = _find(wanted.service, names), _find(wanted.host, dict.fromkeys(inventory.hosts, ""))
        wanted = replace(wanted, service=service, host=host)
        page = await read_record(database, page_of_events, wanted, query.before, min(query.limit, MOST))
        snapshot = await source.get()
        chosen = {name: request.query.get(name, "") for name in _FILTERS}
        kept = {name: value for name, value in chosen.items() if value}
        older = urlencode({**kept, "before": page.next.format()}) if page.next is not None else ""
        return await renderer.respond(
            request, "events.html", {"chosen": chosen}, snapshot=snapshot.describe(),
            kinds=[kind for kind in KINDS if wanted.with_audit or kind not in ("operation", "sign-in")],
            services=dict(islice(names.items(), SUGGESTED)), hosts=list(inventory.hosts)[:SUGGESTED],
            events=page.rows, older=older,
            export=urlencode(kept),
        )  # fmt: skip

    add_route(app, "GET", "/events", show, AccessRequirement.VIEWER)


def _find(text: str, names: Mapping[str, str]) -> str:
    """Return what a reader means by a part of an id or a name, if that is only one; else the text as it is."""
    if text in names or not text:
        return text
    exact = [name for name, title in names.items() if title.lower() == text.lower()]
    part = [name for name, title in names.items() if text.lower() in f"{name} {title}".lower()]
    return exact[0] if len(exact) == 1 else part[0] if len(part) == 1 else text
