"""What is wrong on a host by its last samples, with the thresholds of the rules in `alerts/rules`.

The rules also wait, compare with earlier values, and are silenced; this is what is wrong now.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.api.host_samples import HostSamples
from exporter.scheduler.collector_scheduler import CollectorStatus

ProblemKind = Literal[
    "host_down", "key_changed", "collector_failed", "memory_low", "load_high", "clock_skew", "filesystem_full",
    "inodes_full", "container_down", "unit_inactive", "program_stopped", "gpu_unhealthy", "gpu_recovery_needed",
    "gpu_memory_errors", "gpu_remap_failure", "gpu_memory_pending", "gpu_xid", "gpu_hot", "gpu_throttled",
]  # fmt: skip
Severity = Literal["critical", "warning"]
FILESYSTEM_USAGE: tuple[tuple[float, Severity], ...] = ((0.9, "critical"), (0.8, "warning"))  # bytes, and inodes
MEMORY_USAGE: tuple[tuple[float, Severity], ...] = ((0.95, "critical"), (0.85, "warning"))
LOAD: tuple[tuple[float, float, Severity], ...] = ((8.0, 2.0, "critical"), (4.0, 1.0, "warning"))  # load, load per CPU
CLOCK_OFFSET = 1.0  # seconds
GPU_TEMPERATURE = {"gpu": 88.0, "memory": 98.0}  # degrees Celsius by sensor
XID_AGE = 1800.0  # seconds
XIDS = frozenset({"48", "62", "64", "74", "79", "95", "119", "120"})  # those that applications do not cause
THROTTLE_REASONS = ("hw_slowdown", "hw_power_brake_slowdown")
# Kind of a problem, and the metrics of what there is and what of it is free.
_FREE_SPACE: tuple[tuple[ProblemKind, str, str], ...] = (
    ("filesystem_full", "host_filesystem_size_bytes", "host_filesystem_available_bytes"),
    ("inodes_full", "host_filesystem_files", "host_filesystem_files_free"),
)
# Kind of a problem, the metric that is 0 then, and the label with the name.
_STOPPED: tuple[tuple[ProblemKind, str, str], ...] = (
    ("container_down", "host_container_up", "container"),
    ("unit_inactive", "host_unit_active", "unit"),
    ("program_stopped", "host_program_running", "program"),
)
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


def find_problems(samples: HostSamples, collectors: Sequence[CollectorStatus], now: float) -> list[Problem]:
    """Return the problems of a host, the critical ones first; `now` is Unix time."""
    problems = [
        *_of_host(samples, collectors),
        *_of_resources(samples),
        *_of_filesystems(samples),
        *_of_programs(samples),
        *_of_gpus(samples, now),
        *_of_slowed_gpus(samples),
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


def _of_resources(samples: HostSamples) -> Iterator[Problem]:
    available = samples.ratio("host_memory_available_bytes", "host_memory_total_bytes")
    if available is not None and (severity := _grade(1 - available, MEMORY_USAGE)):
        yield Problem("memory_low", severity, message=_percent(1 - available))
    load, per_cpu = samples.value("host_load1"), samples.ratio("host_load1", "host_cpu_count")
    if load is not None and per_cpu is not None:
        grades = [severity for least, ratio, severity in LOAD if load > least and per_cpu > ratio]
        if grades:
            yield Problem("load_high", grades[0], message=f"{load:g}")
    offset = samples.value("host_clock_offset_seconds")
    if offset is not None and abs(offset) > CLOCK_OFFSET:
        yield Problem("clock_skew", "warning", message=f"{offset:+.1f} s")


def _of_filesystems(samples: HostSamples) -> Iterator[Problem]:
    for kind, whole, part in _FREE_SPACE:
        free = samples.values(part, "mountpoint")
        for mountpoint, size in samples.values(whole, "mountpoint").items():
            if size > 0 and mountpoint in free and (severity := _grade(1 - free[mountpoint] / size, FILESYSTEM_USAGE)):
                yield Problem(kind, severity, mountpoint, _percent(1 - free[mountpoint] / size))


def _of_programs(samples: HostSamples) -> Iterator[Problem]:
    for kind, metric, label in _STOPPED:
        for name, value in samples.values(metric, label).items():
            if value == 0:
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
    for sample in samples.get("gpu_xid_last_timestamp_seconds"):
        if sample.labels["xid"] in XIDS and now - sample.value < XID_AGE:
            yield Problem("gpu_xid", "critical", sample.labels["gpu"], f"XID {sample.labels['xid']}")


def _of_slowed_gpus(samples: HostSamples) -> Iterator[Problem]:
    hot = {gpu: "" for gpu, value in _throttled(samples, "hw_thermal_slowdown").items() if value}
    throttled_by_heat = set(hot)
    for sample in samples.get("gpu_temperature_celsius"):
        if sample.value > GPU_TEMPERATURE.get(sample.labels["sensor"], float("inf")):
            hot[sample.labels["gpu"]] = f"{sample.value:g} °C"
    for gpu, message in hot.items():
        yield Problem("gpu_hot", "warning", gpu, message)
    for reason in THROTTLE_REASONS:
        for gpu, value in _throttled(samples, reason).items():
            if value and gpu not in throttled_by_heat:
                yield Problem("gpu_throttled", "warning", gpu, reason)


def _throttled(samples: HostSamples, reason: str) -> dict[str, float]:
    return samples.values("gpu_throttle_active", "gpu", reason=reason)


def _grade(value: float, thresholds: Sequence[tuple[float, Severity]]) -> Severity | None:
    return next((severity for threshold, severity in thresholds if value > threshold), None)


def _percent(ratio: float) -> str:
    return f"{ratio:.0%}"
