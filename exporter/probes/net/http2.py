"""A minimal HTTP/2 client (RFC 9113): one request with a small response over a probe's connection.

h2 implements the protocol. It receives whole frames, and no more than a small response needs: a peer may send any
number of tiny frames, which all take time and some of them memory.
"""

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hpack import Decoder, HeaderTuple, OversizedHeaderListError

from exporter.probes.expectations import quote_excerpt
from exporter.results import ProbeDetails

ALPN = "h2"
# Of one connection:
FRAME_LIMIT = 1000
TOTAL_LIMIT = 256 * 1024  # bytes
HEADER_LIMIT = 16 * 1024  # bytes of headers as they are sent, and of all lists of headers when they are decoded
FIELDS_LIMIT = 5000  # headers, those of interim responses and trailers included
SETTINGS_LIMIT = 1024  # bytes of settings: h2 goes through all of them for each frame
BODY_LIMIT = 8 * 1024  # bytes

FRAME_SIZE = 16 * 1024  # bytes: the smallest SETTINGS_MAX_FRAME_SIZE that the protocol allows
HEAD = 9  # bytes: length (3), type, flags, stream (4)
_UNREAD_LIMIT = 4 * (HEAD + FRAME_SIZE)
_DATA, _HEADERS, SETTINGS_FRAME, _PUSH_PROMISE, GOAWAY, _CONTINUATION = 0, 1, 4, 5, 7, 9
_ACK = 1
_FIELD_OVERHEAD = 32  # bytes that HPACK counts for a header in addition to its text (RFC 7541, 4.1)
STREAM = 1
_QUOTED = re.compile(r"\W+b?['\"]")


class Http2Error(Exception):
    """The connection ended without a whole response, or the peer exceeded a limit or violated the protocol."""


@dataclass(slots=True)
class Http2Response:
    """A response; `headers` include `:status` and, after those with the same name, the trailers."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False


class FrameReader(asyncio.Protocol):
    """Reads a peer's frames one by one, up to the limits of this module."""

    def __init__(self, details: ProbeDetails) -> None:
        self._details = details
        self._unread = bytearray()
        self._closed = self._paused = False
        self._changed = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._frames = self._total = self._headers = self._settings = 0
        self._size = 0  # of the frame that is received now, 0 as long as its head is incomplete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        self._changed.set()
        if len(self._unread) > _UNREAD_LIMIT and self._transport is not None and not self._paused:
            self._transport.pause_reading()
            self._paused = True

    def eof_received(self) -> None:
        self._close()

    def connection_lost(self, _error: Exception | None) -> None:
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._changed.set()

    @property
    def speaks_http2(self) -> bool:
        """Whether the peer has begun as a server of HTTP/2 does."""
        return self._frames > 0

    @property
    def ended_silently(self) -> bool:
        """Whether the peer closed the connection without sending anything."""
        return self._closed and not self._frames and not self._unread

    async def next(self) -> bytes:
        """Return the next frame. Raises Http2Error."""
        while True:
            if not self._size:
                self._read_head()
            if self._size and len(self._unread) >= self._size:
                frame = bytes(self._unread[: self._size])
                del self._unread[: self._size]
                self._size = 0
                return frame
            if self._closed:
                raise Http2Error("the connection was closed before the end of the response")
            if self._paused and self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()
                self._paused = False
            self._changed.clear()
            await self._changed.wait()

    def _read_head(self) -> None:
        """Count the frame that begins with the unread bytes, if its head is complete. Raises Http2Error."""
        head = bytes(self._unread[:HEAD])
        if not self._frames:
            self._check_preface(head)
        if len(head) < HEAD:
            return
        length, kind = int.from_bytes(head[:3]), head[3]
        self._frames += 1
        self._total += HEAD + length
        if kind in (_HEADERS, _PUSH_PROMISE, _CONTINUATION):
            self._headers += length
        elif kind == SETTINGS_FRAME:
            self._settings += length
        for exceeded, limit in (
            (length > FRAME_SIZE, f"a frame of more than {FRAME_SIZE} bytes"),
            (self._frames > FRAME_LIMIT, f"more than {FRAME_LIMIT} frames"),
            (self._total > TOTAL_LIMIT, f"more than {TOTAL_LIMIT} bytes"),
            (self._headers > HEADER_LIMIT, f"more than {HEADER_LIMIT} bytes of headers"),
            (self._settings > SETTINGS_LIMIT, f"more than {SETTINGS_LIMIT} bytes of settings"),
        ):
            if exceeded:
                raise Http2Error(f"received {limit}")
        self._size = HEAD + length

    def _check_preface(self, head: bytes) -> None:
        """Check that the first frame has settings (RFC 9113, 3.4); its length is less than 65,536."""
        if head[:1] in (b"", b"\0") and (len(head) < HEAD or (head[3] == SETTINGS_FRAME and not head[4] & _ACK)):
            return
        raise Http2Error(f"the answer is not HTTP/2: {quote_excerpt(bytes(self._unread), self._details)}")


