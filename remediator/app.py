"""The remediator as a program: load the configuration, open the record, serve, drain, stop."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import structlog
from aiohttp import web

import fleet.shells.ssh  # noqa: F401 - loaded at the start, not during an incident
from fleet.inventory.loading import Loaded
from fleet.inventory.model import Inventory
from remediator import console
from remediator.chat import feishu_callback
from remediator.chat.buttons import ButtonHandler
from remediator.chat.feishu_connection import LongConnections
from remediator.clients.alertmanager import Alertmanager
from remediator.clients.alerts import MAX_BODY
from remediator.clients.exporter import Exporter
from remediator.engine.engine import Engine
from remediator.engine.housekeeping import run_housekeeping
from remediator.http import read_api, webhook, write_api
from remediator.metrics import RemediatorMetrics
from remediator.notifications.outbox import Batch
from remediator.notifications.sender import Sender
from remediator.operations import Operations
from remediator.record.database import Database
from runtime import tokens
from runtime.errors import DefibError
from runtime.lifecycle import Listen, serve
from runtime.redaction import Redactor
from runtime.tokens import ApiToken
from runtime.web import Access, application, is_loopback
from runtime.webconfig import WebConfig

Load = Callable[[], Loaded]
Clients = tuple[Exporter, Alertmanager | None]
log = structlog.get_logger()


async def run(load: Load, listen: Listen, web_config: WebConfig, redact: Redactor) -> None:
    """Serve until a signal stops it. Raises ConfigurationError and StartError before anything is started."""
    loaded = await asyncio.to_thread(load)
    redact.learn(loaded.secrets)
    inventory = loaded.inventory
    settings = inventory.remediator
    access = Access(
        _api_token(inventory), web_config.basic_auth_users, settings.webhook_token, open=is_loopback(listen.host)
    )
    database = await asyncio.to_thread(Database, settings.database, inventory)
    try:
        clients = await asyncio.to_thread(_create_clients, inventory, redact)
    except DefibError:
        await asyncio.to_thread(database.close)
        raise
    parts = _Parts.create(clients, database, redact)
    reload = _Reload(load, parts, clients, access)
    app = application(
        access,
        web_config,
        ready=lambda: True,
        ill=database.lost,
        max_body=MAX_BODY,
        refused=webhook.count_refusals(parts.metrics),
    )
    parts.add_routes(app, reload)
    parts.metrics.reloaded(successful=True)
    try:
        await serve(
            "remediator", app, listen, tls=web_config.ssl_context(),
            tasks=[parts.engine.run, parts.sender.run, parts.run_housekeeping, parts.connections.run],
            reload=reload, drain=parts.drain,
        )  # fmt: skip
    finally:
        await parts.engine.executor.close()
        await _close(*reload.clients)
        await parts.http_client.aclose()
        await asyncio.to_thread(database.close)


@dataclass(frozen=True)
class _Parts:
    """The parts of the program, wired."""

    database: Database
    redact: Redactor
    metrics: RemediatorMetrics
    http_client: httpx.AsyncClient
    engine: Engine
    operations: Operations
    sender: Sender
    buttons: ButtonHandler
    connections: LongConnections

    @classmethod
    def create(cls, clients: Clients, database: Database, redact: Redactor) -> "_Parts":
        metrics, http_client = RemediatorMetrics(), httpx.AsyncClient(trust_env=True)

        # The engine wakes the sender, which asks the engine for details.
        async def details(batch: Batch) -> Mapping[str, Any]:
            return await engine.details(batch)

        sender = Sender(database, http_client, metrics, redact, details)
        engine = Engine(database, *clients, sender, metrics, redact)
        operations = Operations(engine, database)
        buttons = ButtonHandler(operations, database, metrics)
        connections = LongConnections(database, buttons, metrics)
        return cls(database, redact, metrics, http_client, engine, operations, sender, buttons, connections)

    def add_routes(self, app: web.Application, reload: "_Reload") -> None:
        webhook.add_routes(app, self.engine, self.database, self.metrics)
        read_api.add_routes(app, self.database, self.metrics, self.redact)
        write_api.add_routes(app, self.operations, self.database, self.redact, reload)
        feishu_callback.add_routes(app, self.database, self.buttons)
        console.add_routes(app, self.database, self.redact)

    async def run_housekeeping(self) -> None:
        await run_housekeeping(self.database, self.engine.wake)

    async def drain(self) -> None:
        await self.buttons.drain()
        await self.engine.drain()


class _Reload:
    """Loads the configuration again and puts it in force; if it is invalid, the previous one stays in force."""

    def __init__(self, load: Load, parts: _Parts, clients: Clients, access: Access) -> None:
        self._load, self._parts, self.clients, self._access = load, parts, clients, access
        self._lock = asyncio.Lock()

    async def __call__(self) -> None:
        metrics = self._parts.metrics
        async with self._lock:
            try:
                loaded = await asyncio.to_thread(self._load)
                new_clients = await asyncio.to_thread(_create_clients, loaded.inventory, self._parts.redact)
            except DefibError as error:
                metrics.reloaded(successful=False)
                log.error("reload_failed", errors=str(error).splitlines())  # noqa: TRY400 - no traceback needed
                raise
            self._parts.redact.learn(loaded.secrets)
            self._access.token = _api_token(loaded.inventory)
            self._access.webhook_token = loaded.inventory.remediator.webhook_token
            old_clients, self.clients = self.clients, new_clients
            await self._parts.engine.reload(loaded.inventory, *self.clients)
            await _close(*old_clients)
            metrics.reloaded(successful=True)
            log.info("configuration_reloaded", services=len(loaded.inventory.services))


def _api_token(inventory: Inventory) -> ApiToken:
    settings = inventory.remediator
    return ApiToken("remediator.token", settings.token, settings.token_file)


def _create_clients(inventory: Inventory, redact: Redactor) -> Clients:
    """Create the clients of the exporter and Alertmanager, and the token file if it is needed. Raises DefibError."""
    exporter, settings = inventory.exporter, inventory.remediator
    token = exporter.token
    if (token is None or settings.token is None) and settings.token_file is not None:
        own_token = tokens.ensure(settings.token_file)
        redact.learn([own_token.get_secret_value()])
        token = token or own_token
    alertmanager = settings.alertmanager_url
    return Exporter(exporter.url, token), Alertmanager(alertmanager) if alertmanager else None


async def _close(exporter: Exporter, alertmanager: Alertmanager | None) -> None:
    await exporter.close()
    if alertmanager is not None:
        await alertmanager.close()
