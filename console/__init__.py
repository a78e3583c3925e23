"""The console: web pages that show the fleet, its incidents and what Defib did, with buttons for operators."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from console import events, hosts, incidents, preferences, services, settings, static, stream
from console.history import History
from console.rendering import PageRenderer
from console.sign_in import SignInPages
from console.snapshot import SnapshotSource
from remediator.app import Parts


def add_pages(app: web.Application, parts: Parts) -> Callable[[], Awaitable[None]]:
    """Add all pages to the remediator's application; returns its task, which runs until it is cancelled."""
    renderer = PageRenderer(parts.database, parts.redact)
    history = History(lambda: parts.database.inventory.remediator.prometheus_url)
    source = SnapshotSource(parts.database, lambda: parts.engine.exporter, history)

    async def close(_app: web.Application) -> None:
        await history.close()

    app.on_cleanup.append(close)
    static.add_routes(app)
    preferences.add_routes(app)
    SignInPages(parts.access, parts.sign_in_services, parts.public_url, renderer).add_routes(app)
    services.add_routes(app, source, renderer, parts.operations, parts.database)
    incidents.add_routes(app, source, renderer, parts.operations, parts.database)
    hosts.add_routes(app, source, renderer)
    events.add_routes(app, source, renderer, parts.database)
    settings.add_routes(app, source, renderer, parts.operations, parts.administration, parts.database)
    stream.add_routes(app, source, renderer, parts.access)
    return source.run
