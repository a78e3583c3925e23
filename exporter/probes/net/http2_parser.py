"""A parser of HTTP/2 (RFC 9113) with the interface of httptools' parsers, for one request on a connection.

h2 implements the protocol. It receives whole frames, and a limited number of small ones: each takes time.
"""

from collections.abc import Callable, Sequence

import httptools
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

from exporter.probes.net.http2 import (
    FRAME_LIMIT,
    FRAME_SIZE,
    GOAWAY,
    HEAD,
    SETTINGS_FRAME,
    SETTINGS_LIMIT,
    STREAM,
    Http2Error,
    check_goaway,
    create_connection,
    describe_violation,
    error_name,
)
from exporter.probes.net.tolerant_parser import ResponseEvents

LARGE = 1024  # bytes of a frame that does not count as a small one
HEADER_LIMIT = 256 * 1024  # bytes of all headers, as they are sent and when they are decoded
_WINDOW = 2**31 - 1  # bytes: the largest one; the reader of the response has a limit of its own
_FIRST_WINDOW = 65_535  # of a new connection
_HEADER_FRAMES = (1, 5, 9)  # HEADERS, PUSH_PROMISE, CONTINUATION


class Http2Parser:
    """Sends a request by `write`, and tells `events` about the response. Raises httptools.HttpParserError."""

    def __init__(self, events: ResponseEvents, write: Callable[[bytes], None]) -> None:
        self._events, self._write = events, write
        self._connection: H2Connection = create_connection(header_limit=HEADER_LIMIT, window=_WINDOW)
        self._unread = bytearray()
        self._small = self._headers = self._settings = 0  # frames; bytes of headers and of settings
        self._has_begun = self._has_ended = False
        self._status = 0
        self._unsent = memoryview(b"")

    def send(self, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        """Send a request, as much of it as the server permits at once."""
        connection = self._connection
        connection.initiate_connection()
        connection.increment_flow_control_window(_WINDOW - _FIRST_WINDOW)
        connection.send_headers(STREAM, [each for each in headers if each[0] != "te"], end_stream=not body)
        self._unsent = memoryview(body)
        self._send_more()

    def _send_more(self) -> None:
        while self._unsent and not self._has_ended:
            room = min(self._connection.local_flow_control_window(STREAM), self._connection.max_outbound_frame_size)
            if room <= 0:
                break
            part, self._unsent = self._unsent[:room], self._unsent[room:]
            self._connection.send_data(STREAM, bytes(part), end_stream=not self._unsent)
        self._write(self._connection.data_to_send())

    def get_status_code(self) -> int:
        return self._status

    def get_http_version(self) -> str:
        return "2"

    def feed_data(self, data: bytes) -> None:
        """Read what the server has sent."""
        self._unread += data
        try:
            while not self._has_ended and (frame := self._take_frame()):
                self._read_frame(frame)
            if not self._has_ended:
                self._send_more()
        except Http2Error as error:
            raise httptools.HttpParserError(str(error)) from error
        except ProtocolError as error:
            raise httptools.HttpParserError(describe_violation(error)) from error

    def _take_frame(self) -> bytes:
        """Return the next frame, empty if it is incomplete. Raises Http2Error."""
        head = bytes(self._unread[:HEAD])
        if not self._has_begun and not _may_begin(head):
            raise Http2Error("it does not begin as HTTP/2 does")
        if len(head) < HEAD:
            return b""
        size = HEAD + int.from_bytes(head[:3])
        if size > HEAD + FRAME_SIZE:
            raise Http2Error(f"received a frame of more than {FRAME_SIZE} bytes")
        if len(self._unread) < size:
            return b""
        self._has_begun = True
        frame = bytes(self._unread[:size])
        del self._unread[:size]
        self._count(frame)
        return frame

    def _count(self, frame: bytes) -> None:
        kind, size = frame[3], len(frame) - HEAD
        self._small += size < LARGE
        self._headers += size if kind in _HEADER_FRAMES else 0
        self._settings += size if kind == SETTINGS_FRAME else 0
        for exceeded, limit in (
            (self._small > FRAME_LIMIT, f"more than {FRAME_LIMIT} small frames"),
            (self._headers > HEADER_LIMIT, f"more than {HEADER_LIMIT} bytes of headers"),
            (self._settings > SETTINGS_LIMIT, f"more than {SETTINGS_LIMIT} bytes of settings"),
        ):
            if exceeded:
                raise Http2Error(f"received {limit}")

    def _read_frame(self, frame: bytes) -> None:
        if frame[3] == GOAWAY:
            check_goaway(frame)
            return  # h2 would refuse what is left of the response
        for event in self._connection.receive_data(frame):
            self._tell(event)

    def _tell(self, event: Event) -> None:
        """Tell about what h2 has read; interim responses and trailers are passed over. Raises Http2Error."""
        if isinstance(event, ResponseReceived):
            for name, value in event.headers or ():
                self._tell_header(_encode(name), _encode(value))
            if self._status < 200:  # noqa: PLR2004 - h2 has another event for interim responses
                raise Http2Error(f"the status of the response is {self._status}")
            self._events.on_headers_complete()
        elif isinstance(event, DataReceived):
            if event.data:
                self._events.on_body(event.data)
        elif isinstance(event, StreamReset):
            raise Http2Error(f"the server reset the stream: {error_name(int(event.error_code or 0))}")
        elif isinstance(event, StreamEnded):
            self._has_ended = True
            self._events.on_message_complete()

    def _tell_header(self, name: bytes, value: bytes) -> None:
        if name == b":status":
            self._status = int(value) if value.isdigit() else 0
        elif not name.startswith(b":"):
            self._events.on_header(name, value)


def _may_begin(head: bytes) -> bool:
    """Whether the first frame may have settings (RFC 9113, 3.4); its length is less than 65,536."""
    return head[:1] in (b"", b"\0") and (len(head) < HEAD or (head[3] == SETTINGS_FRAME and not head[4] & 1))


def _encode(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "replace")
