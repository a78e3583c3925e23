"""The HTTP base of all servers: routes with what they require of callers, errors as JSON, health and readiness."""

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import quote, urlsplit
from weakref import WeakValueDictionary

import structlog
from aiohttp import web

from runtime.access.browser import READING
from runtime.access.control import LASTING, AccessControl, find_identity, get_identity
from runtime.access.roles import AccessRequirement
from runtime.addresses import group_address
from runtime.errors import ApiError, StartError
from runtime.http_checks import add_response_headers
from runtime.logs import LimitedLog
from runtime.redaction import Redactor
from runtime.webconfig import WebConfigFile

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = structlog.get_logger()
limited_log = LimitedLog()
_CLIENT_ERROR, _UNAUTHORIZED = 400, 401
MAX_LOCAL_PATH = 500  # characters
MAX_BODY = 64 * 1024  # bytes of a request
MAX_READING = 64  # requests of one caller that are being answered; more are refused


def create_application(
    access: AccessControl,
    web_config: WebConfigFile,
    *,
    ready: Callable[[], bool],
    get_health_problem: Callable[[], str | None] = lambda: None,
    max_body: int = MAX_BODY,
    at_once: int = MAX_READING,
    sign_in: str = "",
    on_error: Callable[[web.Request, ApiError], None] = lambda _request, _error: None,
) -> web.Application:
    """Return an application as `create_base_application`, with health, readiness and the caller's identity.

    `get_health_problem` returns what makes the program unhealthy, or None.
    """
    app = create_base_application(
        access, web_config, max_body=max_body, at_once=at_once, sign_in=sign_in, on_error=on_error
    )

    async def healthy(_request: web.Request) -> web.Response:
        problem = get_health_problem()
        return web.Response(text="healthy\n") if problem is None else web.Response(status=503, text=f"{problem}\n")

    async def is_ready(_request: web.Request) -> web.Response:
        return web.Response(text="ready\n") if ready() else web.Response(status=503, text="not ready\n")

    async def show_identity(request: web.Request) -> web.Response:
        identity = get_identity(request)
        return web.json_response({"name": identity.label, "role": identity.role, "means": identity.means})

    async def show_access(_request: web.Request) -> web.Response:
        return web.json_response(access.describe())

    add_route(app, "GET", "/-/healthy", healthy, AccessRequirement.UNCHECKED)
    add_route(app, "GET", "/-/ready", is_ready, AccessRequirement.UNCHECKED)
    add_route(app, "GET", "/api/v1/identity", show_identity, AccessRequirement.VIEWER)
    add_route(app, "GET", "/api/v1/access", show_access, AccessRequirement.ADMIN)
    return app


def create_base_application(
    access: AccessControl,
    web_config: WebConfigFile,
    *,
    max_body: int = MAX_BODY,
    at_once: int = MAX_READING,
    sign_in: str = "",
    on_error: Callable[[web.Request, ApiError], None],
) -> web.Application:
    """Return an application with access control and uniform errors, and without routes.

    `at_once` is how many requests that only read are answered for one caller at a time; the others wait.
    Browsers without a session are sent to the path `sign_in`. `on_error` is called for each request that ended with an
    ApiError.
    """
    app = web.Application(client_max_size=max_body, middlewares=[_errors, _access])
    app[_ACCESS] = access
    app[_REQUIREMENTS] = {}
    app[_ON_ERROR] = on_error
    app[_SIGN_IN] = sign_in
    app[_READING] = {}
    app[_TURNS], app[_AT_ONCE] = WeakValueDictionary(), at_once
    add_response_headers(app, web_config)
    app.on_startup.append(_check_routes)
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


ErrorPage = Callable[[web.Request, ApiError], Awaitable[web.Response]]
# Renders errors for people; without it, they get JSON, too.
ERROR_PAGE: web.AppKey[ErrorPage] = web.AppKey("error_page", Callable)  # type: ignore[arg-type]  # no class
# The path of the page in which a script shows the answer, if that is not the request's.
SHOWN_AT = web.RequestKey("shown_at", str)
# Masks secrets in errors as JSON, which may repeat what another server has sent.
REDACT = web.AppKey("redact", Redactor)
_ACCESS = web.AppKey("access", AccessControl)
_ON_ERROR: web.AppKey[Callable[[web.Request, ApiError], None]] = web.AppKey("on_error", Callable)  # type: ignore[arg-type]  # no class
_REQUIREMENTS: web.AppKey[dict[web.AbstractRoute, AccessRequirement]] = web.AppKey("requirements", dict)
_SIGN_IN = web.AppKey("sign_in", str)
_TURNS: web.AppKey[WeakValueDictionary[str, asyncio.Semaphore]] = web.AppKey("turns", WeakValueDictionary)  # by caller
_AT_ONCE = web.AppKey("at_once", int)
_TURN: web.RequestKey[asyncio.Semaphore | None] = web.RequestKey("turn", object)  # type: ignore[arg-type]  # no class
_READING: web.AppKey[dict[str, dict[int, web.Request]]] = web.AppKey("reading", dict)  # those in progress, by caller


