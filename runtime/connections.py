"""The connections of a server: limits on their number, and timeouts for slow clients.

A new connection that exceeds a limit takes the place of another one, preferably of a client that has shown no
credential. Clients without one can therefore not lock out those that have one, even from the same address.
"""

import asyncio
import contextlib
import enum
import itertools
import resource
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from aiohttp import StreamReader, web

from runtime.access.control import LASTING, PAUSED, find_identity
from runtime.addresses import group_address
from runtime.http_checks import PASSES_BODIES, RESPONSE_HEADERS, describe_parser_error, find_fault, refuse
from runtime.logs import LimitedLog
from runtime.metrics import ProgramMetrics
from runtime.pacing import PacedProtocol, RequestPacer
from runtime.suspension import RESUMED, SuspendedError, Work, format_head

HANDSHAKE_TIMEOUT = 10.0  # of TLS
HEADERS_TIMEOUT = 10.0  # from the connection, or from the first byte of a later request
BODY_TIMEOUT = 30.0
MAX_HEADER_COUNT = 128
MAX_HEADERS = 32 * 1024  # bytes of a request's headers that have arrived, while the others are missing
PART = 8 * 1024  # bytes that are parsed in one turn of the event loop
READ_BUFFER = 16 * 1024  # bytes of a body that wait for the application
MAX_PIECES = 1000  # parts of a body that wait for the application; each takes memory, however short it is
MAX_WAITING = 8  # requests of a connection that wait for the response to another one
RESPONSE_TIMEOUT = 30.0  # how long a client may leave full buffers unread
NEW_FOR = 2.0  # seconds in which a new connection is expected to send its first request
_CHECK_EVERY = 1.0
_CHECK_AGAIN = 0.01
_DROPPED_TOGETHER = 20
_BACKLOG = 1024
_ACCEPTED_TOGETHER = 10
_PAUSE_AFTER_FAILURE = 1.0
_RESUMED_TOGETHER = 8
_BAD_REQUEST = 400
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
        self._by_address: dict[str, dict[_AnyConnection, None]] = {}
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

    async def _open(self, connection: "Connection", client: socket.socket, tls: ssl.SSLContext | None) -> None:
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

    def add(self, connection: "Connection", *, has_tls: bool) -> None:
        """Add a new connection. At a limit, drop one that can be spared, or the new one if there is none."""
        limits = self._limits
        limit, limit_per_address = limits.total, limits.per_address
        if has_tls:
            limit, limit_per_address = limits.tls, limits.tls_per_address
        siblings = self._by_address.get(connection.address, {})
        candidates: list[dict[_AnyConnection, None]] = []
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

    def move_to_end(self, connection: "Connection") -> None:
        """Note that the connection has begun to wait for its client."""
        siblings = self._by_address.get(connection.address, {})
        if connection in siblings:
            del siblings[connection]
            siblings[connection] = None

    def remove(self, connection: "_AnyConnection") -> None:
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

    def report_drop(self, connection: "_AnyConnection", reason: str) -> None:
        self._metrics.dropped_connections.labels(reason).inc()
        _log.warning("connection_dropped", client=connection.address, reason=reason)

    def refuse(self, connection: "Connection", fault: str) -> web.Response:
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

    def _suspend(self, connection: "Connection", request: web.BaseRequest, work: Work) -> None:
        """Put a small connection in the place of one whose request goes on later."""
        importance = connection.importance(asyncio.get_running_loop().time())
        identity = find_identity(request)
        suspended = SuspendedConnection(self, connection.address, identity.label if identity else "", importance)
        suspended.head, suspended.work = format_head(request), work
        suspended.connection_made(connection.release(suspended))
        self._replace(connection, suspended)
        work.wait(suspended.resume)

    def _replace(self, old: "_AnyConnection", new: "_AnyConnection") -> None:
        siblings = self._by_address[old.address]
        del siblings[old]
        siblings[new] = None

    def resume(self, suspended: "SuspendedConnection") -> None:
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

    def _resume(self, suspended: "SuspendedConnection") -> None:
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


def _find_spared(connections: dict["_AnyConnection", None], now: float) -> "_AnyConnection | None":
    """Return the connection that can be spared most; of several, the one that has waited for its client the longest."""
    found, least = None, _Importance.BUSY
    for each in connections:
        importance = each.importance(now)
        if importance < least:
            found, least = each, importance
            if importance is _Importance.REFUSED:
                break
    return found


class _Importance(enum.IntEnum):
    """How important a connection is, when one has to be dropped."""

    REFUSED = 0  # it waits for its refusal
    SILENT = 1  # it has not sent a request for a while
    UNKNOWN = 2  # its last request had no valid credential
    UNKNOWN_BUSY = 3  # the application answers its request, which had no valid credential, or none yet
    NEW = 4  # its first request may be on its way
    KNOWN = 5  # its last request had a valid credential
    BUSY = 6  # the application answers its request, which has a valid credential: it is never dropped


