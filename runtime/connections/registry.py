"""The open connections of a server, within its limits."""

import asyncio
import itertools
import resource
import socket
import ssl
from collections import deque
from dataclasses import dataclass
from typing import cast

from aiohttp import web

from runtime.access.control import find_identity
from runtime.connections.connection import MAX_HEADER_COUNT, Connection
from runtime.connections.importance import Importance
from runtime.connections.suspended import SuspendedConnection
from runtime.http_checks import PASSES_BODIES, RESPONSE_HEADERS, find_fault, refuse
from runtime.logs import LimitedLog
from runtime.metrics import ProgramMetrics
from runtime.pacing import PacedProtocol, RequestPacer
from runtime.suspension import RESUMED, SuspendedError, Work, format_head

HANDSHAKE_TIMEOUT = 10.0  # of TLS
PART = 8 * 1024  # bytes that are parsed in one turn of the event loop
_DROPPED_TOGETHER = 20
_RESUMED_TOGETHER = 8
_BAD_REQUEST = 400
AnyConnection = Connection | SuspendedConnection
_log = LimitedLog()


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections a server has at most, and how much of the limit of open files they may take."""

    total: int = 2048
    per_address: int = 512
    tls: int = 512  # each takes more than a megabyte while its client sends as fast as it can
    tls_per_address: int = 256
    share_of_files: float = 0.25


DEFAULT_LIMITS = ConnectionLimits()
CONNECTION_LIMITS = web.AppKey("connection_limits", ConnectionLimits)


class Connections:
    """The open connections of a server."""

    def __init__(self, app: web.Application, server: web.Server, metrics: ProgramMetrics) -> None:
        self._server, self._metrics = server, metrics
        self._headers = app[RESPONSE_HEADERS]
        self._limits = app.get(CONNECTION_LIMITS, DEFAULT_LIMITS)
        self._file_limit = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * self._limits.share_of_files)
        self._passes_bodies = app.get(PASSES_BODIES, False)
        self._count = 0
        self._by_address: dict[str, dict[AnyConnection, None]] = {}
        self._resuming: deque[SuspendedConnection] = deque()
        self.may_suspend = True
        self._pacer = RequestPacer()
        self._handle = server.request_handler
        server.request_handler = self._answer

    def open(self, client: socket.socket, address: str, tls: ssl.SSLContext | None) -> None:
        """Serve a client that has connected from this address."""
        connection = Connection(self._server, self, client, address)
        self.add(connection, has_tls=tls is not None)
        connection.opening = asyncio.get_running_loop().create_task(self._open(connection, client, tls))

    async def _open(self, connection: Connection, client: socket.socket, tls: ssl.SSLContext | None) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: PacedProtocol(connection, PART),
                client,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT if tls else None,
            )
        except OSError as error:  # the client has gone, refuses the handshake, sends something else, or is silent
            if isinstance(error, ConnectionAbortedError):
                connection.drop("handshake")
            self.remove(connection)
            client.close()
        finally:
            connection.opening = None

    def add(self, connection: Connection, *, has_tls: bool) -> None:
        """Add a new connection. At a limit, drop one that can be spared, or the new one if there is none."""
        limits = self._limits
        limit, limit_per_address = limits.total, limits.per_address
        if has_tls:
            limit, limit_per_address = limits.tls, limits.tls_per_address
        siblings = self._by_address.get(connection.address, {})
        candidates: list[dict[AnyConnection, None]] = []
        if len(siblings) >= limit_per_address:
            candidates = [siblings]
        elif self._count >= min(limit, self._file_limit):
            candidates = sorted(self._by_address.values(), key=len, reverse=True)
        dropped = None
        if candidates:
            now = asyncio.get_running_loop().time()
            spared = [found for each in candidates if (found := _find_spared(each, now)) is not None]
            # Of the address with the most connections, if several can be spared alike.
            dropped = min(spared, key=lambda each: each.importance(now), default=connection)
        self._by_address.setdefault(connection.address, {})[connection] = None
        self._count += 1
        self._metrics.connections.inc()
        if dropped is not None:
            dropped.drop("limit")

    def move_to_end(self, connection: Connection) -> None:
        """Note that the connection has begun to wait for its client."""
        siblings = self._by_address.get(connection.address, {})
        if connection in siblings:
            del siblings[connection]
            siblings[connection] = None

    def remove(self, connection: AnyConnection) -> None:
        siblings = self._by_address.get(connection.address, {})
        if connection in siblings:
            del siblings[connection]
            self._count -= 1
            self._metrics.connections.dec()
            if not siblings:
                del self._by_address[connection.address]

    def check_timeouts(self) -> bool:
        """Drop connections of slow clients, and return whether there may be more of them.

        Few at a time, so that the event loop is never blocked for long.
        """
        now = asyncio.get_running_loop().time()
        connections = [each for siblings in self._by_address.values() for each in siblings]
        overdue = (each for each in connections if each.drop_if_slow(now))
        return len(list(itertools.islice(overdue, _DROPPED_TOGETHER))) == _DROPPED_TOGETHER

    def report_drop(self, connection: AnyConnection, reason: str) -> None:
        self._metrics.dropped_connections.labels(reason).inc()
        _log.warning("connection_dropped", client=connection.address, reason=reason)

    def refuse(self, connection: Connection, fault: str) -> web.Response:
        """Return the response to a malformed request."""
        self._metrics.malformed_requests.inc()
        _log.warning("request_malformed", client=connection.address, fault=fault)
        return refuse(_BAD_REQUEST, "malformed_request", fault, self._headers)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast("Connection", request.protocol)
        with connection.answer(request):
            if (queue := connection.find_queue(request)) is not None:
                await self._pacer.wait(queue)
            fault = find_fault(request, compressed=self._passes_bodies)
            if fault is not None:
                return self.refuse(connection, fault)
            if connection.resumed is not None:
                request[RESUMED], connection.resumed = connection.resumed, None
            try:
                return await self._handle(request)
            except SuspendedError as suspended:
                if connection.may_suspend():
                    self._suspend(connection, request, suspended.work)
                else:  # it has just been dropped
                    suspended.work.close()
                raise

    def _suspend(self, connection: Connection, request: web.BaseRequest, work: Work) -> None:
        """Put a small connection in the place of one whose request goes on later."""
        importance = connection.importance(asyncio.get_running_loop().time())
        identity = find_identity(request)
        suspended = SuspendedConnection(self, connection.address, identity.label if identity else "", importance)
        suspended.head, suspended.work = format_head(request), work
        suspended.connection_made(connection.release(suspended))
        self._replace(connection, suspended)
        work.wait(suspended.resume)

    def _replace(self, old: AnyConnection, new: AnyConnection) -> None:
        siblings = self._by_address[old.address]
        del siblings[old]
        siblings[new] = None

    def resume(self, suspended: SuspendedConnection) -> None:
        """Go on with a request: few in each turn of the event loop, since thousands may at the same time."""
        self._resuming.append(suspended)
        if len(self._resuming) == 1:
            asyncio.get_running_loop().call_soon(self._resume_some)

    def _resume_some(self) -> None:
        try:
            for _ in range(min(_RESUMED_TOGETHER, len(self._resuming))):
                suspended = self._resuming.popleft()
                if not suspended.has_ended:
                    self._resume(suspended)
        finally:
            if self._resuming:
                asyncio.get_running_loop().call_soon(self._resume_some)

    def _resume(self, suspended: SuspendedConnection) -> None:
        connection = Connection(self._server, self, None, suspended.address, max_headers=MAX_HEADER_COUNT + 1)
        self._replace(suspended, connection)
        try:
            connection.take_over(suspended)
        except OSError:  # its client has gone
            connection.abort()

    def end_suspended(self) -> None:
        """Drop the connections whose requests are suspended, and suspend no more."""
        self.may_suspend = False
        for siblings in list(self._by_address.values()):
            for each in [each for each in siblings if isinstance(each, SuspendedConnection)]:
                each.abort()


def _find_spared(connections: dict[AnyConnection, None], now: float) -> AnyConnection | None:
    """Return the connection that can be spared most; of several, the one that has waited for its client the longest."""
    found, least = None, Importance.BUSY
    for each in connections:
        importance = each.importance(now)
        if importance < least:
            found, least = each, importance
            if importance is Importance.REFUSED:
                break
    return found