@web.middleware
async def _access(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.match_info.http_exception is None:  # else there is no such route: the handler raises 404 or 405
        requirement = request.app[_REQUIREMENTS].get(request.match_info.route, AccessRequirement.ADMIN)
        await request.app[_ACCESS].check(request, requirement)
        if request.method in READING and requirement is not AccessRequirement.UNCHECKED:
            return await _answer_reading(request, handler)
    return await handler(request)


async def _answer_reading(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a request that only reads, unless its caller has too many of them: those of clients that have gone count.

    A request that lasts, such as a stream's, does not count.
    """
    caller = name_caller(request)
    reading = request.app[_READING].setdefault(caller, {})
    if sum(not each.get(LASTING, False) for each in reading.values()) >= MAX_READING:
        raise ApiError(503, "busy", "too many requests of this caller are in progress", {"Retry-After": "1"})
    reading[id(request)] = request  # which is not hashable
    try:
        return await _answer_in_turn(request, handler, caller)
    finally:
        del reading[id(request)]
        if not reading:
            request.app[_READING].pop(caller, None)


async def _answer_in_turn(request: web.Request, handler: Handler, caller: str) -> web.StreamResponse:
    """Answer a request when its caller has few others that are being answered; not if the client has gone by then."""
    turns = request.app[_TURNS].setdefault(caller, asyncio.Semaphore(request.app[_AT_ONCE]))
    await turns.acquire()
    request[_TURN] = turns
    try:
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError("the client has gone")
        return await handler(request)
    finally:
        _end_turn(request)


def name_caller(request: web.Request) -> str:
    """Return by whom a request is counted: the caller's label, or the address of one that has not signed in."""
    identity = find_identity(request)
    if identity is not None:
        return identity.label
    return f"address {group_address(request.app[_ACCESS].find_address(request))}"


def mark_as_lasting(request: web.Request) -> None:
    """Note that the response has no end, so that it keeps no other request of its caller waiting."""
    request[LASTING] = True
    _end_turn(request)


def _end_turn(request: web.Request) -> None:
    turns = request.get(_TURN)
    if turns is not None:
        request[_TURN] = None
        turns.release()


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
    except Exception as raised:  # a request is where a task begins
        if _is_from_closed_connection(request, raised):
            raise ConnectionResetError("the client has gone") from raised
        if limited_log.admits("request_failed"):
            log.exception("request_failed", method=request.method, path=request.path)
        error = ApiError(500, "internal", "internal error; see the log")
    if error.status == _UNAUTHORIZED and request.app[_SIGN_IN] and request.method == "GET" and _is_for_person(request):
        next_ = quote(request.path_qs.removeprefix("/"), safe="")
        location = relative_path(request, f"{request.app[_SIGN_IN]}?next={next_}")
        return web.Response(status=303, headers={"Location": location})
    request.app[_ON_ERROR](request, error)
    is_api = request.path.startswith(("/api/", "/-/", "/webhook/"))
    if ERROR_PAGE in request.app and _is_for_person(request) and not is_api:
        return await request.app[ERROR_PAGE](request, error)
    redact = request.app.get(REDACT)
    body = {"error": {"code": error.code, "message": error.message if redact is None else redact(error.message)}}
    return web.json_response(body, status=error.status, headers=error.headers)


def _is_from_closed_connection(request: web.Request, error: Exception) -> bool:
    if request.transport is not None and not request.transport.is_closing():
        return False
    return isinstance(error, ConnectionError) or str(error) == "Connection closed."  # as aiohttp's reading raises it


def relative_path(request: web.Request, path: str) -> str:
    """Return a path of this server relative to the request's, since a proxy may serve all paths below a prefix."""
    shown_at = request.get(SHOWN_AT) or request.rel_url.raw_path  # a part of the path may be `a%2Fb`
    return f"./{'../' * (shown_at.count('/') - 1)}{path}"


def parse_local_path(text: str) -> str:
    """Return a path of this server, relative to its root; empty if the text is anything else."""
    is_plain = text.isascii() and text.isprintable() and "\\" not in text and len(text) <= MAX_LOCAL_PATH
    try:
        parts = urlsplit(text)
    except ValueError:
        return ""
    is_path = not parts.scheme and not parts.netloc and not text.startswith(("/", ".")) and "//" not in parts.path
    return text if is_plain and is_path else ""


def _is_for_person(request: web.Request) -> bool:
    """Whether a person opens a page, or sends a form, with a browser; a script of a page shows errors itself."""
    is_from_script = request.headers.get("Sec-Fetch-Mode", "navigate") != "navigate"
    is_from_browser = "Authorization" not in request.headers and "text/html" in request.headers.get("Accept", "")
    return is_from_browser and not is_from_script
