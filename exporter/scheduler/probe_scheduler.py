"""The probe scheduler: probes every service on its own schedule and publishes the results."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass

import structlog
from prometheus_client import Histogram

from exporter.collectors.base import LogExcerpt
from exporter.exposition.label_values import escape_value
from exporter.exposition.metrics_page import MetricsPage
from exporter.exposition.service_series import FAMILIES, render_host
from exporter.heartbeats import series
from exporter.heartbeats.creation import LimitReachedError
from exporter.heartbeats.monitor import HeartbeatMonitor
from exporter.heartbeats.store import HeartbeatStoreError
from exporter.metrics import ExporterMetrics
from exporter.probes import ProbeContext
from exporter.probes.host import HostProbeOptions
from exporter.results import ProbeDetails, ProbeResult
from exporter.scheduler import collector_scheduler
from exporter.scheduler.changes import ServiceChanges
from exporter.scheduler.collector_scheduler import CollectorScheduler, CollectorStatus
from exporter.scheduler.cursors import Cursors
from exporter.scheduler.early_probes import SILENT, EarlyProbes
from exporter.scheduler.events import EventRing
from exporter.scheduler.host_readings import SHARED_FOR, HostReadings, sections_by_host
from exporter.scheduler.probe_runner import run
from exporter.scheduler.probed_service import RENDER_EVERY, ProbedService
from exporter.scheduler.schedule import Schedule, add_jitter
from fleet.inventory.model import Host, Inventory, Service
from fleet.inventory.reasons import UNDETERMINED
from fleet.shells.pool import Shells
from runtime.logs import LimitedLog
from runtime.redaction import Redactor
from runtime.tasks import cancel_and_wait

CONCURRENT_PROBES = 1000
LATE = 2.0  # seconds after its due time at which a probe is skipped and gets a new due time
FORGET_EVERY = 5.0
NAMES_LOGGED = 10  # of services whose probing is paused or resumed
YIELD_EVERY = 200  # services that a reload handles before it lets probes run
log = structlog.get_logger()
limited_log = LimitedLog()


@dataclass(frozen=True)
class MonitoredHost:
    """A host, its collectors, and the IDs of its services. `version` differs after a reload or a collector's run."""

    host: Host
    collectors: Sequence[CollectorStatus]
    services: Sequence[str]
    version: tuple[int, int]


