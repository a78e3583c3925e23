"""HTTP/1.1 responses: read to the end and within limits."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import httptools

from exporter.probes.expectations import quote_excerpt
from exporter.probes.held_bodies import HELD
from exporter.probes.net.tolerant_parser import TolerantResponseParser
from exporter.results import ProbeDetails, ProbeFailure

if TYPE_CHECKING:
    from exporter.probes.net.http2_parser import Http2Parser

HEADERS_LIMIT = 256 * 1024
PARTS_LIMIT = 20_000  # parts of a body, in addition to one for each `PART` bytes
PART = 8
BODY_ALWAYS_READ = 1024 * 1024  # bytes; longer ones only within `BODIES_LIMIT`
_ASCII = bytes(range(128))
BODIES_LIMIT = 256 * 1024 * 1024  # bytes of all bodies that are being read


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """The final response; `duration` is that of all requests, `secure` whether it came over TLS."""

    status: int
    version: str
    headers: list[tuple[str, str]]
    body: bytes
    duration: float
    secure: bool

    def header(self, name: str) -> str | None:
        return first_value(self.headers, name)

    def joined_header(self, name: str) -> str | None:
        """Return the values of a header that is a list, joined with commas (RFC 9110, 5.3); None if it is missing."""
        values = self.header_values(name)
        return ", ".join(values) if values else None

    def header_values(self, name: str) -> list[str]:
        """Return the value of each header with this name."""
        return _values_of(self.headers, name)


class HttpResponseReader(asyncio.Protocol):
    """Reads one response; `done` becomes None when it is complete, or the failure that ended it.

    `release` must be called once it is read, or given up.
    """

    def __init__(
        self,
        method: str,
        max_body: int,
        details: ProbeDetails,
        on_body: Callable[["HttpResponseReader", bytes], None] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()
        self.status = 0  # until it is known
        self.first_byte: float | None = None
        self.done: asyncio.Future[ProbeFailure | None] = asyncio.get_running_loop().create_future()
        self._details = details
        self._method = method
        self._max_body = max_body
        self._body_size = self._body_parts = 0
        self._on_body = on_body  # receives the body in pieces instead of `body`
        self._headers_size = 0  # headers and trailers
        self._unparsed_size = 0  # bytes of headers that are not complete
        self._body_received = False  # in the last call of data_received()
        self.version = ""
        self._is_http2 = False
        self.has_received = False  # anything
        self._parser: httptools.HttpResponseParser | TolerantResponseParser | Http2Parser = (
            httptools.HttpResponseParser(self) if strict else TolerantResponseParser(self)
        )

    def use_http2(self, write: Callable[[bytes], None]) -> "Http2Parser":
        """Read the response as HTTP/2, before anything was received; return what sends the request."""
        from exporter.probes.net.http2_parser import Http2Parser  # h2, which few probes need

        parser = Http2Parser(self, write)
        self._parser, self._is_http2 = parser, True
        return parser

    def data_received(self, data: bytes) -> None:
        self.has_received = True
        if self.first_byte is None and not self._is_http2:  # which begins with settings
            self.first_byte = time.perf_counter()
        if self.done.done():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.end(None)
        except httptools.HttpParserError as error:
            if self._is_http2:
                self.end(ProbeFailure("protocol", f"the answer is not valid HTTP/2: {error}"))
            beginning = quote_excerpt(data, self._details)
            self.end(ProbeFailure("protocol", f"the answer is not HTTP: {error}; it begins with {beginning}"))
        # The parser reports a name, a value or a chunk extension only when it is complete.
        self._unparsed_size = 0 if self._body_received else self._unparsed_size + len(data)
        self._body_received = False
        if self._unparsed_size > HEADERS_LIMIT:
            self._end_for_headers()

    def _end_for_headers(self) -> None:
        self.end(ProbeFailure("protocol", f"the response headers are longer than {HEADERS_LIMIT} bytes"))

    @property
    def body_size(self) -> int:
        """The bytes of the body that have been received, before decoding."""
        return self._body_size

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.done.done():
            return  # data after the end of the response
        self._headers_size += len(name) + len(value)
        if self._headers_size > HEADERS_LIMIT:
            self._end_for_headers()
        if not self.status:  # trailers count towards the limit, but are not used
            lower = name.decode("latin-1").lower()
            self.headers.append((lower, _decode_value(lower, value.strip(b" \t"))))

    def on_headers_complete(self) -> None:
        if self.done.done():
            return
        status = int(self._parser.get_status_code())
        self.version = str(self._parser.get_http_version())
        if status < 200 and status != 101:  # noqa: PLR2004 - an interim response; the final one follows
            self.headers.clear()
            return
        self.status = status
        if self.first_byte is None:
            self.first_byte = time.perf_counter()
        if self._method == "HEAD" or (self._method == "CONNECT" and status < 300):  # noqa: PLR2004 - HTTP status code
            self.end(None)

    def on_body(self, data: bytes) -> None:
        if self.done.done():
            return
        self._body_received = True
        self._body_size += len(data)
        self._body_parts += 1
        if self._body_parts > PARTS_LIMIT + self._body_size // PART:
            self.end(
                ProbeFailure("protocol", f"the body has {self._body_parts} chunks, most shorter than {PART} bytes")
            )
        elif self._body_size > self._max_body:
            self.end(ProbeFailure("body", f"the body is longer than max_body ({self._max_body} bytes)"))
        elif self._on_body is not None:
            self._on_body(self, data)
        else:
            self.body += data
            HELD.add(self._details, len(data))
            if HELD.total > BODIES_LIMIT and self._body_size > BODY_ALWAYS_READ:
                limit = f"all bodies that are being read have more than {BODIES_LIMIT} bytes together"
                self.end(ProbeFailure("body", f"the body is longer than {BODY_ALWAYS_READ} bytes, and {limit}"))

    def on_message_complete(self) -> None:
        if self.status:
            self.end(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if self.status and not self._has_length() and error is None:
            self.end(None)  # the end of the connection is the end of a body without a length
        elif self.status:
            self.end(ProbeFailure("protocol", f"the connection was closed after {self._body_size} bytes of the body"))
        elif self.first_byte is not None:
            self.end(ProbeFailure("protocol", "the connection was closed within the response headers"))
        else:
            cause = getattr(error, "strerror", None) or "closed"
            self.end(ProbeFailure("protocol", f"the connection was lost before any answer: {str(cause).lower()}"))

    def _has_length(self) -> bool:
        """Whether the headers determine where the body ends."""
        return self._is_http2 or any(
            name == "content-length" or (name == "transfer-encoding" and "chunked" in value.lower())
            for name, value in self.headers
        )

    def end(self, failure: ProbeFailure | None) -> None:
        """Stop reading, with a failure or with what has been read."""
        if not self.done.done():
            self.done.set_result(failure)

    def release(self) -> None:
        """Stop reading, also if the probe was cancelled because it took too long."""
        self.done.cancel()
        del self._parser  # each holds the other, and the body would stay until the next garbage collection

    def header(self, name: str) -> str | None:
        return first_value(self.headers, name)


def first_value(headers: list[tuple[str, str]], name: str) -> str | None:
    """Return the value of a header, the first one if it is repeated, as common clients do; None if it is missing."""
    lower = name.lower()
    return next((value for key, value in headers if key == lower), None)


def _values_of(headers: list[tuple[str, str]], name: str) -> list[str]:
    lower = name.lower()
    return [value for key, value in headers if key == lower]


def _decode_value(name: str, value: bytes) -> str:
    """Decode UTF-8, which most servers send, or else Latin-1, which accepts any bytes; a URL keeps its bytes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return quote(value, safe=_ASCII) if name == "location" else value.decode("latin-1")
