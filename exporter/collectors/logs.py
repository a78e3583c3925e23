"""The `logs` collector: counts lines of logs that match patterns, and requests in access logs by status code."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from exporter.collectors import CollectorKind
from exporter.collectors.base import (
    Collector,
    CollectorFailure,
    CollectorOptions,
    LogExcerpt,
    ReadSections,
    check_interval,
)
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host import logs
from fleet.host.sections import Section, SectionOutput
from fleet.inventory.units import Identifier, Pattern, PositiveDuration, compile_pattern
from fleet.managers.containers import ContainerName
from fleet.managers.systemd import UnitName
from fleet.shells import ENDED_BY_TIMEOUT

SOURCE_LIMIT = 20  # of each kind
PATTERN_LIMIT = 20
EXCERPT_LINES = logs.SHOWN_ERRORS
ERRORS_SHOWN = 3
# Counters start at 0, so that the first errors are an increase; other codes have a counter once they occur.
COUNTED_FROM_START = ("200", "500", "502", "503", "504")
SERVER_ERRORS = "5xx"  # the name of a pattern's place for the lines of access logs

FAMILIES = (
    MetricFamily("host_log_matches_total", "counter", "Number of lines of the log that match the pattern."),
    MetricFamily(
        "host_http_requests_total",
        "counter",
        "Number of requests in the access log, by status code; other without one.",
    ),
)


def _check_unique(names: list[str]) -> list[str]:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{repeated} is listed twice")
    return names


_Limited = Field(max_length=SOURCE_LIMIT)


class LogsCollectorOptions(CollectorOptions):
    """`patterns` apply to units, containers and files, `access` are access logs."""

    wrapper_arguments: ClassVar[tuple[str, ...]] = ("units", "containers", "files", "access")
    every: Annotated[PositiveDuration, AfterValidator(check_interval)] = 60.0
    units: Annotated[list[UnitName], _Limited, AfterValidator(_check_unique)] = []
    containers: Annotated[list[ContainerName], _Limited, AfterValidator(_check_unique)] = []
    files: Annotated[list[logs.LogPath], _Limited, AfterValidator(_check_unique)] = []
    access: Annotated[list[logs.LogPath], _Limited, AfterValidator(_check_unique)] = []
    patterns: Annotated[dict[Identifier, Pattern], Field(max_length=PATTERN_LIMIT)] = {}

    @model_validator(mode="after")
    def _check_complete(self) -> "LogsCollectorOptions":
        has_sources = bool(self.units or self.containers or self.files)
        if not has_sources and not self.access:
            raise ValueError("needs `units`, `containers`, `files` or `access`: the logs to read")
        if has_sources and not self.patterns:
            raise ValueError("needs `patterns`, such as {error: 'ERROR|exception'}")
        if self.patterns and not has_sources:
            raise ValueError("has `patterns`, but no `units`, `containers` or `files` that they apply to")
        return self

    @property
    def sources(self) -> Mapping[str, Sequence[str]]:
        """The sources by section."""
        return {
            logs.UNITS: self.units, logs.CONTAINERS: self.containers, logs.FILES: self.files, logs.ACCESS: self.access,
        }  # fmt: skip


@dataclass
class _Found:
    """What one run has found in a log."""

    position: str
    error: str
    skipped: Sequence[str]
    counts: dict[str, int] = field(default_factory=dict)  # by pattern, or by code
    lines: dict[str, list[str]] = field(default_factory=dict)  # the last ones, by pattern


class LogsCollector(Collector[LogsCollectorOptions]):
    """Keeps where the last run has ended in each log, the counters, and the last matching lines.

    After a start, the first run only finds the ends of the logs: what was written before is not counted.
    """

    def __init__(self, options: LogsCollectorOptions, host: str) -> None:
        super().__init__(options, host)
        self._patterns = {name: compile_pattern(pattern) for name, pattern in options.patterns.items()}
        self._positions = {
            section: dict.fromkeys(names, logs.NEW) for section, names in options.sources.items() if names
        }
        self._counts = {
            (section, source): Counter(
                dict.fromkeys(COUNTED_FROM_START if section == logs.ACCESS else self._patterns, 0)
            )
            for section, sources in self._positions.items()
            for source in sources
        }
        self._excerpts: dict[tuple[str, str], LogExcerpt] = {}

    def sections(self) -> list[Section]:
        return [logs.build_section(name, positions) for name, positions in self._positions.items()]

    def list_excerpts(self) -> Sequence[LogExcerpt]:
        return [self._excerpts[key] for key in sorted(self._excerpts)]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        try:
            outputs = await read(self.sections())
            errors: list[str] = []
            for section in self._positions:
                errors += await self._take(section, outputs.get(section), samples)
        finally:
            self._add_counters(samples)  # also those of a host that does not answer: they will go on from there
        if errors:
            late = any(output.status in ENDED_BY_TIMEOUT for output in outputs.values())
            raise CollectorFailure("; ".join(errors[:ERRORS_SHOWN]), late=late)

    async def _take(self, section: str, output: SectionOutput | None, samples: CollectorSamples) -> list[str]:
        """Count what was read, and return the errors."""
        if output is None:
            return [f"the output of {section} is missing"]
        positions = self._positions[section]
        # In a thread: thousands of lines must not delay probes.
        found = await asyncio.to_thread(self._parse, section, output.text, dict(positions))
        errors = []
        for source, new in found.items():
            if new.error:
                errors.append(f"{source}: {new.error}")
            if new.position:
                positions[source] = new.position
                self._add(section, source, new)
            for amount in new.skipped if new.position else ():
                samples.leave_out(1, f"{source}: too much for one run; left out: {amount}")
        missing = [source for source in positions if source not in found]
        if output.status != 0 or missing:
            errors.append(_describe_failure(section, output, missing))
        return errors

    def _parse(self, section: str, text: str, positions: Mapping[str, str]) -> dict[str, _Found]:
        """Return what was found by source; changes nothing, since its run may be cancelled meanwhile."""
        sources = logs.parse_sources(text, positions)
        if section == logs.CONTAINERS:
            for name, source in sources.items():
                logs.finish_container(source, positions[name])
        match = self._count_codes if section == logs.ACCESS else self._count_matches
        return {name: match(source) for name, source in sources.items()}

    @staticmethod
    def _count_codes(source: logs.SourceOutput) -> _Found:
        lines = {SERVER_ERRORS: source.lines} if source.lines else {}
        return _Found(source.position, source.error, source.skipped, source.codes, lines)

    def _count_matches(self, source: logs.SourceOutput) -> _Found:
        found = _Found(source.position, source.error, source.skipped)
        for name, pattern in self._patterns.items():
            matching = [line for line in source.lines if pattern.search(line) is not None]
            if matching:
                found.counts[name] = len(matching)
                found.lines[name] = matching[-EXCERPT_LINES:]
        return found

    def _add(self, section: str, source: str, found: _Found) -> None:
        self._counts[section, source].update(found.counts)
        now = time.time()
        for pattern, lines in found.lines.items():
            before = self._excerpts.get((source, pattern))
            last = [*(before.lines if before is not None else ()), *lines][-EXCERPT_LINES:]
            self._excerpts[source, pattern] = LogExcerpt(source, pattern, now, last)

    def _add_counters(self, samples: CollectorSamples) -> None:
        for (section, source), counts in self._counts.items():
            for name, number in sorted(counts.items()):
                if section == logs.ACCESS:
                    samples.add("host_http_requests_total", number, source=source, code=name)
                else:
                    samples.add("host_log_matches_total", number, source=source, pattern=name)


def _describe_failure(section: str, output: SectionOutput, missing: Sequence[str]) -> str:
    if output.status in ENDED_BY_TIMEOUT:
        return f"{section} did not answer in time"
    if output.status != 0:
        return f"{section}: exit status {output.status}: {output.last_line}"
    return f"{missing[0]}: it was not read"


LOGS = CollectorKind(LogsCollectorOptions, FAMILIES, LogsCollector)
