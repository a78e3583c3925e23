"""The `system` collector: CPU, load, memory, filesystems, what the kernel counts, and the offset of the clock."""

import time

from exporter.collectors import CollectorKind
from exporter.collectors.base import Collector, CollectorFailure, CollectorOptions, ReadSections, require_output
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.metrics_page import MetricFamily
from fleet.host import kernel, system
from fleet.host.sections import Section

FAMILIES = (
    MetricFamily("host_load1", "gauge", "Load average over 1 minute."),
    MetricFamily("host_load5", "gauge", "Load average over 5 minutes."),
    MetricFamily("host_load15", "gauge", "Load average over 15 minutes."),
    MetricFamily("host_cpu_count", "gauge", "Number of CPUs."),
    MetricFamily("host_cpu_usage_ratio", "gauge", "Ratio of CPU time used since the previous run, over all CPUs."),
    MetricFamily("host_memory_total_bytes", "gauge", "Total memory."),
    MetricFamily("host_memory_available_bytes", "gauge", "Memory available to processes."),
    MetricFamily("host_boot_timestamp_seconds", "gauge", "Unix time at which the host was booted."),
    MetricFamily("host_clock_offset_seconds", "gauge", "Clock of the host minus clock of the exporter."),
    MetricFamily("host_filesystem_size_bytes", "gauge", "Size of a filesystem."),
    MetricFamily("host_filesystem_available_bytes", "gauge", "Space available to users other than root."),
    MetricFamily("host_filesystem_files", "gauge", "Number of inodes of a filesystem."),
    MetricFamily("host_filesystem_files_free", "gauge", "Number of free inodes."),
    MetricFamily("host_oom_kills_total", "counter", "Number of processes that the kernel killed for lack of memory."),
    MetricFamily("host_file_descriptors_allocated", "gauge", "Number of allocated file descriptors."),
    MetricFamily("host_file_descriptors_limit", "gauge", "Maximum number of file descriptors."),
    MetricFamily("host_conntrack_entries", "gauge", "Number of connections that the kernel tracks."),
    MetricFamily("host_conntrack_limit", "gauge", "Maximum number of connections that the kernel tracks."),
    MetricFamily("host_network_packets_total", "counter", "Number of packets of a network card, by direction."),
    MetricFamily("host_network_errors_total", "counter", "Number of packets with errors, by direction."),
    MetricFamily(
        "host_disk_io_weighted_seconds_total",
        "counter",
        "Time that requests to a disk have waited or were in progress, summed over the requests.",
    ),
    MetricFamily("host_raid_degraded_disks", "gauge", "Number of disks that a RAID array of the kernel lacks."),
    MetricFamily("host_clock_synchronized", "gauge", "Whether the host's NTP client has synchronized the clock."),
)


class SystemCollector(Collector[CollectorOptions]):
    """Keeps the CPU times of the previous run."""

    _previous: system.Machine | None = None

    def sections(self) -> list[Section]:
        return [system.PROC_SECTION, system.FILESYSTEMS_SECTION]

    async def collect(self, read: ReadSections, samples: CollectorSamples) -> None:
        sent_at = time.time()
        outputs = await read(self.sections())
        received_at = time.time()
        try:
            machine = system.parse_machine(require_output(outputs, "proc"))
        except ValueError as error:
            raise CollectorFailure(str(error)) from error
        self._add(machine, sent_at, received_at, samples)
        _add_kernel(kernel.parse_kernel(outputs["proc"].text), samples)
        # df may hang on a filesystem while /proc can be read.
        if "df" in outputs:
            _add_filesystems(outputs["df"].text, samples)
        require_output(outputs, "df")

    def _add(self, machine: system.Machine, sent_at: float, received_at: float, samples: CollectorSamples) -> None:
        for name, load in zip(("host_load1", "host_load5", "host_load15"), machine.load, strict=True):
            samples.add(name, load)
        samples.add("host_cpu_count", machine.cpus)
        previous, self._previous = self._previous, machine
        if previous is not None and machine.booted == previous.booted and machine.total > previous.total:
            samples.add("host_cpu_usage_ratio", (machine.busy - previous.busy) / (machine.total - previous.total))
        samples.add("host_memory_total_bytes", machine.memory_total)
        samples.add("host_memory_available_bytes", machine.memory_available)
        samples.add("host_boot_timestamp_seconds", machine.booted)
        if machine.now is not None:
            # The clock was read between request and response; the offset is 0 if that can explain the difference.
            earliest, latest = machine.now
            offset = min(0.0, latest - sent_at) or max(0.0, earliest - received_at)
            samples.add("host_clock_offset_seconds", offset)


def _add_kernel(found: kernel.Kernel, samples: CollectorSamples) -> None:
    samples.add("host_oom_kills_total", found.oom_kills)
    allocated, files_limit = found.files or (None, None)
    samples.add("host_file_descriptors_allocated", allocated)
    samples.add("host_file_descriptors_limit", files_limit)
    tracked, connections_limit = found.connections or (None, None)
    samples.add("host_conntrack_entries", tracked)
    samples.add("host_conntrack_limit", connections_limit)
    for counts in found.network:
        labels = {"device": counts.device, "direction": counts.direction}
        samples.add("host_network_packets_total", counts.packets, **labels)
        samples.add("host_network_errors_total", counts.errors, **labels)
    for device, seconds in found.queue_seconds.items():
        samples.add("host_disk_io_weighted_seconds_total", seconds, device=device)
    for device, missing in found.missing_disks.items():
        samples.add("host_raid_degraded_disks", missing, device=device)
    synchronized = found.clock_synchronized
    samples.add("host_clock_synchronized", None if synchronized is None else int(synchronized))


def _add_filesystems(output: str, samples: CollectorSamples) -> None:
    for filesystem in system.parse_filesystems(output):
        labels = {"mountpoint": filesystem.mountpoint, "device": filesystem.device, "fstype": filesystem.type}
        samples.add("host_filesystem_size_bytes", filesystem.size, **labels)
        samples.add("host_filesystem_available_bytes", filesystem.available, **labels)
        samples.add("host_filesystem_files", filesystem.files, **labels)
        samples.add("host_filesystem_files_free", filesystem.files_free, **labels)


SYSTEM = CollectorKind(CollectorOptions, FAMILIES, SystemCollector)
