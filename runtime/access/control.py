"""Access control: authenticate the caller of a request, and refuse what its role does not permit."""

import asyncio
import base64
import binascii
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiohttp import web

from runtime.access.audit import AuditEntry, Refusals
from runtime.access.browser import KnownHosts, check_csrf, check_fetch_metadata, is_from_browser, read_form
from runtime.access.passwords import Passwords
from runtime.access.proxy import TrustedProxy, find_client_address, is_direct_from_loopback
from runtime.access.roles import (
    LOCAL,
    UNNAMED,
    USER_HEADER,
    AccessRequirement,
    Identity,
    Means,
    Role,
    SignInMethod,
    least_role,
    permits,
    printable_name,
    signed_in_label,
)
from runtime.access.sessions import Session, Sessions, csrf_token
from runtime.access.throttle import Throttle, ThrottledError
from runtime.access.tokens import ApiToken, ApiTokens, ConfiguredTokens
from runtime.errors import ApiError

MAX_PATH = 200  # characters of a path in the audit log
END_SESSIONS_EVERY = 5.0  # seconds between checks whether the users of sessions are still there
LASTING = web.RequestKey("lasting", bool)  # whether the answer has no end, such as a stream's
PAUSED = web.RequestKey("paused", bool)  # whether the refusal of the request is being delayed
AUTOMATIC = "automatic"  # a key in the query of requests that a page sends by itself
COOKIE = "defib_session"
MAX_SLOW_DOWN = 1.0  # seconds by which a refused credential is answered later
_CONFIGURED_NAMES: Mapping[Role, str] = {
    Role.ADMIN: LOCAL,
    Role.METRICS: "metrics_token",
    Role.WEBHOOK: "webhook_token",
}

_IDENTITY, _SESSION = web.RequestKey("identity", Identity), web.RequestKey("session", Session)
_CSRF_TOKEN = web.RequestKey("csrf_token", str)
FindRole = Callable[[], Role | None]
# Returns the present role of the credential with which the request was authenticated.
_FIND_ROLE: web.RequestKey[FindRole] = web.RequestKey("find_role", Callable)  # type: ignore[arg-type]  # no class


def find_identity(request: web.BaseRequest) -> Identity | None:
    """Return the caller's identity; None for an anonymous one."""
    return request.get(_IDENTITY)


def set_identity(request: web.BaseRequest, identity: Identity) -> None:
    """Note who the caller is, where a route authenticates its callers itself."""
    request[_IDENTITY] = identity


def get_identity(request: web.Request) -> Identity:
    """Return the caller's identity, which every route has that requires a role."""
    return request[_IDENTITY]


def find_session(request: web.Request) -> Session | None:
    """Return the session that the request belongs to."""
    return request.get(_SESSION)


def _keep_role_check(request: web.Request, find_role: FindRole) -> None:
    request[_FIND_ROLE] = find_role


def get_csrf_token(request: web.Request) -> str:
    """Return the CSRF token for the forms of a page; empty where the caller needs none."""
    token: str = request.get(_CSRF_TOKEN, "")
    return token


FindGroupRole = Callable[[SignInMethod, str, Sequence[str]], Role | None]


def find_no_role(_method: SignInMethod, _provider: str, _groups: Sequence[str]) -> None:
    """Return that nobody has a role: without other sign-in services, there are no groups."""


@dataclass(frozen=True)
class AccessSettings:
    """The part of access control that the configuration sets and a reload replaces.

    `find_group_role` returns the present role of a user of another sign-in service by the provider and their groups.
    """

    hosts: KnownHosts = field(default_factory=KnownHosts)
    proxy: TrustedProxy | None = None
    find_group_role: FindGroupRole = find_no_role


@dataclass
class WebUsers:
    """The users of the web configuration: bcrypt hashes and roles by name."""

    hashes: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    exposed: str = ""  # who else can read or change the file; empty if nobody

    def role_of(self, name: str) -> Role:
        return self.roles.get(name, Role.VIEWER)


