"""Alerts of hosts and GPUs cross gaps: what fires before fires during and after, and what is renamed ends.

Each alert has series here that make it fire; promtool evaluates all of them together, with the same gap in all series.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.metric_names import rules

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "alerts" / "rules" / name for name in ("hosts.yml", "gpus.yml")]
STEP = 30  # seconds between two samples and two evaluations
GAP, END = 112, 140  # samples: where the gaps begin, and how many there are
LAST = GAP - 1
Values = Callable[[int, int], str]  # the values of a series from one sample up to another


def constant(value: float) -> Values:
    return lambda first, end: f"{value:g}x{end - first - 1}"


def counter(increase: float) -> Values:
    return lambda first, end: f"{increase * first:g}+{increase:g}x{end - first - 1}"


def changed(before: float, after: float, at: int) -> Values:
    def values(first: int, end: int) -> str:
        parts = [(before, min(end, at) - first), (after, end - max(first, at))]
        return " ".join(f"{value:g}x{count - 1}" for value, count in parts if count > 0)

    return values


# By alert: how many of it fire, and the series that make it, by their metric and labels (without the job).
FIRING: dict[str, tuple[int, dict[str, Values]]] = {
    "HostKeyChanged": (1, {'host_key_changed{host="k", group="g"}': constant(1), 'host_up{host="k", group="g"}': constant(0)}),
    "HostDown": (2, {
        'host_up{host="d", group="g"}': constant(0),
        'host_info{host="n", group="g", address="a"}': constant(1),
        'service_up{service="n1", host="n"}': constant(0), 'service_up{service="n2", host="n"}': constant(0),
    }),
    "HostShellFailing": (1, {'host_up{host="s", group="g"}': constant(0), 'service_up{service="s1", host="s"}': constant(1)}),
    "HostCollectFailing": (1, {'host_collect_success{host="h", collector="odd"}': constant(0)}),
    "HostRebooted": (1, {'host_boot_timestamp_seconds{host="h"}': changed(-9e5, (GAP - 6) * STEP, GAP - 5)}),
    "HostClockSkew": (1, {'host_clock_offset_seconds{host="h"}': constant(9)}),
    "HostDiskFull": (2, {
        'host_filesystem_size_bytes{host="h", mountpoint="/"}': constant(100),
        'host_filesystem_available_bytes{host="h", mountpoint="/"}': constant(5),
    }),
    "HostInodesFull": (2, {
        'host_filesystem_files{host="h", mountpoint="/"}': constant(100),
        'host_filesystem_files_free{host="h", mountpoint="/"}': constant(5),
    }),
    "HostMemoryLow": (2, {
        'host_memory_total_bytes{host="h"}': constant(100), 'host_memory_available_bytes{host="h"}': constant(3),
    }),
    "HostLoadHigh": (2, {'host_load1{host="h"}': constant(40), 'host_cpu_count{host="h"}': constant(8)}),
    "HostContainerDown": (2, {
        'host_container_up{host="h", container="was-up"}': changed(1, 0, 20),
        'host_container_up{host="h", container="failed"}': constant(0),
        'host_container_exit_code{host="h", container="failed"}': constant(1),
        'host_container_up{host="h", container="finished"}': changed(1, 0, 20),
        'host_container_exit_code{host="h", container="finished"}': constant(0),
        'host_container_up{host="h", container="starts"}': changed(1, 0, 20),
        'host_container_health{host="h", container="starts", health="starting"}': constant(1),
    }),
    "HostUnitFailed": (1, {
        'host_unit_active{host="h", unit="u.service"}': constant(0),
        'host_unit_active{host="h", unit="once.service"}': constant(0),
        'host_unit_finished{host="h", unit="once.service"}': constant(1),
    }),
    "HostProgramDown": (1, {
        'host_program_running{host="h", program="p"}': constant(0),
        'host_program_running{host="h", program="once"}': constant(0),
        'host_program_finished{host="h", program="once"}': constant(1),
    }),
    "HostOOMKill": (1, {'host_oom_kills_total{host="h"}': counter(1)}),
    "HostCrashLoop": (2, {
        'host_container_restarts_total{host="h", container="loops"}': counter(1),
        'host_unit_restarts_total{host="h", unit="loops"}': counter(1),
    }),
    "HostRAIDDegraded": (1, {'host_raid_degraded_disks{host="h", device="md0"}': constant(1)}),
    "HostClockUnsynchronized": (1, {'host_clock_synchronized{host="h"}': constant(0)}),
    "HostNetworkErrors": (1, {
        'host_network_packets_total{host="h", device="e", direction="receive"}': counter(1000),
        'host_network_errors_total{host="h", device="e", direction="receive"}': counter(20),
    }),
    "HostConntrackFull": (2, {'host_conntrack_entries{host="h"}': constant(99), 'host_conntrack_limit{host="h"}': constant(100)}),
    "HostFileDescriptorsLow": (2, {
        'host_file_descriptors_allocated{host="h"}': constant(99), 'host_file_descriptors_limit{host="h"}': constant(100),
    }),
    "HostDiskSaturated": (1, {'host_disk_io_weighted_seconds_total{host="h", device="sda"}': counter(40 * STEP)}),
    "LogErrors": (1, {'host_log_matches_total{host="h", source="/a.log", pattern="error"}': counter(5)}),
    "HTTPErrorRatio": (1, {
        'host_http_requests_total{host="h", source="/a.log", code="200"}': counter(50),
        'host_http_requests_total{host="h", source="/a.log", code="502"}': counter(2),
    }),
    "GPUUnhealthy": (2, {
        'gpu_healthy{host="h", gpu="0"}': constant(0), 'gpu_recovery_needed{host="h", gpu="0", action="Reset"}': constant(1),
    }),
    "GPUMissing": (1, {'gpu_count{host="h"}': changed(8, 7, 20)}),
    "GPUErrors": (5, {
        'gpu_ecc_errors_total{host="h", gpu="1", kind="uncorrected", scope="volatile"}': constant(2),
        'gpu_remapped_rows{host="h", gpu="1", kind="failure"}': constant(1),
        'gpu_retired_pages{host="h", gpu="1", kind="pending"}': constant(1),
        'gpu_xid_last_timestamp_seconds{host="h", gpu="1", xid="79"}': constant((GAP - 10) * STEP),
        'gpu_xid_last_timestamp_seconds{host="h", gpu="1", xid="92"}': constant((GAP - 10) * STEP),
    }),
    "GPUHot": (2, {
        'gpu_temperature_celsius{host="h", gpu="1", sensor="gpu"}': constant(95),
        'gpu_throttle_active{host="h", gpu="3", reason="sw_thermal_slowdown"}': constant(1),
        'gpu_throttle_active{host="h", gpu="3", reason="hw_slowdown"}': constant(1),
    }),
    "GPUThrottled": (1, {'gpu_throttle_active{host="h", gpu="2", reason="hw_slowdown"}': constant(1)}),
}  # fmt: skip
COLLECTORS = ("system", "gpu", "docker", "systemd", "supervisor", "logs")
WELL: dict[str, Values] = {
    'host_up{host="h", group="g"}': constant(1),
    **{f'host_collect_success{{host="h", collector="{name}"}}': constant(1) for name in COLLECTORS},
}
SERIES = {**WELL, **{name: values for _, series in FIRING.values() for name, values in series.items()}}
NOT_COLLECTED = ("host_up", "host_key_changed", "host_info", "service_up", "host_collect_success")


def with_gap(values: Values, length: int) -> str:
    return f"{values(0, GAP)} stale {'_ ' * (length - 1)}{values(GAP + length, END)}"


def named(series: str, **labels: str) -> str:
    """Return a series of the exporter's job, with more labels."""
    more = {"job": "defib-exporter", **labels}
    return series.replace("{", "{" + "".join(f'{name}="{value}", ' for name, value in more.items()), 1)


