"""The listener for pings, push URLs and badges: open while pings may arrive, on an address of its own."""

import ssl
from collections.abc import Callable
from typing import cast

import structlog
from aiohttp import web

from exporter.api import badges, pings, push
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.connections import Connections, Listener
from runtime.errors import StartError
from runtime.http_checks import add_response_headers
from runtime.lifecycle import ListenAddress
from runtime.metrics import ProgramMetrics
from runtime.webconfig import WebConfigFile

SHUTDOWN_TIMEOUT = 2.0  # seconds in which requests that are being answered may end
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
    """Serves an application on an address that a reload may change."""

    def __init__(
        self, app: web.Application, metrics: ProgramMetrics, get_tls: Callable[[], ssl.SSLContext | None]
    ) -> None:
        self._runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_TIMEOUT, handle_signals=False)
        self._app, self._metrics, self._get_tls = app, metrics, get_tls
        self._connections: Connections | None = None
        self._listener: Listener | None = None
        self._address = ""

    async def listen(self, address: str) -> None:
        """Listen on an address instead of the present one; on none if it is empty. Raises StartError."""
        if address == self._address:
            return
        listener = await self._bind(address) if address else None
        if self._listener is not None:
            self._listener.close()
        self._listener, self._address = listener, address
        if listener is not None:
            host, port = listener.address
            log.info("heartbeats_listening", host=host, port=port)

    async def _bind(self, address: str) -> Listener:
        if self._connections is None:
            await self._runner.setup()
            server = cast("web.Server", self._runner.server)
            self._connections = Connections(self._app, server, self._metrics)
        to = ListenAddress.parse(address)
        try:
            return await Listener.bind(to.host, to.port, self._connections, self._get_tls)
        except OSError as error:
            reason = error.strerror or error
            raise StartError(f"exporter.heartbeats.listen: cannot listen on {address}: {reason}") from error

    async def close(self) -> None:
        """Accept no more pings, and answer those that have arrived."""
        await self.listen("")
        await self._runner.cleanup()
