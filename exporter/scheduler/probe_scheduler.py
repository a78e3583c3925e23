"""The services under watch: each probed on its own clock, its state kept, its lines on the page."""

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence

import structlog

from exporter.exposition.metrics_page import MetricsPage
from exporter.exposition.service_series import FAMILIES, ServiceSeries, render_host_info
from exporter.metrics import ExporterMetrics
from exporter.probes.host import HostProbeOptions
from exporter.results import FailureReason, ProbeResult
from exporter.scheduler import collector_scheduler
from exporter.scheduler.collector_scheduler import CollectorScheduler
from exporter.scheduler.host_readings import SHARED_FOR, HostReadings, sections_by_host
from exporter.scheduler.probe_runner import run_probe
from exporter.scheduler.schedule import Schedule, add_jitter
from exporter.service_state import ServiceState
from fleet.inventory.model import Host, Inventory, Service
from fleet.shells.pool import Shells
from runtime.redaction import Redactor
from runtime.tasks import cancel

IN_FLIGHT = 1000
FAILURES_KEPT = 20
LOG_AGAIN = 600.0  # seconds between two lines about the same failure
LATE = 2.0  # seconds after its time at which a probe is not begun any more, but given a new time
YIELD_EVERY = 200  # services that a reload sees to before the probes have their turn
log = structlog.get_logger()


class ProbedService:
    """One service: its state, its counters, and the lock that keeps two probes of it apart."""

    def __init__(self, service: Service) -> None:
        self.state = ServiceState()
        self.last: ProbeResult | None = None
        self.digest = service.digest  # of the configuration that the last result is of
        self.failures: Counter[FailureReason] = Counter()
        self.recent_failures: deque[ProbeResult] = deque(maxlen=FAILURES_KEPT)
        self.lock = asyncio.Lock()
        self.probed_out_of_turn = asyncio.Event()  # a probe was made out of turn: when the next is due has changed
        self.task: asyncio.Task[None] | None = None
        self._logged = 0.0  # of the event loop's clock
        self.changed_at: float | None = None  # when `up` was decided or changed, of the same clock
        self.take(service)

    def take(self, service: Service) -> None:
        self.service = service
        self.series = ServiceSeries(service)

    def lines(self) -> dict[str, str]:
        return self.series.render(self.state, self.last, self.failures)

    def record(self, result: ProbeResult, now: float, digest: str) -> None:
        """Take a result of the configuration `digest`, at `now` of the event loop's clock."""
        rules = self.service.probe
        before = self.state
        self.state = before.after(result, fail_after=rules.fail_after, recover_after=rules.recover_after)
        if self.state.up is not before.up:
            self.changed_at = now
        news = self.last is None or (self.last.success, self.last.reason) != (result.success, result.reason)
        self.last, self.digest = result, digest
        trace = result.details.evidence.get("traceback")
        # For `defib probe` only, or for while it ran: of 10,000 services it would be much.
        result.details.evidence.clear()
        result.details.timeout_failure = None  # an exception holds all that it has passed through
        if result.reason is not None:
            self.failures[result.reason] += 1
            self.recent_failures.append(result)
        still_failing = not result.success and now - self._logged >= LOG_AGAIN
        if news or self.state.up is not before.up or still_failing:
            self._logged = now
            log.info(
                "probe",
                service=self.service.id,
                success=result.success,
                up=self.state.up,
                reason=result.reason,
                message=result.message or None,
                **({"traceback": trace} if trace else {}),
            )


