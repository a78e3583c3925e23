"""What the services for signing in have in common, and the redirects to them that have not come back yet."""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.access.roles import Role
from runtime.errors import DefibError

MAX_PENDING = 1000
PENDING_FOR = 600.0  # seconds


class SignInError(DefibError):
    """The service did not sign the user in; the message is for the log."""


@dataclass(frozen=True)
class Pending:
    """A redirect to a service: `browser` is a digest of the cookie of the browser that must come back."""

    service: str
    browser: str
    redirect_uri: str
    next: str
    started_at: float
    nonce: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    code_verifier: str = field(default_factory=lambda: secrets.token_urlsafe(64), repr=False)


@dataclass(frozen=True)
class SignedInUser:
    """A user as a service knows them; `groups` are what their role depends on."""

    name: str
    groups: Sequence[str]


class SignInService(Protocol):
    """A service for signing in, by the authorization code flow of OAuth 2.0."""

    @property
    def title(self) -> str:
        """The name for the button on the page."""

    async def create_url(self, state: str, pending: Pending) -> str:
        """Return the URL that the browser is sent to. Raises SignInError."""

    async def fetch_user(self, code: str, pending: Pending) -> SignedInUser:
        """Return the user that a code stands for. Raises SignInError."""

    def find_role(self, groups: Sequence[str]) -> Role | None:
        """Return the role that a user with these groups has now; None without one."""

    async def close(self) -> None:
        """Close the connections."""


class PendingSignIns:
    """The redirects that have not come back, by their `state`. Each can be used once, by the same browser."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._pending: dict[str, Pending] = {}

    def add(self, service: str, cookie: str, redirect_uri: str, next_: str) -> tuple[str, Pending]:
        """Return a new state and what belongs to it."""
        now = self._now()
        self._pending = {state: each for state, each in self._pending.items() if now - each.started_at < PENDING_FOR}
        if len(self._pending) >= MAX_PENDING:
            self._pending.pop(next(iter(self._pending)))
        state = secrets.token_urlsafe(32)
        self._pending[state] = Pending(service, _digest(cookie), redirect_uri, next_, now)
        return state, self._pending[state]

    def take(self, service: str, state: str, cookie: str) -> Pending:
        """Return and forget what belongs to a state. Raises SignInError."""
        pending = self._pending.pop(state, None)
        if pending is None or self._now() - pending.started_at >= PENDING_FOR or pending.service != service:
            raise SignInError("the state is unknown, or too old")
        if not hmac.compare_digest(pending.browser, _digest(cookie)):
            raise SignInError("another browser started it")
        return pending


def _digest(cookie: str) -> str:
    return hashlib.sha256(cookie.encode("utf-8", "surrogateescape")).hexdigest()
