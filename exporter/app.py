"""The exporter process: load the configuration, probe, serve, reload, stop."""

import asyncio
import resource
from collections.abc import Callable, Mapping
from functools import partial

import structlog

from exporter.api import add_routes
from exporter.api.ping_listener import PingListener
from exporter.metrics import ExporterMetrics
from exporter.modules.prober import ModuleProber
from exporter.scheduler.probe_scheduler import ProbeScheduler
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Inventory
from fleet.inventory.server_access import create_settings
from fleet.sources import ServiceSources, report_to
from runtime.access.audit import write_to_log
from runtime.access.control import AccessControl
from runtime.access.roles import Role
from runtime.access.tokens import ConfiguredTokens
from runtime.lifecycle import ListenAddress, Reloader, freeze_garbage_collector, serve
from runtime.redaction import Redactor
from runtime.web import create_application
from runtime.webconfig import WebConfigFile

log = structlog.get_logger()


async def run(
    load: Callable[[], LoadedInventory], listen: ListenAddress, web_config: WebConfigFile, redact: Redactor
) -> None:
    """Serve until a signal stops the process. Raises ConfigurationError and StartError before anything is started."""
    metrics = ExporterMetrics()
    sources = ServiceSources(load, report_to(metrics))
    loaded = await sources.load()
    redact.add(loaded.secrets)
    scheduler = ProbeScheduler(metrics, redact, in_flight=_max_concurrent_probes())
    access = AccessControl(
        lambda: web_config.users,
        ConfiguredTokens(redact.add),
        write_audit=write_to_log,
        now=asyncio.get_running_loop().time,
    )
    await _apply_access(access, loaded)
    if problem := access.tokens.explain_missing(Role.ADMIN):
        log.warning("local_token_unavailable", error=problem, effect="only users of the web configuration have access")
    started = asyncio.Event()
    app = create_application(
        access, web_config, ready=started.is_set, on_error=lambda _request, error: metrics.count_refusal(error.status)
    )
    modules = ModuleProber(redact)
    await modules.load(loaded.inventory.exporter.modules_file, loaded.inventory.exporter.modules_targets)
    pings = PingListener(scheduler, metrics, web_config)
    current = loaded.inventory

    async def apply(inventory: Inventory) -> None:
        await modules.load(inventory.exporter.modules_file, inventory.exporter.modules_targets)
        await apply_services(inventory)

    async def apply_services(inventory: Inventory) -> None:
        await scheduler.apply(inventory)
        await pings.listen(inventory.exporter.heartbeats.listen if scheduler.heartbeats.is_receiving else "")

    async def start() -> None:
        async with reload.lock:
            await apply_services(loaded.inventory)
            freeze_garbage_collector()
        metrics.record_reload(successful=True)
        started.set()

    async def apply_configuration() -> Mapping[str, object]:
        nonlocal current
        new = await sources.load()
        redact.add(new.secrets)
        try:
            await apply(new.inventory)
        except Exception:
            await apply(current)
            raise
        await _apply_access(access, new)
        current = new.inventory
        freeze_garbage_collector()
        return {"services": len(scheduler.services)}

    reload = Reloader(apply_configuration, metrics)

    async def drain() -> None:
        await pings.close()
        await scheduler.close()

    add_routes(app, scheduler, modules, metrics, reload)
    await serve(
        "exporter",
        app,
        listen,
        metrics,
        web_config=web_config,
        tasks=[
            start,
            access.run,
            partial(sources.watch, reload),
            scheduler.report_heartbeats,
            scheduler.forget_heartbeats,
        ],
        reload=reload,
        drain=drain,
    )


async def _apply_access(access: AccessControl, loaded: LoadedInventory) -> None:
    """Put the access settings of a configuration in force."""
    access.settings = create_settings(loaded.inventory.access, [loaded.inventory.exporter.url.url])
    await access.tokens.replace(
        [(loaded.local_token("exporter"), Role.ADMIN), (loaded.token("access.metrics_token"), Role.METRICS)]
    )


def _max_concurrent_probes() -> int:
    """Return the limit of concurrent probes: each opens a socket, and may use half of the files that can be open.

    The server's connections use at most a quarter.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(100, min(soft // 2, 10_000))
