"""Protection of browsers: which sites' pages may send requests, under which names this server is known, and CSRF."""

import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from aiohttp import web

from runtime.errors import ApiError
from runtime.request_bodies import read_request_body

READING = ("GET", "HEAD")
CSRF_HEADER = "X-CSRF-Token"
MAX_FORM, MAX_FIELDS = 16 * 1024, 20  # bytes and fields of a form
_FORM: web.RequestKey[dict[str, str]] = web.RequestKey("form", dict)


@dataclass(frozen=True)
class KnownHosts:
    """The names under which browsers may know this server, without ports, and the origins of its public URLs.

    IP literals and localhost are always known: no page of another site can have them as its name.
    """

    names: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    @classmethod
    def create(cls, hosts: Sequence[str], urls: Sequence[str]) -> "KnownHosts":
        """Return the names of `hosts`, and the names and origins of `urls`."""
        parts = [urlsplit(url) for url in urls]
        names = {host.lower() for host in hosts} | {part.hostname for part in parts if part.hostname}
        return cls(frozenset(names), frozenset(f"{part.scheme}://{part.netloc}".lower() for part in parts))

    def check_host(self, request: web.Request) -> None:
        """Refuse a request whose Host is unknown: with DNS rebinding, a page's own name leads to this server."""
        name = _host_name(request.host)
        if not (name == "localhost" or _is_ip_literal(name) or name in self.names):
            message = f"the server is not known as {name[:100]!r}: add the name to access.hosts"
            raise ApiError(403, "unknown_host", message)

    def check_origin(self, request: web.Request) -> None:
        """Refuse changes that a page of another site sends."""
        origin = request.headers.get("Origin")
        if request.method in READING or origin is None:
            return
        netloc = _netloc(origin)
        # A proxy that ends TLS passes the name. One that passes its own address needs the public URL to be configured.
        if origin.lower() not in self.origins and (not netloc or netloc != request.host.lower()):
            own = f"{request.scheme}://{request.host}"
            message = (
                f"the request is from {origin[:100]!r}, not from {own[:100]!r}; behind a proxy, pass the Host header"
                " on, or set notify.links.remediator to the URL that browsers use"
            )
            raise ApiError(403, "cross_origin", message)


def check_fetch_metadata(request: web.Request) -> None:
    """Refuse what pages of other sites request, except links to pages of this server."""
    if request.headers.get("Sec-Fetch-Site") != "cross-site":
        return
    is_navigation = request.headers.get("Sec-Fetch-Mode") == "navigate"
    is_document = request.headers.get("Sec-Fetch-Dest", "document") == "document"  # not a frame
    is_page = request.method == "GET" and not request.path.startswith("/api/")
    if not (is_page and is_navigation and is_document):
        raise ApiError(403, "cross_site", "requests from other sites are refused")


def is_from_browser(request: web.Request) -> bool:
    """Whether a page may have sent the request."""
    return "Sec-Fetch-Site" in request.headers or "Origin" in request.headers


def check_csrf(request: web.Request, expected: str, given: str) -> None:
    """Refuse a change without the CSRF token of its session: `given` is from a form, or empty."""
    if request.method in READING:
        return
    token = given or request.headers.get(CSRF_HEADER, "")
    if not hmac.compare_digest(token.encode("utf-8", "surrogateescape"), expected.encode()):
        raise ApiError(403, "csrf", f"the CSRF token is missing or wrong ({CSRF_HEADER}): load the page again")


async def read_form(request: web.Request) -> Mapping[str, str]:
    """Return the fields of a form, which may be sent by anybody; empty if the request has none. Raises ApiError."""
    if request.method in READING or request.content_type != "application/x-www-form-urlencoded":
        return {}
    form = request.get(_FORM)
    if form is None:
        body = await read_request_body(request, MAX_FORM)
        try:
            form = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS))
        except ValueError as error:
            raise ApiError(400, "bad_request", "the form cannot be read") from error
        request[_FORM] = form
    return form


def _host_name(host: str) -> str:
    """Return a Host header's name, in lower case, without port and final dot."""
    name, colon, port = host.rpartition(":")
    name = name if colon and (port.isdigit() or not port) and not host.endswith("]") else host
    return name.lower().removesuffix(".").strip("[]")


def _is_ip_literal(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
