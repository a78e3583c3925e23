"""Bearer tokens: those of the configuration, which are read from their files again, and API tokens with a name."""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from runtime.access.roles import Role, UserRole
from runtime.tokens import ConfiguredToken, TokenError

READ_EVERY = 1.0  # seconds
READ_AGAIN_AFTER = 0.2  # seconds from one reading to the next one that an unknown token causes
API_TOKEN_PREFIX = "defib_"  # noqa: S105 - by which scanners for leaked secrets recognize tokens
log = structlog.get_logger()


class ConfiguredTokens:
    """The tokens of the configuration, with the present content of their files.

    A file that cannot be read twice in a row revokes its token.
    """

    def __init__(self, on_value: Callable[[list[str]], None]) -> None:
        self._on_value = on_value  # called with new values, to keep it out of logs
        self._read_at = float("-inf")
        self._reading_again: asyncio.Task[None] | None = None
        self._tokens: Sequence[tuple[ConfiguredToken, Role]] = ()
        self._values: dict[str, str] = {}  # by setting
        self._failing: dict[str, str] = {}

    async def replace(self, tokens: Iterable[tuple[ConfiguredToken, Role]]) -> None:
        """Put the tokens of a configuration in force, once they are read."""
        replaced = tuple(tokens)
        results = await _read_all(replaced)
        self._tokens, self._values, self._failing = replaced, {}, {}
        self._note(results)

    def has(self, role: Role) -> bool:
        """Whether a token with a role is configured."""
        return any(each is role and token.is_set for token, each in self._tokens)

    def explain_missing(self, role: Role) -> str:
        """Return why no token with a role can be used; empty if one can."""
        settings = [token.setting for token, each in self._tokens if each is role]
        if any(setting in self._values for setting in settings):
            return ""
        return "; ".join(self._failing.get(setting, f"{setting} is not set") for setting in settings)

    async def find(self, secret: str) -> Role | None:
        """Return the role of a token; None if it is unknown, also after the files were read again."""
        role = self.find_present(secret)
        if role is None:
            if self._reading_again is None:
                self._reading_again = asyncio.create_task(self._read_again(), name="read tokens")
            await asyncio.shield(self._reading_again)
            role = self.find_present(secret)
        return role

    async def _read_again(self) -> None:
        """Read the files, but not too often: all unknown tokens of a short time wait for the same reading."""
        try:
            await asyncio.sleep(self._read_at + READ_AGAIN_AFTER - asyncio.get_running_loop().time())
        finally:
            self._reading_again = None  # the next unknown token may have been written after the reading began
        await self.read()

    def find_present(self, secret: str) -> Role | None:
        """Return the role of a token as the files were last read; None if it is unknown."""
        given = secret.encode("utf-8", "surrogateescape")
        found = None
        for token, role in self._tokens:
            value = self._values.get(token.setting)
            if value is not None and hmac.compare_digest(given, value.encode()):
                found = found or role
        return found

    async def read(self) -> None:
        """Read all files."""
        tokens = self._tokens
        self._read_at = asyncio.get_running_loop().time()
        results = await _read_all(tokens)
        if tokens is self._tokens:
            self._note(results)

    def _note(self, results: Sequence[tuple[str | None, str]]) -> None:
        """Note the value of each token, or why there is none."""
        for (token, _), (value, problem) in zip(self._tokens, results, strict=True):
            if value is not None:
                if self._values.get(token.setting) != value:
                    self._on_value([value])
                self._values[token.setting] = value
                self._failing.pop(token.setting, None)
                continue
            if token.setting in self._failing:
                self._values.pop(token.setting, None)
            elif token.setting in self._values:
                log.warning("token_unreadable", setting=token.setting, error=problem, effect="requests are refused")
            self._failing[token.setting] = problem

    async def run(self) -> None:
        """Read the files again and again, until cancelled."""
        while True:
            await asyncio.sleep(READ_EVERY)
            await self.read()


async def _read_all(tokens: Sequence[tuple[ConfiguredToken, Role]]) -> list[tuple[str | None, str]]:
    """Return the value of each token, or None and why there is none."""
    return await asyncio.to_thread(lambda: [_try_read(token) for token, _ in tokens])


def _try_read(token: ConfiguredToken) -> tuple[str | None, str]:
    try:
        return token.read().get_secret_value(), ""
    except TokenError as error:
        return None, str(error)


@dataclass(frozen=True)
class ApiToken:
    """An API token as it is stored: with a digest instead of its secret. Times are of the record's clock."""

    name: str
    role: UserRole
    digest: str
    created_at: float
    created_by: str
    expires_at: float | None = None
    last_used_at: float | None = None

    def has_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


class ApiTokens:
    """The API tokens in force, by the digests of their secrets."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._by_digest: dict[str, ApiToken] = {}
        self._used: dict[str, float] = {}

    def replace(self, tokens: Iterable[ApiToken]) -> None:
        self._by_digest = {token.digest: token for token in tokens}

    def find(self, secret: str) -> ApiToken | None:
        """Return the token with a secret, which may have expired."""
        return self._by_digest.get(digest_of(secret)) if secret.startswith(API_TOKEN_PREFIX) else None

    def find_valid(self, digest: str) -> ApiToken | None:
        """Return the token with a digest, unless it has expired."""
        token = self._by_digest.get(digest)
        return None if token is None or token.has_expired(self._now()) else token

    def note_use(self, token: ApiToken) -> None:
        self._used[token.digest] = self._now()

    def put_back_uses(self, uses: Mapping[str, float]) -> None:
        """Keep uses that could not be stored."""
        self._used = {**uses, **self._used}

    def take_uses(self) -> dict[str, float]:
        """Return when tokens were last used since the last call, by digest."""
        used, self._used = self._used, {}
        return used


def create_secret() -> str:
    """Return the secret of a new API token."""
    return f"{API_TOKEN_PREFIX}{secrets.token_urlsafe(32)}"


def digest_of(secret: str) -> str:
    """Return the digest by which the secret of a token or the id of a session is stored."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
