"""Accepts connections."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence

from runtime.addresses import group_address
from runtime.connections.registry import Connections
from runtime.logs import LimitedLog

_CHECK_EVERY = 1.0
_CHECK_AGAIN = 0.01
_BACKLOG = 1024
_ACCEPTED_TOGETHER = 10
_PAUSE_AFTER_FAILURE = 1.0
_log = LimitedLog()


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
