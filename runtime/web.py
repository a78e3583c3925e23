"""The HTTP base of both servers: who may ask, how errors look, health and readiness."""

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

from runtime.tokens import ApiToken, TokenError
from runtime.webconfig import WebConfig

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = structlog.get_logger()

WEB_USER = "user"  # the request's key of the web user's name
_AUTHENTICATED = "authenticated"
_NOBODY = bcrypt.hashpw(b"nobody", bcrypt.gensalt(10))


class ApiError(Exception):
    """Ends a request with `{"error": {"code", "message"}}`."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Requirement(Enum):
    """What a route asks of a caller."""

    PUBLIC = auto()  # health, and requests that carry a signature of their own
    SCRAPE = auto()  # as READ, but any credential is ignored where none is needed; or the webhook's token
    READ = auto()  # a credential, unless reading is open; without one, no text of a service, host or peer is shown
    CREDENTIAL = auto()  # the API token or a web user, on loopback too: it changes something, or runs a command
    WEBHOOK = auto()  # that, or the webhook's token


@dataclass
class AccessControl:
    """Who may call: the API token, bcrypt users of the web configuration, and the webhook's token.

    `open` says whether reading asks for nothing where there are no users.
    """

    token: ApiToken
    users: Mapping[str, str] = field(default_factory=dict)
    webhook_token: SecretStr | None = None
    open: bool = True
    _seen: dict[bytes, None] = field(default_factory=dict, repr=False)

    async def check(self, request: web.Request, needs: Requirement) -> None:
        """Raise Problem 401 or 403 unless the caller may; who showed a credential is known by the request."""
        if needs is Requirement.PUBLIC:
            return
        scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
        if scheme and await self._accepts(request, needs, scheme.lower(), credential.strip()):
            return
        # A wrong credential is refused, so that nobody takes the open parts for all there is.
        if not self._is_open(needs) or (scheme and needs is not Requirement.SCRAPE):
            raise await self._refusal()

    def _is_open(self, needs: Requirement) -> bool:
        if self.users or not self.open:
            return False
        return needs is Requirement.READ or (needs is Requirement.SCRAPE and self.webhook_token is None)

    async def _accepts(self, request: web.Request, needs: Requirement, scheme: str, credential: str) -> bool:
        if scheme == "basic" and self.users:
            name = await self._user(credential)
            if name is not None:
                request[WEB_USER] = name
            request[_AUTHENTICATED] = name is not None
            return name is not None
        if scheme != "bearer":
            return False
        own = self.webhook_token if needs in (Requirement.SCRAPE, Requirement.WEBHOOK) else None
        if own is not None and _same(credential, own.get_secret_value()):
            return True
        with contextlib.suppress(TokenError):
            token = await asyncio.to_thread(self.token.get)
            request[_AUTHENTICATED] = _same(credential, token.get_secret_value())
        return is_authenticated(request)

    async def _refusal(self) -> ApiError:
        if not self.users:
            try:
                await asyncio.to_thread(self.token.get)
            except TokenError as error:
                log.warning("there is no API token to compare with", why=str(error))
                said = f"there is no API token here that can be used: set {self.token.setting} (the log says more)"
                return ApiError(403, "no_token", said)
        realm = "Basic" if self.users else "Bearer"
        said = "no or wrong credentials: this needs the API token as bearer, or a web user"
        return ApiError(401, "unauthorized", said, {"WWW-Authenticate": f'{realm} realm="defib"'})

    async def _user(self, credential: str) -> str | None:
        """The user's name, where the password is theirs."""
        try:
            name, _, password = base64.b64decode(credential, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        hashed = self.users.get(name, "").encode() or _NOBODY
        # bcrypt is slow on purpose; who was let in once is remembered by a digest.
        digest = hashlib.sha256(hashed + b"\0" + name.encode() + b"\0" + password.encode()).digest()
        if digest in self._seen:
            return name
        given = password.encode()[:72]  # what bcrypt reads of it
        right = await asyncio.to_thread(bcrypt.checkpw, given, hashed) and name in self.users
        if right:
            if len(self._seen) >= 100:  # noqa: PLR2004
                self._seen.clear()
            self._seen[digest] = None
        return name if right else None


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), wanted.encode())