class ProbeScheduler:
    """Probes the services and runs the collectors of an inventory until it is closed."""

    def __init__(
        self,
        metrics: ExporterMetrics,
        redact: Redactor,
        *,
        in_flight: int = CONCURRENT_PROBES,
        randomness: random.Random | None = None,
    ) -> None:
        self.services: dict[str, ProbedService] = {}
        self.page = MetricsPage((*FAMILIES, *collector_scheduler.FAMILIES, *series.FAMILIES))
        self.heartbeats = HeartbeatMonitor(redact, lambda name, lines: self.page.put(f"heartbeat {name}", lines))
        self._metrics = metrics
        self._redact = redact
        self._random = randomness or random.Random()  # noqa: S311 - spreads load, not used for security
        self._durations: dict[tuple[str, str], Histogram] = {}
        self._in_flight = 0
        metrics.in_flight.set_function(lambda: self._in_flight)
        self._early = EarlyProbes(self._random)
        self._slots = asyncio.Semaphore(in_flight)
        self._shells = Shells({})
        self._readings = HostReadings(self._shells)
        cursors = Cursors()
        self.changes, self.events = ServiceChanges(cursors), EventRing(cursors)
        self._collectors = CollectorScheduler(
            self.page, self._readings, redact, self._random, self.events, self._record_host_change
        )
        self.hosts: Mapping[str, Host] = {}
        self._services_of: Mapping[str, Sequence[str]] = {}  # by host
        self._reloads = 0
        self._changing = asyncio.Lock()  # which services there are
        self._pausing = asyncio.Lock()
        self._end_of_pauses: asyncio.TimerHandle | None = None
        self._resuming: asyncio.Task[None] | None = None

    async def apply(self, inventory: Inventory) -> None:
        """Switch to `inventory`; tasks of unchanged services and collectors keep running.

        Raises StartError, TokenError and HeartbeatStoreError if heartbeats cannot be received.
        """
        async with self._changing:
            await self.heartbeats.apply(inventory)
            await self._apply(inventory, {**inventory.services, **self.heartbeats.created})
        self._count_created()

    async def _apply(self, inventory: Inventory, services: Mapping[str, Service]) -> None:
        self._early.forget(self.hosts.keys() - inventory.hosts.keys())
        for name in self.hosts.keys() - inventory.hosts.keys():
            self.page.drop(f"host {name}")
        for name, host in inventory.hosts.items():
            self.page.put(f"host {name}", render_host(host))
        await self._shells.reload(inventory.hosts)
        self.hosts = inventory.hosts
        self._services_of = _group_by_host(services)
        removed = [self.services.pop(name) for name in self.services.keys() - services.keys()]
        changed = [
            probed
            async for probed in _with_pauses(list(self.services.values()))
            if probed.service != services[probed.id]
        ]
        await _cancel_tasks(*removed, *changed)
        collector_sections = self._collectors.shared_sections(inventory.hosts)
        self._readings.set_sections(sections_by_host(services.values(), collector_sections))
        await self._collectors.apply(inventory.hosts)
        for probed in removed:
            self.page.drop(probed.id)
        for probed in changed:
            probed.set_service(services[probed.id])
        for name in services.keys() - self.services.keys():
            self.services[name] = probed = ProbedService(services[name])
            changed.append(probed)
        async for probed in _with_pauses(changed):
            self.page.put(probed.id, probed.render())
            if probed.is_reported:
                self.heartbeats.recheck(probed.id)
            else:
                probed.task = asyncio.create_task(self._run(probed), name=f"probe {probed.id}")
        self._reloads += 1
        self.changes.reload()

    async def create_heartbeat(self, slug: str) -> bool:
        """Create a heartbeat for the job that has requested its URL; returns whether it is new.

        Raises NotCreatedError, RateLimitedError and HeartbeatStoreError.
        """
        async with self._changing:
            try:
                service = await self.heartbeats.create(slug)
            except LimitReachedError as error:
                self._metrics.heartbeats_not_created.inc()
                if limited_log.admits("heartbeat_not_created"):
                    log.warning("heartbeat_not_created", slug=slug, error=error.text)
                raise
            if service is None:
                return False
            self.services[slug] = probed = ProbedService(service)
            self._publish(probed)
        self._count_created()
        log.info("heartbeat_created", service=slug)
        return True

    async def remove_heartbeat(self, name: str, why: str) -> None:
        """Remove a heartbeat that a job has created. Raises KeyError and HeartbeatStoreError."""
        async with self._changing:
            await self.heartbeats.remove(name)
            del self.services[name]
            self.page.drop(name)
            self.changes.reload()
        self._count_created()
        log.info("heartbeat_removed", service=name, reason=why)

    async def forget_heartbeats(self) -> None:
        """Remove created heartbeats that have been down for long without a ping, until cancelled."""
        while True:
            for name in self.heartbeats.find_forgotten():
                with contextlib.suppress(KeyError, HeartbeatStoreError):  # removed meanwhile, or removed later
                    await self.remove_heartbeat(name, "no ping for longer than forget_after")
            await asyncio.sleep(FORGET_EVERY)

    def _count_created(self) -> None:
        self._metrics.heartbeats_created.set(len(self.heartbeats.created))

    async def close(self) -> None:
        if self._end_of_pauses is not None:
            self._end_of_pauses.cancel()
        await cancel_and_wait([self._resuming] if self._resuming is not None else [])
        await _cancel_tasks(*self.services.values())
        await self.heartbeats.close()
        await self._collectors.close()
        await self._readings.close()
        await self._shells.close()

    def ssh_connections(self) -> Mapping[str, int]:
        """Return the number of SSH connections by state."""
        return self._shells.connections()

    def host_up(self, name: str) -> bool | None:
        """Return whether the host's shell answered the last collector run, None before the first."""
        state = self._collectors.host_states.get(name)
        return None if state is None else state == "up"

    def find_host(self, name: str) -> MonitoredHost | None:
        host = self.hosts.get(name)
        if host is None:
            return None
        version = self._reloads, self._collectors.runs[name]
        return MonitoredHost(host, self._collectors.collectors_of(host), self._services_of.get(name, ()), version)

    def lines_of(self, host: Host) -> Mapping[str, str]:
        """Return the lines of `/metrics` that the host's collectors have published, by metric name."""
        return self._collectors.lines_of(host)

    def excerpts_of(self, host: Host) -> Sequence[LogExcerpt]:
        """Return the last matching lines of the host's logs, redacted."""
        return self._collectors.excerpts_of(host)

    async def probe_now(self, probed: ProbedService) -> ProbeResult:
        """Probe outside the schedule, after a probe in flight has ended, so that the result is newer than the call."""
        async with probed.lock:
            result = await self._probe(probed, asyncio.get_running_loop().time(), on_request=True)
        probed.probed_out_of_turn.set()
        return result

    async def report_heartbeats(self) -> None:
        """Record the states of heartbeats whenever they may have changed, until cancelled."""
        await self.heartbeats.run(self._report_heartbeat, self.changes.record)

    async def _report_heartbeat(self, name: str, changed_at: float) -> None:
        probed = self.services.get(name)
        if probed is None or not probed.is_reported or probed.is_paused:
            return  # it is reported when it is no longer paused
        try:
            async with probed.lock:
                await self._probe(probed, 0.0, measured_at=changed_at)
        except Exception:  # without this task, all heartbeats would keep their last state for ever
            log.exception("probe_task_failed", service=name)

    async def pause(self, services: Collection[str], seconds: float) -> None:
        """Probe these services only on request for some seconds, and all others on schedule.

        During a pause and after it, the state of a service is undetermined until it is probed on schedule again.
        """
        async with self._pausing:
            if self._end_of_pauses is not None:
                self._end_of_pauses.cancel()
            loop = asyncio.get_running_loop()
            self._end_of_pauses = loop.call_later(seconds, self._resume_all) if services else None
            changed = [each for each in self.services.values() if each.is_paused is not (each.id in services)]
            async for probed in _with_pauses(changed):
                self._set_paused(probed, paused=probed.id in services)
        for event, names in (
            ("probing_paused", [each.id for each in changed if each.is_paused]),
            ("probing_resumed", [each.id for each in changed if not each.is_paused]),
        ):
            if names:
                log.info(event, services=names[:NAMES_LOGGED], number=len(names))

    def _resume_all(self) -> None:
        """Probe all services on schedule again: nobody has repeated the pauses."""
        self._resuming = asyncio.create_task(self.pause((), 0), name="resume probing")

    def _set_paused(self, probed: ProbedService, *, paused: bool) -> None:
        service, had_state = probed.service, probed.visible_state[0].up is not None
        probed.set_paused(paused=paused)
        if self.services.get(service.id) is not probed:
            return  # a reload has removed it
        self._publish(probed)
        if paused and had_state:
            self.events.record(time.time(), "service", service.host, service.id, "unknown", "probing is paused")
        if not paused:
            probed.probed_out_of_turn.set()  # so that it is probed soon
            self.heartbeats.recheck(service.id)

    def _publish(self, probed: ProbedService) -> None:
        """Show the state of a service on `/metrics` and in the API."""
        now = asyncio.get_running_loop().time()
        if now < probed.rendered_at + RENDER_EVERY:
            self.page.put_later(probed.id, probed.render)
        else:
            self.page.put(probed.id, probed.render())
            probed.rendered_at = now
        self.changes.record(probed.id)

    async def _run(self, probed: ProbedService) -> None:
        loop = asyncio.get_running_loop()
        options = probed.service.probe
        reads_host = isinstance(options.options, HostProbeOptions)
        # Probes that share a reading of their host are due at the same time; all others are spread.
        schedule = Schedule.for_key(_schedule_key(probed.service), options.every, options.retry_every)
        due = at = schedule.first_due(loop.time())
        while True:
            if await probed.probed_out_of_turn.wait_until(at):
                probed.probed_out_of_turn.clear()
                due, at = _compute_due_again(probed, schedule, due, at, loop.time())
                continue
            if probed.is_paused:
                due, _ = schedule.next_due(due, loop.time(), stable=True)
                at = due
                continue
            if loop.time() - at > LATE:
                # The process was suspended or blocked: all probes are late, and would start at the same time.
                self._metrics.schedule_lag.observe(loop.time() - at)
                self._metrics.skipped.inc()
                due = at = schedule.first_due(loop.time())
                continue
            try:
                async with probed.lock, self._slots:
                    if probed.probed_out_of_turn.is_set() or probed.is_paused:
                        continue
                    now = loop.time()
                    self._metrics.schedule_lag.observe(max(0.0, now - at))
                    await self._probe(probed, now - SHARED_FOR)
            except Exception:  # without its task, the service would keep its last state for ever
                log.exception("probe_task_failed", service=probed.id)
            due, missed = schedule.next_due(due, loop.time(), stable=probed.state.is_steadily_up)
            at = due if reads_host else add_jitter(due, options.every, self._random)
            if missed:
                self._metrics.skipped.inc(missed)

    async def _probe(
        self, probed: ProbedService, since: float, *, on_request: bool = False, measured_at: float | None = None
    ) -> ProbeResult:
        """Probe and record the result; a reading of the host that is used must have started at `since` or later."""
        service, host = probed.service, probed.service.host
        context = ProbeContext(
            probed.id,
            host,
            service.probe.timeout,
            lambda: self._shells.get(host),
            lambda: self._readings.get(host, since=since),
            lambda: self.heartbeats.check(probed.id),
        )
        self._in_flight += 1
        try:
            details = ProbeDetails(redact=self._redact, measured_at=measured_at)
            result = await run(probed.kind, probed.options, context, details)
        finally:
            self._in_flight -= 1
        if probed.is_reported and result.reason in UNDETERMINED:
            return result  # a heartbeat without pings is unknown
        if probed.is_paused and not on_request:
            return result  # the pause began meanwhile
        before = probed.state.up
        probed.apply_result(result, asyncio.get_running_loop().time(), service.digest)
        if self.services.get(probed.id) is probed:
            self._publish(probed)
            self._record_event(probed, before, result)
            if before and not probed.state.up and result.reason in SILENT and not self._has_collectors(service.host):
                self._probe_early(service.host)
            if not before and probed.state.up and self._collectors.host_states.get(service.host) == "down":
                self._collectors.retry(self.hosts[service.host])
        if not probed.is_reported:  # else nothing was measured
            self._find_duration(service.provider, service.category).observe(result.duration)
        return result

    def _find_duration(self, provider: str, category: str) -> Histogram:
        """Return the histogram of a provider and a category: to find it by its labels takes as long as to observe."""
        found = self._durations.get((provider, category))
        if found is None:
            found = self._metrics.probe_duration.labels(escape_value(provider), escape_value(category))
            self._durations[provider, category] = found
        return found

    def _record_event(self, probed: ProbedService, before: bool | None, result: ProbeResult) -> None:
        up, service = probed.state.up, probed.service
        if up is None or up is before or probed.is_paused:
            return
        detail = "" if up else f"{result.reason}: {result.message}"
        at, state = result.started_at + result.duration, "up" if up else "down"
        self.events.record(at, "service", service.host, service.id, state, detail, first=before is None)

    def _record_host_change(self, host: str) -> None:
        """Record a change of all services of the host, since the API shows its state with each of them."""
        for service in self._services_of.get(host, ()):
            self.changes.record(service)
        if self._collectors.host_states[host] == "down":
            self._probe_early(host)

    def _has_collectors(self, name: str) -> bool:
        host = self.hosts.get(name)
        return host is not None and any(options for _, options in host.collect)

    def _probe_early(self, host: str) -> None:
        """Probe the services of a host that does not answer within seconds: the alert HostDown depends on them."""
        names = self._services_of.get(host, ())
        services = [self.services[name] for name in names if name in self.services]
        self._early.start(host, services, asyncio.get_running_loop().time())


