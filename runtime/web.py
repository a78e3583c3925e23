"""The HTTP base of both servers: who may ask, how errors look, health and readiness."""

import asyncio
import base64
import binascii
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

from runtime.webconfig import WebConfig

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = structlog.get_logger()

WEB_USER = "user"  # the request's key of the web user's name
_NOBODY = bcrypt.hashpw(b"nobody", bcrypt.gensalt(10))


class Problem(Exception):  # noqa: N818 - it is an answer as much as an error
    """Ends a request with `{"error": {"code", "message"}}`."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Needs(Enum):
    """What a route asks of a caller."""

    NOTHING = auto()
    READER = auto()  # a web user where users are configured
    TOKEN = auto()  # the token or a web user; open on loopback where there is neither
    USER = auto()  # a web user; open on loopback where there are none


@dataclass
class Access:
    """Who may call: bcrypt users of the web configuration, and perhaps one bearer token."""

    users: Mapping[str, str] = field(default_factory=dict)
    token: SecretStr | None = None
    loopback: bool = True
    _seen: dict[bytes, None] = field(default_factory=dict, repr=False)

    async def check(self, request: web.Request, needs: Needs) -> None:
        """Raise Problem 401 or 403 unless the caller may; a web user is named on the request."""
        if needs is Needs.NOTHING or (needs is Needs.READER and not self.users):
            return
        token = self.token if needs is Needs.TOKEN else None
        if not self.users and token is None:
            if self.loopback:
                return
            raise Problem(403, "forbidden", "beyond loopback this needs a web user (--web.config.file)")
        scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
        if token is not None and scheme.lower() == "bearer" and _same(credential.strip(), token.get_secret_value()):
            return
        name = await self._user(credential.strip()) if self.users and scheme.lower() == "basic" else None
        if name is not None:
            request[WEB_USER] = name
            return
        realm = "Basic" if self.users else "Bearer"
        raise Problem(401, "unauthorized", "no or wrong credentials", {"WWW-Authenticate": f'{realm} realm="defib"'})

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


def caller(request: web.Request) -> str:
    """Who asks: a web user's name, or where there are none, what a caller from this machine calls itself."""
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


def application(
    access: Access,
    config: WebConfig,
    *,
    ready: Callable[[], bool],
    ill: Callable[[], str | None] = lambda: None,
    max_body: int = 64 * 1024,
    refused: Callable[[web.Request, Problem], None] = lambda _request, _problem: None,
) -> web.Application:
    """An application with health, readiness, uniform errors and access control, ready for `add_route`.

    `ill` says what only a person can mend, if anything is; `refused` hears of every request that ended with a Problem.
    """
    app = web.Application(client_max_size=max_body, middlewares=[_errors, _access])
    app[_ACCESS] = access
    app[_NEEDS] = {}
    app[_REFUSED] = refused
    headers = config.http_server_config.headers

    async def add_headers(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(headers)

    app.on_response_prepare.append(add_headers)

    async def healthy(_request: web.Request) -> web.Response:
        what = ill()
        return web.Response(text="healthy\n") if what is None else web.Response(status=503, text=f"{what}\n")

    async def is_ready(_request: web.Request) -> web.Response:
        return web.Response(text="ready\n") if ready() else web.Response(status=503, text="not ready\n")

    add_route(app, "GET", "/-/healthy", healthy, Needs.NOTHING)
    add_route(app, "GET", "/-/ready", is_ready, Needs.NOTHING)
    return app


def add_route(app: web.Application, method: str, path: str, handler: Handler, needs: Needs) -> None:
    app[_NEEDS][handler] = needs
    app.router.add_route(method, path, handler)
    if method == "GET":
        app.router.add_route("HEAD", path, handler)


_ACCESS = web.AppKey("access", Access)
_REFUSED: web.AppKey[Callable[[web.Request, Problem], None]] = web.AppKey("refused", Callable)  # type: ignore[arg-type]
_NEEDS: web.AppKey[dict[Handler, Needs]] = web.AppKey("needs", dict)


@web.middleware
async def _access(request: web.Request, handler: Handler) -> web.StreamResponse:
    needs = request.app[_NEEDS].get(request.match_info.handler, Needs.NOTHING)
    await request.app[_ACCESS].check(request, needs)
    origin = request.headers.get("Origin")
    if origin and request.method not in ("GET", "HEAD"):
        # A page of somebody else's, in a browser that can reach us, must not restart anything; nor one that has its own
        # name resolve to us, which only a password keeps out.
        page = urlsplit(origin)
        trusted = bool(request.app[_ACCESS].users) or is_loopback(page.hostname or "")
        if page.netloc != request.host or not trusted:
            raise Problem(403, "cross_origin", "requests from other origins are refused")
    return await handler(request)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Problem as refusal:
        problem = refusal
    except web.HTTPException as error:
        if error.status < 400:  # noqa: PLR2004 - a redirect is an answer
            raise
        code = (error.reason or "error").lower().replace(" ", "_")
        problem = Problem(error.status, code, error.reason or "error")
    except asyncio.CancelledError:
        raise
    except Exception:  # a request is where a task begins
        log.exception("request failed", method=request.method, path=request.path)
        problem = Problem(500, "internal", "an error of ours; the log says more")
    request.app[_REFUSED](request, problem)
    body = {"error": {"code": problem.code, "message": problem.message}}
    return web.json_response(body, status=problem.status, headers=problem.headers)
