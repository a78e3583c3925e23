"""What is wrong on a host by its last samples, with the host's thresholds, as in the rules in `alerts/rules`.

The rules also wait, compare with earlier values, and are silenced; this is what is wrong now.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.api.host_samples import HostSamples
from exporter.scheduler.collector_scheduler import CollectorStatus
from fleet.inventory.thresholds import OFF, HostThresholds, Thresholds

ProblemKind = Literal[
    "host_down", "key_changed", "collector_failed", "memory_low", "load_high", "clock_skew", "filesystem_full",
    "inodes_full", "container_down", "unit_inactive", "program_stopped", "gpu_unhealthy", "gpu_recovery_needed",
    "gpu_memory_errors", "gpu_remap_failure", "gpu_memory_pending", "gpu_xid", "gpu_hot", "gpu_throttled",
]  # fmt: skip
Severity = Literal["critical", "warning"]
LOAD_PER_CPU: Mapping[Severity, float] = {"critical": 2.0, "warning": 1.0}  # above which a load can be too high
XID_AGE = 1800.0  # seconds
# XIDs that applications do not cause.
XIDS: Mapping[Severity, frozenset[str]] = {
    "critical": frozenset({"48", "62", "64", "74", "79", "95", "119", "120", "140", "143"}),
    "warning": frozenset({"63", "92", "94", "154"}),
}
BOOT_FILESYSTEM_FULL = 0.9  # /boot has the size that kernels need: 85 % is normal there
THROTTLE_REASONS = ("hw_slowdown", "hw_power_brake_slowdown")
HEAT_REASONS = ("hw_thermal_slowdown", "sw_thermal_slowdown")
# Kind of a problem, the metric that is 0 then unless it is finished, and the label with the name.
_STOPPED: tuple[tuple[ProblemKind, str, str], ...] = (
    ("unit_inactive", "host_unit_active", "unit"),
    ("program_stopped", "host_program_running", "program"),
)
_FINISHED = {"host_unit_active": "host_unit_finished", "host_program_running": "host_program_finished"}
RESTARTED = ("always", "unless-stopped")  # restart policies of containers that should always run
# Kind and severity of a problem, the metric and its labels, and the value that shows it.
_GPU_FLAGS: tuple[tuple[ProblemKind, Severity, str, Mapping[str, str], int], ...] = (
    ("gpu_unhealthy", "critical", "gpu_healthy", {}, 0),
    ("gpu_remap_failure", "critical", "gpu_remapped_rows", {"kind": "failure"}, 1),
    ("gpu_memory_pending", "warning", "gpu_remapped_rows", {"kind": "pending"}, 1),
    ("gpu_memory_pending", "warning", "gpu_retired_pages", {"kind": "pending"}, 1),
)
_SEVERITIES: tuple[Severity, ...] = ("critical", "warning")


@dataclass(frozen=True)
class Problem:
    """A problem, and of what: a collector, mount point, container, unit, program or GPU; empty: of the host itself."""

    kind: ProblemKind
    severity: Severity
    name: str = ""
    message: str = ""


def find_problems(
    samples: HostSamples, collectors: Sequence[CollectorStatus], thresholds: HostThresholds, now: float
) -> list[Problem]:
    """Return the problems of a host, the critical ones first; `now` is Unix time."""
    problems = [
        *_of_host(samples, collectors),
        *_of_resources(samples, thresholds),
        *_of_filesystems(samples, thresholds),
        *_of_programs(samples),
        *_of_gpus(samples, now),
        *_of_slowed_gpus(samples, thresholds),
    ]
    return sorted(problems, key=lambda problem: _SEVERITIES.index(problem.severity))


def _of_host(samples: HostSamples, collectors: Sequence[CollectorStatus]) -> Iterator[Problem]:
    up = samples.value("host_up") != 0
    if samples.value("host_key_changed") == 1:
        yield Problem("key_changed", "critical")
    elif not up:
        yield Problem("host_down", "critical")
    for collector in collectors:
        if up and collector.run is not None and collector.run.error is not None:
            yield Problem("collector_failed", "warning", collector.name, collector.run.error)


def _of_resources(samples: HostSamples, thresholds: HostThresholds) -> Iterator[Problem]:
    available = samples.ratio("host_memory_available_bytes", "host_memory_total_bytes")
    if available is not None and (severity := _grade(1 - available, thresholds.memory)):
        yield Problem("memory_low", severity, message=_percent(1 - available))
    load, per_cpu = samples.value("host_load1"), samples.ratio("host_load1", "host_cpu_count")
    if load is not None and per_cpu is not None:
        limits: Mapping[str, float] = dict(thresholds.load)
        grades = [each for each in _SEVERITIES if load > limits[each] and per_cpu > LOAD_PER_CPU[each]]
        if grades:
            yield Problem("load_high", grades[0], message=f"{load:g}")
    offset = samples.value("host_clock_offset_seconds")
    if offset is not None and abs(offset) > thresholds.clock_offset.warning:
        yield Problem("clock_skew", "warning", message=f"{offset:+.1f} s")


def _of_filesystems(samples: HostSamples, thresholds: HostThresholds) -> Iterator[Problem]:
    available = samples.values("host_filesystem_available_bytes", "mountpoint")
    for mountpoint, size in samples.values("host_filesystem_size_bytes", "mountpoint").items():
        if size > 0 and (space := available.get(mountpoint)) is not None:
            severity = _grade_filesystem(mountpoint, 1 - space / size, space, thresholds)
            if severity is not None:
                yield Problem("filesystem_full", severity, mountpoint, _percent(1 - space / size))
    free = samples.values("host_filesystem_files_free", "mountpoint")
    for mountpoint, files in samples.values("host_filesystem_files", "mountpoint").items():
        if files > 0 and mountpoint in free and (severity := _grade(1 - free[mountpoint] / files, thresholds.inodes)):
            yield Problem("inodes_full", severity, mountpoint, _percent(1 - free[mountpoint] / files))


def _grade_filesystem(mountpoint: str, used: float, available: float, thresholds: HostThresholds) -> Severity | None:
    limits: Mapping[str, float] = dict(thresholds.filesystem)
    spaces: Mapping[str, float] = dict(thresholds.filesystem_available)
    grades = [each for each in _SEVERITIES if used > limits[each] and available < spaces[each]]
    if mountpoint == "/boot" or mountpoint.startswith("/boot/"):
        return "warning" if "warning" in grades and used > BOOT_FILESYSTEM_FULL else None
    return grades[0] if grades else None


def _of_programs(samples: HostSamples) -> Iterator[Problem]:
    exit_codes = samples.values("host_container_exit_code", "container")
    restarted = {
        sample.labels["container"]
        for sample in samples.get("host_container_info")
        if sample.labels.get("restart_policy") in RESTARTED
    }
    starting = samples.values("host_container_health", "container", health="starting")
    for name, up in samples.values("host_container_up", "container").items():
        is_finished = exit_codes.get(name) == 0 and name not in restarted
        if not up and not is_finished and not starting.get(name):
            yield Problem("container_down", "warning", name)
    for kind, metric, label in _STOPPED:
        finished = samples.values(_FINISHED[metric], label)
        for name, value in samples.values(metric, label).items():
            if value == 0 and not finished.get(name):
                yield Problem(kind, "warning", name)


def _of_gpus(samples: HostSamples, now: float) -> Iterator[Problem]:
    for kind, severity, metric, labels, bad in _GPU_FLAGS:
        for gpu, value in samples.values(metric, "gpu", **labels).items():
            if value == bad:
                yield Problem(kind, severity, gpu)
    for gpu, errors in samples.values("gpu_ecc_errors_total", "gpu", kind="uncorrected", scope="volatile").items():
        if errors > 0:
            yield Problem("gpu_memory_errors", "critical", gpu, f"{errors:g} uncorrected")
    for sample in samples.get("gpu_recovery_needed"):
        if sample.value == 1:
            yield Problem("gpu_recovery_needed", "critical", sample.labels["gpu"], sample.labels["action"])
    yield from _of_kernel_log(samples, now)


def _of_kernel_log(samples: HostSamples, now: float) -> Iterator[Problem]:
    clock_offset = samples.value("host_clock_offset_seconds") or 0.0  # timestamps are of the host's clock
    for sample in samples.get("gpu_xid_last_timestamp_seconds"):
        for severity, xids in XIDS.items():
            if sample.labels["xid"] in xids and now - (sample.value - clock_offset) < XID_AGE:
                yield Problem("gpu_xid", severity, sample.labels["gpu"], f"XID {sample.labels['xid']}")


def _of_slowed_gpus(samples: HostSamples, thresholds: HostThresholds) -> Iterator[Problem]:
    limits = {"gpu": thresholds.gpu_temperature.warning, "memory": thresholds.gpu_memory_temperature.warning}
    hot = {gpu: "" for reason in HEAT_REASONS for gpu, value in _throttled(samples, reason).items() if value}
    throttled_by_heat = set(hot)
    for sample in samples.get("gpu_temperature_celsius"):
        if sample.value > limits.get(sample.labels["sensor"], OFF):
            hot[sample.labels["gpu"]] = f"{sample.value:g} °C"
    for gpu, message in hot.items():
        yield Problem("gpu_hot", "warning", gpu, message)
    for reason in THROTTLE_REASONS:
        for gpu, value in _throttled(samples, reason).items():
            if value and gpu not in throttled_by_heat:
                yield Problem("gpu_throttled", "warning", gpu, reason)


def _throttled(samples: HostSamples, reason: str) -> dict[str, float]:
    return samples.values("gpu_throttle_active", "gpu", reason=reason)


def _grade(value: float, thresholds: Thresholds) -> Severity | None:
    limits: Mapping[str, float] = dict(thresholds)
    return next((severity for severity in _SEVERITIES if value > limits.get(severity, OFF)), None)


def _percent(ratio: float) -> str:
    return f"{ratio:.0%}"
