"""The remediator as a program: load, open the record, take up what was left, serve, drain, stop."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import structlog

from fleet.loading import Loaded
from fleet.model import Inventory
from remediator.api import add_routes, tell_refusals
from remediator.database import Database
from remediator.engine import Engine
from remediator.housekeeping import keep_house
from remediator.metrics import Metrics
from remediator.notices.outbox import Notice
from remediator.notices.sender import Sender
from remediator.peers import Alertmanager, Exporter
from remediator.webhook import MAX_BODY
from runtime.errors import DefibError, StartError
from runtime.lifecycle import Listen, serve
from runtime.redaction import Redactor
from runtime.web import Access, application, is_loopback
from runtime.webconfig import WebConfig

log = structlog.get_logger()


async def run(load: Callable[[], Loaded], listen: Listen, web_config: WebConfig, redact: Redactor) -> None:
    """Serve until a signal says stop. Raises ConfigurationError and StartError before anything is started."""
    loaded = await asyncio.to_thread(load)
    redact.learn(loaded.secrets)
    inventory = loaded.inventory
    access = Access(web_config.basic_auth_users, inventory.remediator.webhook_token, is_loopback(listen.host))
    if not access.loopback and not access.users and access.token is None:
        raise StartError(
            "beyond loopback the remediator needs remediator.webhook_token or a --web.config.file with users"
        )
    peers = _peers(inventory)
    database = await asyncio.to_thread(Database, inventory.remediator.database)
    metrics = Metrics()
    client = httpx.AsyncClient(trust_env=True)

    # The two need each other: the engine wakes the sender, which asks it for what there is to tell.
    async def details(notice: Notice) -> Mapping[str, Any]:
        return await engine.details(notice)

    def now_in_force() -> Inventory:
        return engine.inventory

    sender = Sender(database, now_in_force, client, metrics, redact, details)
    engine = Engine(database, inventory, *peers, sender, metrics, redact)
    reloading = asyncio.Lock()

    async def reload() -> None:
        nonlocal peers
        async with reloading:
            try:
                fresh = await asyncio.to_thread(load)
                fresh_peers = _peers(fresh.inventory)
            except DefibError as error:
                metrics.reloaded(successful=False)
                log.error("reload refused; the old configuration stays", wrong=str(error).splitlines())  # noqa: TRY400
                raise
            redact.learn(fresh.secrets)
            access.token = fresh.inventory.remediator.webhook_token
            before, peers = peers, fresh_peers
            await engine.take(fresh.inventory, *peers)
            await _close(*before)
            metrics.reloaded(successful=True)
            log.info("reloaded", services=len(fresh.inventory.services))

    app = application(access, web_config, ready=lambda: True, max_body=MAX_BODY, refused=tell_refusals(metrics))
    add_routes(app, engine, database, metrics, redact, reload)
    metrics.reloaded(successful=True)

    async def housekeeping() -> None:
        await keep_house(database, now_in_force, engine.wake)

    try:
        await serve(
            "remediator", app, listen, tls=web_config.ssl_context(),
            tasks=[engine.run, sender.run, housekeeping], reload=reload, drain=engine.drain,
        )  # fmt: skip
    finally:
        await engine.actor.close()
        await _close(*peers)
        await client.aclose()
        await asyncio.to_thread(database.close)


def _peers(inventory: Inventory) -> tuple[Exporter, Alertmanager | None]:
    exporter, alertmanager = inventory.exporter, inventory.remediator.alertmanager_url
    return Exporter(exporter.url, exporter.token), Alertmanager(alertmanager) if alertmanager else None


async def _close(exporter: Exporter, alertmanager: Alertmanager | None) -> None:
    await exporter.close()
    if alertmanager is not None:
        await alertmanager.close()
