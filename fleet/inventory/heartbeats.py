"""The exporter's settings for heartbeats, and the URLs that jobs request."""

import hashlib
import hmac
import re
import uuid
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, SecretStr

from fleet.inventory.endpoints import MAX_PORT, ConfigModel, OwnToken, RelativePath, Url

MIN_PING_KEY = 16  # characters
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


def is_uuid(text: str) -> bool:
    """Whether a text is a UUID in its usual form, with hyphens."""
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


class HeartbeatSettings(ConfigModel):
    """Where the exporter receives pings, and where it stores them."""

    listen: Annotated[str, AfterValidator(check_listen)] = "127.0.0.1:9998"
    url: Url | None = None  # of the listener, as jobs reach it
    database: RelativePath = Path("/var/lib/defib-exporter/heartbeats.db")
    ping_key: Annotated[OwnToken, AfterValidator(check_ping_key)] | None = None

    @property
    def base_url(self) -> str:
        return (self.url or f"http://{self.listen}").rstrip("/")


def derive_uuid(ping_key: str, service: str) -> str:
    """Return the UUID of a service's heartbeat: it depends on the ping key and the service's ID alone."""
    digest = hmac.digest(ping_key.encode(), f"heartbeat:{service}".encode(), hashlib.sha256)
    return str(uuid.UUID(bytes=digest[:16], version=4))
