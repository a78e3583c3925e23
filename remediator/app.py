"""The remediator as a program: load the configuration, open the record, serve, drain, stop."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from aiohttp import web

import fleet.shells.ssh  # noqa: F401 - loaded at the start, not during an incident
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.server_access import create_settings
from fleet.sources import ServiceSources, report_to
from remediator.administration import Administration
from remediator.chat import feishu_callback
from remediator.chat.buttons import ButtonHandler
from remediator.chat.feishu_connection import LongConnections
from remediator.clients.alertmanager import Alertmanager
from remediator.clients.alerts import MAX_BODY
from remediator.clients.exporter import Exporter
from remediator.clients.gateway import Gateway
from remediator.engine.dead_man import run_dead_man
from remediator.engine.engine import Engine
from remediator.engine.housekeeping import run_housekeeping
from remediator.engine.scheduled_reports import run_scheduled_reports
from remediator.gateway import GatewayOperations
from remediator.http import (
    access_api,
    events_api,
    gateway_api,
    heartbeats_api,
    overview_api,
    read_api,
    report_api,
    webhook,
    write_api,
)
from remediator.metrics import RemediatorMetrics
from remediator.notifications.outbox import Batch
from remediator.notifications.sender import Sender
from remediator.operations import Operations
from remediator.record.audit import AuditLog
from remediator.record.database import Database
from remediator.record.sessions import StoredSessions
from remediator.reports.reporter import Reporter
from remediator.sign_in.registry import SignInServices
from remediator.snapshot import SnapshotSource
from runtime import tokens
from runtime.access.control import AccessControl
from runtime.access.roles import Role
from runtime.access.sessions import Sessions
from runtime.access.tokens import ApiTokens, ConfiguredTokens
from runtime.errors import DefibError
from runtime.http_clients import limit_interim_responses
from runtime.lifecycle import ListenAddress, Reloader, freeze_garbage_collector, serve, warn_of_restart
from runtime.redaction import Redactor
from runtime.tls import create_client_context
from runtime.web import REDACT, create_application
from runtime.webconfig import WebConfigFile

READS_AT_ONCE = 4  # of one caller
Load = Callable[[], LoadedInventory]
Clients = tuple[Exporter, Alertmanager | None]
# Adds pages to the application, and returns their task.
AddPages = Callable[[web.Application, "Parts"], Callable[[], Awaitable[None]]]


async def run(
    load: Load, listen: ListenAddress, web_config: WebConfigFile, redact: Redactor, *, add_pages: AddPages
) -> None:
    """Serve until a signal stops it. Raises ConfigurationError and StartError before anything is started."""
    metrics = RemediatorMetrics()
    sources = ServiceSources(load, report_to(metrics))
    loaded = await sources.load()
    redact.add(loaded.secrets)
    inventory = loaded.inventory
    database = await asyncio.to_thread(Database, inventory.remediator.database, inventory)
    try:
        clients = await asyncio.to_thread(_create_clients, loaded, redact)
        gateway = await asyncio.to_thread(_create_gateway, loaded)
        parts = Parts.create(clients, gateway, database, metrics, redact, web_config)
        await parts.administration.load()
        await parts.apply_access(loaded)
    except DefibError:
        await asyncio.to_thread(database.close)
        raise
    configuration = _Reload(sources, parts, clients)
    reload = Reloader(configuration, metrics)
    app = create_application(
        parts.access,
        web_config,
        ready=lambda: True,
        get_health_problem=database.describe_lost_file,
        max_body=MAX_BODY,
        at_once=READS_AT_ONCE,
        sign_in="sign-in",
        on_error=webhook.count_refusals(parts.metrics),
    )
    app[REDACT] = parts.redact
    parts.add_routes(app, reload)
    run_pages = add_pages(app, parts)
    parts.metrics.record_reload(successful=True)
    freeze_garbage_collector()
    try:
        await serve(
            "remediator", app, listen, metrics, web_config=web_config,
            tasks=[*parts.tasks, run_pages, partial(sources.watch, reload)], reload=reload, drain=parts.drain,
        )  # fmt: skip
    finally:
        await parts.engine.executor.close()
        await parts.sign_in_services.close()
        await _close(*configuration.clients)
        await parts.gateway.replace(None)
        await parts.http_client.aclose()
        await asyncio.to_thread(database.close)


@dataclass(frozen=True)
class Parts:
    """The parts of the program, wired; the console uses them, too."""

    database: Database
    redact: Redactor
    metrics: RemediatorMetrics
    http_client: httpx.AsyncClient
    access: AccessControl
    sign_in_services: SignInServices
    administration: Administration
    engine: Engine
    operations: Operations
    gateway: GatewayOperations
    snapshot: SnapshotSource
    reporter: Reporter
    sender: Sender
    buttons: ButtonHandler
    connections: LongConnections

    @classmethod
    def create(
        cls,
        clients: Clients,
        gateway: Gateway | None,
        database: Database,
        metrics: RemediatorMetrics,
        redact: Redactor,
        web_config: WebConfigFile,
    ) -> "Parts":
        http_client = limit_interim_responses(httpx.AsyncClient(trust_env=True, verify=create_client_context()))
        audit_log, now = AuditLog(database, redact), database.clock.now
        api_tokens, sessions = ApiTokens(now), Sessions(now, StoredSessions(database))
        access = AccessControl(
            lambda: web_config.users,
            ConfiguredTokens(redact.add),
            write_audit=audit_log.write,
            now=now,
            api_tokens=api_tokens,
            sessions=sessions,
        )
        sign_in_services = SignInServices(lambda: database.inventory.notify, http_client)

        # The engine wakes the sender, which asks the engine for details.
        async def details(batch: Batch) -> Mapping[str, Any]:
            return await engine.read_failed_probe(batch)

        sender = Sender(database, http_client, metrics, redact, details)
        engine = Engine(database, *clients, sender, metrics, redact)
        operations = Operations(engine, sender, database, audit_log)
        gateway_operations = GatewayOperations(gateway, audit_log, lambda: database.clock.unix(database.clock.now()))
        snapshot = SnapshotSource(database, lambda: engine.exporter)
        administration = Administration(database, api_tokens, sessions, audit_log)
        buttons = ButtonHandler(operations, database, metrics, audit_log)
        connections = LongConnections(database, buttons, metrics)
        return cls(
            database, redact, metrics, http_client, access, sign_in_services, administration, engine, operations,
            gateway_operations, snapshot, Reporter(database), sender, buttons, connections,
        )  # fmt: skip

    def add_routes(self, app: web.Application, reload: Reloader) -> None:
        webhook.add_routes(app, self.engine, self.database, self.metrics)
        read_api.add_routes(app, self.database, self.metrics, self.redact)
        overview_api.add_routes(app, self.snapshot, self.database, self.redact)
        events_api.add_routes(app, self.database, self.redact)
        heartbeats_api.add_routes(app, self.snapshot, self.operations, self.database, self.redact)
        gateway_api.add_routes(app, self.gateway, self.database, self.redact)
        report_api.add_routes(app, self.reporter, self.database, self.redact)
        write_api.add_routes(app, self.operations, self.database, self.redact, reload)
        access_api.add_routes(app, self.administration, self.database)
        feishu_callback.add_routes(app, self.database, self.buttons)

    def public_url(self) -> str:
        """Return the console's URL for browsers."""
        inventory = self.database.inventory
        return inventory.notify.links.remediator or inventory.remediator.url.url

    async def apply_access(self, loaded: LoadedInventory) -> None:
        """Put the access settings of a configuration in force. Raises StartError."""
        inventory = loaded.inventory
        await self.sign_in_services.apply(inventory.access)
        urls = [inventory.notify.links.remediator or inventory.remediator.url.url, inventory.remediator.url.url]
        self.access.settings = create_settings(inventory.access, urls, self.sign_in_services.find_role)
        await self.access.tokens.replace(
            [
                (loaded.local_token("remediator"), Role.ADMIN),
                (loaded.token("remediator.webhook_token"), Role.WEBHOOK),
                (loaded.token("access.metrics_token"), Role.METRICS),
            ]
        )

    @property
    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """What runs beside the server; a full disk or a lost database ends none of it."""
        return (
            self.engine.run, self.sender.run, self.run_housekeeping, self.connections.run, self.access.run,
            self.snapshot.run, self.run_dead_man, self.run_scheduled_reports,
        )  # fmt: skip

    async def run_housekeeping(self) -> None:
        await run_housekeeping(self.database, self.engine.wake, self.administration.store_token_uses)

    async def run_scheduled_reports(self) -> None:
        await run_scheduled_reports(self.database, self.reporter, self.sender.wake)

    async def run_dead_man(self) -> None:
        await run_dead_man(self.database, self.snapshot, self.http_client, self.metrics)

    async def drain(self) -> None:
        await self.buttons.drain()
        await self.engine.drain()


