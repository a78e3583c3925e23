"""The remediator as a program: load the configuration, open the record, serve, drain, stop."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from aiohttp import web

import fleet.shells.ssh  # noqa: F401 - loaded at the start, not during an incident
from fleet.inventory.loading import LoadedInventory
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
from runtime.lifecycle import ListenAddress, Reloader, serve
from runtime.redaction import Redactor
from runtime.tokens import ApiToken
from runtime.web import AccessControl, create_application, is_loopback
from runtime.webconfig import WebConfig

Load = Callable[[], LoadedInventory]
Clients = tuple[Exporter, Alertmanager | None]


async def run(load: Load, listen: ListenAddress, web_config: WebConfig, redact: Redactor) -> None:
    """Serve until a signal stops it. Raises ConfigurationError and StartError before anything is started."""
    loaded = await asyncio.to_thread(load)
    redact.add(loaded.secrets)
    inventory = loaded.inventory
    settings = inventory.remediator
    access = AccessControl(
        _api_token(inventory), web_config.basic_auth_users, settings.webhook_token, open=is_loopback(listen.host)
    )
    database = await asyncio.to_thread(Database, settings.database, inventory)
    try:
        clients = await asyncio.to_thread(_create_clients, inventory, redact)
    except DefibError:
        await asyncio.to_thread(database.close)
        raise
    parts = _Parts.create(clients, database, redact)
    configuration = _Reload(load, parts, clients, access)
    reload = Reloader(configuration, parts.metrics)
    app = create_application(
        access,
        web_config,
        ready=lambda: True,
        get_health_problem=database.describe_lost_file,
        max_body=MAX_BODY,
        on_error=webhook.count_refusals(parts.metrics),
    )
    parts.add_routes(app, reload)
    parts.metrics.record_reload(successful=True)
    try:
        await serve(
            "remediator", app, listen, parts.metrics, tls=web_config.ssl_context(),
            tasks=[parts.engine.run, parts.sender.run, parts.run_housekeeping, parts.connections.run],
            reload=reload, drain=parts.drain,
        )  # fmt: skip
    finally:
        await parts.engine.executor.close()
        await _close(*configuration.clients)
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
            return await engine.read_failed_probe(batch)

        sender = Sender(database, http_client, metrics, redact, details)
        engine = Engine(database, *clients, sender, metrics, redact)
        operations = Operations(engine, database)
        buttons = ButtonHandler(operations, database, metrics)
        connections = LongConnections(database, buttons, metrics)
        return cls(database, redact, metrics, http_client, engine, operations, sender, buttons, connections)

    def add_routes(self, app: web.Application, reload: Reloader) -> None:
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
    """Loads the configuration again and puts it in force; if that fails, the previous one stays in force."""

    def __init__(self, load: Load, parts: _Parts, clients: Clients, access: AccessControl) -> None:
        self._load, self._parts, self.clients, self._access = load, parts, clients, access

    async def __call__(self) -> Mapping[str, object]:
        engine = self._parts.engine
        loaded = await asyncio.to_thread(self._load)
        self._parts.redact.add(loaded.secrets)
        new_clients = await asyncio.to_thread(_create_clients, loaded.inventory, self._parts.redact)
        previous = self._parts.database.inventory
        try:
            await engine.reload(loaded.inventory, *new_clients)
        except Exception:
            await engine.reload(previous, *self.clients)
            await _close(*new_clients)
            raise
        self._access.token = _api_token(loaded.inventory)
        self._access.webhook_token = loaded.inventory.remediator.webhook_token
        old_clients, self.clients = self.clients, new_clients
        await _close(*old_clients)
        return {"services": len(loaded.inventory.services)}


def _api_token(inventory: Inventory) -> ApiToken:
    settings = inventory.remediator
    return ApiToken("remediator.token", settings.token, settings.token_file)


def _create_clients(inventory: Inventory, redact: Redactor) -> Clients:
    """Create the clients of the exporter and Alertmanager, and the token file if it is needed. Raises DefibError."""
    exporter, settings = inventory.exporter, inventory.remediator
    token = exporter.token
    if (token is None or settings.token is None) and settings.token_file is not None:
        own_token = tokens.ensure_token(settings.token_file)
        redact.add([own_token.get_secret_value()])
        token = token or own_token
    alertmanager = settings.alertmanager_url
    return Exporter(exporter.url, token), Alertmanager(alertmanager) if alertmanager else None


async def _close(exporter: Exporter, alertmanager: Alertmanager | None) -> None:
    await exporter.close()
    if alertmanager is not None:
        await alertmanager.close()