class Connection(web.RequestHandler):
    """The connection of one client, who must send requests and read responses in time."""

    def __init__(
        self,
        server: web.Server,
        connections: Connections,
        client: socket.socket | None,
        address: str,
        *,
        max_headers: int = MAX_HEADER_COUNT,
    ) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # no log
            auto_decompress=False,  # a few kilobytes would become gigabytes, before access is checked
            read_bufsize=READ_BUFFER,
            max_headers=max_headers,
        )
        self._connections, self._socket, self.address = connections, client, address
        self._transport: asyncio.Transport | None = None
        self._request: web.BaseRequest | None = None
        self._request_start = 0.0
        self._headers_start: float | None = None  # None while a connection that is kept alive is idle
        self._pause_start: float | None = None
        self._header_bytes, self._has_headers = 0, False  # of a request that is being received
        self._body: StreamReader | None = None  # of the last request
        self._opened_at = self._loop.time()
        self._has_sent_request = self._is_dropped = False
        self._caller = ""  # of the last request, if that had a valid credential
        self.opening: asyncio.Task[None] | None = None
        self.resumed: Work | None = None  # with which the only request goes on
        self._has_resumed = False

    def find_queue(self, request: web.BaseRequest) -> str | None:
        """Return the queue in which a request waits until it begins; None for the first one with a credential.

        Until that is checked, the connection may be dropped for others; if it is wrong, the refusal is delayed.
        """
        if self._caller:
            return f"caller {self._caller}"
        has_credential = "Authorization" in request.headers or "Cookie" in request.headers
        return None if has_credential else f"address {self.address}"

    def drop(self, reason: str) -> None:
        """Close the connection; what has not been sent is lost."""
        self._connections.remove(self)
        self._connections.report_drop(self, reason)
        self.abort()

    def importance(self, now: float) -> _Importance:
        request = self._request
        if request is not None and request.get(PAUSED, False):
            return _Importance.REFUSED
        if request is not None and not request.get(LASTING, False) and self._is_answering(request):
            if find_identity(request) is not None:
                return _Importance.BUSY
            return _Importance.KNOWN if self._caller else _Importance.UNKNOWN_BUSY  # it may wait for its turn
        if self._caller or (request is not None and find_identity(request) is not None):
            return _Importance.KNOWN
        if self._has_sent_request:
            return _Importance.UNKNOWN
        return _Importance.NEW if now < self._opened_at + NEW_FOR else _Importance.SILENT

    def _is_answering(self, request: web.BaseRequest) -> bool:
        """Whether the connection waits for the application, and not for its client."""
        return not self.writing_paused and request.content.is_eof()

    @contextlib.contextmanager
    def answer(self, request: web.BaseRequest) -> Iterator[None]:
        """Note that the headers have arrived, and the application answers."""
        self._request, self._request_start = request, self._loop.time()
        self._headers_start, self._has_sent_request = None, True
        self._body = request.content
        try:
            yield
        finally:
            self._request, self._has_headers = None, False
            identity = find_identity(request)
            self._caller = identity.label if identity is not None else ""
            self._connections.move_to_end(self)

    def may_suspend(self) -> bool:
        """Whether nothing of the present request has to be received, and nothing has to be sent before its response."""
        is_read = self._body is not None and self._body.is_eof() and not self._messages
        is_open = self.transport is not None and not self._is_dropped and self._connections.may_suspend
        return is_read and is_open and not self.writing_paused

    def release(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        """Give the transport to another protocol, and end the handling of the present request."""
        transport = self._transport
        assert transport is not None  # noqa: S101 - else it could not be suspended
        self._transport = self.transport = None  # so that aiohttp does not close it
        super().connection_lost(None)
        transport.set_protocol(protocol)
        return transport

    def take_over(self, suspended: "SuspendedConnection") -> None:
        """Go on with a request that was suspended."""
        self._caller, self.resumed = suspended.caller, suspended.work
        transport = suspended.release(self)
        self.connection_made(transport)
        self.data_received(suspended.head)
        self._has_resumed = True

    def abort(self) -> None:
        """Close the connection without sending what waits to be sent."""
        self._is_dropped = True
        if self._transport is not None:
            self._transport.abort()
        elif self._socket is not None:
            with contextlib.suppress(OSError):  # the client has gone
                self._socket.shutdown(socket.SHUT_RDWR)  # ends the TLS handshake

    def drop_if_slow(self, now: float) -> bool:
        """Drop the connection if its client is too slow, and return whether it was."""
        if self._headers_start is not None and now > self._headers_start + HEADERS_TIMEOUT:
            self.drop("headers")
            return True
        if self._pause_start is not None and now > self._pause_start + RESPONSE_TIMEOUT:
            self.drop("response")
            return True
        if self._request is None or now < self._request_start + BODY_TIMEOUT:
            return False
        body = self._request.content
        if body.is_eof() or body.exception() is not None:
            return False
        self._connections.report_drop(self, "body")
        # Ends the application's reading. After the response, aiohttp closes the connection.
        body.set_exception(web.HTTPRequestTimeout())
        return True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)
        self._headers_start = self._loop.time()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.remove(self)
        if self.resumed is not None:  # and has not gone on
            self.resumed.close()
            self.resumed = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_dropped or self._has_resumed:
            return  # the rest of what had arrived, or what follows the only request
        if self._request is None and self._headers_start is None:
            self._headers_start = self._loop.time()
        count = self._request_count
        # After an early response, the rest of the request's body still arrives.
        is_body = self._has_headers or (self._body is not None and not self._body.is_eof())
        super().data_received(data)
        payload = self._messages[-1][1] if self._messages else self._body
        if len(getattr(payload, "_buffer", ())) > MAX_PIECES:  # a body of tiny chunks
            self.drop("body")
            return
        if len(self._messages) > MAX_WAITING:
            self.drop("pipelining")
            return
        # Each header has a limit, but together they would take megabytes for each connection.
        if self._request_count != count:
            self._header_bytes, self._has_headers = 0, True
        elif not is_body:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADERS:
                self.drop("headers")

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume if reading was paused: readers call this for each part of a body, and the parser would be run."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._pause_start = self._loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._pause_start = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the response to what aiohttp cannot parse; its own would quote the request."""
        response = super().handle_error(request, status, exc, message)
        if status == _BAD_REQUEST:
            return self._connections.refuse(self, describe_parser_error(exc))
        return response


