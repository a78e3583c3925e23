"""The collector scheduler: runs every collector of every host on its own schedule and publishes its samples."""

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from exporter.collectors import COLLECTORS
from exporter.collectors.base import Collector, CollectorFailure, CollectorOptions, record_truncation
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily, MetricsPage, format_labels
from exporter.scheduler.host_readings import SHARED_FOR, HostReadings
from exporter.scheduler.schedule import Schedule, add_jitter
from fleet.host.sections import NOT_READ, IncompleteReadingError, Section, SectionOutput, read_sections
from fleet.inventory.model import Host
from fleet.shells import ENDED_BY_TIMEOUT, HostKeyError, ShellError
from fleet.shells.pool import Shells
from fleet.shells.ssh import CONNECT_TIMEOUT
from runtime.redaction import Redactor
from runtime.tasks import cancel_and_wait

DEADLINE = 10.0  # seconds of a run; the interval, if that is shorter
MAX_PAUSE = 600.0  # seconds between two runs on a host that does not answer
ERROR_LIMIT = 500  # characters in a log line
log = structlog.get_logger()

FAMILIES = (
    MetricFamily("host_up", "gauge", "Whether the host's shell answers (1) or not (0)."),
    MetricFamily(
        "host_key_changed",
        "gauge",
        "Whether the host presents an SSH key other than the pinned one; nothing is sent to it then.",
    ),
    MetricFamily("host_collect_success", "gauge", "Whether the last run of the collector read everything."),
    MetricFamily("host_collect_duration_seconds", "gauge", "Duration of the collector's last run."),
    MetricFamily(
        "host_collect_truncated",
        "gauge",
        "Number of samples and lines that the last run of the collector left out because of a limit.",
    ),
    *(family for kind in COLLECTORS.values() for family in kind.families),
)


@dataclass
class ScheduledCollector:
    """A collector of a host, the error of its last run, and its task."""

    host: Host
    name: str
    options: CollectorOptions
    collector: Collector[CollectorOptions]
    error: str | None = ""  # None after a successful run, empty before the first
    unanswered: int = 0  # runs in a row without a response from the host
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> str:
        return f"{self.name} {self.host.name}"

    def is_same_as(self, other: "ScheduledCollector") -> bool:
        """Return whether it reads the same from the same host, under the same labels."""
        host, other_host = self.host, other.host
        return self.options == other.options and (host.connection_settings, host.group) == (
            other_host.connection_settings,
            other_host.group,
        )

    @property
    def deadline(self) -> float:
        return min(DEADLINE, self.options.every)


