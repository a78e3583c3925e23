"""The pages for signing in and out."""

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote, urlsplit

from aiohttp import web

from console.rendering import PageRenderer
from remediator.sign_in.services import Redirect, RedirectError, SignedInUser, SignInError, SignInService
from runtime.access.audit import AuditEntry
from runtime.access.browser import check_csrf, read_form
from runtime.access.control import AccessControl, find_session, get_identity
from runtime.access.roles import AccessRequirement, SignInMethod
from runtime.access.sessions import AGE_LIMIT, csrf_token
from runtime.errors import ApiError
from runtime.logs import LimitedLog
from runtime.web import add_route, parse_local_path, relative_path

FORM_COOKIE = "defib_sign_in"
FORM_FOR, REDIRECT_FOR = 3600, 600  # seconds for which a form can be sent, and a browser can come back
DISPLAY_COOKIE_AGE = 366 * 86400  # seconds
EXCHANGES, EXCHANGES_OF_ADDRESS = 50, 5  # requests to services for signing in, in progress
log = LimitedLog()


class SignInPages:
    """Pages for signing in. `public_url` returns the console's URL."""

    def __init__(
        self,
        access: AccessControl,
        services: Mapping[str, SignInService],
        public_url: Callable[[], str],
        renderer: PageRenderer,
    ) -> None:
        self._access, self._services, self._public_url, self._renderer = access, services, public_url, renderer
        self._exchanging: Counter[str] = Counter()  # requests to services in progress, by the browser's address

    def add_routes(self, app: web.Application) -> None:
        public = AccessRequirement.PUBLIC
        add_route(app, "GET", "/sign-in", self._show, public)
        add_route(app, "POST", "/sign-in", self._check_password, public)
        add_route(app, "POST", "/sign-in/token", self._check_token, public)
        add_route(app, "GET", "/sign-in/{service:oidc|feishu}", self._redirect, public)
        add_route(app, "GET", "/sign-in/{service:oidc|feishu}/callback", self._finish, public)
        add_route(app, "POST", "/sign-out", self._sign_out, AccessRequirement.VIEWER)

    async def _show(self, request: web.Request) -> web.Response:
        return await self._render(request, parse_local_path(request.query.get("next", "")))

    async def _render(
        self,
        request: web.Request,
        next_: str,
        *,
        status: int = 200,
        problem: str = "",
        values: tuple[str, ...] = (),
        user: str = "",
    ) -> web.Response:
        """Return the page; `problem` is the key of an error message."""
        form_id = request.cookies.get(self._form_cookie(request), "") or secrets.token_urlsafe(32)
        # What the client has sent is not masked: it could guess secrets by what is.
        sent = {"values": values, "user": user, "next": next_, "form_token": csrf_token(form_id)}
        response = await self._renderer.respond(
            request, "sign_in.html", sent, status=status, problem=problem,
            has_passwords=bool(self._access.users.hashes), services=self._services,
        )  # fmt: skip
        self._set_cookie(request, response, self._form_cookie(request), form_id, FORM_FOR)
        return response

    async def _check_password(self, request: web.Request) -> web.Response:
        form = await read_form(request)
        next_ = parse_local_path(form.get("next", ""))
        try:
            self._check_form(request, form)
            user = form.get("user", "")
            await self._access.check_password(request, user, form.get("password", ""), "sign_in")
        except ApiError as error:
            wait = error.headers.get("Retry-After", "") if error.headers else ""
            user = form.get("user", "")
            problem = {401: "wrong_password", 429: "throttled"}.get(error.status, "form_expired")
            response = await self._render(
                request, next_, status=error.status, problem=problem, values=(wait,), user=user
            )
            if wait:
                response.headers["Retry-After"] = wait
            return response
        return await self._start_session(request, user, "password", next_)

    async def _check_token(self, request: web.Request) -> web.Response:
        """Sign in a display with an API token, for as long as the token is valid."""
        form = await read_form(request)
        next_ = parse_local_path(form.get("next", ""))
        try:
            self._check_form(request, form)
            token = await self._access.check_display_token(request, form.get("token", "").strip())
        except ApiError as error:
            problem = {"unauthorized": "wrong_token", "forbidden": "not_viewer"}.get(error.code, "form_expired")
            return await self._render(request, next_, status=error.status, problem=problem)
        id_ = await self._access.start_session(request, token.name, "token", token=token)
        return self._begin(request, id_, next_, DISPLAY_COOKIE_AGE)

    def _check_form(self, request: web.Request, form: Mapping[str, str]) -> None:
        """Raise ApiError unless the form was made for this browser."""
        form_id = request.cookies.get(self._form_cookie(request), "")
        # Without the cookie, no token is right.
        check_csrf(request, csrf_token(form_id or secrets.token_urlsafe(32)), form.get("csrf", ""))

    async def _redirect(self, request: web.Request) -> web.Response:
        """Send the browser to another service for signing in."""
        name = request.match_info["service"]
        service = self._find_service(name)
        next_ = parse_local_path(request.query.get("next", ""))
        public = urlsplit(self._public_url())
        if public.netloc.lower() != request.host.lower() and "again" not in request.query:
            # The browser comes back to the public URL, and must have the cookie for that name.
            location = f"{self._public_url().rstrip('/')}/sign-in/{name}?again=&next={quote(next_, safe='')}"
            return web.Response(status=303, headers={"Location": location})
        redirect = Redirect(name, secrets.token_urlsafe(32), self._redirect_uri(name), next_)
        try:
            url = await service.create_url(redirect)
        except SignInError as error:
            log.warning("sign_in_failed", service=name, error=str(error))
            values = (service.title,)
            return await self._render(request, next_, status=502, problem="service_failed", values=values)
        response = web.Response(status=303, headers={"Location": url})
        self._set_cookie(request, response, self._form_cookie(request), redirect.secret, REDIRECT_FOR)
        return response

    def _redirect_uri(self, service: str) -> str:
        return f"{self._public_url().rstrip('/')}/sign-in/{service}/callback"

    async def _finish(self, request: web.Request) -> web.Response:
        """Sign in the user with whom the browser comes back from the service."""
        name = request.match_info["service"]
        service = self._find_service(name)
        method: SignInMethod = "oidc" if name == "oidc" else "feishu"
        try:
            secret = request.cookies.get(self._form_cookie(request), "")
            redirect = Redirect.resume(name, secret, self._redirect_uri(name), request.query.get("state", ""))
            user = await self._exchange(request, service, _find_code(request), redirect)
        except SignInError as error:
            log.warning("sign_in_failed", service=name, error=str(error))
            await self._access.refuse(request, "", str(error), event="sign_in")
            problem = "redirect_expired" if isinstance(error, RedirectError) else "service_failed"
            return await self._render(request, "", status=401, problem=problem, values=(service.title,))
        if service.find_role(user.groups) is None:
            groups = ", ".join(user.groups)[:200] or "none"
            message = f"the user has no role in access.{name}; their groups: {groups}"
            self._access.note_refusal(request, user.name, message, event="sign_in", means="console")
            return await self._render(request, "", status=403, problem="no_role", values=(user.name,))
        next_ = parse_local_path(redirect.next)
        return await self._start_session(request, user.name, method, next_, user.groups, service.provider)

    async def _start_session(
        self,
        request: web.Request,
        user: str,
        method: SignInMethod,
        next_: str,
        groups: Sequence[str] = (),
        provider: str = "",
    ) -> web.Response:
        id_ = await self._access.start_session(request, user, method, groups, provider)
        return self._begin(request, id_, next_, int(AGE_LIMIT))

    def _begin(self, request: web.Request, id_: str, next_: str, max_age: int) -> web.Response:
        """Return the answer that gives a browser its session."""
        response = web.Response(status=303, headers={"Location": relative_path(request, next_)})
        self._set_cookie(request, response, self._access.cookie_name(request), id_, max_age)
        self._delete_cookie(request, response, self._form_cookie(request))
        return response

    async def _exchange(
        self, request: web.Request, service: SignInService, code: str, redirect: Redirect
    ) -> SignedInUser:
        """Return the user that a code stands for. Raises SignInError."""
        address = self._access.find_address(request)
        if self._exchanging[address] >= EXCHANGES_OF_ADDRESS or self._exchanging.total() >= EXCHANGES:
            raise SignInError("too many people are signing in")
        self._exchanging[address] += 1
        try:
            return await service.fetch_user(code, redirect)
        finally:
            self._exchanging[address] -= 1
            self._exchanging += Counter()  # without addresses that have none

    def _find_service(self, name: str) -> SignInService:
        service = self._services.get(name)
        if service is None:
            raise ApiError(404, "unknown_service", f"access.{name} is not configured")
        return service

    def _form_cookie(self, request: web.Request) -> str:
        return f"__Host-{FORM_COOKIE}" if self._access.is_secure(request) else FORM_COOKIE

    def _set_cookie(self, request: web.Request, response: web.Response, name: str, value: str, max_age: int) -> None:
        response.set_cookie(
            name, value, max_age=max_age, path="/", httponly=True, samesite="Lax",
            secure=self._access.is_secure(request),
        )  # fmt: skip

    def _delete_cookie(self, request: web.Request, response: web.Response, name: str) -> None:
        self._set_cookie(request, response, name, "", 0)

    async def _sign_out(self, request: web.Request) -> web.Response:
        session = find_session(request)
        if session is not None and self._access.sessions is not None:
            await self._access.sessions.end(session)
            await self._access.write_audit(AuditEntry.of(get_identity(request), "sign_out"))
        response = web.Response(status=303, headers={"Location": relative_path(request, "sign-in")})
        self._delete_cookie(request, response, self._access.cookie_name(request))
        return response


def _find_code(request: web.Request) -> str:
    """Return the code with which a service sends the browser back. Raises SignInError."""
    if "code" not in request.query:
        raise SignInError(f"the service sent the error {request.query.get('error', '')[:100]!r} instead of a code")
    return request.query["code"]