class AccessControl:
    """Authenticates and authorizes requests. Programs without sessions or API tokens leave those out."""

    def __init__(
        self,
        get_users: Callable[[], WebUsers],
        tokens: ConfiguredTokens,
        *,
        write_audit: Callable[[AuditEntry], Awaitable[None]],
        now: Callable[[], float],
        api_tokens: ApiTokens | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self.settings = AccessSettings()
        self._get_users = get_users
        self.tokens, self.api_tokens, self.sessions = tokens, api_tokens, sessions
        self.passwords = Passwords(lambda: self.users.hashes, Throttle(now))
        self.write_audit = write_audit
        self.refusals = Refusals(write_audit, now)
        self._now = now
        self._pauses = Throttle(now)  # of callers with wrong tokens, which are refused, but never locked out
        self._proxy_secret = secrets.token_urlsafe(32)

    async def check(self, request: web.Request, requirement: AccessRequirement) -> None:
        """Raise ApiError 401, 403 or 429 unless the caller may; else set the request's identity, if it has one."""
        if requirement is AccessRequirement.UNCHECKED:
            return
        is_open = requirement is AccessRequirement.SCRAPE and self._is_open_to_scrapes(request)
        is_public = requirement is AccessRequirement.PUBLIC
        scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
        try:
            # A page of another site has no token. Where none is checked, one that it makes up proves nothing.
            if scheme.lower() != "bearer" or is_open or is_public:
                self.settings.hosts.check_host(request)
                check_fetch_metadata(request)
            self.settings.hosts.check_origin(request)
        except ApiError as error:
            self.note_refusal(request, "", error.message)
            raise
        if is_open:  # whatever Prometheus sends
            await self._identify_scraper(request, scheme.lower(), credential.strip())
            return
        if is_public:
            identity = await self._authenticate_session(request)
        else:
            identity = await self._authenticate(request, scheme.lower(), credential.strip())
        if identity is not None:
            request[_IDENTITY] = identity
        if is_public:
            return
        if identity is None:
            raise self._build_unauthorized("authentication is required")
        if not permits(identity.role, requirement):
            message = f"this requires the role {least_role(requirement)}; {identity.label} has {identity.role}"
            self.note_refusal(request, "", message, identity)
            raise ApiError(403, "forbidden", message)
        await self._check_csrf(request, identity)

    async def _identify_scraper(self, request: web.Request, scheme: str, credential: str) -> None:
        """Note that a request has a token, so that it is counted apart from others of its address."""
        if scheme == "bearer" and (role := await self.tokens.find(credential)) is not None:
            request[_IDENTITY] = Identity(_CONFIGURED_NAMES[role], role, "token", self.find_address(request))

    def _is_open_to_scrapes(self, request: web.Request) -> bool:
        if self.users.hashes:  # as in all Prometheus exporters with users
            return False
        return is_direct_from_loopback(request) or not self.tokens.has(Role.METRICS)

    async def _authenticate(self, request: web.Request, scheme: str, credential: str) -> Identity | None:
        if scheme == "bearer":
            return await self._authenticate_token(request, credential)
        if scheme == "basic" and self.users.hashes:
            return await self._authenticate_password(request, credential)
        if scheme:
            reason = (
                "this server has no users (--web.config.file)" if scheme == "basic" else "unknown kind of credential"
            )
            raise await self.refuse(request, "", reason)
        return await self._authenticate_session(request) or self._authenticate_proxy(request)

    async def _authenticate_token(self, request: web.Request, secret: str) -> Identity:
        address = self.find_address(request)
        if self.api_tokens is not None and (token := self.api_tokens.find(secret)) is not None:
            if token.has_expired(self._now()):
                message = f"the token {token.name} has expired"
                raise await self.refuse(request, token.name, message, code="expired")
            self.api_tokens.note_use(token)
            _keep_role_check(request, partial(self._find_token_role, token.digest))
            return Identity(token.name, Role(token.role), "token", address)
        role = await self.tokens.find(secret)
        if role is None:
            raise await self.refuse(request, "", "unknown token")
        _keep_role_check(request, partial(self.tokens.find_present, secret))
        if role is not Role.ADMIN:
            return Identity(_CONFIGURED_NAMES[role], role, "token", address)
        # The caller names the user: nothing else can be known of a local process.
        claimed = printable_name(request.headers.get(USER_HEADER, "")) or UNNAMED
        return Identity(LOCAL, role, "cli", address, claimed_user=claimed)

    async def _authenticate_password(self, request: web.Request, credential: str) -> Identity:
        address = self.find_address(request)
        try:
            name, _, password = base64.b64decode(credential, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise await self.refuse(request, "", "the header Authorization is not valid") from None
        await self.check_password(request, name, password)
        _keep_role_check(request, partial(self._find_password_role, name, self.passwords.credential_of(name)))
        return Identity(name, self.users.role_of(name), "password", address)

    async def check_password(self, request: web.Request, name: str, password: str, event: str = "access") -> None:
        """Raise ApiError 401 or 429 unless the password is the user's; refusals are recorded."""
        means: Means = "console" if event == "sign_in" else "password"
        known = name if name in self.users.hashes else "(unknown user)"  # a password may be typed as the user
        try:
            if await self.passwords.check(name, password, self.find_address(request)):
                return
        except ThrottledError as error:
            self.note_refusal(request, known, "too many failed attempts", event=event, means=means)
            await _pause(request, error.seconds)
            message = f"too many failed attempts; {error}"
            raise ApiError(429, "throttled", message, {"Retry-After": error.retry_after}) from error
        self.note_refusal(request, known, "wrong user or password", event=event, means=means)
        raise self._build_unauthorized("wrong user or password")

    async def _authenticate_session(self, request: web.Request) -> Identity | None:
        if self.sessions is None:
            return None
        id_ = request.cookies.get(self.cookie_name(request), "")
        session = self.sessions.find(id_)
        if session is None:
            return None
        role = self.find_session_role(session)
        if role is None:
            await self._end_orphan(session)
            return None
        request[_SESSION], request[_CSRF_TOKEN] = session, csrf_token(id_)
        _keep_role_check(request, partial(self._find_cookie_role, id_))
        if AUTOMATIC not in request.query:  # else an open page would keep the session for ever
            self.sessions.touch(session)
        return Identity(session.user, role, "console", self.find_address(request), method=session.method)

    async def _end_orphan(self, session: Session) -> None:
        """End a session whose user was removed, has no role any more, or has another password."""
        if self.sessions is not None:
            await self.sessions.end(session)
            name = signed_in_label(session.user, session.method)
            detail = "the user was removed, or has another password or sign-in service"
            await self.write_audit(AuditEntry("end session", name, "console", session.address, detail=detail))

    async def _end_orphans(self) -> None:
        while self.sessions is not None:
            await asyncio.sleep(END_SESSIONS_EVERY)
            for session in self.sessions.list_all():
                if self.find_session_role(session) is None:
                    await self._end_orphan(session)

    def is_unchanged(self, request: web.Request) -> bool:
        """Whether the credential with which a long request began is still valid, and gives the same role."""
        find_role = request.get(_FIND_ROLE) or partial(self._find_proxy_role, request)
        return find_role() is get_identity(request).role

    def find_session_role(self, session: Session) -> Role | None:
        """Return the present role of a session's user, None where the user has none any more."""
        if session.method == "token":
            return self._find_token_role(session.credential)
        if session.method != "password":
            return self.settings.find_group_role(session.method, session.credential, session.groups)
        return self._find_password_role(session.user, session.credential)

    def _find_cookie_role(self, id_: str) -> Role | None:
        session = self.sessions.find(id_) if self.sessions is not None else None
        return self.find_session_role(session) if session is not None else None

    def _find_token_role(self, digest: str) -> Role | None:
        token = self.api_tokens.find_valid(digest) if self.api_tokens is not None else None
        return Role(token.role) if token is not None else None

    def _find_password_role(self, user: str, credential: str | None) -> Role | None:
        """Return the present role of a user; None if they were removed, or have another password."""
        current = self.passwords.credential_of(user)
        return self.users.role_of(user) if current is not None and current == credential else None

    def _find_proxy_role(self, request: web.Request) -> Role | None:
        found = self.settings.proxy.find_user(request) if self.settings.proxy is not None else None
        return found[1] if found is not None else None

    def _authenticate_proxy(self, request: web.Request) -> Identity | None:
        found = self.settings.proxy.find_user(request) if self.settings.proxy is not None else None
        if found is None:
            return None
        name, role = found
        identity = Identity(name, role or Role.VIEWER, "proxy", self.find_address(request))
        if role is None:
            message = f"none of the groups of {name} has a role in access.proxy"
            self.note_refusal(request, "", message, identity)
            raise ApiError(403, "forbidden", message)
        request[_CSRF_TOKEN] = csrf_token(f"{self._proxy_secret}:{name}")
        return identity

    async def _check_csrf(self, request: web.Request, identity: Identity) -> None:
        """Require the CSRF token of changes that a page may have sent with a credential that the browser adds."""
        if identity.means == "console" or (identity.means == "proxy" and is_from_browser(request)):
            form = await read_form(request)
            try:
                check_csrf(request, request[_CSRF_TOKEN], form.get("csrf", ""))
            except ApiError as error:
                self.note_refusal(request, "", error.message, identity)
                raise

    async def check_display_token(self, request: web.Request, secret: str) -> ApiToken:
        """Return the API token with which a display signs in. Raises ApiError 401, and 403 unless it is a viewer's."""
        found = self.api_tokens.find(secret) if self.api_tokens is not None else None
        if found is None or found.has_expired(self._now()):
            raise await self.refuse(request, "", "unknown or expired token", event="sign_in")
        if Role(found.role) is not Role.VIEWER:  # its session lasts as long as the token, where anybody may pass by
            message = f"only a token with the role viewer may sign in; {found.name} has {found.role}"
            self.note_refusal(request, found.name, message, event="sign_in", means="console")
            raise ApiError(403, "forbidden", message)
        return found

    async def start_session(
        self,
        request: web.Request,
        user: str,
        method: SignInMethod,
        groups: Iterable[str] = (),
        provider: str = "",
        token: ApiToken | None = None,
    ) -> str:
        """Start a session for a user or a token that has signed in, end the one before, and return its id.

        `groups` are those of the user at the `provider`.
        """
        assert self.sessions is not None  # noqa: S101 - programs without sessions have no pages for signing in
        before = self.sessions.find(request.cookies.get(self.cookie_name(request), ""))
        if before is not None:
            await self.sessions.end(before)
        address, credential = self.find_address(request), token.digest if token is not None else provider
        if method == "password":
            credential = self.passwords.credential_of(user) or ""
        id_ = await self.sessions.create(
            user, method, credential=credential,
            groups=groups, address=address, browser=printable_name(request.headers.get("User-Agent", "")),
        )  # fmt: skip
        await self.write_audit(AuditEntry("sign_in", signed_in_label(user, method), "console", address))
        return id_

    def cookie_name(self, request: web.Request) -> str:
        """Return the name of the session's cookie. With TLS, browsers accept it from this very host only."""
        return f"__Host-{COOKIE}" if self.is_secure(request) else COOKIE

    def is_secure(self, request: web.Request) -> bool:
        """Whether the browser uses TLS: to this server, or to a proxy in front of it."""
        if request.secure or f"https://{request.host}".lower() in self.settings.hosts.origins:
            return True
        proxy = self.settings.proxy
        return (
            proxy is not None
            and proxy.trusts(request.remote or "")
            and request.headers.get("X-Forwarded-Proto", "").lower() == "https"
        )

    async def run(self) -> None:
        """Keep tokens, sessions and the audit log up to date, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.tokens.run(), name="tokens")
            group.create_task(self.refusals.run(), name="refusals")
            if self.sessions is not None:
                group.create_task(self.sessions.run(), name="sessions")
                group.create_task(self._end_orphans(), name="orphaned sessions")

    @property
    def users(self) -> WebUsers:
        return self._get_users()

    def describe(self) -> Mapping[str, Any]:
        """Return who has access, without secrets."""
        users = self.users
        return {
            "users": {name: users.role_of(name) for name in users.hashes},
            "users_without_role": sorted(users.hashes.keys() - users.roles.keys()),
            "metrics_token": self.tokens.has(Role.METRICS),
            "webhook_token": self.tokens.has(Role.WEBHOOK),
            "web_config_exposed": users.exposed,
        }

    def find_address(self, request: web.Request) -> str:
        """Return the client's address."""
        return find_client_address(request, self.settings.proxy)

    async def refuse(
        self, request: web.Request, name: str, reason: str, code: str = "unauthorized", event: str = "access"
    ) -> ApiError:
        """Record a refused credential and return the error, after a pause where many were refused."""
        self.note_refusal(request, name, reason, event=event, means="console" if event == "sign_in" else "token")
        address = self.find_address(request)
        try:
            self._pauses.begin(address, address)
        except ThrottledError as error:
            await _pause(request, error.seconds)
        return self._build_unauthorized(reason, code)

    def _build_unauthorized(self, reason: str, code: str = "unauthorized") -> ApiError:
        hint = " (the server has no local token: see its log)" if self.tokens.explain_missing(Role.ADMIN) else ""
        # A challenge for passwords only where there is no page for signing in: browsers would ask for one themselves.
        scheme = "Basic" if self.users.hashes and self.sessions is None else "Bearer"
        message = f"{reason}: send a token as bearer token, or a user's password{hint}"
        return ApiError(401, code, message, {"WWW-Authenticate": f'{scheme} realm="defib"'})

    def note_refusal(
        self,
        request: web.Request,
        name: str,
        reason: str,
        identity: Identity | None = None,
        event: str = "access",
        means: Means = "token",
    ) -> None:
        """Record that a request was refused; `means` is what an unknown caller has tried."""
        resource = request.match_info.route.resource
        # Unknown callers could fill the log with paths.
        path = request.path if identity is not None or resource is None else resource.canonical
        self.refusals.add(
            AuditEntry(
                event,
                identity.label if identity is not None else printable_name(name) or "(unknown)",
                identity.means if identity is not None else means,
                self.find_address(request),
                f"{request.method} {path[:MAX_PATH]}",
                "refused",
                reason,
                verified=identity is not None and not identity.claimed_user,
            )
        )


async def _pause(request: web.Request, seconds: float) -> None:
    """Wait before a refusal. Meanwhile a new connection may take the place of this one."""
    request[PAUSED] = True
    await asyncio.sleep(min(seconds, MAX_SLOW_DOWN))
    request[PAUSED] = False
