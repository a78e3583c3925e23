"""Heartbeats that jobs create with their first ping: which may be created, and the services that they are."""

from collections.abc import Iterable, Mapping

from exporter.probes.heartbeat import HeartbeatProbeOptions
from fleet.inventory.heartbeats import SLUG, CreateSettings
from fleet.inventory.model import Inventory, Service
from fleet.inventory.units import format_duration


class NotCreatedError(Exception):
    """A heartbeat that may not be created, with the status of the answer and its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class LimitReachedError(NotCreatedError):
    """As many heartbeats as permitted were created."""

    def __init__(self, limit: int) -> None:
        super().__init__(403, f"the limit of {limit} created heartbeats is reached")
        self.limit = limit


def check_slug(inventory: Inventory, slug: str) -> CreateSettings:
    """Return the settings of a heartbeat with this slug that the inventory does not have. Raises NotCreatedError."""
    settings = inventory.exporter.heartbeats.create
    if settings is None:
        raise NotCreatedError(404, "not found")
    if SLUG.fullmatch(slug) is None:
        raise NotCreatedError(400, "invalid slug")
    if not inventory.exporter.heartbeats.may_create(slug):
        raise NotCreatedError(404, "not found")
    if slug in inventory.services:
        raise NotCreatedError(409, "another service has this name")
    return settings


def find_remaining(inventory: Inventory, created: Iterable[str]) -> list[str]:
    """Return which of the created heartbeats remain: those that the inventory permits and does not have itself."""
    settings = inventory.exporter.heartbeats
    taken = set(inventory.services)
    for service in inventory.services.values():
        if isinstance(service.probe.options, HeartbeatProbeOptions) and service.probe.options.slug:
            taken.add(service.probe.options.slug)
    return [name for name in created if name not in taken and settings.may_create(name)]


def make_services(inventory: Inventory, names: Iterable[str]) -> Mapping[str, Service]:
    """Return the services of created heartbeats, as if the inventory had them."""
    settings = inventory.exporter.heartbeats.create
    if settings is None:
        return {}
    durations = {name: format_duration(getattr(settings, name)) for name in ("every", "grace", "start_grace")}
    service = {
        "probe": {"heartbeat": durations},
        "severity": settings.severity,
        "category": settings.category,
        "team": settings.team,
    }
    return type(inventory).model_validate({"services": dict.fromkeys(names, service)}).services
