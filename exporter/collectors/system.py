"""The `system` collector: CPU, load, memory, filesystems, and how a host's clock differs from ours."""

import time

from exporter.collectors import Kind
from exporter.collectors.collecting import CollectFailure, Collecting, Every, Read, good
from exporter.exposition.page import Family
from exporter.exposition.samples import Samples
from fleet.host import system
from fleet.host.sections import Section

FAMILIES = (
    Family("host_load1", "gauge", "Load average of one minute."),
    Family("host_load5", "gauge", "Load average of five minutes."),
    Family("host_load15", "gauge", "Load average of fifteen minutes."),
    Family("host_cpu_count", "gauge", "CPUs."),
    Family("host_cpu_usage_ratio", "gauge", "Share of all CPUs' time that was used since the last run."),
    Family("host_memory_total_bytes", "gauge", "Memory."),
    Family("host_memory_available_bytes", "gauge", "Memory that programs could have."),
    Family("host_boot_timestamp_seconds", "gauge", "When the host was started."),
    Family("host_clock_offset_seconds", "gauge", "The host's clock minus ours."),
    Family("host_filesystem_size_bytes", "gauge", "Size of a filesystem."),
    Family("host_filesystem_available_bytes", "gauge", "What users other than root may still write."),
    Family("host_filesystem_files", "gauge", "Inodes of a filesystem."),
    Family("host_filesystem_files_free", "gauge", "Inodes that are free."),
)


class System(Collecting[Every]):
    """Keeps the CPU's times of the last run."""

    _before: system.Machine | None = None

    def sections(self) -> list[Section]:
        return [system.PROC_SECTION, system.FILESYSTEMS_SECTION]

    async def collect(self, read: Read, samples: Samples) -> None:
        asked = time.time()
        outputs = await read(self.sections())
        answered = time.time()
        try:
            found = system.parse_machine(good(outputs, "proc"))
        except ValueError as error:
            raise CollectFailure(str(error)) from error
        self._add(found, asked, answered, samples)
        # df may be stuck where /proc is not.
        if "df" in outputs:
            _add_filesystems(outputs["df"].text, samples)
        good(outputs, "df")

    def _add(self, found: system.Machine, asked: float, answered: float, samples: Samples) -> None:
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


def _add_filesystems(output: str, samples: Samples) -> None:
    for each in system.parse_filesystems(output):
        names = {"mountpoint": each.mountpoint, "device": each.device, "fstype": each.type}
        samples.add("host_filesystem_size_bytes", each.size, **names)
        samples.add("host_filesystem_available_bytes", each.available, **names)
        samples.add("host_filesystem_files", each.files, **names)
        samples.add("host_filesystem_files_free", each.files_free, **names)


SYSTEM = Kind(Every, FAMILIES, System)
