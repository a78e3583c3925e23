"""The collectors of all hosts: each on its own clock, its lines on the page, its failures told once."""

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from exporter.collectors import COLLECTORS
from exporter.collectors.collecting import CollectFailure, Collecting, Every
from exporter.exposition.page import Family, Page, labels
from exporter.exposition.samples import Samples
from exporter.scheduler.host_readings import SHARED_FOR, Readings
from exporter.scheduler.schedule import Schedule, jittered
from fleet.host.sections import NOT_READ, IncompleteReadingError, Section, SectionOutput, read_sections
from fleet.inventory.model import Host
from fleet.shells import ENDED_BY_TIMEOUT, HostKeyError, ShellError
from fleet.shells.pool import Shells
from fleet.shells.ssh import CONNECT_TIMEOUT
from runtime.redaction import Redactor
from runtime.tasks import cancel_and_wait

DEADLINE = 10.0  # seconds of a run; less where the interval is
LONGEST_PAUSE = 600.0  # seconds between two runs on a host that does not answer
log = structlog.get_logger()

FAMILIES = (
    Family("host_up", "gauge", "Whether the host's shell answers."),
    Family(
        "host_key_changed", "gauge", "Whether the host shows another key than the one pinned; nothing is sent then."
    ),
    Family("host_collect_success", "gauge", "Whether a collector read all that it should."),
    Family("host_collect_duration_seconds", "gauge", "Duration of a collector's last run."),
    *(family for kind in COLLECTORS.values() for family in kind.families),
)


@dataclass
class Run:
    """One collector of one host, and what is known of it."""

    host: Host
    name: str
    options: Every
    collector: Collecting[Every]
    why: str | None = ""  # None: it works; what was told last otherwise
    in_vain: int = 0  # runs in a row that the host did not answer
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> str:
        return f"{self.name} {self.host.name}"

    def goes_on_as(self, other: "Run") -> bool:
        """Whether it reads the same, of the same host, under the same name."""
        mine, others = self.host, other.host
        return self.options == other.options and (mine.connection_settings, mine.group) == (
            others.connection_settings,
            others.group,
        )

    @property
    def deadline(self) -> float:
        return min(DEADLINE, self.options.every)


