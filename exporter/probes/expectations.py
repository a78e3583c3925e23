"""Expectations of texts that several probe kinds share, and how they are checked."""

import codecs
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import webencodings

from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.units import compile_pattern

EXCERPT_LENGTH = 120  # characters
LABEL_LIMIT = 40  # characters of the name of a charset
PIECE = 64 * 1024  # bytes that are decoded at once
EXAMINED = 10_000  # characters of a text that become evidence

_SINGLE_BYTE = ("windows-", "iso-8859-", "koi8-", "ibm866", "macintosh", "x-mac-cyrillic")  # charsets
_BYTE_ORDER_MARKS = (b"\xef\xbb", b"\xfe\xff", b"\xff\xfe")  # their first two bytes


@lru_cache(maxsize=50_000)
def compile_cached(pattern: str) -> Any:
    """Compile an RE2 pattern, or return the cached result."""
    return compile_pattern(pattern)


def check_matches(patterns: Iterable[str], text: bytes, name: str, details: ProbeDetails) -> None:
    """Raise ProbeFailure unless every pattern matches `text` (UTF-8)."""
    for pattern in patterns:
        if compile_cached(pattern).search(text) is None:
            raise ProbeFailure(
                "body", f"{name} does not match {pattern!r}; it begins with {quote_excerpt(text, details)}"
            )


def check_lacks(patterns: Iterable[str], text: bytes, name: str, details: ProbeDetails) -> None:
    """Raise ProbeFailure if any pattern matches `text` (UTF-8)."""
    for pattern in patterns:
        found = compile_cached(pattern).search(text)
        if found is not None:
            matched = _quote_match(text, found.span(), details)
            raise ProbeFailure("body", f"{name} must not match {pattern!r}, but contains {matched}")


def _quote_match(text: bytes, span: tuple[int, int], details: ProbeDetails) -> str:
    """Return the beginning of a match, quoted. It may be a part of a secret: what is around it is redacted with it."""
    start, end = span
    margin = 4 * details.redact.longest  # bytes; a character takes up to 4
    before = text[max(0, start - margin) : start].decode("utf-8", "replace")
    matched = text[start : min(end, start + 4 * EXCERPT_LENGTH)].decode("utf-8", "replace")[:EXCERPT_LENGTH]
    near = before + text[start : start + 4 * EXCERPT_LENGTH + margin].decode("utf-8", "replace")
    shown = details.redact.redact_part(near, len(before), len(before) + len(matched))
    return repr(shown) + ("…" if end - start > len(matched.encode()) else "")


def quote_excerpt(text: bytes, details: ProbeDetails) -> str:
    """Return the beginning of `text`, quoted; secrets are redacted before it is cut."""
    examined = EXCERPT_LENGTH + details.redact.longest  # characters, of which each takes up to 4 bytes
    part = text[: 4 * examined].decode("utf-8", "replace")
    return repr(details.redact.redact_head(part, EXCERPT_LENGTH)) + ("…" if len(part) > EXCERPT_LENGTH else "")


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def recode_as_utf8(content_type: str | None, body: bytes) -> bytes:
    """Return the body in UTF-8, in which patterns are matched, without a byte order mark.

    The names of charsets, and that a byte order mark comes before them, are as in the WHATWG's Encoding Standard. An
    unknown charset is taken for UTF-8.
    """
    _, found, charset = (content_type or "").lower().partition("charset=")
    label = charset.split(";")[0].strip(" \"'")[:LABEL_LIMIT] if found else ""
    if (not label or label == "utf-8") and body[:2] not in _BYTE_ORDER_MARKS and _is_utf8(body):
        return body  # as most are
    encoding = webencodings.lookup(label) or webencodings.UTF8
    if encoding.name == "iso-2022-kr":  # which the standard replaces as a whole
        return "\ufffd".encode() if body else b""
    if (table := _find_table(encoding)) is not None and body[:2] not in _BYTE_ORDER_MARKS:
        return codecs.charmap_decode(body, "strict", table)[0].encode()
    # The standard decodes GBK as its superset.
    decoder = webencodings.IncrementalDecoder("gb18030" if encoding.name == "gbk" else encoding, "replace")
    # In pieces, between which other threads run: an invalid byte takes a hundred times as long as others.
    pieces = [decoder.decode(body[start : start + PIECE]) for start in range(0, len(body), PIECE)]
    return "".join([*pieces, decoder.decode(b"", final=True)]).encode("utf-8", "replace")


@lru_cache(maxsize=100)
def _find_table(encoding: webencodings.Encoding) -> str | None:
    """Return the characters of a charset of single bytes, U+FFFD for those that it has not; None for others."""
    if not encoding.name.startswith(_SINGLE_BYTE):
        return None
    return "".join(encoding.codec_info.decode(bytes([byte]), "replace")[0] for byte in range(256))
