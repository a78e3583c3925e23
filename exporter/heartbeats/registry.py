"""Which heartbeat a ping URL is of."""

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exporter.probes.heartbeat import HeartbeatProbeOptions
from fleet.inventory.heartbeats import derive_uuid
from fleet.inventory.model import Service


@dataclass(frozen=True, slots=True)
class PingUrls:
    """The URLs of a heartbeat. Both are secrets: the second one has the ping key, with which all others begin."""

    by_uuid: str
    by_slug: str


class HeartbeatRegistry:
    """The heartbeats by UUID and by slug."""

    def __init__(self) -> None:
        self._ping_key = self._base_url = ""
        self._by_uuid: dict[str, str] = {}
        self._uuids: dict[str, str] = {}  # by service
        self._by_slug: dict[str, tuple[str, ...]] = {}
        self._slugs: dict[str, str] = {}

    def replace(self, services: Iterable[Service], ping_key: str, base_url: str) -> None:
        """Put the heartbeats of an inventory in force; their URLs begin with `base_url`."""
        self._ping_key, self._base_url = ping_key, base_url
        self._by_uuid, self._by_slug, self._uuids, self._slugs = {}, {}, {}, {}
        for service in services:
            options: HeartbeatProbeOptions = service.probe.options
            own = options.uuid.get_secret_value() if options.uuid is not None else derive_uuid(ping_key, service.id)
            self._uuids[service.id], self._slugs[service.id] = own, options.slug or service.id
            self._by_uuid[own] = service.id
            slug = self._slugs[service.id]
            self._by_slug[slug] = (*self._by_slug.get(slug, ()), service.id)

    @property
    def secrets(self) -> Sequence[str]:
        """What must not be logged."""
        return [self._ping_key, *self._by_uuid]

    def find_by_uuid(self, uuid: str) -> str | None:
        """Return the service of a UUID, None if there is none."""
        return self._by_uuid.get(uuid.lower())

    def find_by_slug(self, ping_key: str, slug: str) -> Sequence[str]:
        """Return the services of a slug; none also if the key is wrong."""
        return self._by_slug.get(slug, ()) if self.is_ping_key(ping_key) else ()

    def is_ping_key(self, text: str) -> bool:
        """Whether a text is the ping key, with which URLs with a slug begin."""
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._ping_key.encode())

    def find_urls(self, service: str) -> PingUrls | None:
        """Return the URLs of a service, None if it is no heartbeat."""
        if service not in self._uuids:
            return None
        base = f"{self._base_url}/ping"
        return PingUrls(f"{base}/{self._uuids[service]}", f"{base}/{self._ping_key}/{self._slugs[service]}")
