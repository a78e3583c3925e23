"""HTTP/1.1 with an upstream: one request at a time on a connection, and the response as it arrives.

No request is sent twice: the upstream may have counted the first one.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.bodies import PART, iterate_parts

HEAD_LIMIT = 128 * 1024  # bytes of a response without those of its body, and of each interim response
MAX_INTERIM = 20  # responses before the final one
_HIGH = 128 * 1024  # bytes of a body that wait to be read, when reading is paused
_INTERIM = frozenset({100, *range(102, 200)})  # 101 ends HTTP
_REDIRECTION, _ERROR = 300, 400
_BODY_IS_READ = frozenset({"POST", "PUT", "PATCH"})  # methods
_UNSAFE = re.compile(rb"[\0\r\n]")  # in a header, for clients


class UpstreamError(Exception):
    """An upstream has failed. The message is for the client and the log."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request as an upstream gets it: `target` is the path with the query; without content, it gives no length."""

    method: str
    target: str
    headers: CIMultiDict[str]
    content: bytes | None

    def is_read(self, status: int) -> bool:
        """Whether an upstream has read the content before it answers with a status.

        It would take what it has not read for the next request: the client could write one that reveals the key.
        """
        return not self.content or (self.method in _BODY_IS_READ and status < _REDIRECTION)

    def encode_head(self, host: str) -> bytes:
        lines = [f"{self.method} {self.target} HTTP/1.1", f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.content is not None:
            lines.append(f"Content-Length: {len(self.content)}")
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")


class Response:
    """The response to a request, of which `read` returns the body part by part.

    Raises UpstreamError if the upstream is silent for too long, breaks off, or sends what is not HTTP.
    """

    def __init__(self, connection: "Connection", call: Call, timeout: float) -> None:
        self.status = 0
        self.has_begun = False  # the final response
        self.reason = ""
        self.is_complete = False
        self.is_reusable = True  # the connection, for the next request
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._connection, self._call, self._timeout = connection, call, timeout
        self._loop = connection.loop
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self._parts: list[bytes] = []
        self._size = 0  # of the parts
        self._interim = 0
        self._outside_body = 0  # bytes since the last part of the body, or response
        self._has_length = False
        self._is_paused = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._silent_since = 0.0

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        return CIMultiDictProxy(self._headers)

    @property
    def at_end(self) -> bool:
        """Whether the whole body has been read."""
        return self.is_complete and not self._parts

    async def begin(self) -> None:
        """Wait until the response begins."""
        while not self.has_begun:
            await self.wait()

    async def read(self) -> bytes:
        """Return what has arrived of the body since the last call, after waiting for it; empty at the end."""
        while not self._parts and not self.is_complete:
            await self.wait()
        return self.take()

    def take(self) -> bytes:
        """Return what has arrived of the body since the last call, empty if there is nothing."""
        if not self._parts:
            return b""
        part = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        if self._is_paused:
            self._is_paused = False
            self._connection.resume_reading()
        return part

    async def wait(self) -> None:
        """Wait until something has changed."""
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        self.note_progress()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._check_silence)
        try:
            await self._waiter
        finally:
            self._waiter = None

    def note_progress(self) -> None:
        """Note that the upstream is not silent: it has sent something, or has taken a part of the request."""
        self._silent_since = self._loop.time()

    def _check_silence(self) -> None:
        self._timer = None
        left = self._silent_since + self._timeout - self._loop.time()
        if self._waiter is None:
            return
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_silence)
        else:
            self.fail("the upstream was silent for too long")

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, message: str) -> None:
        """End the response, unless it is complete; what has arrived can still be read."""
        self.is_reusable = False
        if self._error is None and not self.is_complete:
            self._error = UpstreamError(message)
        self.wake()

    def feed(self, data: bytes) -> None:
        """Take what the upstream has sent."""
        if self.is_complete or self._error is not None or self._parser is None:
            self.is_reusable = False
            return
        self._silent_since = self._loop.time()
        self._outside_body += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.is_reusable = False
        except httptools.HttpParserError as error:
            self.fail(f"the upstream's response is not valid ({type(error).__name__})")
        if self._outside_body > HEAD_LIMIT:
            self.fail("the upstream's response is not valid (the headers are too long)")
        if self._size > _HIGH and not self._is_paused:
            self._is_paused = True
            self._connection.pause_reading()
        self.wake()

    def end(self, error: Exception | None) -> None:
        """Take the end of the connection."""
        if self.has_begun and not self._has_length and error is None:
            self.is_complete = True
            self.wake()
        self.fail("the upstream's response ended too early" if self.has_begun else "the upstream closed the connection")

    def on_message_begin(self) -> None:
        if self.is_complete:  # another response, to no request
            self.is_reusable = False

    def on_status(self, reason: bytes) -> None:
        if not self.is_complete:
            self.reason += reason.decode("utf-8", "surrogateescape")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_begun:
            return  # a trailer
        if _UNSAFE.search(value) is not None:
            self.fail("the upstream's response is not valid (a header has control characters)")
        else:
            name = name.rstrip(b" ")  # as the parser understands it (RFC 9112, section 5.1)
            self._headers.add(name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        if self.is_complete or self._error is not None or self._parser is None:
            return
        status = self._parser.get_status_code()
        self._outside_body = 0
        if status in _INTERIM:
            self._skip_interim()
            return
        self.status, self.has_begun = status, True
        codings = ",".join(self._headers.getall("Transfer-Encoding", ()))
        self._has_length = "Content-Length" in self._headers or "chunked" in codings.lower()
        self.is_reusable = self.is_reusable and self._call.is_read(status)
        if self._call.method == "HEAD":  # whatever length the headers give, the parser waits for it
            self.is_complete, self.is_reusable = True, False

    def _skip_interim(self) -> None:
        self._headers.clear()
        self.reason = ""
        self._interim += 1
        if self._interim > MAX_INTERIM:
            self.fail("the upstream's response is not valid (too many interim responses)")

    def on_body(self, data: bytes) -> None:
        if self.is_complete:
            return
        self._outside_body = 0
        self._parts.append(data)
        self._size += len(data)

    def on_message_complete(self) -> None:
        if self.has_begun and not self.is_complete:
            self.is_complete = True
            self.is_reusable = self.is_reusable and self._parser is not None and self._parser.should_keep_alive()

    def close(self) -> None:
        """End the exchange: a response that was not read to its end ends the connection with the upstream."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._connection.release(self)
        self._parser = None  # each holds the other


class Connection(asyncio.Protocol):
    """A connection with an upstream at `host`, as its header names it.

    `on_free` gets the connection when it can take another request, `on_lost` when it has ended.
    """

    def __init__(
        self, host: str, on_free: "Callable[[Connection], None]", on_lost: "Callable[[Connection], None]"
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.idle_since = 0.0
        self._host, self._on_free, self._on_lost = host, on_free, on_lost
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._sending: asyncio.Task[None] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    def send(self, call: Call, timeout: float, on_sent: Callable[[], None]) -> Response:
        """Send a request; `on_sent` is called when all of it is on its way. Silence may last `timeout` seconds."""
        response = self._response = Response(self, call, timeout)
        if self._transport is None:
            response.end(None)
            return response
        head, content = call.encode_head(self._host), call.content or b""
        if len(content) <= PART:
            self._transport.write(head + content)
            on_sent()
        else:
            self._transport.write(head)
            self._sending = self.loop.create_task(self._send_parts(content, response, on_sent))
        return response

    async def _send_parts(self, content: bytes, response: Response, on_sent: Callable[[], None]) -> None:
        """Send a long body, while the response may begin: an upstream that has refused it does not get the rest."""
        for part in iterate_parts(content):
            await self._may_write.wait()
            if self._transport is None or response.status >= _ERROR:
                response.is_reusable = False
                return
            self._transport.write(part)
            response.note_progress()
        on_sent()

    def release(self, response: Response) -> None:
        """End an exchange, and with it the connection if it cannot take another request."""
        if self._response is not response:
            return
        self._response = None
        sending, self._sending = self._sending, None
        is_sent = sending is None or sending.done()
        if sending is not None:
            sending.cancel()
        if is_sent and response.at_end and response.is_reusable and self.is_open:
            self._on_free(self)
        else:
            self.abort()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause_reading(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._response is not None:
            self._response.feed(data)
        else:  # what no request has asked for must not answer the next one
            self.abort()

    def eof_received(self) -> None:
        """Close the connection; it takes no further request from now on."""
        self._on_lost(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._may_write.set()
        if self._response is not None:
            self._response.end(exc)
        self._on_lost(self)

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()
