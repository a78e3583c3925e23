"""What the services for signing in have in common, and the redirects to them."""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.access.roles import Role
from runtime.errors import DefibError


class SignInError(DefibError):
    """The service did not sign the user in; the message is for the log."""


class RedirectError(SignInError):
    """The browser does not come back from a redirect of this server."""


@dataclass(frozen=True)
class Redirect:
    """A redirect of a browser to a service, which sends it back with a code.

    Everything derives from a `secret` in a cookie of the browser, so that only the same browser can come back, and the
    server stores nothing.
    """

    service: str
    secret: str = field(repr=False)
    redirect_uri: str
    next: str

    @classmethod
    def resume(cls, service: str, secret: str, redirect_uri: str, state: str) -> "Redirect":
        """Return the redirect that a browser comes back from with a state. Raises RedirectError."""
        try:
            next_ = base64.urlsafe_b64decode(state.partition(".")[2]).decode()
        except ValueError:
            next_ = ""
        redirect = cls(service, secret, redirect_uri, next_)
        if not secret or not hmac.compare_digest(redirect.state.encode(), state.encode("utf-8", "surrogateescape")):
            raise RedirectError("the state is unknown: another browser started it, or it took too long")
        return redirect

    @property
    def state(self) -> str:
        next_ = base64.urlsafe_b64encode(self.next.encode()).decode()
        return f"{self._derive(f'state {self.service} {self.next}')}.{next_}"

    @property
    def nonce(self) -> str:
        return self._derive("nonce")

    @property
    def code_verifier(self) -> str:
        return self._derive("code verifier")

    def _derive(self, purpose: str) -> str:
        return hmac.new(self.secret.encode("utf-8", "surrogateescape"), purpose.encode(), hashlib.sha256).hexdigest()


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

    @property
    def provider(self) -> str:
        """Who vouches for the users. Sessions end when this changes."""

    async def create_url(self, redirect: Redirect) -> str:
        """Return the URL that the browser is sent to. Raises SignInError."""

    async def fetch_user(self, code: str, redirect: Redirect) -> SignedInUser:
        """Return the user that a code stands for. Raises SignInError."""

    def find_role(self, groups: Sequence[str]) -> Role | None:
        """Return the role that a user with these groups has now; None without one."""

    async def close(self) -> None:
        """Close the connections."""
