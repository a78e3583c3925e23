"""The gateway process: load the configuration, pass requests on, reload, drain, stop."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from fleet.inventory.gateway import GatewaySettings
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.server_access import create_settings
from gateway import state
from gateway.api import GatewayApi, add_routes
from gateway.bodies import BodyMemory
from gateway.clients import Clients
from gateway.metrics import GatewayMetrics
from gateway.proxy import Proxy
from gateway.upstreams import LoopClock, Upstreams, open_sent_file
from runtime.access.audit import write_to_log
from runtime.access.control import AccessControl
from runtime.access.roles import Role
from runtime.access.tokens import ConfiguredTokens
from runtime.errors import StartError
from runtime.http_checks import PASSES_BODIES
from runtime.lifecycle import ListenAddress, Reloader, freeze_garbage_collector, serve
from runtime.redaction import Redactor
from runtime.web import create_application
from runtime.webconfig import WebConfigFile

READY_BELOW = 0.9  # of the queue
log = structlog.get_logger()


class Gateway:
    """The parts of the process, and what a reload changes in them."""

    def __init__(self, redact: Redactor, web_config: WebConfigFile) -> None:
        self._redact = redact
        self.metrics = GatewayMetrics(lambda: [each.describe() for each in self.upstreams])
        self.access = AccessControl(
            lambda: web_config.users, ConfiguredTokens(redact.add), write_audit=write_to_log, now=time.monotonic
        )
        self.clients = Clients(time.time)
        self.bodies = BodyMemory(0)
        self.upstreams = Upstreams(LoopClock(), None)

    async def restore(self, settings: GatewaySettings) -> None:
        """Continue where an earlier process has stopped. Raises StartError."""
        if settings.state_file is None:
            log.warning("state_not_kept", effect="after a restart, the rate may be exceeded for a minute")
            return
        sent = await asyncio.to_thread(open_sent_file, settings.state_file)
        stored = await asyncio.to_thread(state.load, settings.state_file)
        self.upstreams = Upstreams(LoopClock(), sent, stored.get("rates"))
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

    def is_ready(self) -> bool:
        """Whether an upstream takes requests, and its queue has room."""
        return any(
            not each.admission.breaker.is_open and sum(each.admission.depths) <= READY_BELOW * each.admission.queue.size
            for each in self.upstreams
        )


async def run(
    load: Callable[[], LoadedInventory], listen: ListenAddress, web_config: WebConfigFile, redact: Redactor
) -> None:
    """Serve until a signal stops the process. Raises ConfigurationError and StartError before anything is started."""
    loaded = await asyncio.to_thread(load)
    settings = loaded.inventory.gateway
    if not settings.upstreams:
        raise StartError("gateway.upstreams is empty: there is nothing to pass requests on to")
    gateway = Gateway(redact, web_config)
    await gateway.restore(settings)
    await gateway.apply(loaded)
    gateway.metrics.record_reload(successful=True)
    if problem := gateway.access.tokens.explain_missing(Role.ADMIN):
        log.warning("local_token_unavailable", error=problem, effect="only users of the web configuration have access")

    async def apply_configuration() -> Mapping[str, object]:
        new = await asyncio.to_thread(load)
        await gateway.apply(new)
        freeze_garbage_collector()
        return {"upstreams": len(gateway.upstreams)}

    reload = Reloader(apply_configuration, gateway.metrics)
    app = create_application(
        gateway.access,
        web_config,
        ready=gateway.is_ready,
        on_error=lambda _request, error: gateway.metrics.count_refusal(error.status),
    )
    app[PASSES_BODIES] = True
    proxy = Proxy(gateway.upstreams, gateway.clients, gateway.bodies, gateway.metrics, gateway.access)
    api = GatewayApi(gateway.upstreams, gateway.clients, gateway.metrics, gateway.access, reload)
    add_routes(app, api, proxy)
    writer = state.StateWriter(settings.state_file, gateway.dump)

    try:
        await serve(
            "gateway",
            app,
            listen,
            gateway.metrics,
            web_config=web_config,
            tasks=[gateway.access.run, writer.run],
            reload=reload,
            drain=proxy.drain,
            ends_with_client=True,
        )
    finally:
        await gateway.upstreams.close()
