"""Build the situation of a service from what the exporter, Alertmanager, the inventory and the record know."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fleet.inventory.digests import digests_differ
from fleet.inventory.model import HostAlert, Inventory, Remediable, Remediation
from fleet.inventory.reasons import UNDETERMINED
from fleet.json_client import ClientError
from remediator.clients.alertmanager import Alertmanager
from remediator.clients.exporter import Exporter
from remediator.policy.components import COMPONENT_DOWN
from remediator.policy.maintenance_windows import Maintenance, find_window
from remediator.policy.situation import ActionHistory, ActionsInProgress, Observation, Situation
from remediator.policy.storm import can_step, is_storm, services_in_group
from remediator.record import situations
from remediator.record.database import Database

SHARED_FOR = 0.5  # seconds for which one response of the exporter serves all decisions
SILENCES_FOR = 15.0  # seconds for which a list of silenced services is used
EXITED_FOR = 90.0  # seconds for which an exit counts that a host reported; a decision is made every 30 s
COMPLETE_AFTER = 300.0  # seconds after its start from which Alertmanager's list is complete


@dataclass(frozen=True)
class AlertLookup:
    """What Alertmanager knows of a service's alerts to act on.

    `silenced` names what mutes all of them; `gone` says that there are none; `caution` why this is not known.
    `active_components` are those about which an alert is active, if only components have alerts; None if not known.
    """

    silenced: str = ""
    gone: bool = False
    caution: str = ""
    active_components: frozenset[str] | None = None


class ServiceObserver:
    """Queries the exporter and Alertmanager. What they do not report is left unknown."""

    def __init__(
        self, database: Database, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None
    ) -> None:
        self._database = database
        self._lock = asyncio.Lock()
        self._observations: Mapping[str, Observation] | None = None
        self._observed_at = float("-inf")
        self._on_host: defaultdict[str, list[str]] = defaultdict(list)  # services by host
        self._failing: dict[str, tuple[list[str], int]] = {}  # by group: the failing services, and how many there are
        self._exited: dict[str, float] = {}  # by service: when its host last said that it had exited
        self._silenced: frozenset[str] = frozenset()
        self._silenced_at = float("-inf")
        self.reload(inventory, exporter, alertmanager)

    def reload(self, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None) -> None:
        """Use another inventory and other clients from now on."""
        self._inventory, self._exporter, self._alertmanager = inventory, exporter, alertmanager
        subjects: dict[str, Remediable] = {**inventory.services, **inventory.host_alerts}
        hosts = {name: inventory.host_of(each) for name, each in subjects.items()}
        self._on_host.clear()
        for service in inventory.services.values():
            self._on_host[service.host].append(service.id)
        self._groups = {name: host.group if host is not None else "" for name, host in hosts.items()}
        self._failing.clear()

    async def collect_situation(self, incident: int, service_id: str) -> Situation:
        """Return the situation without a fresh probe. Raises StorageError."""
        observed = await self.observe_service(service_id)
        return await self._database.read(situations.add_recorded_facts, incident, service_id, observed)

    async def observe_service(self, service_id: str) -> Situation:
        """Return what the exporter and the inventory know, without the record."""
        service = self._inventory.find_subject(service_id)
        rules = self._inventory.remediation.for_service(service)
        observations = await self._observe_all() or {}
        if isinstance(service, HostAlert):
            observed = self._observe_host(service.host, observations)
        else:
            observed = observations.get(service_id)
        if observed is not None and service is not None and service.automatic_components:
            with contextlib.suppress(ClientError):
                observed = await self._exporter.observe(service_id)  # with its components
        window = self._find_window(service_id, service)
        others = self._on_host.get(service.host, ()) if service is not None and service.host else ()
        now = self._database.clock.now()
        dependencies = service.depends_on if service else ()
        return Situation(
            now,
            frozenset(),
            ActionHistory(),
            ActionsInProgress(),
            observed,
            other_is_up=any(observations[name].up for name in others if name in observations and name != service_id),
            scheduled=window.why if window is not None else "",
            maintenance_ends=now + window.remaining if window is not None else None,
            dependencies_down=tuple(
                name for name in dependencies if name in observations and observations[name].up is False
            ),
            **await self._find_storm(service_id, rules, observations),
        )

    def _observe_host(self, host: str, observations: Mapping[str, Observation]) -> Observation | None:
        """Return whether a host's shell responds, which the exporter reports with the services on it."""
        on_host = (observations[name] for name in self._on_host.get(host, ()) if name in observations)
        seen = [each.host_up for each in on_host if each.host_up is not None]
        return Observation(None, None, None, host_up=any(seen)) if seen else None

    async def _find_storm(
        self, service_id: str, rules: Remediation, observations: Mapping[str, Observation]
    ) -> Mapping[str, Any]:
        """Return the fields of a situation that describe a storm, without expected failures."""
        failing, total = self._find_failing(service_id, observations)
        if not is_storm(rules, len(failing), total):
            return {}
        expected = await self._database.read(situations.expected_failures, failing)
        expected |= {name for name in failing if self._find_window(name, self._inventory.services.get(name))}
        expected |= await self._find_silenced()
        unexpected = [name for name in failing if name not in expected]
        total -= len(failing) - len(unexpected)
        if not is_storm(rules, len(unexpected), total):
            return {}
        now = asyncio.get_running_loop().time()
        explained = {
            name
            for name in unexpected
            if observations[name].is_refused or now - self._exited.get(name, float("-inf")) < EXITED_FOR
        }
        steps = can_step(rules, service_id, unexpected, explained, total)
        return {"storm": (len(unexpected), total), "storm_steps": steps}

    def note_exited(self, service_id: str) -> None:
        """Remember that the host of a service says that it exited."""
        self._exited[service_id] = asyncio.get_running_loop().time()

    async def _find_silenced(self) -> frozenset[str]:
        """Return the services whose alerts are silenced; none if Alertmanager cannot be reached."""
        now = asyncio.get_running_loop().time()
        if self._alertmanager is not None and now - self._silenced_at >= SILENCES_FOR:
            self._silenced_at = now
            with contextlib.suppress(ClientError):
                self._silenced = await self._alertmanager.silenced_services()
        return self._silenced

    def _find_failing(self, service_id: str, observations: Mapping[str, Observation]) -> tuple[list[str], int]:
        """Return the failing services of the service's group, and how many of the group are observed."""
        group = self._groups.get(service_id, "")
        if group not in self._failing:
            observed = [name for name in services_in_group(service_id, self._groups) if name in observations]
            failing = [name for name in observed if observations[name].success is False]
            self._failing[group] = failing, len(observed)
        return self._failing[group]

    def _find_window(self, service_id: str, service: Remediable | None) -> Maintenance | None:
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

    async def probe(self, service: Remediable, situation: Situation) -> Situation:
        """Return the situation after a fresh probe; an alert of a host has none."""
        if isinstance(service, HostAlert):
            return replace(situation, now=self._database.clock.now())
        observed: Observation | None = None
        with contextlib.suppress(ClientError):
            observed = await self._exporter.probe(service.id, service.probe.timeout)
        return replace(situation, observed=observed, now=self._database.clock.now())

    async def probe_for_action(self, service: Remediable, situation: Situation) -> Situation:
        """As `probe`; if components that may be restarted are down, probe again, and keep those that are still down."""
        first = await self.probe(service, situation)
        down = first.observed.components_down if first.observed is not None else frozenset()
        if not down.intersection(service.automatic_components):
            return first
        second = await self.probe(service, first)
        if second.observed is None:
            return second
        still = second.observed.components_down & down
        return replace(second, observed=replace(second.observed, components_down=still))

    async def find_dependencies_down(self, service: Remediable) -> tuple[str, ...]:
        """Probe the services that a service depends on, and return those that are down."""
        observations = await self._observe_all() or {} if service.depends_on else {}

        async def is_down(name: str) -> bool:
            observed = observations.get(name)
            if observed is not None and observed.paused:
                return False  # not known, and not to be probed for others
            with contextlib.suppress(ClientError):
                observed = await self._exporter.probe(name, self._inventory.services[name].probe.timeout)
            if observed is None:
                return False
            return observed.up is False or (observed.success is False and observed.reason not in UNDETERMINED)

        names = [name for name in service.depends_on if name in self._inventory.services]
        down = await asyncio.gather(*map(is_down, names))
        return tuple(name for name, each in zip(names, down, strict=True) if each)

    async def look_up_alerts(self, service: Remediable, firing: frozenset[str]) -> AlertLookup:
        """Look up a service's or a host's firing alerts to act on in Alertmanager. One that is active is enough to act.

        If there are none, look up those of components that are restarted automatically.
        """
        if self._alertmanager is None:
            return AlertLookup()
        names = firing & set(self._inventory.remediation.for_service(service).alerts)
        if not names and service.automatic_components:
            names = firing & {COMPONENT_DOWN}
        try:
            known = await self._alertmanager.alerts_with(
                {"host": service.host, "service": ""} if isinstance(service, HostAlert) else {"service": service.id}
            )
        except ClientError as error:
            return AlertLookup(caution=f"cannot query Alertmanager: {error}")
        matching = [alert for alert in known.alerts if alert.name in names]
        active = [alert for alert in matching if alert.muted_by == ""]
        if active:
            components = frozenset(alert.component for alert in active) if COMPONENT_DOWN in names else None
            return AlertLookup(active_components=components)
        if matching:
            return AlertLookup(silenced=matching[0].muted_by)
        if known.uptime < COMPLETE_AFTER:
            return AlertLookup(caution="Alertmanager has just started and may not have all alerts yet")
        return AlertLookup(gone=True)
