"""The exporter as a program: load, watch, serve, reload, stop."""

import asyncio
import gc
import os
import resource
from collections.abc import Callable, Mapping

import structlog

from exporter.api import add_routes
from exporter.metrics import Metrics
from exporter.probes.net.connections import tls_context
from exporter.scheduler.watcher import Watcher
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Inventory
from runtime.lifecycle import ListenAddress, Reloader, serve
from runtime.redaction import Redactor
from runtime.tokens import ApiToken, TokenError
from runtime.web import AccessControl, create_application
from runtime.webconfig import WebConfig

RESOLVER_THREADS = "1024"  # libuv lets half of them wait for name servers
log = structlog.get_logger()


async def run(
    load: Callable[[], LoadedInventory], listen: ListenAddress, web_config: WebConfig, redact: Redactor
) -> None:
    """Serve until a signal says stop. Raises ConfigurationError and StartError before anything is started."""
    loaded = await asyncio.to_thread(load)
    redact.add(loaded.secrets)
    metrics = Metrics()
    watcher = Watcher(metrics, redact, in_flight=_room_for_probes())
    access = AccessControl(await _api_token(loaded.inventory, redact), web_config.basic_auth_users)
    started = asyncio.Event()
    app = create_application(access, web_config, ready=started.is_set)
    current = loaded.inventory

    async def start() -> None:
        async with reload.lock:
            await watcher.apply(loaded.inventory)
            _settle()
        metrics.record_reload(successful=True)
        started.set()

    async def apply_configuration() -> Mapping[str, object]:
        nonlocal current
        fresh = await asyncio.to_thread(load)
        redact.add(fresh.secrets)
        token = await _api_token(fresh.inventory, redact)
        tls_context.cache_clear()  # certificate files may have been renewed
        try:
            await watcher.apply(fresh.inventory)
        except Exception:
            await watcher.apply(current)
            raise
        access.token, current = token, fresh.inventory
        gc.unfreeze()  # the old configuration can be freed
        _settle()
        return {"services": len(watcher.watches)}

    reload = Reloader(apply_configuration, metrics)
    add_routes(app, watcher, metrics, reload)
    await serve(
        "exporter", app, listen, tls=web_config.ssl_context(), tasks=[start], reload=reload, drain=watcher.close
    )


async def _api_token(inventory: Inventory, redact: Redactor) -> ApiToken:
    """What callers must show; the file beside the record may come later, when the remediator writes it."""
    token = ApiToken("exporter.token", inventory.exporter.token, inventory.remediator.token_file)
    try:
        redact.add([(await asyncio.to_thread(token.get)).get_secret_value()])
    except TokenError as error:
        log.warning("no API token: POST requests are refused until there is one", why=str(error))
    return token


def _settle() -> None:
    """Have the collector pass over what stays: to look through 10,000 services each time holds up their probes."""
    gc.collect()
    gc.freeze()


def _room_for_probes() -> int:
    """How many probes may run at once: most of the files that we may open, each being a socket."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(100, min(soft - 256, 10_000))


def prepare_process() -> None:
    """What must be set before the event loop exists: room for sockets, threads for slow name servers."""
    os.environ.setdefault("UV_THREADPOOL_SIZE", RESOLVER_THREADS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