async def send_request(
    transport: asyncio.Transport, frames: FrameReader, headers: Sequence[tuple[str, str]], body: bytes
) -> Http2Response:
    """Send a request over a new connection, and return its response. Raises Http2Error.

    `body` is at most a frame long. The caller closes the connection.
    """
    connection = create_connection()
    connection.initiate_connection()
    connection.send_headers(STREAM, headers)
    connection.send_data(STREAM, body, end_stream=True)
    transport.write(connection.data_to_send())
    response = Http2Response()
    while not response.ended:
        frame = await frames.next()
        if frame[3] == GOAWAY:
            check_goaway(frame)
            continue  # h2 would refuse what is left of the response
        try:
            events = connection.receive_data(frame)
        except ProtocolError as error:
            raise Http2Error(describe_violation(error)) from error
        for event in events:
            _apply(event, response)
        transport.write(connection.data_to_send())
        await asyncio.sleep(0)  # a peer that never stops sending must not block other probes
    return response


def create_connection(header_limit: int = HEADER_LIMIT, window: int | None = None) -> H2Connection:
    """Return a client's connection; `window` is how many bytes of a response may be sent before they are read."""
    connection = H2Connection(H2Configuration(client_side=True, header_encoding=None))
    settings = {
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.MAX_CONCURRENT_STREAMS: 0,
        SettingCodes.MAX_FRAME_SIZE: FRAME_SIZE,
        SettingCodes.MAX_HEADER_LIST_SIZE: header_limit,
        **({SettingCodes.INITIAL_WINDOW_SIZE: window} if window is not None else {}),
    }
    connection.local_settings = Settings(client=True, initial_values=settings)
    connection.decoder = _LimitedDecoder(header_limit)
    return connection


class _LimitedDecoder(Decoder):
    """Decodes all blocks of headers of a connection, up to a limit in bytes and one in headers.

    A byte may stand for a whole header, and a server may send any number of interim responses.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = self._bytes_left = limit
        self._fields_left = FIELDS_LIMIT

    def decode(self, data: bytes, raw: bool = False) -> Iterable[HeaderTuple]:
        """Raises hpack's errors and Http2Error."""
        self.max_header_list_size = self._bytes_left  # h2 sets it when the peer acknowledges settings
        try:
            headers = list(super().decode(data, raw))
        except OversizedHeaderListError:
            raise Http2Error(f"received more than {self._limit} bytes of headers") from None
        self._bytes_left -= sum(len(name) + len(value) + _FIELD_OVERHEAD for name, value in headers)
        self._fields_left -= len(headers)
        if self._fields_left < 0:
            raise Http2Error(f"received more than {FIELDS_LIMIT} headers")
        return headers


def describe_violation(error: ProtocolError) -> str:
    """Return what is wrong with the frames of a server, without the names and values of headers that h2 quotes."""
    text = _QUOTED.split(str(error), maxsplit=1)[0]
    return f"the server violates HTTP/2: {type(error).__name__}: {text}"


def check_goaway(frame: bytes) -> None:
    """Raise Http2Error unless the server still answers the request, as one that shuts down does (RFC 9113, 6.8)."""
    payload = frame[HEAD:]
    last_stream, code = int.from_bytes(payload[:4]) & 0x7FFFFFFF, int.from_bytes(payload[4:8])
    if code or last_stream < STREAM:
        text = payload[8:].decode("utf-8", "replace")  # whole, so that a secret in it is masked
        raise Http2Error(f"the server ended the connection: {error_name(code)}{f' ({text})' if text else ''}")


def _apply(event: Event, response: Http2Response) -> None:
    """Add to the response what h2 has read. Raises Http2Error."""
    if isinstance(event, ResponseReceived | TrailersReceived):
        for name, value in event.headers or ():
            response.headers[_decode(name)] = _decode(value)
    elif isinstance(event, DataReceived):
        response.body += event.data or b""
        if len(response.body) > BODY_LIMIT:
            raise Http2Error(f"the response is longer than {BODY_LIMIT} bytes")
    elif isinstance(event, StreamReset):
        raise Http2Error(f"the server reset the stream: {error_name(int(event.error_code or 0))}")
    elif isinstance(event, StreamEnded):
        response.ended = True


def _decode(text: bytes | str) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def error_name(code: int) -> str:
    return next((each.name for each in ErrorCodes if each == code), f"error {code}")
