"""The remediator as a program: load, open the record, take up what was left, serve, drain, stop."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from aiohttp import web

import fleet.shells.ssh  # noqa: F401 - loaded at the start, not in the middle of an incident
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Inventory
from remediator import console
from remediator.chat import feishu_callback
from remediator.chat.buttons import Presses
from remediator.chat.feishu_connection import LongConnections
from remediator.clients.peers import Alertmanager, Exporter
from remediator.clients.webhook import MAX_BODY
from remediator.engine.engine import Engine
from remediator.engine.housekeeping import keep_house
from remediator.http.api import add_routes, tell_refusals
from remediator.metrics import Metrics
from remediator.notifications.outbox import Batch
from remediator.notifications.sender import Sender
from remediator.record.database import Database
from runtime import tokens
from runtime.errors import DefibError
from runtime.lifecycle import ListenAddress, Reloader, serve
from runtime.redaction import Redactor
from runtime.tokens import ApiToken
from runtime.web import AccessControl, create_application, is_loopback
from runtime.webconfig import WebConfig

Load = Callable[[], LoadedInventory]
Peers = tuple[Exporter, Alertmanager | None]


async def run(load: Load, listen: ListenAddress, web_config: WebConfig, redact: Redactor) -> None:
    """Serve until a signal says stop. Raises ConfigurationError and StartError before anything is started."""
    loaded = await asyncio.to_thread(load)
    redact.add(loaded.secrets)
    inventory = loaded.inventory
    settings = inventory.remediator
    access = AccessControl(
        _api_token(inventory), web_config.basic_auth_users, settings.webhook_token, open=is_loopback(listen.host)
    )
    database = await asyncio.to_thread(Database, settings.database)
    try:
        peers = await asyncio.to_thread(_peers, inventory, redact)
    except DefibError:
        await asyncio.to_thread(database.close)
        raise
    parts = _Parts.built(inventory, peers, database, redact)
    configuration = _Reload(load, parts, peers, access)
    reload = Reloader(configuration, parts.metrics)
    app = create_application(
        access,
        web_config,
        ready=lambda: True,
        get_health_problem=database.lost,
        max_body=MAX_BODY,
        on_error=tell_refusals(parts.metrics),
    )
    parts.add_routes(app, reload)
    parts.metrics.record_reload(successful=True)
    try:
        await serve(
            "remediator", app, listen, tls=web_config.ssl_context(),
            tasks=[parts.engine.run, parts.sender.run, parts.keep_house, parts.connections.run],
            reload=reload, drain=parts.drain,
        )  # fmt: skip
    finally:
        await parts.engine.actor.close()
        await _close(*configuration.peers)
        await parts.client.aclose()
        await asyncio.to_thread(database.close)


@dataclass(frozen=True)
class _Parts:
    """What the program is made of."""

    database: Database
    redact: Redactor
    metrics: Metrics
    client: httpx.AsyncClient
    engine: Engine
    sender: Sender
    presses: Presses
    connections: LongConnections

    @classmethod
    def built(cls, inventory: Inventory, peers: Peers, database: Database, redact: Redactor) -> "_Parts":
        metrics, client = Metrics(), httpx.AsyncClient(trust_env=True)

        # The two need each other: the engine wakes the sender, which asks it for what there is to tell.
        async def details(batch: Batch) -> Mapping[str, Any]:
            return await engine.details(batch)

        def now_in_force() -> Inventory:
            return engine.inventory

        sender = Sender(database, now_in_force, client, metrics, redact, details)
        engine = Engine(database, inventory, *peers, sender, metrics, redact)
        presses = Presses(engine, database, metrics)
        connections = LongConnections(now_in_force, presses, metrics)
        return cls(database, redact, metrics, client, engine, sender, presses, connections)

    def add_routes(self, app: web.Application, reload: Reloader) -> None:
        add_routes(app, self.engine, self.database, self.metrics, self.redact, reload)
        feishu_callback.add_routes(app, self.engine, self.database, self.presses)
        console.add_routes(app, self.engine, self.database, self.redact)

    async def keep_house(self) -> None:
        await keep_house(self.database, lambda: self.engine.inventory, self.engine.wake)

    async def drain(self) -> None:
        await self.presses.drain()
        await self.engine.drain()


class _Reload:
    """Replaces the configuration by the one in the files, or leaves everything as it is."""

    def __init__(self, load: Load, parts: _Parts, peers: Peers, access: AccessControl) -> None:
        self._load, self._parts, self.peers, self._access = load, parts, peers, access

    async def __call__(self) -> Mapping[str, object]:
        engine = self._parts.engine
        fresh = await asyncio.to_thread(self._load)
        self._parts.redact.add(fresh.secrets)
        fresh_peers = await asyncio.to_thread(_peers, fresh.inventory, self._parts.redact)
        before = engine.inventory
        try:
            await engine.take(fresh.inventory, *fresh_peers)
        except Exception:
            await engine.take(before, *self.peers)
            await _close(*fresh_peers)
            raise
        self._access.token = _api_token(fresh.inventory)
        self._access.webhook_token = fresh.inventory.remediator.webhook_token
        old_peers, self.peers = self.peers, fresh_peers
        await _close(*old_peers)
        return {"services": len(fresh.inventory.services)}


def _api_token(inventory: Inventory) -> ApiToken:
    settings = inventory.remediator
    return ApiToken("remediator.token", settings.token, settings.token_file)


def _peers(inventory: Inventory, redact: Redactor) -> Peers:
    """The servers that are asked; the token's file is written first where it is needed. Raises DefibError."""
    exporter, settings = inventory.exporter, inventory.remediator
    token = exporter.token
    if (token is None or settings.token is None) and settings.token_file is not None:
        own = tokens.ensure_token(settings.token_file)
        redact.add([own.get_secret_value()])
        token = token or own
    alertmanager = settings.alertmanager_url
    return Exporter(exporter.url, token), Alertmanager(alertmanager) if alertmanager else None


async def _close(exporter: Exporter, alertmanager: Alertmanager | None) -> None:
    await exporter.close()
    if alertmanager is not None:
        await alertmanager.close()