class CollectorScheduler:
    """Runs the collectors of an inventory's hosts until it is closed."""

    def __init__(
        self, page: MetricsPage, shells: Shells, readings: HostReadings, redact: Redactor, randomness: random.Random
    ) -> None:
        self._page, self._shells, self._readings, self._redact = page, shells, readings, redact
        self._random = randomness
        self._scheduled: dict[str, ScheduledCollector] = {}
        self.shell_answers: dict[str, bool] = {}  # by host: whether its shell answered the last run

    def shared_sections(self, hosts: Mapping[str, Host]) -> dict[str, list[Section]]:
        """Return by host the sections of collectors that share readings with probes."""
        sections: dict[str, list[Section]] = {}
        for scheduled in _collectors_of(hosts):
            if scheduled.collector.shared:
                sections.setdefault(scheduled.host.name, []).extend(scheduled.collector.sections())
        return sections

    async def apply(self, hosts: Mapping[str, Host]) -> None:
        """Switch to the collectors of `hosts`; tasks of unchanged collectors keep running."""
        new = {scheduled.key: scheduled for scheduled in _collectors_of(hosts)}
        removed = [old for key, old in self._scheduled.items() if key not in new or not old.is_same_as(new[key])]
        await _cancel_tasks(removed)
        for old in removed:
            del self._scheduled[old.key]
            if old.key not in new:  # otherwise the old samples stay until the first run of the new one
                self._page.drop(old.key)
        for key, scheduled in self._scheduled.items():
            scheduled.host = new[key].host  # its labels may have changed
        for name in {old.host.name for old in removed} - {scheduled.host.name for scheduled in new.values()}:
            self._page.drop(f"up {name}")
            self.shell_answers.pop(name, None)
        for key, scheduled in new.items():
            if key not in self._scheduled:
                self._scheduled[key] = scheduled
                scheduled.task = asyncio.create_task(self._run(scheduled), name=f"collect {key}")

    async def close(self) -> None:
        await _cancel_tasks(list(self._scheduled.values()))

    async def _run(self, scheduled: ScheduledCollector) -> None:
        loop = asyncio.get_running_loop()
        every = scheduled.options.every
        shared = scheduled.collector.shared
        schedule = Schedule.for_key(scheduled.host.name if shared else scheduled.key, every, every)
        due = at = schedule.first_due(loop.time())
        while True:
            await asyncio.sleep(max(0.0, at - loop.time()))
            await self._collect(scheduled)
            due, _ = schedule.next_due(due, loop.time(), stable=True)
            at = due if shared else add_jitter(due, every, self._random)
            if scheduled.unanswered:
                # Back off: further requests would add to the load of a hanging host, and delay other readers.
                pause = min(every * 2 ** min(scheduled.unanswered, 10), MAX_PAUSE) * self._random.uniform(0.5, 1.0)
                at = max(at, loop.time() + pause)

    async def _collect(self, scheduled: ScheduledCollector) -> None:
        """Run the collector once, and publish its samples and whether it succeeded."""
        samples = CollectorSamples(scheduled.host.name)
        started = time.perf_counter()
        error: str | None = None
        answered, late, key_changed = True, False, False

        async def read(sections: Sequence[Section]) -> Mapping[str, SectionOutput]:
            outputs = await self._read(scheduled, sections)
            record_truncation(outputs, samples)
            return outputs

        try:
            async with asyncio.timeout(scheduled.deadline + CONNECT_TIMEOUT):
                await scheduled.collector.collect(read, samples)
            error = samples.fault
        except CollectorFailure as failure:
            error, late = str(failure), failure.late
        except IncompleteReadingError as failure:
            error, late = str(failure), failure.late
            samples.truncated += failure.too_long
        except ShellError as shell_error:
            error, answered = str(shell_error), False
            key_changed = isinstance(shell_error, HostKeyError) and shell_error.changed
        except TimeoutError:
            # The shell ends a command that hangs, so it is the shell itself that does not answer.
            error, late, answered = "the host's shell did not answer in time", True, False
        except Exception as defect:
            error = f"internal error in the collector: {type(defect).__name__}; see the log"
            if error != scheduled.error:
                log.exception("collector_crashed", host=scheduled.host.name, collector=scheduled.name)
        scheduled.unanswered = 0 if answered and not late else scheduled.unanswered + 1
        self._publish(scheduled, samples, success=error is None, duration=time.perf_counter() - started)
        self._publish_host(scheduled.host, answered=answered, key_changed=key_changed)
        if error != scheduled.error:
            self._log_outcome(scheduled, error, key_changed=key_changed)
        scheduled.error = error

    def _publish(
        self, scheduled: ScheduledCollector, samples: CollectorSamples, *, success: bool, duration: float
    ) -> None:
        outcome = CollectorSamples(scheduled.host.name)
        outcome.add("host_collect_success", int(success), collector=scheduled.name)
        outcome.add("host_collect_duration_seconds", duration, collector=scheduled.name)
        outcome.add("host_collect_truncated", samples.truncated, collector=scheduled.name)
        self._page.put(scheduled.key, samples.lines | outcome.lines)

    def _publish_host(self, host: Host, *, answered: bool, key_changed: bool) -> None:
        self.shell_answers[host.name] = answered
        labels = format_labels({"host": host.name, "group": host.group})
        lines = {"host_up": f"host_up{{{labels}}} {int(answered)}\n"}
        if answered or key_changed:
            lines["host_key_changed"] = f"host_key_changed{{{labels}}} {int(key_changed)}\n"
        self._page.put(f"up {host.name}", lines)

    def _log_outcome(self, scheduled: ScheduledCollector, error: str | None, *, key_changed: bool) -> None:
        fields = {"host": scheduled.host.name, "collector": scheduled.name}
        if error is None:
            log.info("collector_succeeded", **fields)
            return
        fields["error"] = self._redact.redact_head(error, ERROR_LIMIT)
        if key_changed:
            log.error("host_key_changed", **fields)
        else:
            log.info("collector_failed", **fields)

    async def _read(self, scheduled: ScheduledCollector, sections: Sequence[Section]) -> Mapping[str, SectionOutput]:
        """Return the output of each section, or why it was not read. Raises ShellError if none was read."""
        outputs: dict[str, SectionOutput] = {}
        if scheduled.collector.shared:
            since = asyncio.get_running_loop().time() - SHARED_FOR
            reading = self._readings.get(scheduled.host.name, since=since)
            for section in sections:
                output, _, _ = await reading.section(section.name, str)
                outputs[section.name] = output
            return outputs
        shell = self._shells.get(scheduled.host.name)
        limited = [replace(section, timeout=scheduled.deadline) for section in sections]
        error = await read_sections(shell, limited, timeout=scheduled.deadline, on_section=outputs.__setitem__)
        if not outputs:
            raise error
        incomplete = error if isinstance(error, IncompleteReadingError) else None
        status = ENDED_BY_TIMEOUT[0] if incomplete and incomplete.late else NOT_READ
        missing = SectionOutput(status, str(error), int(incomplete is not None and incomplete.too_long))
        return {section.name: missing for section in sections} | outputs


def _collectors_of(hosts: Mapping[str, Host]) -> Iterator[ScheduledCollector]:
    for host in hosts.values():
        for name, options in host.collect:
            if options:
                yield ScheduledCollector(host, name, options, COLLECTORS[name].create(options, host.name))


async def _cancel_tasks(scheduled: Sequence[ScheduledCollector]) -> None:
    await cancel_and_wait(each.task for each in scheduled if each.task is not None)
