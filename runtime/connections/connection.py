"""The connection of one client, which must send requests and read responses in time."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from aiohttp import StreamReader, web

from runtime.access.control import LASTING, PAUSED, find_identity
from runtime.connections.importance import Importance
from runtime.http_checks import describe_parser_error
from runtime.suspension import Work

if TYPE_CHECKING:
    from runtime.connections.registry import Connections
    from runtime.connections.suspended import SuspendedConnection

HEADERS_TIMEOUT = 10.0  # from the connection, or from the first byte of a later request
BODY_TIMEOUT = 30.0
MAX_HEADER_COUNT = 128
MAX_HEADERS = 32 * 1024  # bytes of a request's headers that have arrived, while the others are missing
READ_BUFFER = 16 * 1024  # bytes of a body that wait for the application
MAX_PIECES = 1000  # parts of a body that wait for the application; each takes memory, however short it is
MAX_WAITING = 8  # requests of a connection that wait for the response to another one
RESPONSE_TIMEOUT = 30.0  # how long a client may leave full buffers unread
NEW_FOR = 2.0  # seconds in which a new connection is expected to send its first request
_BAD_REQUEST = 400


class Connection(web.RequestHandler):
    """The connection of one client, who must send requests and read responses in time."""

    def __init__(
        self,
        server: web.Server,
        connections: "Connections",
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

    def importance(self, now: float) -> Importance:
        request = self._request
        if request is not None and request.get(PAUSED, False):
            return Importance.REFUSED
        if request is not None and not request.get(LASTING, False) and self._is_answering(request):
            if find_identity(request) is not None:
                return Importance.BUSY
            return Importance.KNOWN if self._caller else Importance.UNKNOWN_BUSY  # it may wait for its turn
        if self._caller or (request is not None and find_identity(request) is not None):
            return Importance.KNOWN
        if self._has_sent_request:
            return Importance.UNKNOWN
        return Importance.NEW if now < self._opened_at + NEW_FOR else Importance.SILENT

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
