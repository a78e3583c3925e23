"""The console: web pages that show the fleet, its incidents and what Defib did, with buttons for operators."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from console import events, preferences, static, wall
from console.errors import add_error_page
from console.gateway import GatewayPage
from console.heartbeats import HeartbeatPages
from console.history import History
from console.hosts import HostPages
from console.incidents import IncidentPages
from console.rendering import PageRenderer
from console.services import ServicePages
from console.settings import SettingsPage
from console.sign_in import SignInPages
from console.stream import Stream
from remediator.app import Parts


def add_pages(app: web.Application, parts: Parts) -> Callable[[], Awaitable[None]]:
    """Add all pages to the remediator's application; returns its task, which runs until it is cancelled."""
    renderer = PageRenderer(parts.database, parts.redact)
    history = History(lambda: parts.database.inventory.remediator.prometheus_url)
    source = parts.snapshot

    async def close(_app: web.Application) -> None:
        await history.close()

    app.on_cleanup.append(close)
    add_error_page(app, renderer)
    static.add_routes(app)
    preferences.add_routes(app)
    SignInPages(parts.access, parts.sign_in_services, parts.public_url, renderer).add_routes(app)
    ServicePages(source, history, renderer, parts.operations, parts.database).add_routes(app)
    IncidentPages(source, renderer, parts.operations, parts.database).add_routes(app)
    HostPages(source, history, renderer, parts.database).add_routes(app)
    HeartbeatPages(source, renderer, parts.database).add_routes(app)
    GatewayPage(source, history, renderer, parts.gateway).add_routes(app)
    wall.add_routes(app, source, renderer)
    events.add_routes(app, source, renderer, parts.database)
    SettingsPage(source, history, renderer, parts.operations, parts.administration, parts.database).add_routes(app)
    Stream(source, history, renderer, parts.access).add_routes(app)

    async def keep_history_fresh() -> None:
        await history.run(source.wait_until_watched)

    return keep_history_fresh
