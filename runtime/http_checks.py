"""What every request and every response must have, whatever the route: valid requests, and headers for browsers."""

import re

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from multidict import CIMultiDict

from runtime.webconfig import WebConfigFile

_HOST = re.compile(r"(?:[\w.-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.ASCII | re.IGNORECASE)
_MAX_PORT = 65535
_ORIGIN = re.compile(r"https?://([^/?]*)", re.IGNORECASE)
_DEFAULT_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    # "no-referrer" would make browsers send `Origin: null` with the forms of our own pages.
    "Referrer-Policy": "same-origin",
}
# Browsers apply it to all ports of the host: a mistake must be over after a day.
_HSTS = "max-age=86400"


class ResponseHeaders:
    """The headers of all responses of a server: those of the web configuration override all others."""

    def __init__(self, web_config: WebConfigFile) -> None:
        self._web_config = web_config

    def add_to(self, headers: CIMultiDict[str]) -> None:
        headers["Server"] = "defib"  # aiohttp's own has versions
        for name, value in _DEFAULT_HEADERS.items():
            headers.setdefault(name, value)
        if self._web_config.tls is not None:
            headers.setdefault("Strict-Transport-Security", _HSTS)
        headers.update(self._web_config.config.http_server_config.headers)


RESPONSE_HEADERS = web.AppKey("response_headers", ResponseHeaders)
PASSES_BODIES = web.AppKey("passes_bodies", bool)  # whether bodies are passed on as they are, compressed ones, too


def add_response_headers(app: web.Application, web_config: WebConfigFile) -> None:
    """Add the headers to all responses of the application. Its server adds them to those of malformed requests."""
    headers = app[RESPONSE_HEADERS] = ResponseHeaders(web_config)

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        headers.add_to(response.headers)
        if request.path.startswith("/api/"):  # what they say is private, and old in a moment
            response.headers.setdefault("Cache-Control", "no-store")

    app.on_response_prepare.append(add)


def find_fault(request: web.BaseRequest, *, compressed: bool = False) -> str | None:
    """Return why a request is ambiguous or invalid, or None. `compressed` says whether its body may be compressed.

    aiohttp's parser has refused two Host headers, Content-Length with Transfer-Encoding, and control characters.
    What it accepts, but proxies and servers understand differently, is refused here (RFC 9112, sections 2.3, 3.2, 6.1).
    """
    host, target = request.headers.get("Host"), request.raw_path
    if request.version not in (HttpVersion10, HttpVersion11):
        return f"HTTP/{request.version.major}.{request.version.minor}"
    if host is not None and not _is_valid_host(host):
        return "invalid Host header"
    if request.method == "CONNECT" or "#" in target or "%00" in target:
        return "invalid request target"
    if not target.startswith("/") and target != "*":
        origin = _ORIGIN.match(target)
        if origin is None or origin[1].lower() != (host or "").lower():
            return "the request target contradicts the Host header"
    return _find_fault_in_encoding(request, compressed=compressed)


def _find_fault_in_encoding(request: web.BaseRequest, *, compressed: bool) -> str | None:
    coding = request.headers.get("Transfer-Encoding")
    if coding is not None and (coding.lower() != "chunked" or request.version < HttpVersion11):
        return "unsupported transfer encoding"
    if not compressed and request.headers.get("Content-Encoding", "identity").lower() != "identity":
        return "compressed bodies are not supported"
    return None


def _is_valid_host(host: str) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and int(match[1] or 0) <= _MAX_PORT


def describe_parser_error(error: BaseException | None) -> str:
    """Return why aiohttp's parser has refused a request, without what it quotes of the request."""
    if isinstance(error, LineTooLong):
        return "the request line or a header is too long"
    if type(error) is BadHttpMessage:  # not of a subclass: their messages begin with a part of the request
        return error.message.partition(":")[0].rstrip(".")
    return "invalid HTTP"


def refuse(status: int, code: str, message: str, headers: ResponseHeaders) -> web.Response:
    """Return the response to a request that is not passed to the application; the connection is then closed."""
    response = web.json_response({"error": {"code": code, "message": message}}, status=status)
    headers.add_to(response.headers)
    response.force_close()
    return response
