"""Content codings (RFC 9110, 8.4), decoded within a bound."""

import zlib

import brotli

from exporter.results import ProbeFailure

PIECE = 64 * 1024
CODINGS = 5  # of one body; each is decoded in a thread that nothing can end
MEMBERS = 100  # each is looked at with all that follow it


def decoded(body: bytes, encodings: str | None, limit: int) -> bytes:
    """`body` without its codings, the last applied first. Raises ProbeFailure where that is over `limit` bytes."""
    codings = [name.strip().lower() for name in (encodings or "").split(",")]
    applied = [coding for coding in codings if coding not in ("", "identity")]
    if len(applied) > CODINGS:
        raise ProbeFailure("protocol", f"the body has {len(applied)} codings, more than {CODINGS}")
    for coding in reversed(applied):
        if not body:
            continue
        try:
            body = _decoded(body, coding, limit)
        except (zlib.error, brotli.error) as error:
            raise ProbeFailure("protocol", f"the body is not {coding}: {error}") from error
    return body


def _decoded(body: bytes, coding: str, limit: int) -> bytes:
    if coding in ("gzip", "x-gzip"):
        return _inflated(body, limit, zlib.MAX_WBITS | 16, "gzip")
    if coding == "deflate":
        try:
            return _inflated(body, limit, zlib.MAX_WBITS, coding)
        except zlib.error:  # many send it without the wrapper that the standard asks for
            return _inflated(body, limit, -zlib.MAX_WBITS, coding)
    if coding == "br":
        return _unbrotlied(body, limit)
    raise ProbeFailure("protocol", f"the body is encoded as {coding[:50]!r}; gzip, deflate and br are understood")


def _inflated(body: bytes, limit: int, wbits: int, coding: str) -> bytes:
    found = bytearray()
    for _ in range(MEMBERS):
        if not body:
            return bytes(found)
        stream = zlib.decompressobj(wbits)
        found += stream.decompress(body, limit + 1 - len(found))
        if len(found) > limit:
            raise _too_long(limit)
        if not stream.eof:
            raise _cut_short(coding)
        body = stream.unused_data.lstrip(b"\0") if wbits > zlib.MAX_WBITS else b""  # gzip may have several members
    raise ProbeFailure("protocol", f"the body's {coding} has more than {MEMBERS} members")


def _unbrotlied(body: bytes, limit: int) -> bytes:
    stream = brotli.Decompressor()
    found = bytearray(stream.process(body, output_buffer_limit=min(PIECE, limit + 1)))
    while not stream.is_finished() and len(found) <= limit:
        more = stream.process(b"", output_buffer_limit=PIECE)
        if not more and stream.can_accept_more_data():
            raise _cut_short("br")
        found += more
    if len(found) > limit:
        raise _too_long(limit)
    return bytes(found)


def _too_long(limit: int) -> ProbeFailure:
    return ProbeFailure("body", f"the body, decoded, is longer than max_body, {limit} bytes")


def _cut_short(coding: str) -> ProbeFailure:
    return ProbeFailure("protocol", f"the body's {coding} was cut short")
