"""Sessions of people who signed in with a browser.

They are held in memory; `SessionStorage` keeps them across restarts. A session's id is only in its cookie: what is held
and stored is its digest.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from runtime.access.roles import SignInMethod
from runtime.access.tokens import digest_of

IDLE_LIMIT = 12 * 3600.0
AGE_LIMIT = 7 * 86400.0
MAX_SESSIONS_OF_USER = 50
TOUCH_EVERY = 60.0  # seconds between updates of `last_used_at`


@dataclass(frozen=True)
class Session:
    """A session.

    `credential` is the digest of the password's hash or of the API token, or the provider of a sign-in service;
    `groups` are those of the user there.
    """

    digest: str
    user: str
    method: SignInMethod
    credential: str
    groups: tuple[str, ...]
    address: str
    browser: str
    created_at: float
    last_used_at: float

    @property
    def number(self) -> str:
        """The name of the session in lists, which does not identify it to the server as its id does."""
        return self.digest[:12]

    def has_ended(self, now: float) -> bool:
        if self.method == "token":  # a display's, which ends with the token
            return False
        return now - self.last_used_at > IDLE_LIMIT or now - self.created_at > AGE_LIMIT


class SessionStorage(Protocol):
    """Keeps sessions across restarts."""

    async def load(self) -> Iterable[Session]:
        """Return the stored sessions."""

    async def save(self, session: Session) -> None:
        """Store a session, or its changes. A failure is logged, and not raised."""

    async def delete(self, digests: Iterable[str]) -> None:
        """Delete sessions. A failure is logged, and not raised."""


class Sessions:
    def __init__(self, now: Callable[[], float], storage: SessionStorage) -> None:
        self._now, self._storage = now, storage
        self._by_digest: dict[str, Session] = {}
        self._touched: set[str] = set()

    async def load(self) -> None:
        self._by_digest = {session.digest: session for session in await self._storage.load()}

    async def create(
        self, user: str, method: SignInMethod, *, credential: str, groups: Iterable[str], address: str, browser: str
    ) -> str:
        """Create a session and return its id, for the cookie."""
        await self._delete_ended()
        own = [each for each in self.list_all() if (each.user, each.method) == (user, method)]
        own.sort(key=lambda each: each.last_used_at)
        await self._end(own[: max(0, len(own) - MAX_SESSIONS_OF_USER + 1)])
        id_ = secrets.token_urlsafe(32)
        now = self._now()
        session = Session(
            digest_of(id_),
            user,
            method,
            credential,
            tuple(groups),
            address,
            browser[:200],
            created_at=now,
            last_used_at=now,
        )
        self._by_digest[session.digest] = session
        await self._storage.save(session)
        return id_

    def find(self, id_: str) -> Session | None:
        """Return the session with an id, unless it has ended."""
        session = self._by_digest.get(digest_of(id_))
        return None if session is None or session.has_ended(self._now()) else session

    def touch(self, session: Session) -> None:
        """Note that a session was used."""
        if self._now() - session.last_used_at >= TOUCH_EVERY and session.digest in self._by_digest:
            self._by_digest[session.digest] = replace(session, last_used_at=self._now())
            self._touched.add(session.digest)

    async def save_touched(self) -> None:
        """Store when sessions were last used, and delete those that have ended."""
        touched, self._touched = self._touched, set()
        for digest in touched:
            session = self._by_digest.get(digest)
            if session is not None:  # it may end while another one is stored
                await self._storage.save(session)
        await self._delete_ended()

    async def run(self) -> None:
        """Keep the stored sessions up to date, until cancelled."""
        while True:
            await asyncio.sleep(TOUCH_EVERY)
            await self.save_touched()

    async def _delete_ended(self) -> None:
        await self._end([session for session in self.list_all() if session.has_ended(self._now())])

    def list_all(self) -> list[Session]:
        """Return all sessions, those that have ended but are not deleted yet included."""
        return list(self._by_digest.values())

    async def end(self, session: Session) -> None:
        await self._end([session])

    async def _end(self, sessions: Iterable[Session]) -> None:
        digests = [session.digest for session in sessions]
        for digest in digests:
            self._by_digest.pop(digest, None)
        if digests:
            await self._storage.delete(digests)


def csrf_token(id_: str) -> str:
    """Return the CSRF token of a session or of a sign-in form, derived from its secret id."""
    return hmac.new(id_.encode("utf-8", "surrogateescape"), b"csrf", hashlib.sha256).hexdigest()
