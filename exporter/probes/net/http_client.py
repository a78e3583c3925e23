"""An HTTP request to its last answer: through a proxy, with a token, after redirects and their cookies."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yarl import URL

from exporter.probes.expectations import EXAMINED, apart, excerpt, parse_json
from exporter.probes.net import redirects
from exporter.probes.net.connections import connect, context_for, refused_after_handshake, secure
from exporter.probes.net.encodings import decoded
from exporter.probes.net.http_request import OAuth2, Proxy, Request, RequestOptions, token_request
from exporter.probes.net.http_response import Exchange, header
from exporter.results import ProbeFailure, Seen

if TYPE_CHECKING:
    from aiohttp import CookieJar

REDIRECTS = 10
LONG = 128 * 1024  # bytes of a body that is worth a thread of its own
OnBody = Callable[[Exchange, bytes], None]
_NOT_FOR_OTHERS = {"server_name": None, "cert_file": None, "key_file": None}


@dataclass(frozen=True, slots=True)
class Answer:
    """The last answer; `body` is decoded, `took` the seconds of all requests, `secure` whether it came by TLS."""

    status: int
    version: str
    headers: list[tuple[str, str]]
    body: bytes
    took: float
    secure: bool

    def header(self, name: str) -> str | None:
        return header(self.headers, name)


async def fetch(options: RequestOptions, seen: Seen, on_body: OnBody | None = None) -> Answer:
    """Ask, and read the answer to its end. Raises ProbeFailure.

    With `on_body` the body is not kept, but given away as it comes, undecoded.
    """
    started = time.perf_counter()
    # The first time it may read files.
    request = options.first if "first" in vars(options) else await asyncio.to_thread(lambda: options.first)
    oauth2 = options.auth.oauth2 if options.auth else None
    if oauth2 is None:
        request, exchange = await _follow(request, options, seen, on_body)
    else:
        request, exchange = await _follow_with_token(request, oauth2, options, seen, on_body)
    seen.gauges["service_http_status_code"] = exchange.status
    seen.evidence["headers"] = exchange.headers
    body = bytes(exchange.body)
    seen.evidence["body"] = body[:EXAMINED]
    encodings = exchange.header("content-encoding")
    if encodings is not None and body:
        body = await apart(decoded, body, encodings, options.max_body)
        seen.evidence["body"] = body[:EXAMINED]
    took = time.perf_counter() - started
    return Answer(exchange.status, exchange.version, exchange.headers, body, took, request.secure)


async def _follow_with_token(
    request: Request, oauth2: OAuth2, options: RequestOptions, seen: Seen, on_body: OnBody | None
) -> tuple[Request, Exchange]:
    """As `_follow`; a token that was kept and is refused is fetched anew, once."""
    plain, kept = seen.redact, oauth2.kept is not None
    while True:
        token = oauth2.kept or await _fresh_token(oauth2, options, seen)
        seen.redact = plain.with_secret(token)
        asked = request.with_header("Authorization", f"Bearer {token}")
        followed, exchange = await _follow(asked, options, seen, on_body)
        if exchange.status not in (401, 403):
            return followed, exchange
        oauth2.forget()
        if not kept:
            return followed, exchange
        kept = False


async def _fresh_token(oauth2: OAuth2, options: RequestOptions, seen: Seen) -> str:
    """Fetch a token and keep it. Raises ProbeFailure."""
    where = f"the token endpoint {oauth2.token_url.url}"
    try:
        exchange = await _token_exchange(oauth2, options, Seen(redact=seen.redact))
        told = parse_json(bytes(exchange.body))
    except ProbeFailure as failure:
        raise ProbeFailure(failure.reason, f"{where}: {failure.message}") from failure
    token = told.get("access_token") if isinstance(told, dict) else None
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise ProbeFailure("auth", f"{where} gave no token")
    oauth2.keep(token, _seconds(told.get("expires_in")))
    return token


def _seconds(lifetime: Any) -> float:
    """What `expires_in` says, which some write as text; without it, until the token is refused."""
    try:
        return float(lifetime)
    except (TypeError, ValueError, OverflowError):
        return math.inf


async def _token_exchange(oauth2: OAuth2, options: RequestOptions, aside: Seen) -> Exchange:
    """Ask for a token; the phases of this request are none of the service's. Raises ProbeFailure."""

    async def ask(*, in_body: bool) -> Exchange:
        request = token_request(oauth2, options.proxy, in_body=in_body)
        return (await _exchange(request, options.for_tokens, aside, None))[0]

    exchange = await ask(in_body=False)
    if exchange.status in (400, 401):  # servers may take the client's credentials in either place (RFC 6749, 2.3.1)
        exchange = await ask(in_body=True)
    if exchange.status != 200:  # noqa: PLR2004
        refused = exchange.status in (400, 401, 403)
        raise ProbeFailure("auth" if refused else "status", f"answered {exchange.status}, expected 200")
    return exchange


