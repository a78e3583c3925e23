"""The services under watch: each probed on its own clock, its state kept, its lines on the page."""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Mapping

import structlog

from exporter.metrics import Metrics
from exporter.page import Page
from exporter.probing import probe
from exporter.results import Reason, Result
from exporter.schedule import Schedule, jittered
from exporter.series import FAMILIES, ServiceSeries, host_lines
from exporter.state import State
from fleet.model import Host, Inventory, Service
from fleet.shells.pool import Shells
from runtime.redaction import Redactor

IN_FLIGHT = 1000
FAILURES_KEPT = 20
log = structlog.get_logger()


class Watch:
    """One service: its state, its counters, and the lock that keeps two probes of it apart."""

    def __init__(self, service: Service) -> None:
        self.state = State()
        self.last: Result | None = None
        self.failures: Counter[Reason] = Counter()
        self.recent: deque[Result] = deque(maxlen=FAILURES_KEPT)
        self.lock = asyncio.Lock()
        self.asked = asyncio.Event()  # a probe was made out of turn: when the next is due has changed
        self.task: asyncio.Task[None] | None = None
        self.take(service)

    def take(self, service: Service) -> None:
        self.service = service
        self.series = ServiceSeries(service)

    def lines(self) -> dict[str, str]:
        return self.series.render(self.state, self.last, self.failures)

    def record(self, result: Result) -> None:
        rules = self.service.probe
        before = self.state
        self.state = before.after(result, fail_after=rules.fail_after, recover_after=rules.recover_after)
        news = self.last is None or (self.last.success, self.last.reason) != (result.success, result.reason)
        self.last = result
        result.seen.evidence.clear()  # for `defib probe` only; of 10,000 services it would be much
        if result.reason is not None:
            self.failures[result.reason] += 1
            self.recent.append(result)
        if news or self.state.up is not before.up:
            log.info(
                "probe",
                service=self.service.id,
                success=result.success,
                up=self.state.up,
                reason=result.reason,
                message=result.message or None,
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
        self.page = Page(FAMILIES)
        self._metrics = metrics
        self._redact = redact
        self._random = randomness or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._slots = asyncio.Semaphore(in_flight)
        self._shells = Shells({})
        self._hosts: Mapping[str, Host] = {}

    async def apply(self, inventory: Inventory) -> None:
        """Watch what `inventory` says; a service that it leaves as it was is not touched."""
        for name in self._hosts.keys() - inventory.hosts.keys():
            self.page.drop(f"host {name}")
        for name, host in inventory.hosts.items():
            self.page.put(f"host {name}", host_lines(host))
        await self._shells.reload(inventory.hosts)
        self._hosts = inventory.hosts
        gone = [self.watches.pop(name) for name in self.watches.keys() - inventory.services.keys()]
        changed = [watch for name, watch in self.watches.items() if watch.service != inventory.services[name]]
        await _end(*gone, *changed)
        for watch in gone:
            self.page.drop(watch.service.id)
        for watch in changed:
            watch.take(inventory.services[watch.service.id])
        for name in inventory.services.keys() - self.watches.keys():
            self.watches[name] = watch = Watch(inventory.services[name])
            changed.append(watch)
        for watch in changed:
            self.page.put(watch.service.id, watch.lines())
            watch.task = asyncio.create_task(self._run(watch), name=f"watch {watch.service.id}")

    async def close(self) -> None:
        await _end(*self.watches.values())
        await self._shells.close()

    def ssh_connections(self) -> Mapping[str, int]:
        return self._shells.connections()

    async def probe_now(self, watch: Watch) -> Result:
        """Probe after this call began, whatever the schedule; a probe in flight is waited for, never reused."""
        async with watch.lock:
            result = await self._probe(watch)
        watch.asked.set()
        return result

    async def _run(self, watch: Watch) -> None:
        loop = asyncio.get_running_loop()
        rules = watch.service.probe
        schedule = Schedule.starting(watch.service.id, loop.time(), rules.every, rules.retry_every)
        due = at = schedule.anchor
        while True:
            if await _asked_before(watch, at):
                # What was found out of turn decides when to look again, as if it had been found now.
                if not watch.state.settled:
                    due = at = min(at, loop.time() + min(rules.retry_every, rules.every))
                continue
            try:
                async with watch.lock, self._slots:
                    self._metrics.lag.observe(max(0.0, loop.time() - at))
                    await self._probe(watch)
            except Exception:  # a service that is no longer watched would look like one that is well
                log.exception("watching broke", service=watch.service.id)
            due, missed = schedule.following(due, loop.time(), settled=watch.state.settled)
            at = jittered(due, rules.every, self._random)
            if missed:
                self._metrics.skipped.inc(missed)

    async def _probe(self, watch: Watch) -> Result:
        service = watch.service
        self._metrics.in_flight.inc()
        try:
            result = await probe(service, lambda: self._shells.of(service.host), self._redact)
        finally:
            self._metrics.in_flight.dec()
        watch.record(result)
        if self.watches.get(service.id) is watch:
            self.page.put(service.id, watch.lines())
        self._metrics.latency.labels(service.provider, service.category).observe(result.duration)
        return result


async def _asked_before(watch: Watch, at: float) -> bool:
    """Wait until `at`; True where a probe out of turn came before."""
    watch.asked.clear()
    try:
        async with asyncio.timeout_at(at):
            await watch.asked.wait()
    except TimeoutError:
        return False
    return True


async def _end(*watches: Watch) -> None:
    tasks = [watch.task for watch in watches if watch.task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
