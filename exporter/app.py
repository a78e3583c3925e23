"""The exporter process: load the configuration, probe, serve, reload, stop."""

import asyncio
import gc
import os
import resource
from collections.abc import Callable

import structlog

from exporter.api import add_routes
from exporter.metrics import ExporterMetrics
from exporter.probes.net.connections import create_ssl_context
from exporter.scheduler.probe_scheduler import ProbeScheduler
from fleet.inventory.loading import Loaded
from fleet.inventory.model import Inventory
from runtime.lifecycle import Listen, serve
from runtime.redaction import Redactor
from runtime.tokens import ApiToken, TokenError
from runtime.web import Access, application
from runtime.webconfig import WebConfig

RESOLVER_THREADS = "1024"  # libuv uses at most half of them for DNS lookups
log = structlog.get_logger()


async def run(load: Callable[[], Loaded], listen: Listen, web_config: WebConfig, redact: Redactor) -> None:
    """Serve until a signal stops the process. Raises ConfigurationError and StartError before anything is started."""
    loaded = await asyncio.to_thread(load)
    redact.learn(loaded.secrets)
    metrics = ExporterMetrics()
    scheduler = ProbeScheduler(metrics, redact, in_flight=_max_concurrent_probes())
    access = Access(await _api_token(loaded.inventory, redact), web_config.basic_auth_users)
    started = asyncio.Event()
    app = application(access, web_config, ready=started.is_set)
    reloading = asyncio.Lock()

    async def start() -> None:
        async with reloading:
            await scheduler.apply(loaded.inventory)
            _freeze_garbage_collector()
        metrics.reloaded(successful=True)
        started.set()

    async def reload() -> None:
        async with reloading:
            try:
                new = await asyncio.to_thread(load)
            except Exception as error:
                metrics.reloaded(successful=False)
                errors = str(error).splitlines()
                log.error("configuration_reload_failed", errors=errors)  # noqa: TRY400 - the message suffices
                raise
            redact.learn(new.secrets)
            access.token = await _api_token(new.inventory, redact)
            create_ssl_context.cache_clear()  # certificate files may have been renewed
            await scheduler.apply(new.inventory)
            gc.unfreeze()  # so that the previous configuration can be collected
            _freeze_garbage_collector()
            metrics.reloaded(successful=True)
            log.info("configuration_reloaded", services=len(scheduler.services))

    add_routes(app, scheduler, metrics, reload)
    await serve(
        "exporter", app, listen, tls=web_config.ssl_context(), tasks=[start], reload=reload, drain=scheduler.close
    )


async def _api_token(inventory: Inventory, redact: Redactor) -> ApiToken:
    """Return the API token; the remediator may create its file later."""
    token = ApiToken("exporter.token", inventory.exporter.token, inventory.remediator.token_file)
    try:
        redact.learn([(await asyncio.to_thread(token.get)).get_secret_value()])
    except TokenError as error:
        log.warning("api_token_unavailable", error=str(error), effect="POST requests are refused")
    return token


def _freeze_garbage_collector() -> None:
    """Freeze long-lived objects: traversing 10,000 services in each garbage collection would delay probes."""
    gc.collect()
    gc.freeze()


def _max_concurrent_probes() -> int:
    """Return the limit of concurrent probes, derived from the limit of open files: each probe opens a socket."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(100, min(soft - 256, 10_000))


def prepare_process() -> None:
    """Raise the limit of open files and the number of resolver threads; call before the event loop is created."""
    os.environ.setdefault("UV_THREADPOOL_SIZE", RESOLVER_THREADS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
