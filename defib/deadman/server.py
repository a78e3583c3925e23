"""The watcher's server: it receives pings, and notifies the channels when they stop and when they return.

It also passes on to them what Alertmanager notifies of.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import structlog
from aiohttp import web

from defib.deadman import messages, store, watch
from defib.deadman.alerts import MAX_BODY, AlertRelay, Destination
from defib.deadman.watch import Watch
from defib.lookup import find_channel
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.problems import ConfigurationError
from remediator.clients.alerts import InvalidPayloadError, PayloadTooLargeError, parse_webhook
from remediator.notifications.channels import ChannelClient, SendResult
from runtime.access.audit import write_to_log
from runtime.access.control import AccessControl
from runtime.access.roles import AccessRequirement, Role
from runtime.access.tokens import ConfiguredTokens
from runtime.errors import ApiError
from runtime.http_clients import limit_interim_responses
from runtime.lifecycle import ListenAddress, Reloader, serve
from runtime.metrics import ProgramMetrics
from runtime.payloads import parse_body
from runtime.redaction import Redactor
from runtime.request_bodies import read_request_body
from runtime.times import format_rfc3339
from runtime.tls import create_client_context
from runtime.tokens import ConfiguredToken, ensure_token
from runtime.web import add_route, create_application
from runtime.webconfig import WebConfigFile

CHECK_EVERY = 1.0
FIRST_RETRY, MAX_RETRY = 2.0, 300.0  # seconds between attempts to notify a channel
log = structlog.get_logger()


@dataclass(frozen=True)
class WatcherSettings:
    """The channels to notify, the seconds after which a ping is missing, and the folder of the token and the state.

    Without channels, those that would be notified of RemediatorDown. With `pings_optional`, a ping is missing only once
    one has arrived.
    """

    channels: Sequence[str]
    within: float
    folder: Path
    pings_optional: bool = False


async def run(
    load: Callable[[], LoadedInventory],
    listen: ListenAddress,
    web_config: WebConfigFile,
    redact: Redactor,
    settings: WatcherSettings,
) -> None:
    """Serve until a signal stops it. Raises DefibError before anything is started."""
    loaded = load()
    destination = _find_destination(loaded, settings.channels)
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    token = ensure_token(settings.folder / "token").get_secret_value()
    redact.add([*loaded.secrets, token])
    loop = asyncio.get_running_loop()
    access = AccessControl(
        lambda: web_config.users, ConfiguredTokens(redact.add), write_audit=write_to_log, now=loop.time
    )
    await access.tokens.replace((each, Role.WEBHOOK) for each in _list_tokens(loaded, settings.folder))
    metrics = ProgramMetrics()
    async with limit_interim_responses(httpx.AsyncClient(trust_env=True, verify=create_client_context())) as client:
        channels = ChannelClient(client)
        watcher, relay = _Watcher(settings, destination, channels, redact), AlertRelay(destination, channels, redact)
        app = create_application(access, web_config, ready=lambda: bool(relay.destination.channels))

        async def receive_ping(request: web.Request) -> web.Response:
            if not secrets.compare_digest(request.match_info["token"].encode(), token.encode()):
                raise ApiError(404, "not_found", "there is no such ping URL")
            await watcher.receive_ping()
            return web.Response(text="OK\n")

        async def reload() -> Mapping[str, object]:
            loaded = await asyncio.to_thread(load)
            new = _find_destination(loaded, settings.channels)
            redact.add(loaded.secrets)
            await access.tokens.replace((each, Role.WEBHOOK) for each in _list_tokens(loaded, settings.folder))
            watcher.destination = relay.destination = new
            return {"channels": list(new.channels)}

        for method in ("GET", "POST", "PUT"):
            add_route(app, method, "/ping/{token}", receive_ping, AccessRequirement.UNCHECKED)
        _add_alerts(app, relay)
        await serve(
            "deadman", app, listen, metrics, web_config=web_config,
            tasks=[watcher.run, relay.run, access.run], reload=Reloader(reload, metrics),
        )  # fmt: skip


def _add_alerts(app: web.Application, relay: AlertRelay) -> None:
    async def receive_alerts(request: web.Request) -> web.Response:
        body = await read_request_body(request, MAX_BODY)
        try:
            payload = await parse_body(parse_webhook, body)
        except InvalidPayloadError as error:
            raise ApiError(400, "not_a_delivery", str(error)) from error
        except PayloadTooLargeError as error:
            raise ApiError(413, "too_large", str(error)) from error
        sent = await relay.deliver(payload)
        return web.json_response({"alerts": len(payload.alerts), "sent": sent})

    add_route(app, "POST", "/alerts", receive_alerts, AccessRequirement.WEBHOOK)


def _find_destination(loaded: LoadedInventory, named: Sequence[str]) -> Destination:
    """Return the channels to notify: those named, else those for problems of Defib, else all. Raises DefibError."""
    notify = loaded.inventory.notify
    for name in named:
        find_channel(loaded.inventory, name)
    routed = notify.channels_for({"alertname": "RemediatorDown", "severity": "critical"}, "alert")
    channels = list(named or [name for name in routed if name in notify.channels] or notify.channels)
    loaded.require_resolved(*(f"notify.channels.{name}" for name in channels))
    if not channels:
        log.warning("no_channel", effect="nobody is notified", hint="add a channel to the configuration, and reload")
    return Destination(loaded.inventory, channels)


def _list_tokens(loaded: LoadedInventory, folder: Path) -> Iterator[ConfiguredToken]:
    """Yield the tokens of Alertmanager: the watcher's own, and that which it sends to a remediator of this machine."""
    yield ConfiguredToken("token", file=folder / "token", owned=True)
    try:
        loaded.require_resolved("remediator.webhook_token")
    except ConfigurationError as error:
        log.warning("webhook_token_unresolved", error=str(error))
    else:
        yield loaded.token("remediator.webhook_token")