class SuspendedConnection(asyncio.Protocol):
    """A connection whose request is suspended: it only notices that its client leaves."""

    __slots__ = ("_connections", "_importance", "_transport", "address", "caller", "has_ended", "head", "work")
    head: bytes  # of the request
    work: Work
    _transport: asyncio.Transport

    def __init__(self, connections: Connections, address: str, caller: str, importance: _Importance) -> None:
        self._connections, self._importance = connections, importance
        self.address, self.caller = address, caller
        self.has_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Drop what follows the request: the connection is closed after the response."""

    def connection_lost(self, _exc: Exception | None) -> None:
        if not self.has_ended:
            self._end()

    def _end(self) -> None:
        self.has_ended = True
        self._connections.remove(self)
        self.work.close()

    def resume(self) -> None:
        """Go on with the request."""
        self._connections.resume(self)

    def release(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        """Give the transport to another protocol."""
        self.has_ended = True
        self._transport.set_protocol(protocol)
        return self._transport

    def drop(self, reason: str) -> None:
        self._connections.report_drop(self, reason)
        self.abort()

    def abort(self) -> None:
        """Close the connection, and end the request."""
        self._end()
        self._transport.abort()

    def importance(self, _now: float) -> _Importance:
        return self._importance

    def drop_if_slow(self, _now: float) -> bool:
        return False


_AnyConnection = Connection | SuspendedConnection


class Listener:
    """Accepts connections. Those in a TLS handshake count, which they would not with asyncio's own servers.

    `get_tls` returns the TLS context of a new connection, None without TLS.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], connections: Connections, get_tls: Callable[[], ssl.SSLContext | None]
    ) -> None:
        self._sockets, self._connections, self._get_tls = sockets, connections, get_tls
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        for each in sockets:
            self._start(each)
        self._check_timeouts()

    @classmethod
    async def bind(
        cls, host: str, port: int, connections: Connections, get_tls: Callable[[], ssl.SSLContext | None]
    ) -> "Listener":
        """Listen on all addresses of `host`. Raises OSError."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with contextlib.ExitStack() as opened:
            sockets = [
                opened.enter_context(socket.create_server(address[:2], family=family, backlog=_BACKLOG))
                for family, _, _, _, address in found
            ]
            opened.pop_all()
        return cls(sockets, connections, get_tls)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._sockets[0].getsockname()[:2]
        return host, port

    def close(self) -> None:
        """Accept no more connections; those that are open stay."""
        self._is_closed = True
        for each in self._sockets:
            self._loop.remove_reader(each)
            each.close()

    def end_suspended(self) -> None:
        """Drop the connections whose requests are suspended."""
        self._connections.end_suspended()

    def _start(self, listening: socket.socket) -> None:
        if not self._is_closed:
            listening.setblocking(False)
            self._loop.add_reader(listening, self._accept, listening)

    def _check_timeouts(self) -> None:
        # One timer for all connections: several for each request would take longer than a small request.
        has_more = self._connections.check_timeouts()
        self._loop.call_later(_CHECK_AGAIN if has_more else _CHECK_EVERY, self._check_timeouts)

    def _accept(self, listening: socket.socket) -> None:
        """Accept some of the clients that wait; the event loop calls again while there are others."""
        for _ in range(_ACCEPTED_TOGETHER):
            try:
                client, peer = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # too many open files, or no memory
                _log.warning("accept_failed", error=str(error))
                self._loop.remove_reader(listening)
                self._loop.call_later(_PAUSE_AFTER_FAILURE, self._start, listening)
                return
            client.setblocking(False)
            self._connections.open(client, group_address(peer[0]), self._get_tls())
