"""What the exporter and Alertmanager say, put together with the record: the situation that a decision is about."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace

from fleet.inventory.digests import digests_differ
from fleet.inventory.model import Inventory, Remediation, Service
from remediator.clients.peers import Alertmanager, Exporter, PeerError
from remediator.policy import Observation, Past, Present, Situation, group_of, is_storm
from remediator.record import situations, switches
from remediator.record.database import Database

LISTING_HOLDS = 0.5
UNDETERMINED = ("shell", "tls", "error")  # reasons of a probe that could not be carried out
REMEMBERS_AFTER = 300.0  # seconds after its start from which Alertmanager's list can be taken for whole


class Observer:
    """Asks those who know; what nobody says is left as not known."""

    def __init__(
        self, database: Database, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None
    ) -> None:
        self._database = database
        self._lock = asyncio.Lock()
        self._listed: Mapping[str, Observation] | None = None
        self._listed_at = float("-inf")
        self.take(inventory, exporter, alertmanager)

    def take(self, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None) -> None:
        """Go on with another inventory and other peers."""
        self._inventory, self._exporter, self._alertmanager = inventory, exporter, alertmanager
        groups = {name: inventory.host_of(each) for name, each in inventory.services.items()}
        self._groups = {name: host.group if host is not None else "" for name, host in groups.items()}

    async def situation(self, incident: int, service_id: str) -> Situation:
        """What there is to know without a fresh probe. Raises StorageError."""
        blank = await self.of(service_id)
        now = self._database.clock.now()
        return await self._database.run(situations.situation_now, incident, service_id, self._inventory, blank, now)

    async def of(self, service_id: str) -> Situation:
        """What the exporter and the inventory say; nothing of the record."""
        service = self._inventory.services.get(service_id)
        rules = self._inventory.remediation.for_service(service)
        known = await self._listing()
        seen = known or {}
        scheduled = self._scheduled(service_id, service)
        now = self._database.clock.now()
        return Situation(
            now,
            frozenset(),
            Past(),
            Present(),
            seen.get(service_id),
            scheduled=scheduled.why if scheduled is not None else "",
            maintenance_ends=now + scheduled.left if scheduled is not None else None,
            dependencies_down=tuple(
                name for name in (service.depends_on if service else ()) if name in seen and seen[name].up is False
            ),
            storm=await self._storm(service_id, rules, seen),
        )

    async def _storm(
        self, service_id: str, rules: Remediation, seen: Mapping[str, Observation]
    ) -> tuple[int, int] | None:
        """Failing and all services of its group, but for those that are known to fail, where that is a storm."""
        near = [name for name in group_of(service_id, self._groups) if name in seen]
        failing = [name for name in near if seen[name].success is False]
        if not is_storm(rules, len(failing), len(near)):
            return None
        known = await self._database.run(situations.known_to_fail, failing, self._inventory, self._database.clock.now())
        known |= {name for name in failing if self._scheduled(name, self._inventory.services.get(name))}
        left = len(failing) - len(known), len(near) - len(known)
        return left if is_storm(rules, *left) else None

    def _scheduled(self, service_id: str, service: Service | None) -> switches.Maintenance | None:
        host = self._inventory.host_of(service) if service else None
        return switches.scheduled_now(self._inventory, service_id, host, self._calendar())

    def _calendar(self) -> float:
        return self._database.clock.unix(self._database.clock.now())

    async def _listing(self) -> Mapping[str, Observation] | None:
        """What the exporter says of all services; decisions of one moment share one answer."""
        async with self._lock:
            loop = asyncio.get_running_loop()
            if loop.time() - self._listed_at >= LISTING_HOLDS:
                self._listed = None
                with contextlib.suppress(PeerError):
                    self._listed = await self._exporter.observe_all()
                self._listed_at = loop.time()
            return self._listed

    async def mismatched(self) -> frozenset[str] | None:
        """The services of which the exporter has another configuration; None where it cannot be asked."""
        seen = await self._listing()
        if seen is None:
            return None
        services = self._inventory.services
        return frozenset(
            name
            for name, each in seen.items()
            if name in services and digests_differ(services[name].digest, each.digest)
        )

    async def probed(self, service: Service, situation: Situation) -> Situation:
        """The same situation after a fresh probe."""
        observed: Observation | None = None
        with contextlib.suppress(PeerError):
            observed = await self._exporter.probe(service.id, service.probe.timeout)
        return replace(situation, observed=observed, now=self._database.clock.now())

    async def dependencies_down(self, service: Service) -> tuple[str, ...]:
        """Probe afresh what a service depends on: those that fail, or that the exporter holds to be down."""
        known = await self._listing() or {}

        async def is_down(name: str) -> bool:
            seen = known.get(name)
            with contextlib.suppress(PeerError):
                seen = await self._exporter.probe(name, self._inventory.services[name].probe.timeout)
            if seen is None:
                return False
            return seen.up is False or (seen.success is False and seen.reason not in UNDETERMINED)

        names = [name for name in service.depends_on if name in self._inventory.services]
        down = await asyncio.gather(*map(is_down, names))
        return tuple(name for name, each in zip(names, down, strict=True) if each)

    async def looked_up(self, service: Service, firing: frozenset[str]) -> tuple[str, bool, str]:
        """What Alertmanager says of a service's alerts to act on: (silenced by what, whether all are gone, a caution).

        One alert that is active is enough to act on.
        """
        if self._alertmanager is None:
            return "", False, ""
        names = firing & set(self._inventory.remediation.for_service(service).alerts)
        try:
            listing = await self._alertmanager.of_service(service.id)
        except PeerError as error:
            return "", False, f"Alertmanager could not be asked: {error}"
        told = [alert for alert in listing.alerts if alert.name in names]
        if any(alert.held_by == "" for alert in told):
            return "", False, ""
        if told:
            return told[0].held_by, False, ""
        if listing.up_for < REMEMBERS_AFTER:
            return "", False, "Alertmanager was started too lately to know every alert"
        return "", True, ""
