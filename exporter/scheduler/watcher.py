"""The services under watch: each probed on its own clock, its state kept, its lines on the page."""

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence

import structlog

from exporter.exposition.page import Page
from exporter.exposition.series import FAMILIES, ServiceSeries, host_lines
from exporter.metrics import Metrics
from exporter.probes.host import HostOptions
from exporter.results import Reason, Result
from exporter.scheduler import collection
from exporter.scheduler.collection import Collection
from exporter.scheduler.host_readings import SHARED_FOR, Readings, wanted_by_host
from exporter.scheduler.probe_runner import probe
from exporter.scheduler.schedule import Schedule, jittered
from exporter.state import State
from fleet.inventory.model import Host, Inventory, Service
from fleet.shells.pool import Shells
from runtime.redaction import Redactor
from runtime.tasks import cancel_and_wait

IN_FLIGHT = 1000
FAILURES_KEPT = 20
LOG_AGAIN = 600.0  # seconds between two lines about the same failure
LATE = 2.0  # seconds after its time at which a probe is not begun any more, but given a new time
YIELD_EVERY = 200  # services that a reload sees to before the probes have their turn
log = structlog.get_logger()


class Watch:
    """One service: its state, its counters, and the lock that keeps two probes of it apart."""

    def __init__(self, service: Service) -> None:
        self.state = State()
        self.last: Result | None = None
        self.digest = service.digest  # of the configuration that the last result is of
        self.failures: Counter[Reason] = Counter()
        self.recent: deque[Result] = deque(maxlen=FAILURES_KEPT)
        self.lock = asyncio.Lock()
        self.asked = asyncio.Event()  # a probe was made out of turn: when the next is due has changed
        self.task: asyncio.Task[None] | None = None
        self._logged = 0.0  # of the event loop's clock
        self.changed: float | None = None  # when `up` was decided or changed, of the same clock
        self.take(service)

    def take(self, service: Service) -> None:
        self.service = service
        self.series = ServiceSeries(service)

    def lines(self) -> dict[str, str]:
        return self.series.render(self.state, self.last, self.failures)

    def record(self, result: Result, now: float, digest: str) -> None:
        """Take a result of the configuration `digest`, at `now` of the event loop's clock."""
        rules = self.service.probe
        before = self.state
        self.state = before.after(result, fail_after=rules.fail_after, recover_after=rules.recover_after)
        if self.state.up is not before.up:
            self.changed = now
        news = self.last is None or (self.last.success, self.last.reason) != (result.success, result.reason)
        self.last, self.digest = result, digest
        trace = result.seen.evidence.get("traceback")
        # For `defib probe` only, or for while it ran: of 10,000 services it would be much.
        result.seen.evidence.clear()
        result.seen.overdue = None  # an exception holds all that it has passed through
        if result.reason is not None:
            self.failures[result.reason] += 1
            self.recent.append(result)
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