class _Watcher:
    """The state of the pings, in memory and in its file."""

    def __init__(
        self, settings: WatcherSettings, destination: Destination, client: ChannelClient, redact: Redactor
    ) -> None:
        self.destination = destination  # which a reload replaces
        self._settings, self._client, self._redact = settings, client, redact
        # Setting the system time while it runs must not make a ping overdue.
        self._clock_offset = time.time() - time.monotonic()
        self._started = self._now()
        self._path = settings.folder / "state.json"
        self._watch = self._stored = store.read_watch(self._path, self._started)
        self._writing = asyncio.Lock()
        self._sending: dict[str, asyncio.Task[None]] = {}  # by channel

    def _now(self) -> float:
        return time.monotonic() + self._clock_offset

    async def receive_ping(self) -> None:
        await self._replace(watch.receive_ping(self._watch, self._now()))

    async def run(self) -> None:
        """Check the deadline and notify the channels, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                if self._watch.pinged_at is not None or not self._settings.pings_optional:
                    await self._replace(
                        watch.check_deadline(self._watch, self._now(), self._settings.within, self._started)
                    )
                for name in watch.list_due(self._watch, self.destination.channels):
                    if name not in self._sending or self._sending[name].done():
                        self._sending[name] = group.create_task(self._notify(name), name=f"notify {name}")
                await asyncio.sleep(CHECK_EVERY)

    async def _replace(self, new: Watch) -> None:
        """Put a state in force, and store it."""
        if new.is_missing and not self._watch.is_missing:
            log.error("pings_missing", last=format_rfc3339(new.pinged_at))
        if self._watch.is_missing and not new.is_missing:
            log.info("pings_returned", missing_since=format_rfc3339(new.missing_since))
        self._watch = new
        async with self._writing:
            if self._watch == self._stored:
                return
            try:
                await asyncio.to_thread(store.write_watch, self._path, self._watch)
            except OSError as error:  # the watch goes on; a restart would lose what happened since the last success
                log.error("state_not_stored", file=str(self._path), error=str(error))  # noqa: TRY400 - no traceback needed
            else:
                self._stored = self._watch

    async def _notify(self, name: str) -> None:
        """Notify a channel, and try again until it accepts the message or there is nothing to say any more."""
        tries, result = 0, None
        while name in self.destination.channels and name in watch.list_due(self._watch, [name]):
            missing = self._watch.is_missing
            result = await self._send(name, result)
            level = log.info if result.outcome == "sent" else log.warning
            level(
                f"notification_{result.outcome}", channel=name, missing=missing, response=self._redact(result.response)
            )
            if result.outcome == "sent":
                await self._replace(watch.record_notified(self._watch, name, missing=missing))
                return
            if result.outcome != "resend":
                await asyncio.sleep(max(min(MAX_RETRY, FIRST_RETRY * 2.0**tries), result.retry_after or 0.0))
                tries = min(tries + 1, 16)

    async def _send(self, name: str, last: SendResult | None) -> SendResult:
        inventory = self.destination.inventory
        message = messages.build_message(self._watch, inventory, self._now())
        if last is not None:
            message = replace(message, retry_state=last.retry_state)
        return await self._client.send(inventory.notify.channels[name], message, time.time())
