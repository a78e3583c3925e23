"""Which heartbeat a URL is of: pings, the push URLs of Uptime Kuma, and badges."""

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exporter.probes.heartbeat import HeartbeatProbeOptions
from fleet.inventory.heartbeats import derive_badge_id, derive_uuid
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
    """The heartbeats by UUID, by slug, and by the ID of their badges."""

    def __init__(self) -> None:
        self._ping_key = self._base_url = ""
        self._by_uuid: dict[str, str] = {}
        self._uuids: dict[str, str] = {}  # by service
        self._by_slug: dict[str, tuple[str, ...]] = {}
        self._services: dict[str, Service] = {}
        self._badges: dict[str, BadgeSubject] | None = None  # by ID; None until one is requested

    def replace(self, services: Iterable[Service], ping_key: str, base_url: str) -> None:
        """Put the heartbeats of an inventory in force; their URLs begin with `base_url`."""
        self._ping_key, self._base_url, self._badges = ping_key, base_url, None
        self._by_uuid, self._by_slug, self._uuids = {}, {}, {}
        self._services = {service.id: service for service in services}
        for service in self._services.values():
            options: HeartbeatProbeOptions = service.probe.options
            own = options.uuid.get_secret_value() if options.uuid is not None else derive_uuid(ping_key, service.id)
            self._uuids[service.id], self._by_uuid[own] = own, service.id
            slug = _slug_of(service)
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

    def find_badge(self, badge_id: str) -> BadgeSubject | None:
        """Return what a badge is about; None if there is none with this ID."""
        if self._badges is None:
            self._badges = dict(self._make_badges())
        return self._badges.get(badge_id)

    def _make_badges(self) -> Iterable[tuple[str, BadgeSubject]]:
        categories: dict[str, list[str]] = {}
        for service in self._services.values():
            yield self._badge_id(service), BadgeSubject(service.title, [service.id])
            categories.setdefault(service.category, []).append(service.id)
        for category, names in categories.items():
            yield derive_badge_id(self._ping_key, "category", category), BadgeSubject(category, names)

    def _badge_id(self, service: Service) -> str:
        return derive_badge_id(self._ping_key, "service", service.id)

    def find_uuid(self, service: str) -> str | None:
        """Return the UUID of a service, None if it is no heartbeat."""
        return self._uuids.get(service)

    def find_urls(self, service: str) -> HeartbeatUrls | None:
        """Return the URLs of a service, None if it is no heartbeat."""
        found = self._services.get(service)
        if found is None:
            return None
        base, uuid = self._base_url, self._uuids[service]
        category = derive_badge_id(self._ping_key, "category", found.category)
        return HeartbeatUrls(
            by_uuid=f"{base}/ping/{uuid}",
            by_slug=f"{base}/ping/{self._ping_key}/{_slug_of(found)}",
            push=f"{base}/api/push/{uuid}",
            badge=f"{base}/badge/{self._badge_id(found)}.svg",
            category_badge=f"{base}/badge/{category}.svg",
        )


def _slug_of(service: Service) -> str:
    options: HeartbeatProbeOptions = service.probe.options
    return options.slug or service.id
