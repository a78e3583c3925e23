"""Administration of access: API tokens and sessions. The HTTP API and the console call these."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from fleet.inventory.units import IDENTIFIER
from remediator.operations import ConflictError, InvalidOperationError, NotFoundError, UnavailableError
from remediator.record import api_tokens, audit
from remediator.record.audit import AuditLog
from remediator.record.database import Database, StorageError
from remediator.record.transaction import Transaction
from runtime.access.audit import AuditEntry
from runtime.access.roles import LOCAL, Identity, UserRole, signed_in_label
from runtime.access.sessions import Session, Sessions
from runtime.access.tokens import ApiToken, ApiTokens, create_secret, digest_of

log = structlog.get_logger()
RESERVED_NAMES = (LOCAL, "metrics_token", "webhook_token")  # of tokens of the configuration, in the audit log


@dataclass(frozen=True)
class CreatedToken:
    """A new API token with its secret, which is not stored."""

    token: ApiToken
    secret: str


class Administration:
    def __init__(self, database: Database, tokens: ApiTokens, sessions: Sessions, audit_log: AuditLog) -> None:
        self._database, self._tokens, self._sessions, self._audit_log = database, tokens, sessions, audit_log

    async def load(self) -> None:
        """Load tokens and sessions from the record. Raises StorageError."""
        self._tokens.replace(await self._database.read(api_tokens.read_all))
        await self._sessions.load()

    async def store_token_uses(self) -> None:
        """Store when tokens were last used. Raises StorageError."""
        if uses := self._tokens.take_uses():
            try:
                await self._database.write(api_tokens.store_uses, uses)
            except StorageError:
                self._tokens.put_back_uses(uses)
                raise

    async def list_tokens(self) -> Sequence[ApiToken]:
        """Return the API tokens in force, those that have expired included. Raises UnavailableError."""
        try:
            await self.store_token_uses()
            return await self._database.read(api_tokens.read_all)
        except StorageError as error:
            raise UnavailableError("not_stored", "cannot read the record") from error

    async def create_token(self, name: str, role: UserRole, expires_in: float | None, by: Identity) -> CreatedToken:
        """Create an API token, which expires after some seconds, or never."""
        if re.fullmatch(IDENTIFIER, name) is None:
            message = (
                "a name has at most 63 of the characters a-z, 0-9, '.', '_' and '-', and begins with a letter or digit"
            )
            raise InvalidOperationError("bad_request", message)
        secret, now = create_secret(), self._database.clock.now()
        expires_at = now + expires_in if expires_in is not None else None
        token = ApiToken(name, role, digest_of(secret), now, by.label, expires_at)

        def work(tx: Transaction) -> list[ApiToken]:
            if name in RESERVED_NAMES:
                raise ConflictError("token_exists", f"{name!r} is the name of a token of the configuration")
            if not api_tokens.create(tx, token):
                raise ConflictError("token_exists", f"there is an API token {name!r} already; revoke it first")
            audit.add(tx, AuditEntry.of(by, "create token", name, detail=role))
            return api_tokens.read_all(tx)

        await self._change_tokens(by, "create token", name, work)
        log.warning("api_token_created", name=name, role=role, by=by.label)
        return CreatedToken(token, secret)

    async def revoke_token(self, name: str, by: Identity) -> None:
        """Revoke an API token, from now on."""

        def work(tx: Transaction) -> list[ApiToken]:
            if not api_tokens.revoke(tx, name, by.label):
                raise NotFoundError("unknown_token", f"there is no API token {name!r}")
            audit.add(tx, AuditEntry.of(by, "revoke token", name))
            return api_tokens.read_all(tx)

        await self._change_tokens(by, "revoke token", name, work)
        log.warning("api_token_revoked", name=name, by=by.label)

    async def _change_tokens(
        self, by: Identity, event: str, name: str, work: Callable[[Transaction], list[ApiToken]]
    ) -> None:
        async with self._audit_log.recording_refusal(by, event, name):
            try:
                self._tokens.replace(await self._database.write_with_priority(work))
            except StorageError as error:
                raise UnavailableError("not_stored", "cannot write to the record; nothing was changed") from error

    def list_sessions(self) -> Sequence[Session]:
        """Return the sessions, the last used first."""
        now = self._database.clock.now()
        running = [session for session in self._sessions.list_all() if not session.has_ended(now)]
        return sorted(running, key=lambda session: session.last_used_at, reverse=True)

    async def end_session(self, number: str, by: Identity) -> None:
        """End somebody's session."""
        found = next((session for session in self.list_sessions() if session.number == number), None)
        async with self._audit_log.recording_refusal(by, "end session", number):
            if found is None:
                raise NotFoundError("unknown_session", f"there is no session {number!r}")
        await self._sessions.end(found)
        user = signed_in_label(found.user, found.method)
        await self._audit_log.write(AuditEntry.of(by, "end session", number, detail=user))
