"""The HTTP base of all servers: access control, errors as JSON, health and readiness."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from urllib.parse import urlsplit

import bcrypt
import structlog
from aiohttp import web
from pydantic import SecretStr

from runtime.errors import StartError
from runtime.logs import LimitedLog
from runtime.requests import add_response_headers
from runtime.tokens import ApiToken, TokenError
from runtime.webconfig import WebConfig

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = structlog.get_logger()
limited_log = LimitedLog()

WEB_USER = "user"  # the key in a request of the web user's name
_AUTHENTICATED = "authenticated"
_UNKNOWN_USER_HASH = bcrypt.hashpw(b"unknown", bcrypt.gensalt(10))  # unknown users take as long as known ones
_BCRYPT_LIMIT = 72  # bytes of a password that bcrypt reads
_CACHED_LOGINS = 100
_CLIENT_ERROR = 400


class ApiError(Exception):
    """Ends a request with a status and `{"error": {"code", "message"}}`."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class AccessRequirement(Enum):
    """What a route requires of its callers."""

    PUBLIC = auto()  # nothing: health, and requests with a signature of their own
    SCRAPE = auto()  # as READ, or the webhook's token; where none is needed, a wrong credential is ignored
    READ = auto()  # a credential, unless reading is open; without one, texts of services, hosts and peers are left out
    CREDENTIAL = auto()  # the API token or a web user, on loopback too: it changes something or runs a command
    WEBHOOK = auto()  # as CREDENTIAL, or the webhook's token


