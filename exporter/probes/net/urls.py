"""URLs as they are sent: as they are written, since some servers distinguish `%2F` and `/`, or `/?` and `/`."""

import re
from typing import NamedTuple
from urllib.parse import quote

from yarl import URL

_PARTS = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?#]*))?([^?#]*)(\?[^#]*)?", re.DOTALL)
_UNSENDABLE = re.compile(r"[^!-~]+")
_ZONE = re.compile(r"%[^]]*(?=\])")


class _Reference(NamedTuple):
    """A URL, or a part of one (RFC 3986, appendix B), without its fragment. The query begins with `?`."""

    scheme: str | None
    authority: str | None
    path: str
    query: str | None


def _split(url: str) -> _Reference:
    match = _PARTS.match(url)
    return _Reference(*match.groups()) if match is not None else _Reference(None, None, url, None)


def request_target(url: str) -> str:
    """Return path and query as they are written; only blanks, control characters and non-ASCII are percent-encoded."""
    _, _, path, query = _split(url)
    target = (path or "/") + (query or "")
    return _UNSENDABLE.sub(lambda match: quote(match[0], safe=""), target)


def resolve_reference(base: str, reference: str) -> str:
    """Return the URL that `reference` stands for in a document at `base` (RFC 3986, 5.2), without its fragment.

    Segments `.` and `..` of its path are resolved, as by other clients. Everything else stays as it is written.
    """
    scheme, authority, path, query = _split(reference)
    if scheme is not None and authority is None:
        return reference
    origin = _split(base)
    if authority is not None or path.startswith("/"):
        path = _remove_dot_segments(path)
    elif path:
        path = _remove_dot_segments(origin.path.rpartition("/")[0] + "/" + path)
    else:
        path, query = origin.path, origin.query if query is None else query
    authority = origin.authority if authority is None else authority
    return f"{scheme or origin.scheme}://{authority}{path}{query or ''}"


def _remove_dot_segments(path: str) -> str:
    """Resolve the segments `.` and `..` of a path that is empty or begins with a slash."""
    segments = path.split("/")
    kept: list[str] = []
    for segment in segments[1:]:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept) if len(segments) > 1 else path


def connectable_host(url: URL) -> str:
    """Return the host of a URL as the resolver expects it: IDNA, and the zone of an IPv6 address after a plain `%`."""
    return (url.raw_host or "").replace("%25", "%")


def check_host(url: str) -> str:
    """Return a URL whose host can be connected to. Raises ValueError."""
    try:
        connectable_host(URL(url))
    except (ValueError, IndexError):  # yarl raises either
        raise ValueError("is not a URL: the name of its host is not valid") from None
    return url


def without_zone(host: str) -> str:
    """Return a host in brackets, with or without a port, without the zone of an IPv6 address (RFC 6874)."""
    return _ZONE.sub("", host, count=1)
