"""The exporter's settings for heartbeats, and the URLs that jobs request."""

import hashlib
import hmac
import re
import uuid
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr

from fleet.inventory.endpoints import MAX_PORT, ConfigModel, OwnToken, RelativePath, Url
from fleet.inventory.notify import Severity
from fleet.inventory.units import Duration, Pattern, PositiveDuration, compile_pattern, format_duration

BadgeKind = Literal["service", "category"]
MIN_PING_KEY = 16  # characters
MIN_EVERY = 1.0  # seconds
MAX_CREATED = 1000  # heartbeats that jobs may create
SLUG = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # of those: a service's ID, without `.` as with healthchecks
_LISTEN = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]*):(\d+)")
_PING_KEY = re.compile(rf"[A-Za-z0-9_-]{{{MIN_PING_KEY},}}")


def check_ping_key(key: SecretStr) -> SecretStr:
    """Return a ping key that can be a part of a URL. Raises ValueError."""
    text = key.get_secret_value()
    if _PING_KEY.fullmatch(text) is None:
        raise ValueError(f"must have at least {MIN_PING_KEY} characters, only letters, digits, `-` and `_`")
    if is_uuid(text):
        raise ValueError("must not have the form of a UUID, which a ping URL has in the same place")
    return key


def check_listen(text: str) -> str:
    found = _LISTEN.fullmatch(text)
    if found is None or int(found[1]) > MAX_PORT:
        raise ValueError(f"{text!r} is not an address to listen on; write 127.0.0.1:9998, [v6]:9998 or :9998")
    return text


def check_every(seconds: float) -> float:
    if seconds < MIN_EVERY:
        raise ValueError(f"{format_duration(seconds)} is too short; the minimum is {format_duration(MIN_EVERY)}")
    return seconds


def is_uuid(text: str) -> bool:
    """Whether a text is a UUID in its usual form, with hyphens."""
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


class CreateSettings(ConfigModel):
    """Which heartbeats jobs may create with their first ping, and how they are watched."""

    slugs: Pattern
    at_most: int = Field(50, ge=1, le=MAX_CREATED)
    every: Annotated[PositiveDuration, AfterValidator(check_every)] = 86400.0
    grace: Duration = 3600.0
    start_grace: PositiveDuration = 3600.0
    severity: Severity = "warning"
    category: str = "other"
    team: str = ""
    forget_after: PositiveDuration = 7 * 86400.0


class HeartbeatSettings(ConfigModel):
    """Where the exporter receives pings, and where it stores them."""

    listen: Annotated[str, AfterValidator(check_listen)] = "127.0.0.1:9998"
    url: Url | None = None  # of the listener, as jobs reach it
    database: RelativePath = Path("/var/lib/defib-exporter/heartbeats.db")
    ping_key: Annotated[OwnToken, AfterValidator(check_ping_key)] | None = None
    create: CreateSettings | None = None

    def may_create(self, slug: str) -> bool:
        """Whether a job may create a heartbeat with this slug, as far as that depends on the slug."""
        if self.create is None or SLUG.fullmatch(slug) is None:
            return False
        return compile_pattern(self.create.slugs).fullmatch(slug) is not None

    @property
    def base_url(self) -> str:
        return (self.url or f"http://{self.listen}").rstrip("/")


def derive_uuid(ping_key: str, service: str) -> str:
    """Return the UUID of a service's heartbeat: it depends on the ping key and the service's ID alone."""
    return str(uuid.UUID(bytes=_derive(ping_key, f"heartbeat:{service}"), version=4))


def sign_badge(ping_key: str, kind: BadgeKind, name: str) -> str:
    """Return the signature in the URL of a badge, from which the UUID of the heartbeat cannot be found."""
    return _derive(ping_key, f"badge of {kind}:{name}").hex()


def _derive(ping_key: str, text: str) -> bytes:
    return hmac.digest(ping_key.encode(), text.encode(), hashlib.sha256)[:16]
