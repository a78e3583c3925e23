"""The gateway process: load the configuration, pass requests on, reload, drain, stop."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from fleet.inventory.gateway import GatewaySettings
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.server_access import create_settings
from gateway import state
from gateway.api import GatewayApi, add_routes
from gateway.bodies import BodyMemory
from gateway.clients import Clients
from gateway.health import add_health_routes, is_ready, listen_for_scrapes
from gateway.metrics import GatewayMetrics
from gateway.proxy import Proxy
from gateway.shared import SharedLimits
from gateway.upstreams import LoopClock, Upstreams, open_sent_file
from runtime.access.audit import write_to_log
from runtime.access.control import AccessControl
from runtime.access.roles import Role
from runtime.access.tokens import ConfiguredTokens
from runtime.connections.registry import CONNECTION_LIMITS, ConnectionLimits
from runtime.errors import StartError
from runtime.http_checks import PASSES_BODIES
from runtime.lifecycle import ListenAddress, Reloader, freeze_garbage_collector, serve, warn_of_restart
from runtime.redaction import Redactor
from runtime.web import create_application
from runtime.webconfig import WebConfigFile

# Requests wait for long, and those of many clients may come through one proxy.
CONNECTIONS = ConnectionLimits(total=12_288, per_address=4096, share_of_files=0.6)
_UNTIL_RESTART = ("listen", "metrics_listen", "state_file", "shared")
log = structlog.get_logger()


class Gateway:
    """The parts of the process, and what a reload changes in them."""

    def __init__(self, redact: Redactor, web_config: WebConfigFile) -> None:
        self._redact = redact
        self.metrics = GatewayMetrics(
            lambda: [each.describe() for each in self.upstreams],
            lambda: None if self.shared is None else self.shared.is_available,
        )
        self.access = AccessControl(
            lambda: web_config.users, ConfiguredTokens(redact.add), write_audit=write_to_log, now=time.monotonic
        )
        self.clients = Clients(time.time)
        self.bodies = BodyMemory(0)
        self.upstreams = Upstreams(LoopClock(), None)
        self.shared: SharedLimits | None = None

    async def restore(self, settings: GatewaySettings, listen: ListenAddress) -> None:
        """Continue where an earlier process has stopped. Raises StartError."""
        if settings.shared is not None:
            self.shared = SharedLimits(
                settings.shared, f"{socket.gethostname()} {listen.host} {listen.port}", time.monotonic
            )
        stored: dict[str, Any] = {}
        sent = await asyncio.to_thread(open_sent_file, settings.state_file)
        if settings.state_file is None:
            log.warning("state_not_kept", effect="after a restart, the rate may be exceeded for a minute")
        else:
            stored = await asyncio.to_thread(state.load, settings.state_file)
        self.upstreams = Upstreams(LoopClock(), sent, stored.get("rates"), self.shared)
        if "budgets" in stored:
            self.clients.restore(stored["budgets"])

    async def apply(self, loaded: LoadedInventory) -> None:
        """Put a configuration in force. Raises DefibError, and has then changed nothing."""
        settings = loaded.inventory.gateway
        self._redact.add(loaded.secrets)
        await self.upstreams.apply(settings)
        self.metrics.begin_counting_refusals({each.provider for each in self.upstreams})
        self.clients.replace(settings.clients)
        self.bodies.limit = settings.max_body
        self.access.settings = create_settings(loaded.inventory.access, [settings.url.url])
        await self.access.tokens.replace(
            [(loaded.local_token("gateway"), Role.ADMIN), (loaded.token("access.metrics_token"), Role.METRICS)]
        )

    def dump(self) -> Mapping[str, Any]:
        return {"rates": self.upstreams.dump(), "budgets": self.clients.dump()}


async def run(
    load: Callable[[], LoadedInventory],
    listen: ListenAddress,
    web_config: WebConfigFile,
    redact: Redactor,
    *,
    ignored_variables: Sequence[str] = (),
    unknown_variables: Sequence[str] = (),
) -> None:
    """Serve until a signal stops the process. Raises ConfigurationError and StartError before anything is started.

    `ignored_variables` are those for which the configuration leaves no use, `unknown_variables` those without meaning.
    """
    if unknown_variables:
        log.warning("variables_unknown", variables=unknown_variables, effect="they are not read: are they misspelled?")
    if ignored_variables:
        effect = "gateway.upstreams is configured, and the configuration alone counts"
        log.warning("variables_ignored", variables=ignored_variables, effect=effect)
    loaded = await asyncio.to_thread(load)
    settings = loaded.inventory.gateway
    if not settings.upstreams:
        raise StartError("gateway.upstreams is empty: there is nothing to pass requests on to")
    gateway = Gateway(redact, web_config)
    await gateway.restore(settings, listen)
    await gateway.apply(loaded)
    gateway.metrics.record_reload(successful=True)
    if problem := gateway.access.tokens.explain_missing(Role.ADMIN):
        log.warning("local_token_unavailable", error=problem, effect="only users of the web configuration have access")

    async def apply_configuration() -> Mapping[str, object]:
        new = await asyncio.to_thread(load)
        await gateway.apply(new)
        freeze_garbage_collector()
        warn_of_restart("gateway", settings, new.inventory.gateway, _UNTIL_RESTART)
        return {"upstreams": len(gateway.upstreams)}

    reload = Reloader(apply_configuration, gateway.metrics)
    app = create_application(
        gateway.access,
        web_config,
        ready=lambda: is_ready(gateway.upstreams),
        on_error=lambda _request, error: gateway.metrics.count_refusal(error.status),
    )
    app[PASSES_BODIES] = True
    app[CONNECTION_LIMITS] = CONNECTIONS
    proxy = Proxy(gateway.upstreams, gateway.clients, gateway.bodies, gateway.metrics, gateway.access)
    api = GatewayApi(gateway.upstreams, gateway.clients, gateway.metrics, gateway.access, reload)
    add_routes(app, api, proxy)
    add_health_routes(app, gateway.upstreams, gateway.metrics)
    writer = state.StateWriter(settings.state_file, gateway.dump)
    async with contextlib.AsyncExitStack() as cleanup:
        cleanup.push_async_callback(gateway.upstreams.close)
        scrapes = await listen_for_scrapes(
            settings.metrics_listen or "", gateway.access, web_config, gateway.upstreams, gateway.metrics
        )
        cleanup.push_async_callback(scrapes.close)
        await serve(
            "gateway",
            app,
            listen,
            gateway.metrics,
            web_config=web_config,
            tasks=[gateway.access.run, writer.run, *([gateway.shared.run] if gateway.shared is not None else [])],
            reload=reload,
            drain=proxy.drain,
            ends_with_client=True,
        )
