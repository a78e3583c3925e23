"""Responses as servers in the field send them: read in one way, however they arrive, or not at all."""

import contextlib
import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.probes.net.tolerant_parser import LINES_LIMIT, ResponseEvents, TolerantResponseParser

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class Recorder:
    """What a parser has told about a response."""

    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    heads: int = 0
    body: bytes = b""
    ended: bool = False
    refused: bool = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.heads += 1

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.ended = True


def read(pieces: Iterable[bytes], *, strict: bool = False) -> Recorder:
    recorder = Recorder()
    events: ResponseEvents = recorder
    parser = httptools.HttpResponseParser(events) if strict else TolerantResponseParser(events)
    try:
        for piece in pieces:
            parser.feed_data(piece)
    except httptools.HttpParserError:
        recorder.refused = True
    return recorder


TOLERATED = {
    "bare LF": (b"HTTP/1.1 200 OK\nX-A: 1\nContent-Length: 5\n\nhello", b"hello"),
    "bare LF and CRLF": (b"HTTP/1.1 200 OK\nX-A: 1\r\nContent-Length: 5\r\n\nhello", b"hello"),
    "blanks before the status code": (b"HTTP/1.1   200 OK\r\nX-A: 1\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "a coding that is none": (OK + b"X-A: 1\r\nTransfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "an empty coding alone": (OK + b"X-A: 1\r\nTransfer-Encoding:\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "equal lengths": (OK + b"X-A: 1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "equal lengths in a list": (OK + b"X-A: 1\r\nContent-Length: 5, 5\r\n\r\nhello", b"hello"),
    "a length and chunks": (OK + b"X-A: 1\r\nContent-Length: 30\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "a folded header": (OK + b"X-A:\r\n \t1\r\nContent-Length:\r\n 5\r\n\r\nhello", b"hello"),
    "blanks before the colon": (OK + b"X-A \t: 1\r\nContent-Length : 5\r\n\r\nhello", b"hello"),
    "a name with blanks": (OK + b"X Powered: a\r\nX-A: 1\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "an empty name": (OK + b": a\r\nX-A: 1\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "control characters": (OK + b"X-A: \x011\0\x7f\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "a bare CR": (OK + b"X-A: \r1\r\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "after an interim response": (b"HTTP/1.1 103 Early\nLink : x\n\n" + OK + b"X-A: 1\nContent-Length: 5\n\nhello", b"hello"),
    "blanks after the sizes of chunks": (OK + b"X-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n5 \t\r\nhello\r\n0 \r\n\r\n", b"hello"),
    "bare LF after chunks": (OK + b"X-A: 1\nTransfer-Encoding: chunked\n\n5\nhello\n0\nX-B: 1\n\n", b"hello"),
    "blanks before an extension": (OK + b"X-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n5 ;a=b\r\nhello\r\n0\r\n\r\n", b"hello"),
}  # fmt: skip

REFUSED = {
    "unequal lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "unequal lengths in a list": OK + b"Content-Length: 5, 6\r\n\r\nhello",
    "lengths that are written differently": OK + b"Content-Length: 5\r\nContent-Length: 05\r\n\r\nhello",
    "unequal lengths beside chunks": OK
    + b"Content-Length: 5\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a length with a sign": OK + b"Content-Length: +5\r\n\r\nhello",
    "a length with a control character": OK + b"Content-Length: 5\0\r\n\r\nhello",
    "an empty length": OK + b"Content-Length:\r\n\r\nhello",
    "chunked before another coding": OK + b"Transfer-Encoding: identity, chunked, x\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "nearly chunked": OK + b"Transfer-Encoding: xchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "chunked with a control character": OK + b"Transfer-Encoding: chunked\x0b\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "an empty coding": OK + b"Transfer-Encoding: , chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "a length and another coding": OK + b"Transfer-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    "nearly a length": OK + b"Content-Length\0: 5\r\n\r\nhello",
    "nearly a length before blanks": OK + b"Content -Length: 5\r\n\r\nhello",
    "a length after a bare CR": OK + b"X-A: 1\rContent-Length: 5\r\n\r\nhello",
    "a coding after a bare CR in a name": OK + b"X\r Transfer-Encoding: chunked\r\n\r\nhello",
    "a fold after the status line": OK + b" X-A: 1\r\n\r\n",
    "a name that is folded": OK + b"Content-Length\r\n : 5\r\n\r\nhello",
    "a line without a colon": OK + b"hello\r\n\r\n",
    "a bare CR as line": OK + b"X-A: 1\r\n\r\r\n\r\n",
    "a bare CR in the status line": b"HTTP/1.1 200 OK\rX\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "too many lines": OK + b"a:\n" * LINES_LIMIT + b"\n",
    "no size of a chunk": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "blanks before the size of a chunk": CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n",
    "a size with a prefix": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "two sizes": CHUNKED + b"5 5\r\nhello\r\n0\r\n\r\n",
    "too great a size": CHUNKED + b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "a bare CR after a size": CHUNKED + b"5\rhello\r\n0\r\n\r\n",
    "a bare LF after an extension": CHUNKED + b"5;a\nhello\r\n0\r\n\r\n",
    "a bare CR in an extension": CHUNKED + b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "a chunk that is longer than its size": CHUNKED + b"4\r\nhello\r\n0\r\n\r\n",
    "chunks without line ends": CHUNKED + b"5\r\nhello0\r\n\r\n",
    "a trailer without a colon": CHUNKED + b"0\r\nhello\r\n\r\n",
}


@pytest.mark.parametrize("name", TOLERATED)
def test_tolerated_responses(name: str) -> None:
    response, body = TOLERATED[name]
    result = read([response])
    assert (result.refused, result.ended, result.body) == (False, True, body)
    assert [value.strip() for header, value in result.headers if header == b"X-A"] == [b"1"]
    assert read([response], strict=True).refused


@pytest.mark.parametrize("name", REFUSED)
def test_refused_responses(name: str) -> None:
    result = read([REFUSED[name]])
    assert (result.refused, result.ended) == (True, False)


@pytest.mark.parametrize("name", [*TOLERATED, *REFUSED])
def test_responses_in_two_pieces(name: str) -> None:
    response = TOLERATED[name][0] if name in TOLERATED else REFUSED[name]
    whole = read([response])
    step = 1 + len(response) // 2000
    for at in range(1, len(response), step):
        split = read([response[:at], response[at:]])
        assert (split.refused, split.ended, split.body) == (whole.refused, whole.ended, whole.body), at
    if step == 1:
        assert read(bytes([byte]) for byte in response).body == whole.body


def test_folds_are_joined_and_control_characters_are_blanks() -> None:
    result = read([OK + b"X-A: a;\r\n  b\r\n\tc \r\nX-B: a\x01\0b\xff\r\n\r\n"])
    assert result.headers == [(b"X-A", b"a; b c"), (b"X-B", b"a  b\xff")]


@pytest.mark.parametrize(
    "response", [CHUNKED + b"5\r\nhel", CHUNKED + b"x", b"HTTP/1.1 200 OK\nX-A: 1", OK + b"X\r\n\r\n"]
)
def test_an_unfinished_response_is_freed_with_its_parser(response: bytes) -> None:
    """A body would stay in memory until the next garbage collection otherwise."""
    recorder = Recorder()
    freed = weakref.ref(recorder)
    parser = TolerantResponseParser(recorder)
    gc.disable()
    try:
        with contextlib.suppress(httptools.HttpParserError):
            parser.feed_data(response)
        del parser, recorder
        assert freed() is None
    finally:
        gc.enable()


def cased(name: str) -> st.SearchStrategy[str]:
    return st.sampled_from([name, name.lower(), name.upper()])


NOISE = st.lists(st.sampled_from(["X-A: 1", "X-B : 2", "X-C: a\r\n b", "X D: 1", "X-E: \x01", "X-F:"]), max_size=3)
LINE_END = st.sampled_from(["\r\n", "\n"])
BLANKS = st.sampled_from(["", " ", "\t", "\r\n "])
LENGTHS = st.lists(st.integers(0, 30).map(str), min_size=2, max_size=4).filter(lambda values: len({*values}) > 1)
CODINGS = st.lists(
    st.sampled_from(["chunked", "identity", "", "gzip", "x", "xchunked"]), min_size=2, max_size=4
).filter(lambda values: "chunked" in "".join(values[:-1]) or values[-1] == "xchunked")


@given(st.data(), st.sampled_from(["Content-Length", "Transfer-Encoding"]))
def test_ambiguous_framing_is_refused(data: st.DataObject, name: str) -> None:
    """Several lengths that differ, or codings in which chunked is not the last, spread over lines and lists."""
    lines = [*data.draw(NOISE)]
    for value in data.draw(LENGTHS if name == "Content-Length" else CODINGS):
        if lines and lines[-1].lower().startswith(name.lower()) and data.draw(st.booleans()):
            lines[-1] += f",{data.draw(BLANKS)}{value}"
        else:
            lines += [f"{data.draw(cased(name))}{data.draw(st.sampled_from(['', ' ']))}:{data.draw(BLANKS)}{value}"]
            lines += data.draw(NOISE)
    head = "".join(f"{line}{data.draw(LINE_END)}" for line in ["HTTP/1.1 200 OK", *lines, ""]).encode()
    result = read([head, b"5\r\nhello\r\n0\r\n\r\n"])
    assert (result.refused, result.body) == (True, b"")


@given(st.lists(st.binary(min_size=1, max_size=40)), st.data())
def test_chunks_are_joined(parts: list[bytes], data: st.DataObject) -> None:
    blanks, extension = st.sampled_from(["", " ", " \t"]), st.sampled_from(["", ";a", ";a=b", ';a="b c"'])
    encoded = b""
    for part in [*parts, b""]:
        line_end = data.draw(LINE_END)
        after_size = data.draw(extension) if line_end == "\r\n" else ""
        encoded += f"{len(part):x}{data.draw(blanks)}{after_size}{line_end}".encode()
        encoded += part + data.draw(LINE_END).encode() if part else b""
    encoded += data.draw(st.sampled_from([b"\r\n", b"X-A: 1\r\n\r\n", b"X-A: 1\n b\n\n"]))
    at = data.draw(st.integers(0, len(encoded)))
    result = read([CHUNKED + encoded[:at], encoded[at:]])
    assert (result.body, result.ended, result.refused) == (b"".join(parts), True, False)


HEAD_CHARACTERS = st.sampled_from(
    [*"aX-:5, ", "\t", "\r", "\n", "\r\n", "\r\n", "\0", "Content-Length", "Transfer-Encoding", "chunked"]
)


@given(st.lists(HEAD_CHARACTERS, max_size=30).map("".join), st.data())
def test_any_head_is_read_the_same_in_pieces(text: str, data: st.DataObject) -> None:
    response = OK + text.encode() + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    at = data.draw(st.integers(1, len(response)))
    whole, split = read([response]), read([response[:at], response[at:]])
    assert (split.refused, split.ended, split.body) == (whole.refused, whole.ended, whole.body)
    strict = read([response], strict=True)
    if not strict.refused and not whole.refused:
        assert (whole.body, whole.ended) == (strict.body, strict.ended)


@given(st.lists(HEAD_CHARACTERS, max_size=30).map("".join))
def test_what_the_standard_allows_is_read_as_before(text: str) -> None:
    """Whatever httptools accepts is accepted, except codings that end with something else than chunked."""
    response = OK + text.encode() + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    strict, tolerant = read([response], strict=True), read([response])
    if not strict.refused:
        codings = [value for name, value in strict.headers if name.lower() == b"transfer-encoding"]
        assert tolerant.refused is False or codings
