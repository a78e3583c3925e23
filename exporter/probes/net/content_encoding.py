"""Content encodings of HTTP (RFC 9110, 8.4): decoding within limits."""

import sys
import zlib

import brotli

from exporter.results import ProbeFailure

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK = 64 * 1024
ENCODINGS_LIMIT = 5  # of one body; decoding runs in a thread that cannot be cancelled
MEMBERS_LIMIT = 100  # of gzip, and frames of zstd; decoding one copies all after it
_GZIP = ("gzip", "x-gzip")
_DECODED = (*_GZIP, "deflate", "br", "zstd")
# All other names, such as that of a charset, stand for no encoding, as clients take them. These are registered ones.
_NOT_DECODED = ("compress", "x-compress", "exi", "pack200-gzip", "aes128gcm", "dcb", "dcz")
_ZSTD_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): 23}  # 8 MiB, the limit of HTTP (RFC 9659)


def decode_body(body: bytes, content_encoding: str | None, limit: int) -> bytes:
    """Return `body` without its encodings. Raises ProbeFailure, also if the result is longer than `limit` bytes."""
    names = [name.strip().lower() for name in (content_encoding or "").split(",")]
    encodings = [name for name in names if name in _DECODED or name in _NOT_DECODED]
    if len(encodings) > ENCODINGS_LIMIT:
        raise ProbeFailure("protocol", f"the body has {len(encodings)} encodings, more than {ENCODINGS_LIMIT}")
    for encoding in reversed(encodings):
        if not body:
            continue
        try:
            body = _decode(body, encoding, limit)
        except (zlib.error, brotli.error, zstd.ZstdError) as error:
            raise ProbeFailure("protocol", f"the body is not valid {encoding}: {error}") from error
    return body


def _decode(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding in _GZIP:
        return _inflate(body, limit, zlib.MAX_WBITS | 16, "gzip")
    if encoding == "deflate":
        try:
            return _inflate(body, limit, zlib.MAX_WBITS, encoding)
        except zlib.error:  # many servers omit the zlib header that the standard requires
            return _inflate(body, limit, -zlib.MAX_WBITS, encoding)
    if encoding == "br":
        return _decompress_brotli(body, limit)
    if encoding == "zstd":
        return _decompress_zstd(body, limit)
    raise ProbeFailure("protocol", f"the body is encoded as {encoding}, which cannot be decoded")


def _inflate(body: bytes, limit: int, wbits: int, encoding: str) -> bytes:
    decoded = bytearray()
    for _ in range(MEMBERS_LIMIT):
        if not body:
            return bytes(decoded)
        stream = zlib.decompressobj(wbits)
        decoded += stream.decompress(body, limit + 1 - len(decoded))
        if len(decoded) > limit:
            raise _too_long(limit)
        if not stream.eof:
            raise _truncated(encoding)
        body = stream.unused_data.lstrip(b"\0") if wbits > zlib.MAX_WBITS else b""  # gzip may have several members
    raise ProbeFailure("protocol", f"the {encoding} body has more than {MEMBERS_LIMIT} members")


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


def _decompress_zstd(body: bytes, limit: int) -> bytes:
    decoded = bytearray()
    for _ in range(MEMBERS_LIMIT):
        if not body:
            return bytes(decoded)
        stream = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)
        decoded += stream.decompress(body, limit + 1 - len(decoded))
        if len(decoded) > limit:
            raise _too_long(limit)
        if not stream.eof:
            raise _truncated("zstd")
        body = stream.unused_data
    raise ProbeFailure("protocol", f"the zstd body has more than {MEMBERS_LIMIT} frames")


def _too_long(limit: int) -> ProbeFailure:
    return ProbeFailure("body", f"the decoded body is longer than max_body ({limit} bytes)")


def _truncated(encoding: str) -> ProbeFailure:
    return ProbeFailure("protocol", f"the {encoding} body is truncated")
