"""One HTTP/1.1 response, read to its end and within its bounds."""

import asyncio
import time
from collections.abc import Callable

import httptools

from exporter.probes.expectations import quote_excerpt
from exporter.results import ProbeDetails, ProbeFailure

HEAD_LIMIT = 256 * 1024


class HttpResponseReader(asyncio.Protocol):
    """One response, read to its end; `done` is None when it is whole, or the failure it ended with."""

    def __init__(
        self,
        method: str,
        max_body: int,
        details: ProbeDetails,
        on_body: Callable[["HttpResponseReader", bytes], None] | None = None,
    ) -> None:
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()
        self.status = 0
        self.first_byte: float | None = None
        self.done: asyncio.Future[ProbeFailure | None] = asyncio.get_running_loop().create_future()
        self._details = details
        self._method = method
        self._max_body = max_body
        self._size = 0  # of the body
        self._listen = on_body  # takes the body as it comes, in place of `body`
        self._head = 0  # bytes of headers and trailers
        self._unparsed = 0  # bytes of a head that has not ended
        self._heard = False  # something of the body, in what came last
        self._framed = False  # the response itself tells where it ends
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        if self.first_byte is None:
            self.first_byte = time.perf_counter()
        if self.done.done():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.end(None)
        except httptools.HttpParserError as error:
            began = quote_excerpt(data, self._details)
            self.end(ProbeFailure("protocol", f"the answer is not HTTP: {error}; it begins {began}"))
        # The parser tells of a name, a value or a chunk's extension only once it has ended.
        self._unparsed = 0 if self._heard else self._unparsed + len(data)
        self._heard = False
        self._bound_head(self._unparsed)

    def _bound_head(self, size: int) -> None:
        if size > HEAD_LIMIT:
            self.end(ProbeFailure("protocol", f"the response's headers are longer than {HEAD_LIMIT} bytes"))

    @property
    def status_known(self) -> bool:
        return self.status != 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.done.done():
            return  # what follows the answer is none of it
        self._head += len(name) + len(value)
        self._bound_head(self._head)
        if not self.status_known:  # trailers count, and tell nothing
            self.headers.append((name.decode("latin-1").lower(), _text(value)))

    def on_headers_complete(self) -> None:
        status = int(self._parser.get_status_code())
        if self.done.done():
            return
        if status < 200 and status != 101:  # noqa: PLR2004 - an interim answer; the real one follows
            self.headers.clear()
            return
        self.status = status
        self._framed = any(
            name == "content-length" or (name == "transfer-encoding" and "chunked" in value.lower())
            for name, value in self.headers
        )
        if self._method == "HEAD" or (self._method == "CONNECT" and status < 300):  # noqa: PLR2004
            self.end(None)

    def on_body(self, data: bytes) -> None:
        if self.done.done():
            return
        self._heard = True
        self._size += len(data)
        if self._size <= self._max_body and self._listen is None:
            self.body += data
        elif self._size <= self._max_body and self._listen is not None:
            self._listen(self, data)
        else:
            self.end(ProbeFailure("body", f"the body is longer than max_body, {self._max_body} bytes"))

    def on_message_complete(self) -> None:
        if self.status_known:
            self.end(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if self.status_known and not self._framed and error is None:
            self.end(None)  # a body without a length ends with its connection
        elif self.status_known:
            self.end(ProbeFailure("protocol", f"the body was cut short after {self._size} bytes"))
        elif self.first_byte is not None:
            self.end(ProbeFailure("protocol", "the connection was closed in the middle of the headers"))
        else:
            why = getattr(error, "strerror", None) or "closed"
            self.end(ProbeFailure("protocol", f"the connection was lost before any answer: {str(why).lower()}"))

    def end(self, failure: ProbeFailure | None) -> None:
        """Read no further."""
        if not self.done.done():
            self.done.set_result(failure)

    @property
    def version(self) -> str:
        return str(self._parser.get_http_version())

    def header(self, name: str) -> str | None:
        return header(self.headers, name)


def header(headers: list[tuple[str, str]], name: str) -> str | None:
    """The values of a header, joined as RFC 9110 has it, or None."""
    values = [value for key, value in headers if key == name.lower()]
    return ", ".join(values) if values else None


def _text(value: bytes) -> str:
    """UTF-8, as servers write it today, or else Latin-1, which is never wrong."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
