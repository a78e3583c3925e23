"""A parser of HTTP/1 responses that accepts what common clients accept, as long as it can be read in one way only.

httptools follows the standard strictly. Here the head of a response is rewritten before httptools parses it, and a
chunked body is decoded without it. What two clients would read differently, such as two unequal lengths, is an error.
"""

import re
from collections.abc import Iterable
from typing import Literal, Protocol

import httptools

LINES_LIMIT = 5000  # of a head; those of one head are processed in one turn of the event loop

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_BLANKS = b" \t"
_TEXT = rb"[^\x00-\x08\n-\x1f\x7f]"  # all but control characters
_CLEAN_HEAD = re.compile(
    rb"HTTP/1\.[01] [2-9][0-9][0-9](?: " + _TEXT + rb"*+)?\r\n(?:" + _TOKEN + rb"++:" + _TEXT + rb"*+\r\n)*+\r\n"
)
_CLEAN_LENGTH = re.compile(rb"\ncontent-length: *+[0-9]++\r")
_BLANKS_BEFORE_STATUS = re.compile(rb"(?<=^HTTP/[0-9]\.[0-9]) ++")
_HEAD_END = re.compile(rb"\n\r?\n")
_NAME = re.compile(_TOKEN + rb"++")
_FRAMING = (b"content-length", b"transfer-encoding")
_FRAMING_AFTER_CR = re.compile(rb"\r[ \t]*+(?:" + b"|".join(_FRAMING) + rb")", re.IGNORECASE)
_NOT_IN_NAME = re.compile(rb"[^!#$%&'*+.^_`|~0-9A-Za-z-]++")
_WITHOUT_CONTROLS = bytes(ord(" ") if each < ord(" ") or each == 0x7F else each for each in range(256))  # noqa: PLR2004 - DEL
# A line with an extension must end with CRLF: for some clients, a bare LF is a part of the extension.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*+(?:\r?\n|;" + _TEXT + rb"*+\r\n)")
_HEX_DIGITS = b"0123456789ABCDEFabcdef"
_LINE_ENDS = b"\r\n"


class ResponseEvents(Protocol):
    """What is told about a response, as by httptools."""

    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


class TolerantResponseParser:
    """A parser with the interface of httptools' parsers."""

    def __init__(self, events: ResponseEvents) -> None:
        self._parser = httptools.HttpResponseParser(events)
        self._events = events
        self._in_head = True
        self._chunks: _ChunkDecoder | None = None
        self._unread = bytearray()  # an incomplete head
        self._searched = 0  # bytes of it that cannot begin its end

    def get_status_code(self) -> int:
        return int(self._parser.get_status_code())

    def get_http_version(self) -> str:
        return str(self._parser.get_http_version())

    def feed_data(self, data: bytes) -> None:
        """Parse the next data. Raises httptools.HttpParserError and httptools.HttpParserUpgrade."""
        if self._chunks is not None:
            self._chunks.feed_data(data)
        elif not self._in_head:
            self._parser.feed_data(data)
        elif not self._unread and (clean := _find_clean_head(data)) is not None:
            size, is_chunked = clean
            self._in_head = False
            self._parser.feed_data(data[:size] if is_chunked else data)
            if is_chunked:
                self._chunks = _ChunkDecoder(self._events)
                self._chunks.feed_data(data[size:])
        else:
            self._unread += data
            self._feed_unread()

    def _feed_unread(self) -> None:
        """Parse the heads of interim responses, and that of the final response with what follows."""
        while self._in_head:
            if self._unread[:1] in _LINE_ENDS:
                self._unread = self._unread.lstrip(_LINE_ENDS)  # empty lines before a head
            if not b"HTTP/".startswith(self._unread[:5]):
                self._in_head = False
                self._parser.feed_data(bytes(self._unread))  # raises what is wrong
                return
            end = _HEAD_END.search(self._unread, self._searched)
            if end is None:
                self._searched = max(0, len(self._unread) - 2)
                return
            head = bytes(self._unread[: end.end()])
            del self._unread[: end.end()]
            self._searched = 0
            self._feed_head(head)
        rest, self._unread = bytes(self._unread), bytearray()
        if rest:
            self.feed_data(rest)

    def _feed_head(self, head: bytes) -> None:
        head, is_chunked = normalize_head(head)
        self._parser.feed_data(head)
        status = self.get_status_code()
        self._in_head = status < 200 and status != 101  # noqa: PLR2004 - after interim responses; HTTP status codes
        if is_chunked and not self._in_head:
            self._chunks = _ChunkDecoder(self._events)


def _find_clean_head(data: bytes) -> tuple[int, bool] | None:
    """Return the size of a complete head of a final response that needs no change, and whether the body is chunked.

    Most responses begin with such a head.
    """
    match = _CLEAN_HEAD.match(data)
    if match is None:
        return None
    head = match[0].lower()
    if head.count(b"\n") > LINES_LIMIT:
        return None
    lengths = head.count(b"\ncontent-length")
    if b"\ntransfer-encoding" not in head:
        is_clean = not lengths or (lengths == 1 and _CLEAN_LENGTH.search(head) is not None)
        return (len(head), False) if is_clean else None
    is_chunked = head.count(b"\ntransfer-encoding") == head.count(b"\ntransfer-encoding: chunked\r") == 1
    return (len(head), True) if is_chunked and not lengths else None


