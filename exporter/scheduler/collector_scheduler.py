"""The collector scheduler: runs every collector of every host on its own schedule and publishes its samples."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import structlog

from exporter.collectors import COLLECTORS
from exporter.collectors.base import Collector, CollectorFailure, CollectorOptions, LogExcerpt, record_truncation
from exporter.exposition.collector_samples import CollectorSamples, LabelTexts
from exporter.exposition.metrics_page import MetricFamily, MetricsPage, format_labels
from exporter.scheduler.events import EventRing
from exporter.scheduler.host_readings import SHARED_FOR, HostReadings
from exporter.scheduler.host_states import States, find_states, list_changes
from exporter.scheduler.schedule import Schedule
from fleet.host.sections import NOT_READ, IncompleteReadingError, Section, SectionOutput
from fleet.inventory.model import Host
from fleet.shells import CONNECT_TIMEOUT, ENDED_BY_TIMEOUT, HostKeyError, ShellError
from runtime.redaction import Redactor, mask_credentials
from runtime.tasks import cancel_and_wait

GRACE = 1.0  # seconds after the deadline of a reading, which ends by itself before
RETRY_WITHIN = 30.0  # seconds after a failed run, if the interval is not shorter
MAX_PAUSE = 600.0  # seconds between two runs on a host that does not answer
ERROR_LIMIT = 500  # characters in the log and in the API
EXCERPT_LIMIT = 500  # characters of a line of a log in the API
# Whether the host's shell answers; `key_changed`: nothing is sent to the host, since its SSH key is not the pinned one.
HostState = Literal["up", "down", "key_changed"]
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


@dataclass(frozen=True, slots=True)
class CollectorRun:
    """The end (Unix time) and the duration (seconds) of a run, and its redacted error; None after a success."""

    ended_at: float
    duration: float
    error: str | None


@dataclass(frozen=True, slots=True)
class CollectorStatus:
    """A collector of a host, its interval in seconds, and its last run."""

    name: str
    every: float
    run: CollectorRun | None


@dataclass
class ScheduledCollector:
    """A collector of a host, its last run and what that found, and its task."""

    host: Host
    name: str
    options: CollectorOptions
    collector: Collector[CollectorOptions]
    error: str | None = ""  # None after a successful run, empty before the first
    unanswered: int = 0  # runs in a row without a response from the host
    failed: int = 0  # runs in a row that failed in any way
    run: CollectorRun | None = None
    labels: LabelTexts = field(default_factory=dict)  # of the samples of the last run
    states: States | None = None  # as they were last reported; None before the first run that reported any
    retry: asyncio.Event = field(default_factory=asyncio.Event)  # set: run now
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


class CollectorScheduler:
    """Runs the collectors of an inventory's hosts until it is closed."""

    def __init__(
        self,
        page: MetricsPage,
        readings: HostReadings,
        redact: Redactor,
        randomness: random.Random,
        events: EventRing,
        on_host_change: Callable[[str], None],
    ) -> None:
        """`on_host_change` is called with the name of a host whose state has changed."""
        self._page, self._readings, self._redact = page, readings, redact
        self._random, self._events, self._on_host_change = randomness, events, on_host_change
        self._scheduled: dict[str, ScheduledCollector] = {}
        self.host_states: dict[str, HostState] = {}  # at the last run of a collector
        self.runs: Counter[str] = Counter()  # by host: how many runs of its collectors have ended

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
            if old.key in new:  # the old samples stay until the first run of the new one
                new[old.key].run = old.run
            else:
                self._page.drop(old.key)
        for key, scheduled in self._scheduled.items():
            scheduled.host = new[key].host  # its labels may have changed
        for name in {old.host.name for old in removed} - {scheduled.host.name for scheduled in new.values()}:
            self._page.drop(f"up {name}")
            self.host_states.pop(name, None)
        for key, scheduled in new.items():
            if key not in self._scheduled:
                self._scheduled[key] = scheduled
                scheduled.task = asyncio.create_task(self._run(scheduled), name=f"collect {key}")

    def collectors_of(self, host: Host) -> list[CollectorStatus]:
        """Return the collectors of a host, in the order of the table of collectors."""
        return [CollectorStatus(each.name, each.options.every, each.run) for each in self._scheduled_on(host)]

    def retry(self, host: Host) -> None:
        """Run those collectors of a host again now that it did not answer: something else on it does."""
        for each in self._scheduled_on(host):
            if each.unanswered:
                each.failed = each.unanswered = 1  # the pauses begin anew
                each.retry.set()

    def lines_of(self, host: Host) -> dict[str, str]:
        """Return the lines of `/metrics` that the host's collectors have published, by metric name."""
        lines = self._page.get(f"up {host.name}")
        for scheduled in self._scheduled_on(host):
            lines |= self._page.get(scheduled.key)
        return lines

    def excerpts_of(self, host: Host) -> list[LogExcerpt]:
        """Return the last matching lines of the host's logs, redacted and shortened."""

        def redact(line: str) -> str:
            return mask_credentials(self._redact.redact_head(line, EXCERPT_LIMIT))

        return [
            replace(excerpt, lines=list(map(redact, excerpt.lines)))
            for scheduled in self._scheduled_on(host)
            for excerpt in scheduled.collector.list_excerpts()
        ]

    def _scheduled_on(self, host: Host) -> list[ScheduledCollector]:
        keys = (f"{name} {host.name}" for name, _ in host.collect)
        return [self._scheduled[key] for key in keys if key in self._scheduled]

    async def close(self) -> None:
        await _cancel_tasks(list(self._scheduled.values()))

    async def _run(self, scheduled: ScheduledCollector) -> None:
        loop = asyncio.get_running_loop()
        every = scheduled.options.every
        # All collectors of a host are due together, so that they share its readings.
        schedule = Schedule.for_key(scheduled.host.name, every, every)
        due = at = schedule.first_due(loop.time())
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(at):
                    await scheduled.retry.wait()
            scheduled.retry.clear()
            await self._collect(scheduled)
            due, _ = schedule.next_due(due, loop.time(), stable=True)
            at = due
            if scheduled.failed:
                retry_at = loop.time() + retry_pause(every, scheduled.failed) * self._random.uniform(0.5, 1.0)
                # Back off: further requests would add to the load of a hanging host, and delay other readers.
                at = retry_at if scheduled.unanswered else min(at, retry_at)

    async def _collect(self, scheduled: ScheduledCollector) -> None:
        """Run the collector once, and publish its samples and whether it succeeded."""
        samples = CollectorSamples(scheduled.host.name, scheduled.labels)
        started = time.perf_counter()
        error: str | None = None
        answered, late, key_changed = True, False, False

        async def read(sections: Sequence[Section]) -> Mapping[str, SectionOutput]:
            outputs = await self._read(scheduled, sections)
            record_truncation(outputs, samples)
            return outputs

        try:
            async with asyncio.timeout(
                scheduled.collector.max_readings * scheduled.collector.deadline + CONNECT_TIMEOUT + GRACE
            ):
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
        scheduled.failed = 0 if error is None else scheduled.failed + 1
        scheduled.labels = samples.labels
        redacted = None if error is None else self._redact.redact_head(error, ERROR_LIMIT)
        scheduled.run = CollectorRun(time.time(), time.perf_counter() - started, redacted)
        self._publish(scheduled, scheduled.run, samples)
        state: HostState = "up" if answered else "key_changed" if key_changed else "down"
        self._publish_host(scheduled.host, state)
        self._record_host(scheduled.host.name, state, scheduled.run)
        self._record_changes(scheduled, scheduled.run, find_states(samples.added))
        self.runs[scheduled.host.name] += 1
        if error != scheduled.error:
            self._log_outcome(scheduled, redacted, key_changed=key_changed)
        scheduled.error = error

    def _publish(self, scheduled: ScheduledCollector, run: CollectorRun, samples: CollectorSamples) -> None:
        outcome = CollectorSamples(scheduled.host.name)
        outcome.add("host_collect_success", int(run.error is None), collector=scheduled.name)
        outcome.add("host_collect_duration_seconds", run.duration, collector=scheduled.name)
        outcome.add("host_collect_truncated", samples.truncated, collector=scheduled.name)
        self._page.put(scheduled.key, samples.lines | outcome.lines)

    def _publish_host(self, host: Host, state: HostState) -> None:
        labels = format_labels({"host": host.name, "group": host.group})
        lines = {"host_up": f"host_up{{{labels}}} {int(state == 'up')}\n"}
        if state != "down":  # otherwise the host has shown no key
            lines["host_key_changed"] = f"host_key_changed{{{labels}}} {int(state == 'key_changed')}\n"
        self._page.put(f"up {host.name}", lines)

    def _record_host(self, host: str, state: HostState, run: CollectorRun) -> None:
        before = self.host_states.get(host)
        if state == before:
            return
        self.host_states[host] = state
        self._on_host_change(host)
        if before is not None:
            detail = "" if state == "up" else run.error or ""
            self._events.record(run.ended_at, "host", host, host, state, detail)

    def _record_changes(self, scheduled: ScheduledCollector, run: CollectorRun, states: States) -> None:
        before = scheduled.states
        if run.error is not None:  # what is missing may not have been read
            states = {**(before or {}), **states}
        scheduled.states = states if states or run.error is None else None
        for change in list_changes(before, states) if before is not None else ():
            self._events.record(
                run.ended_at, change.kind, scheduled.host.name, change.name, change.state, change.detail,
                first=change.first,
            )  # fmt: skip

    def _log_outcome(self, scheduled: ScheduledCollector, error: str | None, *, key_changed: bool) -> None:
        fields = {"host": scheduled.host.name, "collector": scheduled.name}
        if error is None:
            log.info("collector_succeeded", **fields)
            return
        fields["error"] = error
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
        limited = [replace(section, timeout=scheduled.collector.deadline) for section in sections]
        reading = self._readings.start(scheduled.host.name, limited)
        error: ShellError | None = None
        for section in sections:
            try:
                outputs[section.name], _, _ = await reading.section(section.name, str)
            except ShellError as shell_error:
                error = shell_error
        if error is None:
            return outputs
        if not outputs:
            raise error
        incomplete = error if isinstance(error, IncompleteReadingError) else None
        status = ENDED_BY_TIMEOUT[0] if incomplete and incomplete.late else NOT_READ
        missing = SectionOutput(status, str(error), int(incomplete is not None and incomplete.too_long))
        return {section.name: missing for section in sections} | outputs


def retry_pause(every: float, failed: int) -> float:
    """Return the longest pause after `failed` failed runs in a row.

    The first is short whatever the interval, so that one failed run does not leave the alerts of a host without values.
    """
    return min(min(every, RETRY_WITHIN) * 2.0 ** min(failed - 1, 10), MAX_PAUSE)


def _collectors_of(hosts: Mapping[str, Host]) -> Iterator[ScheduledCollector]:
    for host in hosts.values():
        for name, options in host.collect:
            if options:
                yield ScheduledCollector(host, name, options, COLLECTORS[name].create(options, host.name))


async def _cancel_tasks(scheduled: Sequence[ScheduledCollector]) -> None:
    await cancel_and_wait(each.task for each in scheduled if each.task is not None)
