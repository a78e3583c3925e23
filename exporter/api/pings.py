"""The ping API of healthchecks: jobs request a URL when they start, end or fail. Its paths are secrets.

The paths, answers and headers are those of healthchecks (https://healthchecks.io/docs/http_api/), so that its clients
work unchanged: `/ping/UUID` and `/ping/PING_KEY/SLUG`, each also without `/ping` and with `/start`, `/fail`, `/log` or
an exit status.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from aiohttp import web

from exporter.heartbeats.bodies import SentBody
from exporter.heartbeats.creation import NotCreatedError
from exporter.heartbeats.rate_limit import RateLimitedError
from exporter.heartbeats.store import HeartbeatStoreError
from exporter.scheduler.probe_scheduler import ProbeScheduler
from fleet.inventory.heartbeats import is_uuid
from fleet.pings import BODY_LIMIT, PingKind

BODY_TIMEOUT = 10.0  # seconds after which a ping counts with the part of its body that has arrived
MAX_EXIT_STATUS = 255
HEADERS = {"Access-Control-Allow-Origin": "*", "Ping-Body-Limit": str(BODY_LIMIT)}
METHODS = ("GET", "HEAD", "POST")
_ACTIONS: dict[str, tuple[PingKind, int | None]] = {
    "": ("success", None), "start": ("start", None), "fail": ("fail", None), "log": ("log", None),
}  # fmt: skip
_RUN_ID_LIMIT = 36  # characters


class PingError(Exception):
    """A request that is no ping of a heartbeat, with its answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


@dataclass(frozen=True, slots=True)
class PingTarget:
    """What the path of a request names: a UUID, or a ping key and a slug; and what happened there."""

    uuid: str
    ping_key: str
    slug: str
    kind: PingKind
    exit_status: int | None


def parse_ping_path(path: str) -> PingTarget:
    """Parse the path of a request, without its query. Raises PingError."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if parts[0] == "ping":
        parts = parts[1:]
    if not parts or not parts[0]:
        raise PingError(404, "not found")
    if is_uuid(parts[0]):
        kind, exit_status = _parse_action(parts[1:])
        return PingTarget(parts[0], "", "", kind, exit_status)
    if len(parts) == 1:
        raise PingError(400, "invalid uuid format")
    kind, exit_status = _parse_action(parts[2:])
    return PingTarget("", parts[0], parts[1], kind, exit_status)


def _parse_action(parts: Sequence[str]) -> tuple[PingKind, int | None]:
    if len(parts) > 1:
        raise PingError(400, "invalid url format")
    action = parts[0] if parts else ""
    if action in _ACTIONS:
        return _ACTIONS[action]
    if re.fullmatch("[0-9]{1,3}", action) is None or int(action) > MAX_EXIT_STATUS:
        raise PingError(400, "invalid url format")
    return ("fail" if int(action) else "success"), int(action)


class PingApi:
    """Answers pings, once they are stored."""

    def __init__(self, scheduler: ProbeScheduler) -> None:
        self._scheduler, self._heartbeats = scheduler, scheduler.heartbeats

    async def answer(self, request: web.Request) -> web.Response:
        """Answer any request of the listener."""
        try:
            is_new = await self._receive(request)
        except (PingError, NotCreatedError) as error:
            return web.Response(status=error.status, text=error.text, headers=HEADERS)
        except RateLimitedError as error:
            wait = {"Retry-After": str(max(1, round(error.retry_after)))}
            return web.Response(status=429, text="rate limit exceeded", headers=HEADERS | wait)
        except HeartbeatStoreError:
            return web.Response(status=503, text="cannot store the ping", headers=HEADERS | {"Retry-After": "5"})
        return web.Response(status=201 if is_new else 200, text="Created" if is_new else "OK", headers=HEADERS)

    async def _receive(self, request: web.Request) -> bool:
        """Store a ping; returns whether it has created its heartbeat."""
        if request.method not in METHODS:
            raise PingError(405, "method not allowed")
        target = parse_ping_path(request.rel_url.raw_path)
        run_id = request.query.get("rid", "")
        if run_id and not is_uuid(run_id):
            raise PingError(400, "invalid uuid format")
        is_new = request.query.get("create") == "1" and await self._create(target)
        service = self._find_service(target)
        body = await _read_body(request)
        try:
            await self._heartbeats.receive(
                service, target.kind, target.exit_status, run_id.lower(), body, client=name_client(request)
            )
        except KeyError:  # a reload has removed it meanwhile
            raise PingError(404, "not found") from None
        return is_new

    async def _create(self, target: PingTarget) -> bool:
        """Create the heartbeat of an unknown slug; returns whether it is new. Raises NotCreatedError."""
        registry = self._heartbeats.registry
        if not registry.is_ping_key(target.ping_key) or registry.find_by_slug(target.ping_key, target.slug):
            return False
        return await self._scheduler.create_heartbeat(target.slug)

    def _find_service(self, target: PingTarget) -> str:
        registry = self._heartbeats.registry
        if target.uuid:
            found = registry.find_by_uuid(target.uuid)
            services = [] if found is None else [found]
        else:
            services = list(registry.find_by_slug(target.ping_key, target.slug))
        if not services:
            raise PingError(404, "not found")
        if len(services) > 1:
            raise PingError(409, "ambiguous slug")
        return services[0]


def name_client(request: web.Request) -> str:
    """Return who sent a ping, as lists of pings show it."""
    return f"{request.method} {request.remote or ''} {request.headers.get('User-Agent', '')}".strip()


async def _read_body(request: web.Request) -> SentBody:
    """Return the body, or what has arrived of it in time."""
    body = SentBody()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for part in request.content.iter_any():
                body.add(part)
    except (TimeoutError, web.RequestPayloadError, web.HTTPRequestTimeout):
        body.is_complete = False
    return body
