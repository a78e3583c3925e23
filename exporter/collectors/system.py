"""The `system` collector: CPU, load, memory, filesystems, what the kernel counts, and the offset of the clock."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from exporter.collectors import CollectorKind
from exporter.collectors.base import (
    Collector,
    CollectorFailure,
    CollectorOptions,
    ReadSections,
    SteadyCounters,
    require_output,
)
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host import kernel, system
from fleet.host.sections import Section, SectionOutput
from fleet.shells import ENDED_BY_TIMEOUT

BOOT_JITTER = 2.0  # seconds: the kernel computes the boot time from two clocks at each reading
HANGING_PAUSE = 600.0  # seconds until a filesystem that did not answer is asked again: each time may leave a process

FAMILIES = (
    MetricFamily("host_load1", "gauge", "Load average over 1 minute."),
    MetricFamily("host_load5", "gauge", "Load average over 5 minutes."),
    MetricFamily("host_load15", "gauge", "Load average over 15 minutes."),
    MetricFamily("host_cpu_count", "gauge", "Number of CPUs."),
    MetricFamily("host_cpu_usage_ratio", "gauge", "Ratio of CPU time used since the previous run, over all CPUs."),
    MetricFamily("host_memory_total_bytes", "gauge", "Total memory."),
    MetricFamily("host_memory_available_bytes", "gauge", "Memory available to processes."),
    MetricFamily("host_swap_total_bytes", "gauge", "Total swap space."),
    MetricFamily("host_swap_free_bytes", "gauge", "Free swap space."),
    MetricFamily("host_swap_pages_total", "counter", "Number of memory pages swapped, by direction."),
    MetricFamily(
        "host_pressure_seconds_total",
        "counter",
        "Time in which some tasks, or all (full), waited for a resource; the kernel's pressure stall information.",
    ),
    MetricFamily("host_boot_timestamp_seconds", "gauge", "Unix time at which the host was booted."),
    MetricFamily("host_clock_offset_seconds", "gauge", "Clock of the host minus clock of the exporter."),
    MetricFamily("host_filesystem_size_bytes", "gauge", "Size of a filesystem."),
    MetricFamily("host_filesystem_available_bytes", "gauge", "Space available to users other than root."),
    MetricFamily("host_filesystem_files", "gauge", "Number of inodes of a filesystem."),
    MetricFamily("host_filesystem_files_free", "gauge", "Number of free inodes."),
    MetricFamily(
        "host_filesystem_error", "gauge", "Whether the size of a filesystem cannot be read: an error, or no answer."
    ),
    MetricFamily("host_oom_kills_total", "counter", "Number of processes that the kernel killed for lack of memory."),
    MetricFamily("host_file_descriptors_allocated", "gauge", "Number of allocated file descriptors."),
    MetricFamily("host_file_descriptors_limit", "gauge", "Maximum number of file descriptors."),
    MetricFamily("host_conntrack_entries", "gauge", "Number of connections that the kernel tracks."),
    MetricFamily("host_conntrack_limit", "gauge", "Maximum number of connections that the kernel tracks."),
    MetricFamily("host_network_packets_total", "counter", "Number of packets of a network card, by direction."),
    MetricFamily("host_network_errors_total", "counter", "Number of packets with errors, by direction."),
    MetricFamily("host_network_dropped_total", "counter", "Number of dropped packets, by direction."),
    MetricFamily("host_network_bytes_total", "counter", "Number of bytes of a network card, by direction."),
    MetricFamily("host_disk_operations_total", "counter", "Number of completed operations of a disk, by direction."),
    MetricFamily("host_disk_bytes_total", "counter", "Number of bytes read from and written to a disk."),
    MetricFamily("host_disk_io_seconds_total", "counter", "Time in which any request to a disk was in progress."),
    MetricFamily(
        "host_disk_io_weighted_seconds_total",
        "counter",
        "Time that requests to a disk have waited or were in progress, summed over the requests.",
    ),
    MetricFamily("host_raid_degraded_disks", "gauge", "Number of disks that a RAID array of the kernel lacks."),
    MetricFamily("host_clock_synchronized", "gauge", "Whether the host's NTP client has synchronized the clock."),
)


class SystemCollector(Collector[CollectorOptions]):
    """Keeps the CPU times of the previous run, the boot time, and the filesystems that did not answer."""

    _previous: system.Machine | None = None
    _booted: float | None = None

    def __init__(self, options: CollectorOptions, host: str) -> None:
        super().__init__(options, host)
        self._counters = SteadyCounters()
        self._ask_again: dict[str, float] = {}  # by number of a filesystem; event loop's clock

    def sections(self) -> list[Section]:
        return [system.PROC_SECTION, system.FILESYSTEMS_SECTION]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        now = asyncio.get_running_loop().time()
        skipped = tuple(number for number, at in self._ask_again.items() if at > now)
        sent_at = time.time()
        outputs = await read([system.PROC_SECTION, replace(system.FILESYSTEMS_SECTION, names=skipped)])
        received_at = time.time()
        try:
            machine = system.parse_machine(require_output(outputs, "proc"))
        except ValueError as error:
            raise CollectorFailure(str(error)) from error
        self._add(machine, sent_at, received_at, samples)
        self._add_kernel(kernel.parse_kernel(outputs["proc"].text), samples)
        # A filesystem may hang while /proc can be read.
        if "df" in outputs:
            self._add_filesystems(outputs, skipped, now, samples)
        require_output(outputs, "df")

    def _add(self, machine: system.Machine, sent_at: float, received_at: float, samples: CollectorSamples) -> None:
        for name, load in zip(("host_load1", "host_load5", "host_load15"), machine.load, strict=True):
            samples.add(name, load)
        samples.add("host_cpu_count", machine.cpus)
        previous, self._previous = self._previous, machine
        is_same_boot = self._booted is not None and abs(machine.booted - self._booted) <= BOOT_JITTER
        if self._booted is None or not is_same_boot:
            self._booted = machine.booted
        if previous is not None and is_same_boot:
            samples.add("host_cpu_usage_ratio", machine.usage_since(previous))
        samples.add("host_memory_total_bytes", machine.memory_total)
        samples.add("host_memory_available_bytes", machine.memory_available)
        samples.add("host_swap_total_bytes", machine.swap_total)
        samples.add("host_swap_free_bytes", machine.swap_free)
        samples.add("host_boot_timestamp_seconds", self._booted)
        if machine.now is not None:
            # The clock was read between request and response; the offset is 0 if that can explain the difference.
            earliest, latest = machine.now
            offset = min(0.0, latest - sent_at) or max(0.0, earliest - received_at)
            samples.add("host_clock_offset_seconds", offset)

    def _add_kernel(self, found: kernel.Kernel, samples: CollectorSamples) -> None:
        count = self._counters.start_run(samples)
        count("host_oom_kills_total", found.oom_kills)
        allocated, files_limit = found.files or (None, None)
        samples.add("host_file_descriptors_allocated", allocated)
        samples.add("host_file_descriptors_limit", files_limit)
        tracked, connections_limit = found.connections or (None, None)
        samples.add("host_conntrack_entries", tracked)
        samples.add("host_conntrack_limit", connections_limit)
        for direction, pages in found.swapped_pages.items():
            count("host_swap_pages_total", pages, direction=direction)
        for (resource, kind), seconds in found.pressure.items():
            count("host_pressure_seconds_total", seconds, resource=resource, kind=kind)
        for packets in found.network:
            labels = {"device": packets.device, "direction": packets.direction}
            count("host_network_packets_total", packets.packets, **labels)
            count("host_network_errors_total", packets.errors, **labels)
        for traffic in found.traffic:
            labels = {"device": traffic.device, "direction": traffic.direction}
            count("host_network_bytes_total", traffic.size, **labels)
            count("host_network_dropped_total", traffic.dropped, **labels)
        for disk in found.disks:
            labels = {"device": disk.device, "direction": disk.direction}
            count("host_disk_operations_total", disk.operations, **labels)
            count("host_disk_bytes_total", disk.size, **labels)
        for device, seconds in found.busy_seconds.items():
            count("host_disk_io_seconds_total", seconds, device=device)
        for device, seconds in found.queue_seconds.items():
            count("host_disk_io_weighted_seconds_total", seconds, device=device)
        for device, missing in found.missing_disks.items():
            samples.add("host_raid_degraded_disks", missing, device=device)
        synchronized = found.clock_synchronized
        samples.add("host_clock_synchronized", None if synchronized is None else int(synchronized))

    def _add_filesystems(
        self, outputs: Mapping[str, SectionOutput], skipped: Sequence[str], now: float, samples: CollectorSamples
    ) -> None:
        """Add the filesystems. Raises CollectorFailure where one of them could not be read."""
        filesystems = system.parse_filesystems(outputs["df"].text)
        if filesystems.left_out:
            limit = f"there are more than {system.FILESYSTEMS_LIMIT} filesystems"
            samples.leave_out(filesystems.left_out, limit)
        for filesystem in filesystems.found:
            labels = {"mountpoint": filesystem.mountpoint, "device": filesystem.device, "fstype": filesystem.type}
            samples.add("host_filesystem_error", int(filesystem.size is None), **labels)
            samples.add("host_filesystem_size_bytes", filesystem.size, **labels)
            samples.add("host_filesystem_available_bytes", filesystem.available, **labels)
            samples.add("host_filesystem_files", filesystem.files, **labels)
            samples.add("host_filesystem_files_free", filesystem.files_free, **labels)
        hanging = [each for each in filesystems.found if each.hangs]
        self._ask_again = {
            each.number: self._ask_again[each.number] if each.number in skipped else now + HANGING_PAUSE
            for each in hanging
        }
        failed = [each for each in filesystems.found if each.size is None]
        if failed and outputs["df"].status in (0, *ENDED_BY_TIMEOUT):
            more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
            reason = failed[0].error or "it does not answer"
            raise CollectorFailure(f"the filesystem at {failed[0].mountpoint}: {reason}{more}")


SYSTEM = CollectorKind(CollectorOptions, FAMILIES, SystemCollector)