def is_authenticated(request: web.Request) -> bool:
    """Whether the caller showed the API token or is a web user, and may see everything."""
    return bool(request.get(_AUTHENTICATED, False))


def get_caller(request: web.Request) -> str:
    """Who asks: a web user's name, or what a caller with the API token calls itself."""
    said = request.get(WEB_USER) or request.headers.get("X-Defib-User", "")
    shown = "".join(character for character in str(said) if character.isprintable()).strip()[:60]
    return shown or f"somebody at {request.remote}"


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
    on_error: Callable[[web.Request, ApiError], None] = lambda _request, _problem: None,
) -> web.Application:
    """An application with health, readiness, uniform errors and access control, ready for `add_route`.

    `get_health_problem` returns what makes the program unhealthy, or None; `on_error` is called for each request that
    ended with an ApiError.
    """
    app = web.Application(client_max_size=max_body, middlewares=[_errors, _access])
    app[_ACCESS] = access
    app[_NEEDS] = {}
    app[_ON_ERROR] = on_error
    headers = config.http_server_config.headers

    async def add_headers(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(headers)

    app.on_response_prepare.append(add_headers)

    async def healthy(_request: web.Request) -> web.Response:
        what = get_health_problem()
        return web.Response(text="healthy\n") if what is None else web.Response(status=503, text=f"{what}\n")

    async def is_ready(_request: web.Request) -> web.Response:
        return web.Response(text="ready\n") if ready() else web.Response(status=503, text="not ready\n")

    add_route(app, "GET", "/-/healthy", healthy, Requirement.PUBLIC)
    add_route(app, "GET", "/-/ready", is_ready, Requirement.PUBLIC)
    return app


def add_route(app: web.Application, method: str, path: str, handler: Handler, needs: Requirement) -> None:
    app[_NEEDS][handler] = needs
    app.router.add_route(method, path, handler)
    if method == "GET":
        app.router.add_route("HEAD", path, handler)


_ACCESS = web.AppKey("access", AccessControl)
_ON_ERROR: web.AppKey[Callable[[web.Request, ApiError], None]] = web.AppKey("refused", Callable)  # type: ignore[arg-type]
_NEEDS: web.AppKey[dict[Handler, Requirement]] = web.AppKey("needs", dict)


@web.middleware
async def _access(request: web.Request, handler: Handler) -> web.StreamResponse:
    needs = request.app[_NEEDS].get(request.match_info.handler, Requirement.PUBLIC)
    await request.app[_ACCESS].check(request, needs)
    origin = request.headers.get("Origin")
    if origin and request.method not in ("GET", "HEAD"):
        # A page of somebody else's, in a browser that can reach us, must not restart anything; nor one that has its own
        # name resolve to us, which only a password keeps out.
        try:
            page = urlsplit(origin)
        except ValueError:  # no browser sends it
            page = urlsplit("")
        trusted = bool(request.app[_ACCESS].users) or is_loopback(page.hostname or "")
        if page.netloc != request.host or not trusted:
            raise ApiError(403, "cross_origin", "requests from other origins are refused")
    return await handler(request)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as refusal:
        problem = refusal
    except web.HTTPException as error:
        if error.status < 400:  # noqa: PLR2004 - a redirect is an answer
            raise
        code = (error.reason or "error").lower().replace(" ", "_")
        problem = ApiError(error.status, code, error.reason or "error")
    except asyncio.CancelledError:
        raise
    except Exception:  # a request is where a task begins
        log.exception("request failed", method=request.method, path=request.path)
        problem = ApiError(500, "internal", "an error of ours; the log says more")
    request.app[_ON_ERROR](request, problem)
    body = {"error": {"code": problem.code, "message": problem.message}}
    return web.json_response(body, status=problem.status, headers=problem.headers)
