"""The page for a display on a wall: what is broken, readable from afar."""

from dataclasses import asdict

from aiohttp import web

from console.rendering import PageRenderer
from remediator.filters import ServiceFilter
from remediator.policy.service_states import STATES
from remediator.snapshot import SnapshotSource
from runtime.access.roles import AccessRequirement
from runtime.web import add_route

SHOWN = 40


def add_routes(app: web.Application, source: SnapshotSource, renderer: PageRenderer) -> None:
    async def show(request: web.Request) -> web.Response:
        snapshot = await source.get()
        broken = ServiceFilter(states=tuple(state for state in STATES if state != "up")).select(snapshot.rows.values())
        return await renderer.respond(
            request, "wall.html", snapshot=snapshot.describe(), counts=dict(snapshot.counts), states=STATES,
            rows=[asdict(row) for row in broken[:SHOWN]], more=len(broken) - SHOWN, total=len(snapshot.rows),
            open_incidents=len(snapshot.overview.incidents),
        )  # fmt: skip

    add_route(app, "GET", "/wall", show, AccessRequirement.VIEWER)
