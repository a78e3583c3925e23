"""The `system` collector: CPU, load, memory, filesystems, and how a host's clock differs from ours."""

import time

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorFailure, CollectorOptions, ReadSections, require_output
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host import system
from fleet.host.reading import Section

FAMILIES = (
    MetricFamily("host_load1", "gauge", "Load average of one minute."),
    MetricFamily("host_load5", "gauge", "Load average of five minutes."),
    MetricFamily("host_load15", "gauge", "Load average of fifteen minutes."),
    MetricFamily("host_cpu_count", "gauge", "CPUs."),
    MetricFamily("host_cpu_usage_ratio", "gauge", "Share of all CPUs' time that was used since the last run."),
    MetricFamily("host_memory_total_bytes", "gauge", "Memory."),
    MetricFamily("host_memory_available_bytes", "gauge", "Memory that programs could have."),
    MetricFamily("host_boot_timestamp_seconds", "gauge", "When the host was started."),
    MetricFamily("host_clock_offset_seconds", "gauge", "The host's clock minus ours."),
    MetricFamily("host_filesystem_size_bytes", "gauge", "Size of a filesystem."),
    MetricFamily("host_filesystem_available_bytes", "gauge", "What users other than root may still write."),
    MetricFamily("host_filesystem_files", "gauge", "Inodes of a filesystem."),
    MetricFamily("host_filesystem_files_free", "gauge", "Inodes that are free."),
)


class SystemCollector(Collector[CollectorOptions]):
    """Keeps the CPU's times of the last run."""

    _before: system.Machine | None = None

    def sections(self) -> list[Section]:
        return [system.PROC, system.FILESYSTEMS]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        asked = time.time()
        outputs = await read(self.sections())
        answered = time.time()
        try:
            found = system.machine(require_output(outputs, "proc"))
        except ValueError as error:
            raise CollectorFailure(str(error)) from error
        self._add(found, asked, answered, samples)
        # df may be stuck where /proc is not.
        if "df" in outputs:
            _add_filesystems(outputs["df"].text, samples)
        require_output(outputs, "df")

    def _add(self, found: system.Machine, asked: float, answered: float, samples: CollectorSamples) -> None:
        for name, load in zip(("host_load1", "host_load5", "host_load15"), found.load, strict=True):
            samples.add(name, load)
        samples.add("host_cpu_count", found.cpus)
        before, self._before = self._before, found
        if before is not None and found.booted == before.booted and found.total > before.total:
            samples.add("host_cpu_usage_ratio", (found.busy - before.busy) / (found.total - before.total))
        samples.add("host_memory_total_bytes", found.memory_total)
        samples.add("host_memory_available_bytes", found.memory_available)
        samples.add("host_boot_timestamp_seconds", found.booted)
        if found.now is not None:
            # The clock was read between the question and the answer: no offset, if it could be so.
            earliest, latest = found.now
            offset = min(0.0, latest - asked) or max(0.0, earliest - answered)
            samples.add("host_clock_offset_seconds", offset)


def _add_filesystems(output: str, samples: CollectorSamples) -> None:
    for each in system.filesystems(output):
        names = {"mountpoint": each.mountpoint, "device": each.device, "fstype": each.type}
        samples.add("host_filesystem_size_bytes", each.size, **names)
        samples.add("host_filesystem_available_bytes", each.available, **names)
        samples.add("host_filesystem_files", each.files, **names)
        samples.add("host_filesystem_files_free", each.files_free, **names)


SYSTEM = CollectorKind(CollectorOptions, FAMILIES, SystemCollector)