def normalize_head(head: bytes) -> tuple[bytes, bool]:
    """Return the head of a response as the standard requires it, and whether the body is chunked.

    Raises httptools.HttpParserError.
    """
    if head.count(b"\n") > LINES_LIMIT:
        raise httptools.HttpParserError(f"more than {LINES_LIMIT} header lines")
    if _FRAMING_AFTER_CR.search(head):
        raise httptools.HttpParserError("Bare CR before a header that determines the length")
    status_line, *lines = [line.removesuffix(b"\r") for line in head.split(b"\n")[:-2]]
    return _normalize_fields(_BLANKS_BEFORE_STATUS.sub(b" ", status_line), _unfold(lines))


def _unfold(lines: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """Return names and values. A line that begins with a blank continues the one before."""
    fields: list[tuple[bytes, list[bytes]]] = []
    for line in lines:
        if line[:1].strip(_BLANKS):
            name, colon, value = line.partition(b":")
            if not colon:
                raise httptools.HttpParserError("Header line without a colon")
            fields.append((name.rstrip(_BLANKS), [value.strip(_BLANKS)]))
        elif fields:
            fields[-1][1].append(line.strip(_BLANKS))
        else:
            raise httptools.HttpParserError("Unexpected space after start line")
    return [(name, b" ".join(parts)) for name, parts in fields]


def _normalize_fields(status_line: bytes, fields: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, bool]:
    lines = [status_line]
    lengths, codings = [], []
    for name, value in fields:
        if _NAME.fullmatch(name) is None:
            if _NOT_IN_NAME.sub(b"", name).lower() in _FRAMING:
                raise httptools.HttpParserError("Invalid character in the name of a header that determines the length")
        elif name.lower() == b"content-length":
            lengths += value.split(b",")
        elif name.lower() == b"transfer-encoding":
            codings += value.split(b",")
        else:
            lines.append(name + b": " + value.translate(_WITHOUT_CONTROLS))
    length, transfer_coding = _parse_length(lengths), _parse_codings(codings)
    if transfer_coding:
        if length and transfer_coding != b"chunked":
            raise httptools.HttpParserError("Content-Length can't be present with Transfer-Encoding")
        lines.append(b"Transfer-Encoding: " + transfer_coding)
    elif length:
        lines.append(b"Content-Length: " + length)
    return b"\r\n".join([*lines, b"", b""]), transfer_coding.endswith(b"chunked")


def _parse_length(values: list[bytes]) -> bytes:
    """Return the one length that is given, once or several times; empty if there is none."""
    lengths = {value.strip(_BLANKS) for value in values}
    if len(lengths) > 1:
        raise httptools.HttpParserError("Unequal Content-Length")
    if not lengths:
        return b""
    (length,) = lengths
    if not length.isdigit():
        raise httptools.HttpParserError("Invalid character in Content-Length" if length else "Empty Content-Length")
    return length


def _parse_codings(values: list[bytes]) -> bytes:
    """Return the transfer codings, of which only the last may be `chunked`; empty if there are none.

    `identity` alone is none (RFC 2616, 3.6).
    """
    codings = [value.strip(_BLANKS).lower() for value in values]
    if all(coding in (b"", b"identity") for coding in codings):
        return b""
    if any(_NAME.fullmatch(coding) is None for coding in codings):
        raise httptools.HttpParserError("Invalid Transfer-Encoding")
    chunked = [coding for coding in codings if b"chunked" in coding]
    if chunked and (chunked != [b"chunked"] or codings[-1] != b"chunked"):
        raise httptools.HttpParserError("Transfer-Encoding with chunked elsewhere than once at the end")
    return b", ".join(codings)


class _ChunkDecoder:
    """Decodes a chunked body (RFC 9112, 7.1). Blanks after a size and bare LF are accepted; trailers are ignored."""

    def __init__(self, events: ResponseEvents) -> None:
        self._events = events
        self._left = 0  # bytes of a chunk
        self._line = bytearray()  # an incomplete line
        self._expected: Literal["size", "end of data", "trailer", "nothing"] = "size"

    def feed_data(self, data: bytes) -> None:
        """Decode the next data. Raises httptools.HttpParserError."""
        at = 0
        while at < len(data) and self._expected != "nothing":
            if self._left:
                part = data[at : at + self._left]
                at += len(part)
                self._left -= len(part)
                self._events.on_body(part)
                continue
            if not self._line:
                self._check_first(data[at])
            end = data.find(b"\n", at) + 1
            if not end:
                self._line += data[at:]
                return
            line = bytes(self._line) + data[at:end] if self._line else data[at:end]
            self._line.clear()
            at = end
            self._read_line(line)

    def _check_first(self, byte: int) -> None:
        """Check how a line begins, since its end may never come."""
        if (self._expected == "size" and byte not in _HEX_DIGITS) or (
            self._expected == "end of data" and byte not in _LINE_ENDS
        ):
            raise httptools.HttpParserError(f"Invalid character instead of the {self._expected} of a chunk")

    def _read_line(self, line: bytes) -> None:
        is_empty = line in (b"\r\n", b"\n")
        if self._expected == "size":
            match = _CHUNK_SIZE.fullmatch(line)
            if match is None:
                raise httptools.HttpParserError("Invalid chunk size")
            self._left = int(match[1], 16)
            self._expected = "end of data" if self._left else "trailer"
        elif self._expected == "end of data":
            if not is_empty:
                raise httptools.HttpParserError("Expected LF after chunk data")
            self._expected = "size"
        elif is_empty:
            self._expected = "nothing"
            self._events.on_message_complete()
        elif b":" not in line and line[:1].strip(_BLANKS):
            raise httptools.HttpParserError("Trailer without a colon")
