"""Build the situation of a service from what the exporter, Alertmanager, the inventory and the record know."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fleet.inventory.digests import digests_differ
from fleet.inventory.model import Inventory, Remediation, Service
from fleet.inventory.reasons import UNDETERMINED
from remediator.clients.alertmanager import Alertmanager
from remediator.clients.exporter import Exporter
from remediator.clients.json_client import ClientError
from remediator.policy.maintenance_windows import Maintenance, find_window
from remediator.policy.situation import ActionHistory, ActionsInProgress, Observation, Situation
from remediator.policy.storm import is_storm, services_in_group
from remediator.record import situations
from remediator.record.database import Database

SHARED_FOR = 0.5  # seconds for which one response of the exporter serves all decisions
COMPLETE_AFTER = 300.0  # seconds after its start from which Alertmanager's list is complete


@dataclass(frozen=True)
class AlertLookup:
    """What Alertmanager knows of a service's alerts to act on.

    `silenced` names what mutes all of them; `gone` says that there are none; `caution` why this is not known.
    """

    silenced: str = ""
    gone: bool = False
    caution: str = ""


class ServiceObserver:
    """Queries the exporter and Alertmanager. What they do not report is left unknown."""

    def __init__(
        self, database: Database, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None
    ) -> None:
        self._database = database
        self._lock = asyncio.Lock()
        self._observations: Mapping[str, Observation] | None = None
        self._observed_at = float("-inf")
        self._failing: dict[str, tuple[list[str], int]] = {}  # by group: the failing services, and how many there are
        self.reload(inventory, exporter, alertmanager)

    def reload(self, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None) -> None:
        """Use another inventory and other clients from now on."""
        self._inventory, self._exporter, self._alertmanager = inventory, exporter, alertmanager
        hosts = {name: inventory.host_of(each) for name, each in inventory.services.items()}
        self._groups = {name: host.group if host is not None else "" for name, host in hosts.items()}
        self._failing.clear()

    async def collect_situation(self, incident: int, service_id: str) -> Situation:
        """Return the situation without a fresh probe. Raises StorageError."""
        observed = await self.observe_service(service_id)
        return await self._database.read(situations.add_recorded_facts, incident, service_id, observed)

    async def observe_service(self, service_id: str) -> Situation:
        """Return what the exporter and the inventory know, without the record."""
        service = self._inventory.services.get(service_id)
        rules = self._inventory.remediation.for_service(service)
        observations = await self._observe_all() or {}
        window = self._find_window(service_id, service)
        now = self._database.clock.now()
        dependencies = service.depends_on if service else ()
        return Situation(
            now,
            frozenset(),
            ActionHistory(),
            ActionsInProgress(),
            observations.get(service_id),
            scheduled=window.why if window is not None else "",
            maintenance_ends=now + window.remaining if window is not None else None,
            dependencies_down=tuple(
                name for name in dependencies if name in observations and observations[name].up is False
            ),
            storm=await self._find_storm(service_id, rules, observations),
        )

    async def _find_storm(
        self, service_id: str, rules: Remediation, observations: Mapping[str, Observation]
    ) -> tuple[int, int] | None:
        """Return the (failing, all) services of the group if that is a storm, without expected failures."""
        failing, total = self._find_failing(service_id, observations)
        if not is_storm(rules, len(failing), total):
            return None
        expected = await self._database.read(situations.expected_failures, failing)
        expected |= {name for name in failing if self._find_window(name, self._inventory.services.get(name))}
        counts = len(failing) - len(expected), total - len(expected)
        return counts if is_storm(rules, *counts) else None

    def _find_failing(self, service_id: str, observations: Mapping[str, Observation]) -> tuple[list[str], int]:
        """Return the failing services of the service's group, and how many of the group are observed."""
        group = self._groups.get(service_id, "")
        if group not in self._failing:
            observed = [name for name in services_in_group(service_id, self._groups) if name in observations]
            failing = [name for name in observed if observations[name].success is False]
            self._failing[group] = failing, len(observed)
        return self._failing[group]

    def _find_window(self, service_id: str, service: Service | None) -> Maintenance | None:
        host = self._inventory.host_of(service) if service else None
        clock = self._database.clock
        return find_window(self._inventory, service_id, host, clock.unix(clock.now()))

    async def _observe_all(self) -> Mapping[str, Observation] | None:
        """Return the exporter's observations of all services; None if it cannot be reached."""
        async with self._lock:
            loop = asyncio.get_running_loop()
            if loop.time() - self._observed_at >= SHARED_FOR:
                self._observations = None
                with contextlib.suppress(ClientError):
                    self._observations = await self._exporter.observe_all()
                self._observed_at = loop.time()
                self._failing.clear()
            return self._observations

    async def find_mismatched_services(self) -> frozenset[str] | None:
        """Return the services whose configuration differs in the exporter; None if it cannot be reached."""
        observations = await self._observe_all()
        if observations is None:
            return None
        services = self._inventory.services
        return frozenset(
            name
            for name, observed in observations.items()
            if name in services and digests_differ(services[name].digest, observed.digest)
        )

    async def probe(self, service: Service, situation: Situation) -> Situation:
        """Return the situation after a fresh probe."""
        observed: Observation | None = None
        with contextlib.suppress(ClientError):
            observed = await self._exporter.probe(service.id, service.probe.timeout)
        return replace(situation, observed=observed, now=self._database.clock.now())

    async def find_dependencies_down(self, service: Service) -> tuple[str, ...]:
        """Probe the services that a service depends on, and return those that are down."""
        observations = await self._observe_all() or {}

        async def is_down(name: str) -> bool:
            observed = observations.get(name)
            with contextlib.suppress(ClientError):
                observed = await self._exporter.probe(name, self._inventory.services[name].probe.timeout)
            if observed is None:
                return False
            return observed.up is False or (observed.success is False and observed.reason not in UNDETERMINED)

        names = [name for name in service.depends_on if name in self._inventory.services]
        down = await asyncio.gather(*map(is_down, names))
        return tuple(name for name, each in zip(names, down, strict=True) if each)

    async def look_up_alerts(self, service: Service, firing: frozenset[str]) -> AlertLookup:
        """Look up a service's firing alerts to act on in Alertmanager. One that is active is enough to act."""
        if self._alertmanager is None:
            return AlertLookup()
        names = firing & set(self._inventory.remediation.for_service(service).alerts)
        try:
            known = await self._alertmanager.alerts_of(service.id)
        except ClientError as error:
            return AlertLookup(caution=f"cannot query Alertmanager: {error}")
        matching = [alert for alert in known.alerts if alert.name in names]
        if any(alert.muted_by == "" for alert in matching):
            return AlertLookup()
        if matching:
            return AlertLookup(silenced=matching[0].muted_by)
        if known.uptime < COMPLETE_AFTER:
            return AlertLookup(caution="Alertmanager has just started and may not have all alerts yet")
        return AlertLookup(gone=True)