@dataclass
class AccessControl:
    """Who may call: the API token, the users of the web configuration, and the webhook's token.

    With `open`, reading requires nothing where there are no users.
    """

    token: ApiToken
    users: Mapping[str, str] = field(default_factory=dict)
    webhook_token: SecretStr | None = None
    open: bool = True
    _logins: dict[bytes, None] = field(default_factory=dict, repr=False)

    async def check(self, request: web.Request, requirement: AccessRequirement) -> None:
        """Raise ApiError 401 or 403 unless the caller may; note in the request whether it is authenticated."""
        if requirement is AccessRequirement.PUBLIC:
            return
        scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
        if scheme and await self._accepts(request, requirement, scheme.lower(), credential.strip()):
            return
        # A wrong credential is refused even where none is needed: the caller would see less than it expects.
        if not self._is_open(requirement) or (scheme and requirement is not AccessRequirement.SCRAPE):
            raise await self._build_refusal()

    def _is_open(self, requirement: AccessRequirement) -> bool:
        if self.users or not self.open:
            return False
        return requirement is AccessRequirement.READ or (
            requirement is AccessRequirement.SCRAPE and self.webhook_token is None
        )

    async def _accepts(
        self, request: web.Request, requirement: AccessRequirement, scheme: str, credential: str
    ) -> bool:
        if scheme == "basic" and self.users:
            name = await self._check_password(credential)
            if name is not None:
                request[WEB_USER] = name
            request[_AUTHENTICATED] = name is not None
            return name is not None
        if scheme != "bearer":
            return False
        own = self.webhook_token if requirement in (AccessRequirement.SCRAPE, AccessRequirement.WEBHOOK) else None
        if own is not None and _is_same(credential, own.get_secret_value()):
            return True
        with contextlib.suppress(TokenError):
            token = await asyncio.to_thread(self.token.get)
            request[_AUTHENTICATED] = _is_same(credential, token.get_secret_value())
        return is_authenticated(request)

    async def _build_refusal(self) -> ApiError:
        if not self.users:
            try:
                await asyncio.to_thread(self.token.get)
            except TokenError as error:
                limited_log.warning("api_token_missing", error=str(error))
                return ApiError(
                    403, "no_token", f"no API token is configured; set {self.token.setting}, or see the log"
                )
        realm = "Basic" if self.users else "Bearer"
        message = "missing or wrong credentials: send the API token as bearer token, or a web user's password"
        return ApiError(401, "unauthorized", message, {"WWW-Authenticate": f'{realm} realm="defib"'})

    async def _check_password(self, credential: str) -> str | None:
        """Return the web user's name, or None where name or password are wrong."""
        try:
            name, _, password = base64.b64decode(credential, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        hashed = self.users.get(name, "").encode() or _UNKNOWN_USER_HASH
        # bcrypt is slow on purpose: a digest of each accepted login is cached.
        digest = hashlib.sha256(hashed + b"\0" + name.encode() + b"\0" + password.encode()).digest()
        if digest in self._logins:
            return name
        is_correct = await asyncio.to_thread(bcrypt.checkpw, password.encode()[:_BCRYPT_LIMIT], hashed)
        if not is_correct or name not in self.users:
            return None
        if len(self._logins) >= _CACHED_LOGINS:
            self._logins.clear()
        self._logins[digest] = None
        return name


def _is_same(credential: str, secret: str) -> bool:
    return hmac.compare_digest(credential.encode("utf-8", "surrogateescape"), secret.encode())


def is_authenticated(request: web.Request) -> bool:
    """Whether the caller has the API token or is a web user, and may see everything."""
    return bool(request.get(_AUTHENTICATED, False))


def get_caller(request: web.Request) -> str:
    """Return the caller's name for the record: the web user, or the X-Defib-User of a caller with the API token."""
    name = request.get(WEB_USER) or request.headers.get("X-Defib-User", "")
    printable = "".join(character for character in str(name) if character.isprintable()).strip()[:60]
    return printable or f"unnamed caller at {request.remote}"


def is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def create_application(
    access: AccessControl,
    config: WebConfig,
    *,
    ready: Callable[[], bool],
    get_health_problem: Callable[[], str | None] = lambda: None,
    max_body: int = 64 * 1024,
    on_error: Callable[[web.Request, ApiError], None] = lambda _request, _error: None,
) -> web.Application:
    """Return an application with health, readiness, uniform errors and access control, ready for `add_route`.

    `get_health_problem` returns what makes the program unhealthy, or None; `on_error` is called for each request that
    ended with an ApiError.
    """
    app = web.Application(client_max_size=max_body, middlewares=[_errors, _access])
    app[_ACCESS] = access
    app[_REQUIREMENTS] = {}
    app[_ON_ERROR] = on_error
    add_response_headers(app, config.http_server_config.headers, tls=config.tls_server_config is not None)
    app.on_startup.append(_check_routes)

    async def healthy(_request: web.Request) -> web.Response:
        problem = get_health_problem()
        return web.Response(text="healthy\n") if problem is None else web.Response(status=503, text=f"{problem}\n")

    async def is_ready(_request: web.Request) -> web.Response:
        return web.Response(text="ready\n") if ready() else web.Response(status=503, text="not ready\n")

    add_route(app, "GET", "/-/healthy", healthy, AccessRequirement.PUBLIC)
    add_route(app, "GET", "/-/ready", is_ready, AccessRequirement.PUBLIC)
    return app


def add_route(app: web.Application, method: str, path: str, handler: Handler, requirement: AccessRequirement) -> None:
    """Add a route, and with GET also HEAD. An application with routes that were added otherwise does not start."""
    for each in ("GET", "HEAD") if method == "GET" else (method,):
        app[_REQUIREMENTS][app.router.add_route(each, path, handler)] = requirement


def list_requirements(app: web.Application) -> dict[tuple[str, str], AccessRequirement | None]:
    """Return the requirement of every route by method and path; None where a route has none."""
    routes = ((route, route.resource) for route in app.router.routes())
    return {
        (route.method, resource.canonical if resource is not None else ""): app[_REQUIREMENTS].get(route)
        for route, resource in routes
    }


async def _check_routes(app: web.Application) -> None:
    missing = sorted(f"{method} {path}" for (method, path), each in list_requirements(app).items() if each is None)
    if missing:
        raise StartError(f"routes without an access requirement: {', '.join(missing)}")


_ACCESS = web.AppKey("access", AccessControl)
_ON_ERROR: web.AppKey[Callable[[web.Request, ApiError], None]] = web.AppKey("on_error", Callable)  # type: ignore[arg-type]  # no class
_REQUIREMENTS: web.AppKey[dict[web.AbstractRoute, AccessRequirement]] = web.AppKey("requirements", dict)


@web.middleware
async def _access(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.match_info.http_exception is not None:
        return await handler(request)  # there is no such route: the handler raises 404 or 405
    requirement = request.app[_REQUIREMENTS].get(request.match_info.route, AccessRequirement.CREDENTIAL)
    await request.app[_ACCESS].check(request, requirement)
    origin = request.headers.get("Origin")
    if origin and request.method not in ("GET", "HEAD"):
        # Pages of other sites must not change anything through a browser that can reach this server. Where a site's
        # name resolves to this server (DNS rebinding), only a password keeps it out.
        try:
            page = urlsplit(origin)
        except ValueError:
            page = urlsplit("")
        trusted = bool(request.app[_ACCESS].users) or is_loopback(page.hostname or "")
        if page.netloc != request.host or not trusted:
            raise ApiError(403, "cross_origin", "requests from other origins are refused")
    return await handler(request)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as raised:
        error = raised
    except web.HTTPException as raised:
        if raised.status < _CLIENT_ERROR:  # a redirect
            raise
        reason = raised.reason or "error"
        error = ApiError(raised.status, reason.lower().replace(" ", "_"), reason)
    except asyncio.CancelledError:
        raise
    except Exception:  # a request is where a task begins
        if limited_log.admits("request_failed"):
            log.exception("request_failed", method=request.method, path=request.path)
        error = ApiError(500, "internal", "internal error; see the log")
    request.app[_ON_ERROR](request, error)
    body = {"error": {"code": error.code, "message": error.message}}
    return web.json_response(body, status=error.status, headers=error.headers)
