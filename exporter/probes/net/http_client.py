"""The HTTP client of probes: one request, including proxy, OAuth 2 token, redirects and cookies."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from yarl import URL

from exporter.probes.expectations import EXAMINED, quote_excerpt, recode_as_utf8
from exporter.probes.held_bodies import HELD
from exporter.probes.json_conditions import parse_json
from exporter.probes.net import redirects
from exporter.probes.net.connections import connect, find_handshake_alert, server_name_of, start_tls
from exporter.probes.net.content_encoding import decode_body
from exporter.probes.net.cookies import Cookies
from exporter.probes.net.http_request import (
    HttpProxy,
    HttpRequest,
    HttpRequestOptions,
    OAuth2,
    build_token_request,
    with_server_name,
)
from exporter.probes.net.http_response import HttpResponse, HttpResponseReader
from exporter.probes.net.tls_contexts import ProbeTls, ssl_context_for
from exporter.probes.net.urls import without_zone
from exporter.results import ProbeDetails, ProbeFailure
from runtime.pacing import PacedProtocol

MAX_REDIRECTS = 10
TOKEN_LIMIT = 64 * 1024  # characters of a token in a file
ACCESS_TOKEN_LIMIT = 16 * 1024  # characters; it is masked in whatever is shown
OnBody = Callable[[HttpResponseReader, bytes], None]
PacedReader = PacedProtocol[HttpResponseReader]
HTTP2 = "h2"  # in ALPN
_ALPN = (HTTP2, "http/1.1")  # both also where HTTP/2 is wanted: the error is clearer than that of the handshake
_TLS_OF_CONFIGURED_ORIGIN = {"server_name": None, "cert_file": None, "key_file": None}


async def fetch(
    options: HttpRequestOptions,
    details: ProbeDetails,
    on_body: OnBody | None = None,
    cookies: Cookies | None = None,
) -> HttpResponse:
    """Send the request and read the response to its end. Raises ProbeFailure.

    The body is not decoded. With `on_body`, it is passed to that function in pieces, and not stored. `cookies` are
    those of earlier requests, to which the ones of this request are added.
    """
    started = time.perf_counter()
    # Building the request reads files the first time.
    request = options.request if "request" in vars(options) else await asyncio.to_thread(lambda: options.request)
    auth = options.auth
    if auth is not None and auth.oauth2 is not None:
        request, reader = await _follow_with_token(request, auth.oauth2, options, details, on_body, cookies)
    else:
        if auth is not None and auth.bearer_file is not None:
            token = await asyncio.to_thread(read_token, auth.bearer_file)
            details.redact = details.redact.with_secret(token)
            request = request.with_header("Authorization", f"Bearer {token}")
        request, reader = await _follow(request, options, details, on_body, cookies)
    body = bytes(reader.body)
    duration = time.perf_counter() - started
    return HttpResponse(reader.status, reader.version, reader.headers, body, duration, request.secure)


def read_token(path: Path) -> str:
    """Return the token in a file. Raises ProbeFailure."""
    try:
        with path.open(encoding="ascii") as file:
            token = file.read(TOKEN_LIMIT + 1).strip()
    except (OSError, UnicodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it has other characters than ASCII"
        raise ProbeFailure("error", f"cannot read the token in {path}: {cause}") from None
    if not token or not token.isprintable() or len(token) > TOKEN_LIMIT:
        raise ProbeFailure("error", f"cannot read the token in {path}: it must be one line, not longer than 64 KiB")
    return token


def decode(response: HttpResponse, options: HttpRequestOptions, details: ProbeDetails) -> HttpResponse:
    """Return the response with its body decoded. Raises ProbeFailure."""
    encoding = response.joined_header("content-encoding")
    if encoding is None or not response.body:
        return response
    body = decode_body(response.body, encoding, options.max_body)
    details.evidence["body"] = body[:EXAMINED]
    return replace(response, body=body)


async def _follow_with_token(
    request: HttpRequest,
    oauth2: OAuth2,
    options: HttpRequestOptions,
    details: ProbeDetails,
    on_body: OnBody | None,
    cookies: Cookies | None,
) -> tuple[HttpRequest, HttpResponseReader]:
    """Send the request with a token; if a cached token is refused, fetch a new one and try once more."""
    redact, was_cached = details.redact, oauth2.cached_token is not None
    while True:
        token = oauth2.cached_token or await _fetch_token(oauth2, options, details)
        details.redact = redact.with_secret_from_server(token)
        authorized = request.with_header("Authorization", f"Bearer {token}")
        followed, reader = await _follow(authorized, options, details, on_body, cookies)
        if reader.status not in (401, 403):
            return followed, reader
        oauth2.drop_token()
        if not was_cached:
            return followed, reader
        was_cached = False


async def _fetch_token(oauth2: OAuth2, options: HttpRequestOptions, details: ProbeDetails) -> str:
    """Fetch a token and cache it. Raises ProbeFailure."""
    endpoint = f"the token endpoint {oauth2.token_url.url}"
    token_details = ProbeDetails(redact=details.redact)
    try:
        reader = await _request_token(oauth2, options, token_details)
        answer = parse_json(recode_as_utf8(reader.header("content-type"), bytes(reader.body)))
    except ProbeFailure as failure:
        raise ProbeFailure(failure.reason, f"{endpoint}: {failure.message}") from failure
    finally:
        HELD.release(token_details)
    token = answer.get("access_token") if isinstance(answer, dict) else None
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise ProbeFailure("auth", f"{endpoint} returned no access token")
    if len(token) > ACCESS_TOKEN_LIMIT:
        raise ProbeFailure("auth", f"{endpoint} returned an access token longer than {ACCESS_TOKEN_LIMIT} characters")
    oauth2.cache_token(token, _parse_lifetime(answer.get("expires_in")))
    return token


def _parse_lifetime(expires_in: Any) -> float:
    """Return the seconds of `expires_in`, which some servers send as a string; infinity if it is missing."""
    try:
        return float(expires_in)
    except (TypeError, ValueError, OverflowError):
        return math.inf


async def _request_token(
    oauth2: OAuth2, options: HttpRequestOptions, token_details: ProbeDetails
) -> HttpResponseReader:
    """Request a token; `token_details` keep its phases apart from those of the service. Raises ProbeFailure."""

    async def send(*, credentials_in_body: bool) -> HttpResponseReader:
        request = build_token_request(oauth2, options.proxy, credentials_in_body=credentials_in_body)
        return (await _exchange(request, options.token_options, token_details, None))[0]

    reader = await send(credentials_in_body=False)
    if reader.status in (400, 401):  # servers may accept client credentials in one place only (RFC 6749, 2.3.1)
        reader = await send(credentials_in_body=True)
    if reader.status != 200:  # noqa: PLR2004 - HTTP status code
        refused = reader.status in (400, 401, 403)
        raise ProbeFailure("auth" if refused else "status", f"answered {reader.status}, expected 200")
    return reader


async def _follow(
    request: HttpRequest,
    options: HttpRequestOptions,
    details: ProbeDetails,
    on_body: OnBody | None,
    cookies: Cookies | None,
) -> tuple[HttpRequest, HttpResponseReader]:
    """Send the request and follow redirects; return the last request and its response. Raises ProbeFailure."""
    sent = cookies.add_to(request) if cookies is not None else request
    reader, configured_peer = await _exchange(sent, options, details, on_body)
    followed = 0
    while options.follow_redirects and reader.status in (301, 302, 303, 307, 308):
        location = reader.header("location")
        if not location:
            break
        followed += 1
        details.gauges["service_http_redirects"] = followed
        if followed > MAX_REDIRECTS:
            target = quote_excerpt(location.encode(), details)
            raise ProbeFailure("protocol", f"redirected more than {MAX_REDIRECTS} times, last to {target}")
        cookies = cookies or Cookies()
        cookies.note(reader.headers, request.url)
        request = request.redirected(reader.status, location, details)
        sent = cookies.add_to(request)
        reader, _ = await _exchange(sent, options, details, on_body, redirected_from=configured_peer)
    if cookies is not None:
        cookies.note(reader.headers, request.url)
    return request, reader


async def _exchange(
    request: HttpRequest,
    options: HttpRequestOptions,
    details: ProbeDetails,
    on_body: OnBody | None,
    redirected_from: str | None = None,
) -> tuple[HttpResponseReader, str]:
    """Send one request; return its response and the server's address (its name behind a proxy). Raises ProbeFailure.

    `redirected_from` is the address of the configured URL if the request follows a redirect.
    """
    url = options.request.url
    is_configured_origin = request.url is url or request.url.origin() == url.origin()
    tls = options.tls if is_configured_origin else options.tls.model_copy(update=_TLS_OF_CONFIGURED_ORIGIN)
    tls = with_server_name(tls, request.host_header)
    transport, paced, peer = await _connect(request, options, tls, details, on_body, redirected_from)
    reader = paced.protocol
    sent = time.perf_counter()
    try:
        _send(request, options, transport, paced)
        failure = await reader.done
    finally:
        transport.abort()
        reader.release()
        ended = time.perf_counter()
        first_byte = reader.first_byte
        details.add_phase("processing", (first_byte or ended) - sent)
        if first_byte is not None:
            details.add_phase("transfer", ended - first_byte)
    _record(reader, details)
    if failure is not None:
        if not reader.has_received and request.secure and request.proxy is None:
            server_name = server_name_of(tls, request.host)
            failure = await find_handshake_alert(peer, request.port, server_name, tls, options) or failure
        raise failure
    return reader, peer


async def _connect(
    request: HttpRequest,
    options: HttpRequestOptions,
    tls: ProbeTls,
    details: ProbeDetails,
    on_body: OnBody | None,
    redirected_from: str | None,
) -> tuple[asyncio.Transport, PacedReader, str]:
    """Connect to the server, or to its proxy, with a reader of the response. Raises ProbeFailure.

    Also return the server's address, or its name behind a proxy.
    """
    may_use_http2 = _may_use_http2(options, request)

    def create_reader() -> PacedReader:
        reader = HttpResponseReader(request.method, options.max_body, details, on_body, strict=options.strict)
        paced = PacedProtocol(reader)
        if may_use_http2:
            paced.set_paused(paused=True)  # until it is known which version the server has chosen
        return paced

    def filter_addresses(addresses: list[str]) -> list[str]:
        assert redirected_from is not None  # noqa: S101 - it is not used otherwise
        return redirects.allowed_addresses(addresses, request.host, redirects.classify_host(redirected_from))

    if request.proxy is not None:
        if redirected_from is not None:
            filter_addresses(await redirects.resolve_for_proxy(request.host, request.port, options))
        transport, reader = await _connect_through_proxy(request.proxy, request, create_reader, options, tls, details)
        return transport, reader, request.host
    return await connect(
        request.host,
        request.port,
        create_reader,
        details,
        dial=options,
        tls=tls if request.secure else None,
        alpn=_ALPN if may_use_http2 else (),
        filter_addresses=None if redirected_from is None else filter_addresses,
    )


def _record(reader: HttpResponseReader, details: ProbeDetails) -> None:
    if reader.status:
        details.gauges["service_http_status_code"] = reader.status
        details.gauges["service_http_version"] = float(reader.version)
        details.gauges["service_http_body_bytes"] = reader.body_size
        details.evidence["headers"] = reader.headers
        details.evidence["body"] = bytes(reader.body[:EXAMINED])


def _may_use_http2(options: HttpRequestOptions, request: HttpRequest) -> bool:
    return options.version != "1.1" and request.proxy is None


def _send(request: HttpRequest, options: HttpRequestOptions, transport: asyncio.Transport, paced: PacedReader) -> None:
    """Send the request in the version of HTTP that the server has chosen. Raises ProbeFailure."""
    if not _may_use_http2(options, request):
        transport.write(request.data)
        return
    if _has_chosen_http2(request, options, transport):
        paced.protocol.use_http2(transport.write).send(request.http2_headers, request.body)
    else:
        transport.write(request.data)
    paced.set_paused(paused=False)


def _has_chosen_http2(request: HttpRequest, options: HttpRequestOptions, transport: asyncio.Transport) -> bool:
    """Whether HTTP/2 is used: without TLS, only if the server is known to speak it. Raises ProbeFailure."""
    is_wanted: bool = options.version == "2"
    if not request.secure:
        return is_wanted
    is_chosen: bool = transport.get_extra_info("ssl_object").selected_alpn_protocol() == HTTP2
    if is_wanted and not is_chosen:
        raise ProbeFailure("protocol", "the server does not offer HTTP/2")
    return is_chosen


async def _connect_through_proxy(
    proxy: HttpProxy,
    request: HttpRequest,
    create_reader: Callable[[], PacedReader],
    options: HttpRequestOptions,
    tls: ProbeTls,
    details: ProbeDetails,
) -> tuple[asyncio.Transport, PacedReader]:
    """Connect to the proxy, and for https through it to the server, with TLS. Raises ProbeFailure."""
    context = ssl_context_for(tls) if request.secure else None
    transport, reader = await _connect_to_proxy(proxy, request, create_reader, options, details)
    if context is not None:
        transport = await start_tls(transport, reader, context, server_name_of(tls, request.host), details)
    return transport, reader


async def _connect_to_proxy(
    proxy: HttpProxy,
    request: HttpRequest,
    create_reader: Callable[[], PacedReader],
    options: HttpRequestOptions,
    details: ProbeDetails,
) -> tuple[asyncio.Transport, PacedReader]:
    """Connect to the proxy, and for https open a tunnel through it (RFC 9110, 9.3.6). Raises ProbeFailure."""
    url = URL(proxy.url)
    tls = proxy.tls if url.scheme == "https" else None
    port = url.port or (443 if tls else 80)
    if not request.secure:
        return (await connect(url.raw_host or "", port, create_reader, details, dial=options, tls=tls))[:2]
    target = f"{without_zone(request.url.host_subcomponent or '')}:{request.port}"
    transport, reader, _ = await connect(
        url.raw_host or "",
        port,
        lambda: HttpResponseReader("CONNECT", options.max_body, details, strict=options.strict),
        details,
        dial=options,
        tls=tls,
    )
    started = time.perf_counter()
    try:
        headers = (f"{name}: {value}" for name, value in proxy.sent_headers.items())
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", *headers]
        transport.write("\r\n".join([*lines, "", ""]).encode())
        failure = await reader.done or _check_connect_status(proxy, reader.status, target)
    except BaseException:
        transport.abort()
        raise
    finally:
        reader.release()
        details.add_phase("connect", time.perf_counter() - started)
    if failure is not None:
        transport.abort()
        raise ProbeFailure(failure.reason, f"the proxy {url.host}:{port}: {failure.message}")
    tunneled = create_reader()
    tunneled.connection_made(transport)
    transport.set_protocol(tunneled)
    return transport, tunneled


def _check_connect_status(proxy: HttpProxy, status: int, target: str) -> ProbeFailure | None:
    if 200 <= status < 300:  # noqa: PLR2004 - HTTP status codes
        return None
    refused = status in (401, 407) and proxy.sent_headers
    return ProbeFailure("auth" if refused else "connect", f"answered {status} to CONNECT {target}")
