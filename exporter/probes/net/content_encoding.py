"""Content encodings of HTTP (RFC 9110, 8.4): decoding within limits."""

import zlib

import brotli

from exporter.results import ProbeFailure

CHUNK = 64 * 1024
ENCODINGS_LIMIT = 5  # of one body; decoding runs in a thread that cannot be cancelled
GZIP_MEMBERS_LIMIT = 100  # decoding a member copies all members after it


def decode_body(body: bytes, content_encoding: str | None, limit: int) -> bytes:
    """Return `body` without its encodings. Raises ProbeFailure, also if the result is longer than `limit` bytes."""
    names = [name.strip().lower() for name in (content_encoding or "").split(",")]
    encodings = [name for name in names if name not in ("", "identity")]
    if len(encodings) > ENCODINGS_LIMIT:
        raise ProbeFailure("protocol", f"the body has {len(encodings)} encodings, more than {ENCODINGS_LIMIT}")
    for encoding in reversed(encodings):
        if not body:
            continue
        try:
            body = _decode(body, encoding, limit)
        except (zlib.error, brotli.error) as error:
            raise ProbeFailure("protocol", f"the body is not valid {encoding}: {error}") from error
    return body


def _decode(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding in ("gzip", "x-gzip"):
        return _inflate(body, limit, zlib.MAX_WBITS | 16, "gzip")
    if encoding == "deflate":
        try:
            return _inflate(body, limit, zlib.MAX_WBITS, encoding)
        except zlib.error:  # many servers omit the zlib header that the standard requires
            return _inflate(body, limit, -zlib.MAX_WBITS, encoding)
    if encoding == "br":
        return _decompress_brotli(body, limit)
    raise ProbeFailure("protocol", f"unsupported content encoding {encoding[:50]!r} (supported: gzip, deflate, br)")


def _inflate(body: bytes, limit: int, wbits: int, encoding: str) -> bytes:
    decoded = bytearray()
    for _ in range(GZIP_MEMBERS_LIMIT):
        if not body:
            return bytes(decoded)
        stream = zlib.decompressobj(wbits)
        decoded += stream.decompress(body, limit + 1 - len(decoded))
        if len(decoded) > limit:
            raise _too_long(limit)
        if not stream.eof:
            raise _truncated(encoding)
        body = stream.unused_data.lstrip(b"\0") if wbits > zlib.MAX_WBITS else b""  # gzip may have several members
    raise ProbeFailure("protocol", f"the {encoding} body has more than {GZIP_MEMBERS_LIMIT} members")


def _decompress_brotli(body: bytes, limit: int) -> bytes:
    stream = brotli.Decompressor()
    decoded = bytearray(stream.process(body, output_buffer_limit=min(CHUNK, limit + 1)))
    while not stream.is_finished() and len(decoded) <= limit:
        more = stream.process(b"", output_buffer_limit=CHUNK)
        if not more and stream.can_accept_more_data():
            raise _truncated("br")
        decoded += more
    if len(decoded) > limit:
        raise _too_long(limit)
    return bytes(decoded)


def _too_long(limit: int) -> ProbeFailure:
    return ProbeFailure("body", f"the decoded body is longer than max_body ({limit} bytes)")


def _truncated(encoding: str) -> ProbeFailure:
    return ProbeFailure("protocol", f"the {encoding} body is truncated")