class Collection:
    """Runs the collectors of an inventory's hosts until it is closed."""

    def __init__(
        self, page: Page, shells: Shells, readings: Readings, redact: Redactor, randomness: random.Random
    ) -> None:
        self._page, self._shells, self._readings, self._redact = page, shells, readings, redact
        self._random = randomness
        self._runs: dict[str, Run] = {}
        self.answered: dict[str, bool] = {}  # by host: whether its shell answered last

    def wanted(self, hosts: Mapping[str, Host]) -> dict[str, list[Section]]:
        """What shared collectors want to be read of each host, beside what probes do."""
        wanted: dict[str, list[Section]] = {}
        for run in _runs(hosts):
            if run.collector.shared:
                wanted.setdefault(run.host.name, []).extend(run.collector.sections())
        return wanted

    async def apply(self, hosts: Mapping[str, Host]) -> None:
        """Collect what `hosts` say; a collector of a host that is as it was is not touched."""
        fresh = {run.key: run for run in _runs(hosts)}
        gone = [run for key, run in self._runs.items() if key not in fresh or not run.goes_on_as(fresh[key])]
        await _end(gone)
        for run in gone:
            del self._runs[run.key]
            if run.key not in fresh:  # else what it measured stands until the new one has measured
                self._page.drop(run.key)
        for key, run in self._runs.items():
            run.host = fresh[key].host  # with other labels, perhaps
        for name in {run.host.name for run in gone} - {run.host.name for run in fresh.values()}:
            self._page.drop(f"up {name}")
            self.answered.pop(name, None)
        for key, run in fresh.items():
            if key not in self._runs:
                self._runs[key] = run
                run.task = asyncio.create_task(self._keep(run), name=f"collect {key}")

    async def close(self) -> None:
        await _end(list(self._runs.values()))

    async def _keep(self, run: Run) -> None:
        loop = asyncio.get_running_loop()
        every = run.options.every
        shared = run.collector.shared
        schedule = Schedule.of(run.host.name if shared else run.key, every, every)
        due = at = schedule.first(loop.time())
        while True:
            await asyncio.sleep(max(0.0, at - loop.time()))
            await self._collect(run)
            due, _ = schedule.following(due, loop.time(), settled=True)
            at = due if shared else jittered(due, every, self._random)
            if run.in_vain:
                # Asking again and again harms a host that hangs, and those who wait beside it.
                pause = min(every * 2 ** min(run.in_vain, 10), LONGEST_PAUSE) * self._random.uniform(0.5, 1.0)
                at = max(at, loop.time() + pause)

    async def _collect(self, run: Run) -> None:
        samples = Samples(run.host.name)
        started = time.perf_counter()
        why: str | None = None
        answered, late, key_changed = True, False, False
        try:
            async with asyncio.timeout(run.deadline + CONNECT_TIMEOUT):
                await run.collector.collect(lambda sections: self._read(run, sections), samples)
            why = samples.fault
        except (CollectFailure, IncompleteReadingError) as failure:
            why, late = str(failure), failure.late
        except ShellError as error:
            why, answered = str(error), False
            key_changed = isinstance(error, HostKeyError) and error.changed
        except TimeoutError:
            # Whatever hangs on a host, its shell ends it: it is the shell that does not answer.
            why, late, answered = "it did not end in time", True, False
        except Exception as error:
            why = f"the collector itself failed: {type(error).__name__}"
            if why != run.why:
                log.exception("collector broke", host=run.host.name, collector=run.name)
        took = time.perf_counter() - started
        run.in_vain = 0 if answered and not late else run.in_vain + 1
        own = Samples(run.host.name)
        own.add("host_collect_success", int(why is None), collector=run.name)
        own.add("host_collect_duration_seconds", took, collector=run.name)
        self._page.put(run.key, samples.lines | own.lines)
        up = labels({"host": run.host.name, "group": run.host.group})
        self.answered[run.host.name] = answered
        told = {"host_up": f"host_up{{{up}}} {int(answered)}\n"}
        if answered or key_changed:
            told["host_key_changed"] = f"host_key_changed{{{up}}} {int(key_changed)}\n"
        self._page.put(f"up {run.host.name}", told)
        if why != run.why and key_changed:
            log.error("host key changed", host=run.host.name, collector=run.name, why=self._told(why))
        elif why != run.why:
            log.info("collected", host=run.host.name, collector=run.name, success=why is None, why=self._told(why))
        run.why = why

    def _told(self, why: str | None) -> str | None:
        return None if why is None else self._redact(why)[:500]

    async def _read(self, run: Run, sections: Sequence[Section]) -> Mapping[str, SectionOutput]:
        """The outputs of all sections, of those that did not come why. Raises ShellError where none came."""
        found: dict[str, SectionOutput] = {}
        if run.collector.shared:
            reading = self._readings.of(run.host.name, since=asyncio.get_running_loop().time() - SHARED_FOR)
            for section in sections:
                output, _, _ = await reading.section(section.name, str)
                found[section.name] = output
            return found
        shell = self._shells.get(run.host.name)
        limited = [replace(section, timeout=run.deadline) for section in sections]
        error = await read_sections(shell, limited, timeout=run.deadline, on_section=found.__setitem__)
        if not found:
            raise error
        late = isinstance(error, IncompleteReadingError) and error.late
        missing = SectionOutput(ENDED_BY_TIMEOUT[0] if late else NOT_READ, str(error))
        return {section.name: missing for section in sections} | found


def _runs(hosts: Mapping[str, Host]) -> Iterator[Run]:
    for host in hosts.values():
        for name, options in host.collect:
            if options:
                yield Run(host, name, options, COLLECTORS[name].make(options, host.name))


async def _end(runs: Sequence[Run]) -> None:
    await cancel_and_wait(run.task for run in runs if run.task is not None)