class ProbeScheduler:
    """Probes every service of an inventory until it is closed."""

    def __init__(
        self,
        metrics: ExporterMetrics,
        redact: Redactor,
        *,
        in_flight: int = IN_FLIGHT,
        randomness: random.Random | None = None,
    ) -> None:
        self.services: dict[str, ProbedService] = {}
        self.page = MetricsPage((*FAMILIES, *collector_scheduler.FAMILIES))
        self._metrics = metrics
        self._redact = redact
        self._random = randomness or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._slots = asyncio.Semaphore(in_flight)
        self._shells = Shells({})
        self._readings = HostReadings(self._shells)
        self._collectors = CollectorScheduler(self.page, self._shells, self._readings, redact, self._random)
        self.hosts: Mapping[str, Host] = {}

    async def apply(self, inventory: Inventory) -> None:
        """Probe what `inventory` says; a service that it leaves as it was is not touched."""
        for name in self.hosts.keys() - inventory.hosts.keys():
            self.page.drop(f"host {name}")
        for name, host in inventory.hosts.items():
            self.page.put(f"host {name}", render_host_info(host))
        await self._shells.reload(inventory.hosts)
        self.hosts = inventory.hosts
        gone = [self.services.pop(name) for name in self.services.keys() - inventory.services.keys()]
        changed = [
            probed
            async for probed in _yielding(list(self.services.values()))
            if probed.service != inventory.services[probed.service.id]
        ]
        await _end(*gone, *changed)
        wanted = self._collectors.shared_sections(inventory.hosts)
        self._readings.set_sections(sections_by_host(inventory.services.values(), wanted))
        await self._collectors.apply(inventory.hosts)
        for probed in gone:
            self.page.drop(probed.service.id)
        for probed in changed:
            probed.take(inventory.services[probed.service.id])
        for name in inventory.services.keys() - self.services.keys():
            self.services[name] = probed = ProbedService(inventory.services[name])
            changed.append(probed)
        async for probed in _yielding(changed):
            self.page.put(probed.service.id, probed.lines())
            probed.task = asyncio.create_task(self._run(probed), name=f"probed {probed.service.id}")

    async def close(self) -> None:
        await _end(*self.services.values())
        await self._collectors.close()
        await self._readings.close()
        await self._shells.close()

    def ssh_connections(self) -> Mapping[str, int]:
        return self._shells.connections()

    def host_up(self, name: str) -> bool | None:
        """Whether a host's shell answered its collectors last; None where none has asked it yet."""
        return self._collectors.shell_answers.get(name)

    async def probe_now(self, probed: ProbedService) -> ProbeResult:
        """Probe after this call began, whatever the schedule; a probe in flight is waited for, never reused."""
        async with probed.lock:
            result = await self._probe(probed, asyncio.get_running_loop().time())
        probed.probed_out_of_turn.set()
        return result

    async def _run(self, probed: ProbedService) -> None:
        loop = asyncio.get_running_loop()
        rules = probed.service.probe
        together = isinstance(rules.options, HostProbeOptions)
        # Those that share a reading of their host are due together; the others spread.
        key = probed.service.host if together else probed.service.id
        schedule = Schedule.for_key(key, rules.every, rules.retry_every)
        due = at = schedule.first_due(loop.time())
        while True:
            if await _wait_for_unscheduled_probe(probed, at):
                # What was found out of turn decides when to look again, as if it had been found now.
                now = loop.time()
                if not probed.state.settled:
                    again = now + min(rules.retry_every, rules.every)
                    due = at = min(at, again) if at > now else again
                elif at <= now:
                    due, _ = schedule.next_due(due, now, settled=True)
                    at = due
                continue
            if loop.time() - at > LATE:
                # We were suspended, or held up. All are late then, and would probe at once.
                self._metrics.lag.observe(loop.time() - at)
                self._metrics.skipped.inc()
                due = at = schedule.first_due(loop.time())
                continue
            try:
                async with probed.lock, self._slots:
                    if probed.probed_out_of_turn.is_set():
                        continue
                    now = loop.time()
                    self._metrics.lag.observe(max(0.0, now - at))
                    await self._probe(probed, now - SHARED_FOR)
            except Exception:  # a service that is no longer watched would look like one that is well
                log.exception("watching broke", service=probed.service.id)
            due, missed = schedule.next_due(due, loop.time(), settled=probed.state.settled)
            at = due if together else add_jitter(due, rules.every, self._random)
            if missed:
                self._metrics.skipped.inc(missed)

    async def _probe(self, probed: ProbedService, since: float) -> ProbeResult:
        """Probe; a reading of the host that it rests on must have begun at `since` or later."""
        service = probed.service
        self._metrics.in_flight.inc()
        try:
            result = await run_probe(
                service,
                lambda: self._shells.of(service.host),
                lambda: self._readings.get(service.host, since=since),
                self._redact,
            )
        finally:
            self._metrics.in_flight.dec()
        probed.record(result, asyncio.get_running_loop().time(), service.digest)
        if self.services.get(service.id) is probed:
            self.page.put(service.id, probed.lines())
        self._metrics.latency.labels(service.provider, service.category).observe(result.duration)
        return result


async def _wait_for_unscheduled_probe(probed: ProbedService, at: float) -> bool:
    """Wait until `at`; True where there was a probe out of turn before, or while a probe in turn waited for it."""
    try:
        async with asyncio.timeout_at(at):
            await probed.probed_out_of_turn.wait()
    except TimeoutError:
        return False
    probed.probed_out_of_turn.clear()
    return True


async def _yielding(services: Sequence[ProbedService]) -> AsyncIterator[ProbedService]:
    """Each in turn; the probes have theirs in between."""
    for number, probed in enumerate(services):
        if number % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        yield probed


async def _end(*services: ProbedService) -> None:
    await cancel(probed.task for probed in services if probed.task is not None)
