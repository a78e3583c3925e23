"""Connections to upstreams, which stay open while a reload replaces the settings."""

import asyncio
import os
import ssl
from typing import NamedTuple

import aiohappyeyeballs
from yarl import URL

from fleet.inventory.endpoints import TlsSettings
from gateway.admission import Permit
from gateway.connections import Call, Connection, Response, UpstreamError
from runtime.errors import DefibError
from runtime.lookups import look_up
from runtime.pacing import PacedProtocol
from runtime.tls import create_client_context

CONNECT_TIMEOUT = 10.0  # seconds
NEXT_ADDRESS_DELAY = 0.25  # seconds (RFC 8305)
KEPT = 15.0  # seconds for which a connection waits for the next request


def create_tls(tls: TlsSettings) -> ssl.SSLContext:
    """Return the context for connections to an upstream. Raises DefibError."""
    try:
        context = create_client_context(str(tls.ca_file) if tls.ca_file else None)
        if tls.cert_file:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise DefibError(f"gateway: cannot load the certificates of an upstream: {error}") from error
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Origin(NamedTuple):
    """Where an upstream is; `host_header` names it in requests."""

    host: str
    port: int
    is_secure: bool
    host_header: str

    @classmethod
    def of(cls, url: URL) -> "Origin":
        return cls(url.raw_host or "", url.port or 0, url.scheme == "https", url.host_port_subcomponent or "")


class ConnectionPool:
    """The connections with one set of TLS settings. A retired pool keeps none after its requests in progress."""

    def __init__(self, tls: ssl.SSLContext, server_name: str | None) -> None:
        self._tls, self._server_name = tls, server_name
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._idle: dict[Origin, list[Connection]] = {}  # the oldest first
        self._closing: asyncio.TimerHandle | None = None
        self._is_retired = False

    async def request(self, origin: Origin, call: Call, timeout: float, permit: Permit) -> Response:
        """Send a request, and wait until its response begins; silence may last `timeout` seconds. Raises UpstreamError.

        `permit` is told when sending begins and ends. The caller closes the response.
        """
        connection = self._take(origin) or await self._connect(origin)
        permit.begin_sending()
        response = connection.send(call, timeout, permit.mark_sent)
        try:
            await response.begin()
        except BaseException:
            response.close()
            raise
        permit.mark_sent()
        return response

    def _take(self, origin: Origin) -> Connection | None:
        """Return the connection that was used last, so that others which are not needed can be closed."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self, origin: Origin) -> Connection:
        """Raises UpstreamError."""

        def create() -> PacedProtocol[Connection]:  # many small chunks must not block the event loop
            return PacedProtocol(Connection(origin.host_header, keep, self._forget))

        def keep(connection: Connection) -> None:
            self._keep(origin, connection)

        server_name = (self._server_name or origin.host) if origin.is_secure else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                addresses = await look_up(origin.host, origin.port)
                sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_DELAY)
                _, paced = await self._loop.create_connection(
                    create, sock=sock, ssl=self._tls if origin.is_secure else None, server_hostname=server_name
                )
        except TimeoutError as error:
            raise UpstreamError(f"cannot connect to the upstream within {CONNECT_TIMEOUT:g} s") from error
        except (OSError, UnicodeError) as error:
            raise UpstreamError(f"cannot connect to the upstream: {_find_cause(error)}") from error
        self._connections.add(paced.protocol)
        return paced.protocol

    def _keep(self, origin: Origin, connection: Connection) -> None:
        """Keep a connection for the next request."""
        if self._is_retired:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.setdefault(origin, []).append(connection)
        if self._closing is None:
            self._closing = self._loop.call_later(KEPT, self._close_unused)

    def _close_unused(self) -> None:
        self._closing = None
        oldest, now = None, self._loop.time()
        for idle in self._idle.values():
            while idle and idle[0].idle_since <= now - KEPT:
                idle.pop(0).abort()
            if idle:
                oldest = min(idle[0].idle_since, oldest or now)
        if oldest is not None:
            self._closing = self._loop.call_at(oldest + KEPT, self._close_unused)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        for idle in self._idle.values():
            if connection in idle:
                idle.remove(connection)

    def retire(self) -> None:
        """Close the connections, each after the request for which it is in use."""
        self._is_retired = True
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()

    def close(self) -> None:
        """Close all connections at once."""
        self._is_retired = True
        for connection in list(self._connections):
            connection.abort()
        if self._closing is not None:
            self._closing.cancel()


def _find_cause(error: Exception) -> str:
    """Return why a connection failed: the texts of asyncio name addresses instead."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {error.verify_message}"
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    return os.strerror(number) if number is not None and number > 0 else type(error).__name__
