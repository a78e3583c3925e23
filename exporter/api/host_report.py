"""The JSON representation of a host, from what its collectors have published."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from exporter.api.host_problems import Problem, find_problems
from exporter.api.host_samples import HostSamples
from exporter.collectors.base import LogExcerpt
from exporter.scheduler.collector_scheduler import CollectorStatus
from exporter.scheduler.probe_scheduler import MonitoredHost
from runtime.terminal import escape_controls
from runtime.times import format_rfc3339

PROBLEM_LIMIT = 100  # problems of each host in the list: a host may report thousands
Columns = Mapping[str, tuple[str, Callable[[float | None], Any]]]  # by key: the metric, and how its value is shown


def _integer(value: float | None) -> int | None:
    return None if value is None else int(value)


def _boolean(value: float | None) -> bool | None:
    return None if value is None else value == 1


def _number(value: float | None) -> float | None:
    return value


_FILESYSTEM: Columns = {
    "size_bytes": ("host_filesystem_size_bytes", _integer),
    "available_bytes": ("host_filesystem_available_bytes", _integer),
    "files": ("host_filesystem_files", _integer),
    "files_free": ("host_filesystem_files_free", _integer),
}
_CONTAINER: Columns = {
    "up": ("host_container_up", _boolean),
    "restarts": ("host_container_restarts_total", _integer),
    "started_at": ("host_container_started_timestamp_seconds", format_rfc3339),
}
_UNIT: Columns = {"active": ("host_unit_active", _boolean)}
_PROGRAM: Columns = {"running": ("host_program_running", _boolean)}
_GPU: Columns = {
    "healthy": ("gpu_healthy", _boolean),
    "utilization_ratio": ("gpu_utilization_ratio", _number),
    "memory_used_bytes": ("gpu_memory_used_bytes", _integer),
    "memory_total_bytes": ("gpu_memory_total_bytes", _integer),
    "power_watts": ("gpu_power_watts", _number),
}


def summarize_host(monitored: MonitoredHost, lines: Mapping[str, str], now: float) -> dict[str, Any]:
    """Return an entry of the list of hosts; what was not measured is None. `now` is Unix time."""
    samples = HostSamples(lines)
    problems = find_problems(samples, monitored.collectors, monitored.host.thresholds, now)
    return _escaped(_summarize(monitored, samples, problems[:PROBLEM_LIMIT], len(problems)))


def describe_host(monitored: MonitoredHost, lines: Mapping[str, str], now: float) -> dict[str, Any]:
    """Return the entry of the list with all problems, and everything that the collectors have read."""
    samples = HostSamples(lines)
    problems = find_problems(samples, monitored.collectors, monitored.host.thresholds, now)
    summary = _summarize(monitored, samples, problems, len(problems))
    info = {sample.labels["container"]: sample.labels["image"] for sample in samples.get("host_container_info")}
    containers = _table(samples, "container", "name", _CONTAINER)
    return _escaped(
        {
            **summary,
            "load5": samples.value("host_load5"),
            "load15": samples.value("host_load15"),
            "booted_at": format_rfc3339(samples.value("host_boot_timestamp_seconds")),
            "clock_offset_seconds": samples.value("host_clock_offset_seconds"),
            "filesystems": _list_filesystems(samples),
            "containers": [{**container, "image": info.get(container["name"])} for container in containers],
            "units": _table(samples, "unit", "name", _UNIT),
            "programs": _table(samples, "program", "name", _PROGRAM),
            "gpus": [_add_details(gpu, samples, problems) for gpu in summary["gpus"]],
        }
    )


def describe_excerpt(excerpt: LogExcerpt) -> dict[str, Any]:
    """Return the last matching lines of a log; only operators may read logs."""
    return _escaped(
        {
            "source": excerpt.source,
            "pattern": excerpt.pattern,
            "read_at": format_rfc3339(excerpt.read_at),
            "lines": list(excerpt.lines),
        }
    )


def _summarize(
    monitored: MonitoredHost, samples: HostSamples, problems: Iterable[Problem], problem_count: int
) -> dict[str, Any]:
    host = monitored.host
    total = _integer(samples.value("host_memory_total_bytes"))
    available = _integer(samples.value("host_memory_available_bytes"))
    return {
        "name": host.name,
        "address": host.address,
        "group": host.group,
        "labels": host.labels,
        "up": _boolean(samples.value("host_up")),
        "key_changed": _boolean(samples.value("host_key_changed")),
        "collectors": [_collector_json(each) for each in monitored.collectors],
        "services": list(monitored.services),
        "cpu_ratio": samples.value("host_cpu_usage_ratio"),
        "load1": samples.value("host_load1"),
        "cpu_count": _integer(samples.value("host_cpu_count")),
        "memory": None if total is None else {"total_bytes": total, "available_bytes": available},
        "filesystems_fullest": _find_fullest(samples),
        "gpus": _list_gpus(samples),
        "problems": [_problem_json(problem) for problem in problems],
        "problem_count": problem_count,
    }


def _collector_json(collector: CollectorStatus) -> dict[str, Any]:
    run = collector.run
    return {
        "name": collector.name,
        "success": None if run is None else run.error is None,
        "error": None if run is None else run.error,
        "collected_at": None if run is None else format_rfc3339(run.ended_at),
        "duration_seconds": None if run is None else run.duration,
        "every_seconds": collector.every,
    }


def _problem_json(problem: Problem) -> dict[str, Any]:
    return {
        "kind": problem.kind, "severity": problem.severity, "name": problem.name, "message": problem.message,
    }  # fmt: skip


def _table(samples: HostSamples, label: str, key: str, columns: Columns) -> list[dict[str, Any]]:
    """Return one row for each value of `label`, which is under `key`, with a column for each metric."""
    values = {column: samples.values(metric, label) for column, (metric, _) in columns.items()}
    names = dict.fromkeys(name for by_name in values.values() for name in by_name)
    return [
        {key: name, **{column: show(values[column].get(name)) for column, (_, show) in columns.items()}}
        for name in names
    ]


def _list_filesystems(samples: HostSamples) -> list[dict[str, Any]]:
    labels = {each.labels["mountpoint"]: each.labels for each in samples.get("host_filesystem_size_bytes")}
    rows = _table(samples, "mountpoint", "mountpoint", _FILESYSTEM)
    known = ((row, labels.get(row["mountpoint"], {})) for row in rows)
    return [{**row, "device": each.get("device"), "fstype": each.get("fstype")} for row, each in known]


def _find_fullest(samples: HostSamples) -> dict[str, Any] | None:
    available = samples.values("host_filesystem_available_bytes", "mountpoint")
    sizes = samples.values("host_filesystem_size_bytes", "mountpoint")
    free = {name: available[name] / size for name, size in sizes.items() if size > 0 and name in available}
    if not free:
        return None
    name = min(free, key=free.__getitem__)
    return {"mountpoint": name, "size_bytes": int(sizes[name]), "available_bytes": int(available[name])}


def _list_gpus(samples: HostSamples) -> list[dict[str, Any]]:
    info = {sample.labels["gpu"]: sample.labels for sample in samples.get("gpu_info")}
    temperatures = samples.values("gpu_temperature_celsius", "gpu", sensor="gpu")
    gpus = [
        {
            **gpu,
            "temperature_celsius": temperatures.get(gpu["gpu"]),
            "name": info[gpu["gpu"]]["name"] if gpu["gpu"] in info else None,
            "uuid": info[gpu["gpu"]]["uuid"] if gpu["gpu"] in info else None,
        }
        for gpu in _table(samples, "gpu", "gpu", _GPU)
    ]
    return sorted(gpus, key=lambda gpu: (not gpu["gpu"].isdecimal(), len(gpu["gpu"]), gpu["gpu"]))


def _add_details(gpu: Mapping[str, Any], samples: HostSamples, problems: Iterable[Problem]) -> dict[str, Any]:
    """Return a GPU with its faults, and who holds its memory: containers, and `host` for processes outside of them."""
    index = gpu["gpu"]
    holders = samples.values("gpu_process_memory_bytes", "container", gpu=index)
    return {
        **gpu,
        "faults": [_problem_json(each) for each in problems if each.name == index and each.kind.startswith("gpu_")],
        "memory_holders": [{"container": name, "memory_bytes": int(size)} for name, size in holders.items()],
    }


def _escaped(report: Mapping[str, Any]) -> dict[str, Any]:
    """Escape control characters in all texts: hosts choose the names of what runs on them."""
    return {key: _escape(value) for key, value in report.items()}


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return escape_controls(value)
    if isinstance(value, Mapping):
        return _escaped(value)
    return [_escape(item) for item in value] if isinstance(value, list) else value