def _group_by_host(services: Mapping[str, Service]) -> Mapping[str, Sequence[str]]:
    groups: dict[str, list[str]] = {}
    for service in services.values():
        groups.setdefault(service.host, []).append(service.id)
    return groups


def _schedule_key(service: Service) -> str:
    return service.host if isinstance(service.probe.options, HostProbeOptions) else service.id


def _compute_due_again(
    probed: ProbedService, schedule: Schedule, due: float, at: float, now: float
) -> tuple[float, float]:
    """Return when the service is due, on schedule and with jitter, after it was probed out of turn or made due."""
    early = probed.take_due_time()
    if early is not None:
        return (early, early) if early < at else (due, at)
    # The result counts as if the service had been due now.
    if not probed.state.is_steadily_up:
        retry_at = now + min(schedule.retry_every, schedule.every)
        retry_at = min(at, retry_at) if at > now else retry_at
        return retry_at, retry_at
    if at <= now:
        due, _ = schedule.next_due(due, now, stable=True)
        return due, due
    return due, at


async def _with_pauses(services: Sequence[ProbedService]) -> AsyncIterator[ProbedService]:
    """Yield the services, and let probes run after every `YIELD_EVERY` of them."""
    for number, probed in enumerate(services):
        if number % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        yield probed


async def _cancel_tasks(*services: ProbedService) -> None:
    await cancel_and_wait(probed.task for probed in services if probed.task is not None)