class Watcher:
    """Watches every service of an inventory until it is closed."""

    def __init__(
        self,
        metrics: Metrics,
        redact: Redactor,
        *,
        in_flight: int = IN_FLIGHT,
        randomness: random.Random | None = None,
    ) -> None:
        self.watches: dict[str, Watch] = {}
        self.page = Page((*FAMILIES, *collection.FAMILIES))
        self._metrics = metrics
        self._redact = redact
        self._random = randomness or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._slots = asyncio.Semaphore(in_flight)
        self._shells = Shells({})
        self._readings = Readings(self._shells)
        self._collection = Collection(self.page, self._shells, self._readings, redact, self._random)
        self.hosts: Mapping[str, Host] = {}

    async def apply(self, inventory: Inventory) -> None:
        """Watch the services of `inventory`; those that have not changed are left alone.

        Where this fails, it can be called with the former inventory to go on as before.
        """
        for name in self.hosts.keys() - inventory.hosts.keys():
            self.page.drop(f"host {name}")
        for name, host in inventory.hosts.items():
            self.page.put(f"host {name}", host_lines(host))
        await self._shells.reload(inventory.hosts)
        self.hosts = inventory.hosts
        gone = [self.watches.pop(name) for name in self.watches.keys() - inventory.services.keys()]
        changed = [
            watch
            async for watch in _unhurried(list(self.watches.values()))
            if watch.service != inventory.services[watch.service.id] or watch.task is None or watch.task.done()
        ]
        await _end(*gone, *changed)
        wanted = self._collection.wanted(inventory.hosts)
        self._readings.want(wanted_by_host(inventory.services.values(), wanted))
        await self._collection.apply(inventory.hosts)
        for watch in gone:
            self.page.drop(watch.service.id)
        for watch in changed:
            watch.take(inventory.services[watch.service.id])
        for name in inventory.services.keys() - self.watches.keys():
            self.watches[name] = watch = Watch(inventory.services[name])
            changed.append(watch)
        async for watch in _unhurried(changed):
            self.page.put(watch.service.id, watch.lines())
            watch.task = asyncio.create_task(self._run(watch), name=f"watch {watch.service.id}")

    async def close(self) -> None:
        await _end(*self.watches.values())
        await self._collection.close()
        await self._readings.close()
        await self._shells.close()

    def ssh_connections(self) -> Mapping[str, int]:
        return self._shells.connections()

    def host_up(self, name: str) -> bool | None:
        """Whether a host's shell answered its collectors last; None where none has asked it yet."""
        return self._collection.answered.get(name)

    async def probe_now(self, watch: Watch) -> Result:
        """Probe after this call began, whatever the schedule; a probe in flight is waited for, never reused."""
        async with watch.lock:
            result = await self._probe(watch, asyncio.get_running_loop().time())
        watch.asked.set()
        return result

    async def _run(self, watch: Watch) -> None:
        loop = asyncio.get_running_loop()
        rules = watch.service.probe
        together = isinstance(rules.options, HostOptions)
        # Those that share a reading of their host are due together; the others spread.
        key = watch.service.host if together else watch.service.id
        schedule = Schedule.of(key, rules.every, rules.retry_every)
        due = at = schedule.first(loop.time())
        while True:
            if await _asked_before(watch, at):
                # What was found out of turn decides when to look again, as if it had been found now.
                now = loop.time()
                if not watch.state.settled:
                    again = now + min(rules.retry_every, rules.every)
                    due = at = min(at, again) if at > now else again
                elif at <= now:
                    due, _ = schedule.following(due, now, settled=True)
                    at = due
                continue
            if loop.time() - at > LATE:
                # We were suspended, or held up. All are late then, and would probe at once.
                self._metrics.lag.observe(loop.time() - at)
                self._metrics.skipped.inc()
                due = at = schedule.first(loop.time())
                continue
            try:
                async with watch.lock, self._slots:
                    if watch.asked.is_set():
                        continue
                    now = loop.time()
                    self._metrics.lag.observe(max(0.0, now - at))
                    await self._probe(watch, now - SHARED_FOR)
            except Exception:  # a service that is no longer watched would look like one that is well
                log.exception("watching broke", service=watch.service.id)
            due, missed = schedule.following(due, loop.time(), settled=watch.state.settled)
            at = due if together else jittered(due, rules.every, self._random)
            if missed:
                self._metrics.skipped.inc(missed)

    async def _probe(self, watch: Watch, since: float) -> Result:
        """Probe; a reading of the host that it rests on must have begun at `since` or later."""
        service = watch.service
        self._metrics.in_flight.inc()
        try:
            result = await probe(
                service,
                lambda: self._shells.get(service.host),
                lambda: self._readings.of(service.host, since=since),
                self._redact,
            )
        finally:
            self._metrics.in_flight.dec()
        watch.record(result, asyncio.get_running_loop().time(), service.digest)
        if self.watches.get(service.id) is watch:
            self.page.put(service.id, watch.lines())
        self._metrics.latency.labels(service.provider, service.category).observe(result.duration)
        return result


async def _asked_before(watch: Watch, at: float) -> bool:
    """Wait until `at`; True where there was a probe out of turn before, or while a probe in turn waited for it."""
    try:
        async with asyncio.timeout_at(at):
            await watch.asked.wait()
    except TimeoutError:
        return False
    watch.asked.clear()
    return True


async def _unhurried(watches: Sequence[Watch]) -> AsyncIterator[Watch]:
    """Each in turn; the probes have theirs in between."""
    for number, watch in enumerate(watches):
        if number % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        yield watch


async def _end(*watches: Watch) -> None:
    await cancel_and_wait(watch.task for watch in watches if watch.task is not None)