def gap_in_all(length: int) -> Iterator[tuple[str, str]]:
    for series, values in SERIES.items():
        yield named(series), with_gap(values, length)


def failed_run() -> Iterator[tuple[str, str]]:
    """Yield the series if the next run of all collectors fails, and the one after that succeeds 90 seconds later."""
    for series, values in SERIES.items():
        if not series.startswith(NOT_COLLECTED):
            yield named(series), with_gap(values, 3)
        elif series.startswith("host_collect_success") and series in WELL:
            yield named(series), f"{values(0, GAP)} 0 0 0 {values(GAP + 3, END)}"
        else:
            yield named(series), values(0, END)


def two_exporters() -> Iterator[tuple[str, str]]:
    """Yield the series of two exporters, of which one is replaced by a third."""
    for series, values in SERIES.items():
        yield named(series, instance="a"), values(0, END)
        yield named(series, instance="b"), f"{values(0, GAP)} stale"
        yield named(series, instance="c"), f"{'_ ' * (GAP + 2)}{values(GAP + 2, END)}"


SCENARIOS = {
    "a lost scrape": lambda: gap_in_all(1),
    "a restart of the exporter": lambda: gap_in_all(3),
    "a failed run of all collectors": failed_run,
    "two exporters, of which one is replaced": two_exporters,
}


def check(path: Path, series: Iterator[tuple[str, str]], expected: list[dict[str, Any]]) -> None:
    test = {
        "interval": f"{STEP}s",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "promql_expr_test": expected,
    }
    document = {"rule_files": [str(file) for file in FILES], "evaluation_interval": f"{STEP}s", "tests": [test]}
    path.write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def firing(alert: str, sample: int, count: int) -> dict[str, Any]:
    return {
        "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
        "eval_time": f"{sample * STEP}s",
        "exp_samples": [{"value": count}] if count else [],
    }


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_alerts_neither_end_nor_begin_again_at_a_gap(tmp_path: Path, scenario: str) -> None:
    samples = [LAST, *range(GAP, GAP + 6), GAP + 8]  # HostRebooted fires for ten minutes only
    expected = [firing(alert, sample, count) for alert, (count, _) in FIRING.items() for sample in samples]
    check(tmp_path / "test.yml", SCENARIOS[scenario](), expected)


@pytest.mark.needs("promtool")
def test_alerts_of_a_renamed_host_end(tmp_path: Path) -> None:
    def renamed() -> Iterator[tuple[str, str]]:
        for series, values in SERIES.items():
            yield named(series), f"{values(0, GAP)} stale"
            yield named(series.replace('host="', 'host="new-')), f"{'_ ' * (GAP + 1)}{values(GAP + 1, END)}"

    ended = {
        # An OOM kill is shown for a quarter of an hour.
        "expr": 'count by (alertname) (ALERTS{alertname!="HostOOMKill", alertstate="firing", host!~"new-.*"})',
        "eval_time": f"{(END - 1) * STEP}s",
        "exp_samples": [],
    }
    # The new name has no past: it has neither booted nor lost a GPU.
    quiet = [firing(alert, END - 1, 0) for alert in ("GPUMissing", "HostRebooted")]
    check(tmp_path / "test.yml", renamed(), [ended, *quiet, firing("HostDown", END - 1, 2)])


def test_every_alert_of_hosts_and_gpus_crosses_gaps() -> None:
    alerts = {rule["alert"] for rule in rules(*FILES) if "alert" in rule}
    # These look back over hours: alerts/tests/hosts_days_test.yml and gpus_days_test.yml.
    assert alerts - {"HostDiskFilling", "GPUIdleHeld"} == set(FIRING)