async def _follow(
    request: Request, options: RequestOptions, seen: Seen, on_body: OnBody | None
) -> tuple[Request, Exchange]:
    exchange, peer = await _exchange(request, options, seen, on_body)
    if not options.follow_redirects:
        return request, exchange
    followed = 0
    jar: CookieJar | None = None
    while exchange.status in (301, 302, 303, 307, 308):
        location = exchange.header("location")
        if location is None:
            break
        followed += 1
        seen.gauges["service_http_redirects"] = followed
        if followed > REDIRECTS:
            raise ProbeFailure(
                "protocol", f"redirected more than {REDIRECTS} times, last to {excerpt(location.encode(), seen)}"
            )
        set_cookies = [value for name, value in exchange.headers if name == "set-cookie"]
        if set_cookies:
            jar = jar or _cookie_jar()
            jar.update_cookies_from_headers(set_cookies, request.url)
        request = request.redirected(exchange.status, location, seen)
        asked = request.with_cookies(jar.filter_cookies(request.url)) if jar else request
        exchange, _ = await _exchange(asked, options, seen, on_body, after=peer)
    return request, exchange


def _cookie_jar() -> "CookieJar":
    from aiohttp import CookieJar

    return CookieJar(unsafe=True, quote_cookie=False)


async def _exchange(
    request: Request, options: RequestOptions, seen: Seen, on_body: OnBody | None, after: str | None = None
) -> tuple[Exchange, str]:
    """An exchange, and the address of the server, or its host where a proxy connects to it. Raises ProbeFailure.

    `after` is that of the configured URL, where this request follows a redirect.
    """
    own = request.url.origin() == options.first.url.origin()
    tls = options.tls if own else options.tls.model_copy(update=_NOT_FOR_OTHERS)

    def made() -> Exchange:
        return Exchange(request.method, options.max_body, seen, on_body)

    def allowed(addresses: list[str]) -> list[str]:
        return addresses if after is None else redirects.allowed(addresses, request.host, redirects.kind_of_host(after))

    transport: asyncio.Transport
    if request.proxy is not None:
        if after is not None:
            allowed(await redirects.known_addresses(request.host, request.port))
        context = context_for(tls) if request.secure else None
        transport, exchange = await _through(request.proxy, request, made, options, seen)
        if context is not None:
            transport = await secure(transport, exchange, context, tls.server_name or request.host, seen)
    else:
        transport, exchange = await connect(
            request.host, request.port, made, seen, dial=options, tls=tls if request.secure else None, allowed=allowed
        )
    peer = request.host if request.proxy is not None else str(transport.get_extra_info("peername")[0])
    sent = time.perf_counter()
    try:
        transport.write(request.data)
        failure = await exchange.done
    finally:
        transport.abort()
        ended = time.perf_counter()
        first = exchange.first_byte
        seen.phase("processing", (first or ended) - sent)
        if first is not None:
            seen.phase("transfer", ended - first)
    if failure is not None:
        if exchange.status:
            seen.gauges["service_http_status_code"] = exchange.status
        if first is None and request.secure and request.proxy is None:
            name = tls.server_name or request.host
            failure = await refused_after_handshake(peer, request.port, name, tls, options) or failure
        raise failure
    return exchange, peer


async def _through(
    proxy: Proxy, request: Request, made: Callable[[], Exchange], options: RequestOptions, seen: Seen
) -> tuple[asyncio.Transport, Exchange]:
    """A connection to the proxy, and for https through it (RFC 9110, 9.3.6)."""
    url = URL(proxy.url)
    tls = proxy.tls if url.scheme == "https" else None
    port = url.port or (443 if tls else 80)
    if not request.secure:
        return await connect(url.raw_host or "", port, made, seen, dial=options, tls=tls)
    target = f"{request.url.host_subcomponent}:{request.port}"
    transport, exchange = await connect(
        url.raw_host or "", port, lambda: Exchange("CONNECT", options.max_body, seen), seen, dial=options, tls=tls
    )
    started = time.perf_counter()
    try:
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", *(f"{k}: {v}" for k, v in proxy.sent.items())]
        transport.write("\r\n".join([*lines, "", ""]).encode())
        failure = await exchange.done or _refusal(proxy, exchange.status, target)
    except BaseException:
        transport.abort()
        raise
    finally:
        seen.phase("connect", time.perf_counter() - started)
    if failure is not None:
        transport.abort()
        raise ProbeFailure(failure.reason, f"the proxy {url.host}:{port}: {failure.message}")
    inner = made()
    transport.set_protocol(inner)
    return transport, inner


def _refusal(proxy: Proxy, status: int, target: str) -> ProbeFailure | None:
    if 200 <= status < 300:  # noqa: PLR2004
        return None
    refused = status in (401, 407) and proxy.sent
    return ProbeFailure("auth" if refused else "connect", f"answered {status} to CONNECT {target}")
