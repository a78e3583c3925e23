"""What the API says of hosts: samples read from lines, changes between runs, problems by the rules' thresholds."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.api import host_problems
from exporter.api.host_problems import Problem, find_problems
from exporter.api.host_report import PROBLEM_LIMIT, describe_host, summarize_host
from exporter.api.host_samples import HostSamples
from exporter.exposition.collector_samples import CollectorSamples
from exporter.exposition.sample_lines import parse_lines
from exporter.scheduler.collector_scheduler import CollectorRun, CollectorStatus
from exporter.scheduler.host_states import CHANGES_LIMIT, StateChange, find_states, list_changes
from exporter.scheduler.probe_scheduler import MonitoredHost
from fleet.inventory.model import Host
from fleet.inventory.thresholds import HostThresholds
from tests.metric_names import rules

NOW = 1.8e9
GIB = 2**30


def samples_of(*added: tuple[str, float, dict[str, str]]) -> CollectorSamples:
    samples = CollectorSamples("h")
    for metric, value, labels in added:
        samples.add(metric, value, **labels)
    return samples


def problems_of(*added: tuple[str, float, dict[str, str]], thresholds: Any = None, **runs: str | None) -> list[Problem]:
    collectors = [CollectorStatus(name, 30.0, CollectorRun(NOW, 0.1, error)) for name, error in runs.items()]
    limits = HostThresholds.model_validate(thresholds or {})
    return find_problems(HostSamples(samples_of(*added).lines), collectors, limits, NOW)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(max_size=20)),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_lines_are_read_as_they_were_added(labels: dict[str, str], value: float) -> None:
    samples = samples_of(("m", value, labels), ("m", 1, {}))
    first, second = parse_lines(samples.lines["m"])
    assert (first.labels, first.value) == ({"host": "h", **labels}, value)
    assert (second.labels, second.value) == ({"host": "h"}, 1)


def test_changes_between_two_runs() -> None:
    before = find_states(
        samples_of(
            ("host_container_up", 1, {"container": "a"}), ("host_container_up", 1, {"container": "b"}),
            ("host_container_up", 0, {"container": "c"}), ("gpu_count", 8, {}), ("gpu_healthy", 1, {"gpu": "0"}),
        ).added
    )  # fmt: skip
    after = find_states(
        samples_of(
            ("host_container_up", 0, {"container": "a"}), ("host_container_up", 0, {"container": "c"}),
            ("host_unit_active", 0, {"unit": "d.service"}), ("gpu_count", 7, {}), ("gpu_healthy", 0, {"gpu": "0"}),
        ).added
    )  # fmt: skip
    assert sorted(list_changes(before, after), key=lambda change: (change.kind, change.name)) == [
        StateChange("container", "a", "down"),
        StateChange("container", "b", "gone"),
        StateChange("gpu", "", "count_changed", "7, before: 8"),
        StateChange("gpu", "0", "unhealthy"),
        StateChange("unit", "d.service", "down", first=True),
    ]
    assert list_changes(after, after) == []


def test_one_run_has_a_limited_number_of_changes() -> None:
    many = find_states(
        samples_of(*(("host_container_up", 1, {"container": f"c{number}"}) for number in range(3000))).added
    )
    changes = list_changes({}, many)
    assert len(changes) == CHANGES_LIMIT + 1
    assert changes[-1] == StateChange("container", "", "changed", "2900 further changes")


def usage(
    kind: str, ratio: float, size: float = 1000, mountpoint: str = "/"
) -> list[tuple[str, float, dict[str, str]]]:
    names = {"bytes": ("size_bytes", "available_bytes"), "files": ("files", "files_free")}[kind]
    labels = {"mountpoint": mountpoint, "device": "/dev/sda1", "fstype": "ext4"}
    return [
        (f"host_filesystem_{name}", value, labels)
        for name, value in zip(names, (size, size - size * ratio), strict=True)
    ]


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ([("host_up", 0, {})], [("host_down", "critical", "")]),
        ([("host_up", 0, {}), ("host_key_changed", 1, {})], [("key_changed", "critical", "")]),
        (usage("bytes", 0.8), []),
        (usage("bytes", 0.85), [("filesystem_full", "warning", "/")]),
        (usage("bytes", 0.95), [("filesystem_full", "critical", "/")]),
        (usage("files", 0.95), [("inodes_full", "critical", "/")]),
        ([("host_memory_total_bytes", 100, {}), ("host_memory_available_bytes", 10, {})], [("memory_low", "warning", "")]),
        ([("host_memory_total_bytes", 100, {}), ("host_memory_available_bytes", 4, {})], [("memory_low", "critical", "")]),
        ([("host_load1", 9, {}), ("host_cpu_count", 4, {})], [("load_high", "critical", "")]),
        ([("host_load1", 9, {}), ("host_cpu_count", 8, {})], [("load_high", "warning", "")]),
        ([("host_load1", 3, {}), ("host_cpu_count", 1, {})], []),
        ([("host_clock_offset_seconds", -2, {})], [("clock_skew", "warning", "")]),
        ([("host_container_up", 0, {"container": "c"})], [("container_down", "warning", "c")]),
        ([("host_container_up", 0, {"container": "c"}), ("host_container_exit_code", 137, {"container": "c"})], [("container_down", "warning", "c")]),
        ([("host_container_up", 0, {"container": "c"}), ("host_container_exit_code", 0, {"container": "c"})], []),
        (
            [
                ("host_container_up", 0, {"container": "c"}), ("host_container_exit_code", 0, {"container": "c"}),
                ("host_container_info", 1, {"container": "c", "image": "i", "restart_policy": "always"}),
            ],
            [("container_down", "warning", "c")],
        ),
        ([("host_container_up", 0, {"container": "c"}), ("host_container_health", 1, {"container": "c", "health": "starting"})], []),
        ([("host_unit_active", 0, {"unit": "u"}), ("host_unit_active", 1, {"unit": "v"})], [("unit_inactive", "warning", "u")]),
        ([("host_unit_active", 0, {"unit": "u"}), ("host_unit_finished", 1, {"unit": "u"})], []),
        ([("host_program_running", 0, {"program": "p"}), ("host_program_finished", 1, {"program": "p"})], []),
        ([("host_program_running", 0, {"program": "p"})], [("program_stopped", "warning", "p")]),
        ([("gpu_healthy", 0, {"gpu": "1"})], [("gpu_unhealthy", "critical", "1")]),
        ([("gpu_recovery_needed", 1, {"gpu": "1", "action": "Reset"})], [("gpu_recovery_needed", "critical", "1")]),
        ([("gpu_ecc_errors_total", 2, {"gpu": "1", "kind": "uncorrected", "scope": "volatile"})], [("gpu_memory_errors", "critical", "1")]),
        ([("gpu_ecc_errors_total", 2, {"gpu": "1", "kind": "corrected", "scope": "volatile"})], []),
        ([("gpu_remapped_rows", 1, {"gpu": "1", "kind": "failure"})], [("gpu_remap_failure", "critical", "1")]),
        ([("gpu_retired_pages", 1, {"gpu": "1", "kind": "pending"})], [("gpu_memory_pending", "warning", "1")]),
        ([("gpu_xid_last_timestamp_seconds", NOW - 60, {"gpu": "1", "xid": "79"})], [("gpu_xid", "critical", "1")]),
        ([("gpu_xid_last_timestamp_seconds", NOW - 60, {"gpu": "1", "xid": "143"})], [("gpu_xid", "critical", "1")]),
        ([("gpu_xid_last_timestamp_seconds", NOW - 60, {"gpu": "1", "xid": "92"})], [("gpu_xid", "warning", "1")]),
        ([("gpu_xid_last_timestamp_seconds", NOW - 60, {"gpu": "1", "xid": "31"})], []),
        (
            [("gpu_xid_last_timestamp_seconds", NOW - 60, {"gpu": "1", "xid": "79"}), ("host_clock_offset_seconds", 7200, {})],
            [("clock_skew", "warning", "")],
        ),
        ([("gpu_xid_last_timestamp_seconds", NOW - 7200, {"gpu": "1", "xid": "79"})], []),
        ([("gpu_temperature_celsius", 99, {"gpu": "1", "sensor": "memory"})], [("gpu_hot", "warning", "1")]),
        ([("gpu_throttle_active", 1, {"gpu": "1", "reason": "hw_slowdown"})], [("gpu_throttled", "warning", "1")]),
        (
            [("gpu_throttle_active", 1, {"gpu": "1", "reason": reason}) for reason in ("hw_slowdown", "hw_thermal_slowdown")],
            [("gpu_hot", "warning", "1")],
        ),
        ([("gpu_throttle_active", 1, {"gpu": "1", "reason": "sw_power_cap"})], []),
        ([("gpu_throttle_active", 1, {"gpu": "1", "reason": "sw_thermal_slowdown"})], [("gpu_hot", "warning", "1")]),
        (usage("bytes", 0.95, 10**13), []),
        (usage("bytes", 0.85, mountpoint="/boot"), []),
        (usage("bytes", 0.95, mountpoint="/boot/efi"), [("filesystem_full", "warning", "/boot/efi")]),
    ],
)  # fmt: skip
def test_problems(added: list[tuple[str, float, dict[str, str]]], expected: list[tuple[str, str, str]]) -> None:
    assert [(problem.kind, problem.severity, problem.name) for problem in problems_of(*added)] == expected


@pytest.mark.parametrize(
    ("thresholds", "added", "expected"),
    [
        ({"filesystem": {"warning": "50%"}}, usage("bytes", 0.6), [("filesystem_full", "warning")]),
        ({"filesystem": {"warning": "50%"}}, usage("files", 0.6), []),
        ({"inodes": {"warning": "50%"}}, usage("files", 0.6), [("inodes_full", "warning")]),
        ({"filesystem": {"critical": "96%"}}, usage("bytes", 0.95), [("filesystem_full", "warning")]),
        ({"filesystem": {"warning": "off"}}, usage("bytes", 0.85), []),
        ({"filesystem": {"warning": "off"}}, usage("bytes", 0.95), [("filesystem_full", "critical")]),
        ({"filesystem": "off"}, usage("bytes", 0.99), []),
        ({"memory": {"warning": "60%", "critical": "70%"}}, [("host_memory_total_bytes", 100, {}), ("host_memory_available_bytes", 25, {})], [("memory_low", "critical")]),
        ({"load": {"warning": 2}}, [("host_load1", 3, {}), ("host_cpu_count", 2, {})], [("load_high", "warning")]),
        ({"load": {"warning": 2}}, [("host_load1", 3, {}), ("host_cpu_count", 4, {})], []),
        ({"load": {"critical": "off"}}, [("host_load1", 99, {}), ("host_cpu_count", 4, {})], [("load_high", "warning")]),
        ({"clock_offset": {"warning": "1m"}}, [("host_clock_offset_seconds", -2, {})], []),
        ({"gpu_temperature": {"warning": 70}}, [("gpu_temperature_celsius", 71, {"gpu": "1", "sensor": "gpu"})], [("gpu_hot", "warning")]),
        ({"gpu_memory_temperature": "off"}, [("gpu_temperature_celsius", 99, {"gpu": "1", "sensor": "memory"})], []),
    ],
)  # fmt: skip
def test_problems_by_a_host_s_own_thresholds(
    thresholds: Any, added: list[tuple[str, float, dict[str, str]]], expected: list[tuple[str, str]]
) -> None:
    problems = problems_of(*added, thresholds=thresholds)
    assert [(problem.kind, problem.severity) for problem in problems] == expected


def test_a_failed_collector_is_a_problem_unless_the_host_is_down() -> None:
    (problem,) = problems_of(("host_up", 1, {}), docker="no socket", system=None)
    assert problem == Problem("collector_failed", "warning", "docker", "no socket")
    assert [each.kind for each in problems_of(("host_up", 0, {}), docker="refused")] == ["host_down"]


def expressions(alert: str) -> str:
    return " ".join(rule["expr"] for rule in rules() if rule.get("alert") == alert)


def test_what_is_not_configurable_is_as_in_the_rules() -> None:
    """The thresholds are compared in test_thresholds.py."""
    per_cpu = re.findall(r"host:load1_per_cpu:ratio > ([0-9.]+)", expressions("HostLoadHigh"))
    assert sorted(map(float, per_cpu)) == sorted(host_problems.LOAD_PER_CPU.values())
    assert f"< {host_problems.XID_AGE:g}" in expressions("GPUErrors")
    xids = ["|".join(sorted(each, key=int)) for each in host_problems.XIDS.values()]
    assert re.findall(r'xid=~"([^"]*)"', expressions("GPUErrors")) == xids
    assert f'reason=~"{"|".join(host_problems.THROTTLE_REASONS)}"' in expressions("GPUThrottled")
    heat = re.findall(r'reason=~"([^"]*)"', expressions("GPUHot"))
    assert heat
    assert all(re.fullmatch(pattern, reason) for pattern in heat for reason in host_problems.HEAT_REASONS)
    assert re.findall(r"clamp_min\(.*, ([0-9.]+)\)", expressions("HostDiskFull")) == [
        f"{host_problems.BOOT_FILESYSTEM_FULL:g}"
    ]
    finished = re.findall(r'restart_policy=~"([^"]*)"', expressions("HostContainerDown"))
    assert set(finished) == {"|".join(host_problems.RESTARTED)}


def monitored() -> MonitoredHost:
    host = Host(address="10.0.0.1", group="gpu", labels={"rack": "a3"})
    return MonitoredHost(host, [CollectorStatus("docker", 30.0, None)], ["web"], (1, 0))


def test_what_was_not_measured_is_null_or_empty() -> None:
    entry = summarize_host(monitored(), {}, NOW)
    assert entry == {
        "name": "", "address": "10.0.0.1", "group": "gpu", "labels": {"rack": "a3"}, "up": None, "key_changed": None,
        "collectors": [
            {"name": "docker", "success": None, "error": None, "collected_at": None, "duration_seconds": None, "every_seconds": 30.0}
        ],
        "services": ["web"], "cpu_ratio": None, "load1": None, "cpu_count": None, "memory": None,
        "filesystems_fullest": None, "gpus": [], "problems": [], "problem_count": 0,
    }  # fmt: skip
    lists: dict[str, Any] = {"filesystems": [], "containers": [], "units": [], "programs": []}
    single = dict.fromkeys(("load5", "load15", "booted_at", "clock_offset_seconds"))
    assert describe_host(monitored(), {}, NOW) == {**entry, **lists, **single}


def test_the_list_has_a_limited_number_of_problems() -> None:
    down = samples_of(*(("host_container_up", 0, {"container": f"c{number}"}) for number in range(2000)))
    entry = summarize_host(monitored(), down.lines, NOW)
    assert (len(entry["problems"]), entry["problem_count"]) == (PROBLEM_LIMIT, 2000)
    assert len(describe_host(monitored(), down.lines, NOW)["problems"]) == 2000


def test_gpus_are_in_the_order_of_their_indexes() -> None:
    indexes = ["00000000:05:00.0", "10", "2"]
    samples = samples_of(*(("gpu_healthy", 1, {"gpu": index}) for index in indexes))
    assert [gpu["gpu"] for gpu in summarize_host(monitored(), samples.lines, NOW)["gpus"]] == ["2", "10", indexes[0]]
