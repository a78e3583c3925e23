"""Which heartbeat a URL is of: pings, the push URLs of Uptime Kuma, and badges, whose URLs are signed."""

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from exporter.probes.heartbeat import HeartbeatProbeOptions
from fleet.inventory.heartbeats import BadgeKind, derive_uuid, sign_badge
from fleet.inventory.model import Service


@dataclass(frozen=True, slots=True)
class HeartbeatUrls:
    """The URLs of a heartbeat. The first three are secrets: who has them can send pings.

    `by_slug` has the ping key, with which all such URLs begin. The badges are SVG.
    """

    by_uuid: str
    by_slug: str
    push: str
    badge: str
    category_badge: str


@dataclass(frozen=True, slots=True)
class BadgeSubject:
    """What a badge is about: `label` is the name of the heartbeat, or a category of them."""

    label: str
    services: Sequence[str]


class HeartbeatRegistry:
    """The heartbeats by UUID and by slug, and the signatures of their badges."""

    def __init__(self) -> None:
        self._ping_key = self._base_url = ""
        self._by_uuid: dict[str, str] = {}
        self._uuids: dict[str, str] = {}  # by service
        self._by_slug: dict[str, tuple[str, ...]] = {}
        self._services: dict[str, Service] = {}

    def replace(self, services: Iterable[Service], ping_key: str, base_url: str) -> None:
        """Put the heartbeats of an inventory in force; their URLs begin with `base_url`."""
        self._ping_key, self._base_url = ping_key, base_url
        self._by_uuid, self._by_slug, self._uuids, self._services = {}, {}, {}, {}
        for service in services:
            self.add(service)

    def add(self, service: Service) -> str:
        """Add a heartbeat, and return its UUID, which must not be logged."""
        options: HeartbeatProbeOptions = service.probe.options
        own = options.uuid.get_secret_value() if options.uuid is not None else derive_uuid(self._ping_key, service.id)
        self._services[service.id], self._uuids[service.id], self._by_uuid[own] = service, own, service.id
        slug = _slug_of(service)
        self._by_slug[slug] = (*self._by_slug.get(slug, ()), service.id)
        return own

    def remove(self, service: Service) -> None:
        """Remove a heartbeat."""
        del self._services[service.id], self._by_uuid[self._uuids.pop(service.id)]
        slug = _slug_of(service)
        self._by_slug[slug] = tuple(name for name in self._by_slug[slug] if name != service.id)

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

    def find_badge(self, signature: str, name: str) -> BadgeSubject | None:
        """Return what a badge is about: the heartbeat or the category with this name, if its signature is right."""
        if name in self._services and self._is_signature(signature, "service", name):
            return BadgeSubject(self._services[name].title, [name])
        if not self._is_signature(signature, "category", name):
            return None
        services = [each.id for each in self._services.values() if each.category == name]
        return BadgeSubject(name, services) if services else None

    def _is_signature(self, text: str, kind: BadgeKind, name: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), sign_badge(self._ping_key, kind, name).encode())

    def find_uuid(self, service: str) -> str | None:
        """Return the UUID of a service, None if it is no heartbeat."""
        return self._uuids.get(service)

    def find_urls(self, service: str) -> HeartbeatUrls | None:
        """Return the URLs of a service, None if it is no heartbeat."""
        found = self._services.get(service)
        if found is None:
            return None
        base, uuid = self._base_url, self._uuids[service]
        return HeartbeatUrls(
            by_uuid=f"{base}/ping/{uuid}",
            by_slug=f"{base}/ping/{self._ping_key}/{_slug_of(found)}",
            push=f"{base}/api/push/{uuid}",
            badge=self._format_badge("service", service),
            category_badge=self._format_badge("category", found.category),
        )

    def _format_badge(self, kind: BadgeKind, name: str) -> str:
        return f"{self._base_url}/badge/{sign_badge(self._ping_key, kind, name)}/{quote(name, safe='')}.svg"


def _slug_of(service: Service) -> str:
    options: HeartbeatProbeOptions = service.probe.options
    return options.slug or service.id
