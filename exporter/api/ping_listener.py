"""The listener for pings, push URLs and badges: open while pings may arrive, on an address of its own."""

import structlog
from aiohttp import web

from exporter.api import badges, pings, push
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.further_listener import FurtherListener
from runtime.http_checks import add_response_headers
from runtime.metrics import ProgramMetrics
from runtime.webconfig import WebConfigFile

log = structlog.get_logger()


def create_ping_application(scheduler: ProbeScheduler, web_config: WebConfigFile) -> web.Application:
    """Return the application of the listener, which needs no sign-in."""
    app = web.Application()
    add_response_headers(app, web_config)
    app.router.add_get(badges.PATH, badges.BadgesApi(scheduler.heartbeats).show)
    app.router.add_route("*", push.PATH, push.PushApi(scheduler.heartbeats).receive)
    app.router.add_route("*", r"/{path:[\s\S]*}", pings.PingApi(scheduler).answer)
    return app


class PingListener:
    """Listens for pings on an address that a reload may change."""

    def __init__(self, scheduler: ProbeScheduler, metrics: ProgramMetrics, web_config: WebConfigFile) -> None:
        app = create_ping_application(scheduler, web_config)
        self._listener = FurtherListener("exporter.heartbeats.listen", app, metrics, lambda: web_config.tls)

    async def listen(self, address: str) -> None:
        """Listen on an address instead of the present one; on none if it is empty. Raises StartError."""
        if (opened := await self._listener.listen(address)) is not None:
            log.info("heartbeats_listening", host=opened[0], port=opened[1])

    async def close(self) -> None:
        """Accept no more pings, and answer those that have arrived."""
        await self._listener.close()