class _Reload:
    """Loads the configuration again and puts it in force; if that fails, the previous one stays in force."""

    def __init__(self, sources: ServiceSources, parts: Parts, clients: Clients) -> None:
        self._sources, self._parts, self.clients = sources, parts, clients

    async def __call__(self) -> Mapping[str, object]:
        engine = self._parts.engine
        loaded = await self._sources.load()
        self._parts.redact.add(loaded.secrets)
        new_clients = await asyncio.to_thread(_create_clients, loaded, self._parts.redact)
        gateway = await asyncio.to_thread(_create_gateway, loaded)
        previous = self._parts.database.inventory
        try:
            await engine.reload(loaded.inventory, *new_clients)
            await self._parts.apply_access(loaded)
        except Exception:
            await engine.reload(previous, *self.clients)
            await _close(*new_clients)
            if gateway is not None:
                await gateway.close()
            raise
        await self._parts.gateway.replace(gateway)
        old_clients, self.clients = self.clients, new_clients
        await _close(*old_clients)
        freeze_garbage_collector()
        warn_of_restart("remediator", previous.remediator, loaded.inventory.remediator, ["database"])
        return {"services": len(loaded.inventory.services)}


def _create_clients(loaded: LoadedInventory, redact: Redactor) -> Clients:
    """Create the clients of the exporter and Alertmanager, and the local token if it is needed. Raises DefibError."""
    settings = loaded.inventory.remediator
    for token in (loaded.local_token("exporter"), loaded.local_token("remediator")):
        if token.owned and token.file is not None:
            redact.add([tokens.ensure_token(token.file).get_secret_value()])
    alertmanager = settings.alertmanager_url
    exporter = Exporter(loaded.inventory.exporter.url, loaded.local_token("exporter"), redact)
    return exporter, Alertmanager(alertmanager) if alertmanager else None


def _create_gateway(loaded: LoadedInventory) -> Gateway | None:
    """Create the client of the gateway, if one is configured. Raises StartError."""
    settings = loaded.inventory.gateway
    return Gateway(settings.url, loaded.local_token("gateway")) if settings.upstreams else None


async def _close(exporter: Exporter, alertmanager: Alertmanager | None) -> None:
    await exporter.close()
    if alertmanager is not None:
        await alertmanager.close()
