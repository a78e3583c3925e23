"""The collectors over a real sshd and on this machine: the published metrics."""

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from exporter.exposition.collector_samples import SERIES_LIMIT
from exporter.metrics import ExporterMetrics
from exporter.scheduler import collector_scheduler
from exporter.scheduler.probe_scheduler import ProbeScheduler
from exporter.scheduler.schedule import phase_offset
from fleet.host.files import parse_listings
from fleet.managers.systemd import UnitStatus
from fleet.managers.systemd import parse_units as systemd_units
from fleet.wrapper import render_wrapper
from runtime.redaction import Redactor
from tests.fleet import descendants
from tests.gpu import CARD, write_nvidia_smi
from tests.integration import peers
from tests.integration.conftest import start_supervisord
from tests.support import eventually, inventory_of

LOCAL = {"address": "127.0.0.1", "shell": "local"}
Samples = dict[tuple[str, ...], float]
WRAPPER = Path(__file__).parents[2] / "deploy" / "ssh" / "defib-shell"
SHARED = Path(__file__).parents[3] / "shared" / "gpu"
ERRORS = {
    "mismatch": ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.144\n", 18),
    "not running": ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9),
    "no devices": ("No devices were found\n", 6),
    "lost": ("Unable to determine the device handle for GPU 0000:07:00.0: GPU is lost.\n", 15),
}


class Collected:
    """A scheduler with hosts, and the samples that it publishes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.scheduler = ProbeScheduler(ExporterMetrics(), Redactor())

    async def of(self, hosts: dict[str, Any], services: dict[str, Any] | None = None) -> None:
        written = {"hosts": hosts, "services": services or {}}
        known = await asyncio.to_thread(inventory_of, self._folder, written)
        await self.scheduler.apply(known.inventory)

    @property
    def samples(self) -> Samples:
        """Values by metric and labels (without those of the host), in the order of the page."""
        text = b"".join(self.scheduler.page.chunks()).decode()
        return {
            (
                sample.name,
                *(value for name, value in sample.labels.items() if name not in ("host", "group")),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def value(self, *key: str) -> float:
        async def there() -> bool:
            return key in self.samples

        await eventually(there)
        return self.samples[key]

    async def shows(self, expected: Mapping[tuple[str, ...], float | None]) -> Samples:
        """Wait until all these samples stand there at once, and return the page.

        `None` is for a sample that is not there. A run that a busy machine cut short is followed by another.
        """

        async def shown() -> Samples | None:
            samples = self.samples
            missing = {key: samples.get(key) for key, value in expected.items() if samples.get(key) != value}
            return None if missing else samples

        found = await eventually(shown)
        assert found is not None
        return found

    async def becomes(self, expected: float, *key: str) -> None:
        await self.shows({key: expected})


@pytest.fixture
async def collected(tmp_path: Path) -> AsyncIterator[Collected]:
    made = Collected(tmp_path / "config")
    yield made
    await made.scheduler.close()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def hardened(host: Sshd, path: str, allowed: str) -> None:
    """Restrict the account's key to the wrapper."""
    folder = host.key_file.parent
    (folder / "allowed").write_text(allowed)
    key = (folder / "authorized").read_text()
    command = f"{WRAPPER} read {folder} {path}"
    (folder / "authorized").write_text(f'restrict,command="{command}" {key}')


async def over_ssh(launcher: Launcher, folder: Path, path: str, **environment: str) -> tuple[Sshd, dict[str, Any]]:
    (port,) = reserve_ports(1)
    host = await sshd.start(launcher, folder / "sshd", port, {"PATH": path, **environment})
    ssh = {"user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    return host, {"address": "127.0.0.1", "ssh": ssh}


async def test_invalid_samples_of_a_host_do_not_affect_other_metrics(tools: Path, collected: Collected) -> None:
    """Prometheus rejects a page with a number out of range, and does not limit the number of series."""
    named = {"well": "1", "huge": "9" * 400, "n" * 2000: "1", **{f"c{number:04}": "1" for number in range(1500)}}
    lines = "".join(f"/{name}\\trunning\\t\\t0\\t-\\t{restarts}\\ti\n" for name, restarts in named.items())
    (tools / "told").write_text(lines.replace("\\t", "\t"))
    script = f"case $1 in ps) echo listed ;; *) cat {tools}/told ;; esac"
    (tools / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "docker").chmod(0o755)
    await collected.of({"h": {**LOCAL, "collect": {"docker": "1s"}}})
    await collected.becomes(0, "host_collect_success", "docker")
    samples = collected.samples
    assert all(abs(value) < float("inf") for value in samples.values())
    assert samples["host_container_up", "huge"] == 1
    assert len([key for key in samples if key[0].startswith("host_container_")]) <= SERIES_LIMIT


@pytest.mark.needs("sshd")
@pytest.mark.parametrize("over", ["ssh", "wrapper", "local"])
async def test_cards(launcher: Launcher, tmp_path: Path, tools: Path, collected: Collected, over: str) -> None:
    other = {**CARD, "index": "1", "uuid": "GPU-2", "pci.bus_id": "00000000:0B:00.0", "memory.used": "[Unknown Error]"}
    write_nvidia_smi(tools / "nvidia-smi", (CARD, other), apps=f"GPU-1, {os.getpid()}, 1000, /usr/bin/x, y\n")
    host: dict[str, Any] = dict(LOCAL)
    if over != "local":
        made, host = await over_ssh(launcher, tmp_path, os.environ["PATH"])
        if over == "wrapper":
            hardened(made, os.environ["PATH"], "fields\nquery\nprocesses\nxids\n")
            host = {**host, "ssh": {**host["ssh"], "wrapper": True}}
    await collected.of({"h": {**host, "collect": {"gpu": "1s"}}})
    await collected.becomes(1, "host_collect_success", "gpu")
    samples = collected.samples
    mib = 2.0**20
    expected = {
        ("gpu_info", "0", "GPU-1", "NVIDIA A100-SXM4-80GB", "550.54.15", "00000000:07:00.0"): 1,
        ("gpu_count",): 2, ("gpu_healthy", "0"): 1,
        ("gpu_utilization_ratio", "0"): 0.93, ("gpu_memory_utilization_ratio", "0"): 0.41,
        ("gpu_memory_total_bytes", "0"): 81920 * mib, ("gpu_memory_used_bytes", "0"): 70000 * mib,
        ("gpu_memory_reserved_bytes", "0"): 600 * mib, ("gpu_memory_free_bytes", "0"): 11320 * mib,
        ("gpu_temperature_celsius", "0", "gpu"): 66, ("gpu_power_watts", "0"): 388.12,
        ("gpu_power_limit_watts", "0"): 400, ("gpu_clock_hertz", "0", "sm"): 1410e6,
        ("gpu_clock_hertz", "0", "memory"): 1593e6, ("gpu_performance_state", "0"): 0,
        ("gpu_throttle_active", "0", "sw_power_cap"): 1, ("gpu_throttle_active", "0", "hw_slowdown"): 0,
        ("gpu_throttle_seconds_total", "0", "sw_power_cap"): 1.5,
        ("gpu_ecc_errors_total", "0", "corrected", "volatile"): 3,
        ("gpu_ecc_errors_total", "0", "uncorrected", "volatile"): 0,
        ("gpu_remapped_rows", "0", "correctable"): 1, ("gpu_remapped_rows", "0", "pending"): 0,
        ("gpu_remapped_rows", "0", "failure"): 0, ("gpu_recovery_needed", "0", "None"): 0,
        ("gpu_process_memory_bytes", "0", "host"): 1000 * mib,
    }  # fmt: skip
    there = {key: value for key, value in samples.items() if key[0].startswith("gpu_") and key[1:2] != ("1",)}
    assert there == {key: pytest.approx(value) for key, value in expected.items()}
    assert samples["gpu_healthy", "1"] == 0
    assert ("gpu_memory_used_bytes", "1") not in samples
    assert samples["host_up",] == 1


@pytest.mark.parametrize("name", ERRORS)
async def test_failing_drivers_and_gpus(tools: Path, collected: Collected, name: str) -> None:
    """The metrics report the failure and keep those of GPUs that still answer."""
    text, status = ERRORS[name]
    write_nvidia_smi(tools / "nvidia-smi", (CARD,))
    await collected.of({"h": {**LOCAL, "collect": {"gpu": "4s"}}})
    await collected.becomes(1, "gpu_healthy", "0")
    write_nvidia_smi(tools / "nvidia-smi", (), before=text, status=status)
    await collected.shows(
        {
            ("host_collect_success", "gpu"): 0,
            ("host_up",): 1,
            # A card that is lost is the one that had its address before.
            ("gpu_healthy", "0"): 0 if name == "lost" else None,
            ("gpu_utilization_ratio", "0"): None,
        }
    )


async def test_a_lost_gpu_does_not_hide_the_others(tools: Path, collected: Collected) -> None:
    lost = "Unable to determine the device handle for GPU1: 0000:34:00.0: Unknown Error\n"
    write_nvidia_smi(tools / "nvidia-smi", (CARD,), before=lost)
    await collected.of({"h": {**LOCAL, "collect": {"gpu": "4s"}}})
    await collected.becomes(1, "gpu_healthy", "0")
    assert collected.samples["gpu_healthy", "1"] == 0
    assert collected.samples["gpu_utilization_ratio", "0"] == pytest.approx(0.93)


async def test_a_corrupted_inforom_is_reported_with_the_metrics(tools: Path, collected: Collected) -> None:
    write_nvidia_smi(tools / "nvidia-smi", (CARD,), status=14)
    await collected.of({"h": {**LOCAL, "collect": {"gpu": "4s"}}})
    await collected.becomes(1, "host_collect_success", "gpu")


async def test_fields_are_read_again_after_a_driver_change(tools: Path, collected: Collected) -> None:
    write_nvidia_smi(tools / "nvidia-smi", (CARD,))
    await collected.of({"h": {**LOCAL, "collect": {"gpu": "4s"}}})
    await collected.becomes(0, "gpu_throttle_active", "0", "hw_slowdown")
    older = {name.replace("event_reasons.", "throttle_reasons."): text for name, text in CARD.items()}
    older["clocks_throttle_reasons.hw_slowdown"] = "Active"
    write_nvidia_smi(tools / "nvidia-smi", (older,))
    await collected.shows({("gpu_throttle_active", "0", "hw_slowdown"): 1, ("host_collect_success", "gpu"): 1})


async def test_a_hanging_driver_does_not_affect_other_collectors(tools: Path, collected: Collected) -> None:
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tools / "nvidia-smi").chmod(0o755)
    gpu = {"every": "1s", "timeout": "2s"}
    await collected.of({"h": {**LOCAL, "collect": {"gpu": gpu, "system": "1s"}}})
    await collected.becomes(0, "host_collect_success", "gpu")
    await collected.becomes(1, "host_collect_success", "system")
    assert collected.samples["host_collect_duration_seconds", "gpu"] < 30


async def test_a_driver_that_takes_longer_than_the_interval_is_read(tools: Path, collected: Collected) -> None:
    write_nvidia_smi(tools / "quick")
    (tools / "nvidia-smi").write_text(f'#!/bin/sh\nsleep 1.5\nexec {tools}/quick "$@"\n')
    (tools / "nvidia-smi").chmod(0o755)
    await collected.of({"h": {**LOCAL, "collect": {"gpu": "1s", "system": "1s"}}})
    await collected.shows({("gpu_power_watts", "0"): 388.12, ("host_collect_success", "gpu"): 1})
    assert collected.samples["host_collect_success", "system"] == 1
    assert collected.samples["host_collect_duration_seconds", "gpu"] > 1.5


async def test_the_series_of_a_gpu_that_vanishes_end(tools: Path, collected: Collected) -> None:
    other = {**CARD, "index": "1", "uuid": "GPU-2", "pci.bus_id": "00000000:0B:00.0"}
    write_nvidia_smi(tools / "nvidia-smi", (CARD, other))
    await collected.of({"h": {**LOCAL, "collect": {"gpu": "1s"}}})
    await collected.becomes(2, "gpu_count")
    write_nvidia_smi(tools / "nvidia-smi", (CARD,))
    samples = await collected.shows({("gpu_count",): 1, ("host_collect_success", "gpu"): 1})
    assert not [key for key in samples if key[0].startswith("gpu_") and key[1:2] == ("1",)]


async def test_the_last_xid_of_each_gpu_and_number_is_kept(tools: Path, collected: Collected) -> None:
    """Neither many lines about an application nor the limited size of the kernel log hide a fault."""
    write_nvidia_smi(tools / "nvidia-smi")
    log = tools / "log"
    flood = "".join(f"[ 51{n:03}.0] NVRM: Xid (PCI:0000:86:00): 31, pid=4242, name=a: 7, Ch 8\n" for n in range(300))
    log.write_text(f"[ 5000.0] NVRM: Xid (PCI:0000:07:00): 79, pid='<unknown>', fallen off the bus.\n{flood}")
    (tools / "dmesg").write_text(f"#!/bin/sh\ncat {log}\n")
    (tools / "dmesg").chmod(0o755)
    await collected.of({"h": {**LOCAL, "collect": {"gpu": "1s"}}})
    at = await collected.value("gpu_xid_last_timestamp_seconds", "0", "79")
    assert at == pytest.approx(_booted() + 5000, abs=1)
    assert collected.samples["gpu_xid_last_timestamp_seconds", "00000000:86:00.0", "31"] == pytest.approx(
        at + 46299, abs=1
    )
    log.write_text("[ 60000.0] NVRM: Xid (PCI:0000:07:00): 13, Graphics Exception\n")
    await collected.value("gpu_xid_last_timestamp_seconds", "0", "13")
    assert collected.samples["gpu_xid_last_timestamp_seconds", "0", "79"] == at


@pytest.mark.needs("sshd")
async def test_the_machine(launcher: Launcher, tmp_path: Path, collected: Collected) -> None:
    _, host = await over_ssh(launcher, tmp_path, os.environ["PATH"])
    await collected.of({"h": {**host, "collect": {"system": "1s"}}})
    assert 0 <= await collected.value("host_cpu_usage_ratio") <= 1
    samples = collected.samples
    booted = int(Path("/proc/stat").read_text().split("btime ")[1].split()[0])
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert samples["host_boot_timestamp_seconds",] == booted
    assert samples["host_memory_total_bytes",] == total
    assert samples["host_cpu_count",] == os.cpu_count()
    assert abs(samples["host_clock_offset_seconds",]) < 1
    sizes = {key[1]: value for key, value in samples.items() if key[0] == "host_filesystem_size_bytes"}
    for mountpoint, size in sizes.items():
        found = os.statvfs(mountpoint)
        assert size == found.f_blocks * found.f_frsize


@pytest.mark.needs("sshd")
async def test_changed_thresholds_restart_neither_collectors_nor_the_connection(
    launcher: Launcher, tmp_path: Path, collected: Collected
) -> None:
    def running() -> set[asyncio.Task[Any]]:
        return {task for task in asyncio.all_tasks() if task.get_name().startswith("collect ")}

    _, host = await over_ssh(launcher, tmp_path, os.environ["PATH"])
    host["collect"] = {"system": "1s"}
    await collected.of({"h": host})
    await collected.becomes(1, "host_up")
    before = running()
    await collected.of({"h": {**host, "thresholds": {"load": {"warning": 2}}}})
    assert collected.samples["host_threshold", "load", "warning"] == 2
    assert collected.scheduler.ssh_connections() == {"connected": 1}
    assert running() == before


@pytest.mark.needs("sshd", "dockerd", "busybox", "systemd")
@pytest.mark.parametrize("by_wrapper", [False, True])
async def test_containers_units_and_programs_in_one_round_trip_with_their_probes(
    launcher: Launcher, tmp_path: Path, container: str, systemd: Path, collected: Collected, by_wrapper: bool
) -> None:
    programs = (
        "[program:well]\ncommand=/bin/sleep 1000\nstartsecs=0\n[program:ill]\ncommand=/bin/false\nstartretries=99\n"
        "[program:once]\ncommand=/bin/true\nstartsecs=0\n[program:later]\ncommand=/bin/true\nautostart=false\n"
    )
    own = Path(
        f"/run/defib-test-{os.getpid()}-{by_wrapper}"
    )  # others can write to temporary folders, which the wrapper refuses
    own.mkdir()
    await launcher.remove_folder_at_end(own)
    config = await start_supervisord(launcher, own, programs)
    path = f"{systemd}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    made, host = await over_ssh(launcher, tmp_path, path, DOCKER_HOST=os.environ["DOCKER_HOST"])
    if by_wrapper:
        allowed = f"docker\nfailed-units\nsystemd well.service\nsystemd once.service\nsupervisor {config}\n"
        hardened(made, path, allowed)
        host = {**host, "ssh": {**host["ssh"], "wrapper": True}}
    collect = {
        "docker": "2s", "systemd": {"every": "2s", "units": ["well", "once"]},
        "supervisor": {"every": "2s", "configs": [str(config)]},
    }  # fmt: skip
    services = {"c": {"host": "h", "probe": {"every": "2s", "retry_every": "2s", "container": {"name": container}}}}
    log = tmp_path / "sshd" / "log"
    sessions, began = log.read_text().count("Starting session"), time.monotonic()
    await collected.of({"h": {**host, "collect": collect}}, services)
    await collected.becomes(1, "host_container_up", container)

    async def some_rounds() -> bool:
        return collected.scheduler.services["c"].state.successes >= 3

    await eventually(some_rounds)
    rounds = (time.monotonic() - began) / 2 + 1
    assert log.read_text().count("Starting session") - sessions <= rounds
    started = subprocess.run(
        ["docker", "inspect", "--format", "{{.State.StartedAt}}", container],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    samples = await collected.shows(
        {
            ("host_container_restarts_total", container): 0,
            ("host_container_info", container, container, "no"): 1,
            ("host_container_exit_code", container): None,
            ("host_container_health", container, "starting"): None,
            ("host_unit_active", "well.service"): 1,
            ("host_unit_finished", "well.service"): 0,
            ("host_unit_restarts_total", "well.service"): 0,
            ("host_unit_active", "once.service"): 0,
            ("host_unit_finished", "once.service"): 1,
            ("host_unit_active", "broken.service"): 0,
            ("host_unit_finished", "broken.service"): None,  # it is not listed
            ("host_program_running", "well"): 1,
            ("host_program_finished", "well"): 0,
            ("host_program_running", "ill"): 0,
            ("host_program_finished", "ill"): 0,
            ("host_program_running", "once"): 0,
            ("host_program_finished", "once"): 1,
            ("host_program_running", "later"): 0,
            ("host_program_finished", "later"): 1,
        }
    )
    assert samples["host_container_started_timestamp_seconds", container] > 1.6e9, started


@pytest.mark.needs("dockerd", "busybox")
async def test_containers_that_finished_failed_and_start(container: str, collected: Collected) -> None:
    def run(name: str, *argv: str) -> str:
        full = f"{container}-{name}"
        subprocess.run(
            ["docker", "run", "--detach", "--pull", "never", "--name", full, *argv], check=True, capture_output=True
        )
        return full

    names = [
        run("done", "--network", "host", container, "/bin/busybox", "true"),
        run("failed", "--restart", "on-failure:1", "--network", "host", container, "/bin/busybox", "false"),
        run("starts", "--memory", "64m", "--network", "host", "--health-cmd", "/bin/busybox true", "--health-interval", "1h", "--restart", "always", container, "/bin/sleep", "1000"),
    ]  # fmt: skip
    try:
        done, failed, starts = names
        await collected.of({"h": {**LOCAL, "collect": {"docker": "1s"}}})
        await collected.shows(
            {
                ("host_container_up", done): 0,
                ("host_container_exit_code", done): 0,
                ("host_container_info", done, container, "no"): 1,
                ("host_container_up", failed): 0,
                ("host_container_exit_code", failed): 1,
                ("host_container_info", failed, container, "on-failure"): 1,
                ("host_container_up", starts): 0,
                ("host_container_exit_code", starts): None,
                ("host_container_health", starts, "starting"): 1,
                ("host_container_health", starts, "healthy"): 0,
                ("host_container_health", starts, "unhealthy"): 0,
                ("host_container_info", starts, container, "always"): 1,
                ("host_container_memory_bytes", done): None,
            }
        )
        assert 0 < await collected.value("host_container_cpu_seconds_total", starts) < 60
        assert 0 < collected.samples["host_container_memory_bytes", starts] < 64 * 2**20
        assert collected.samples["host_container_memory_limit_bytes", starts] == 64 * 2**20
    finally:
        subprocess.run(["docker", "rm", "--force", *names], check=True, capture_output=True)


async def test_what_the_kernel_counts(collected: Collected) -> None:
    await collected.of({"h": {**LOCAL, "collect": {"system": "1s"}}})
    await collected.becomes(1, "host_collect_success", "system")
    samples = collected.samples
    kills = re.findall(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    assert samples["host_oom_kills_total",] <= int(kills[0])
    assert samples["host_file_descriptors_limit",] == int(Path("/proc/sys/fs/file-nr").read_text().split()[2])
    assert 0 < samples["host_file_descriptors_allocated",] < samples["host_file_descriptors_limit",]
    cards = {path.parent.name for path in Path("/sys/class/net").glob("*/device")}
    assert {key[1] for key in samples if key[0] == "host_network_errors_total"} == cards
    disks = {path.parent.name for path in Path("/sys/block").glob("*/device")}
    assert {key[1] for key in samples if key[0] == "host_disk_io_weighted_seconds_total"} == disks
    assert {key[1] for key in samples if key[0] == "host_disk_bytes_total"} == disks
    assert {key[1] for key in samples if key[0] == "host_network_bytes_total"} == cards
    swap = re.findall(r"^SwapTotal: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert samples["host_swap_total_bytes",] == int(swap[0]) * 1024
    pressure = {f"/proc/pressure/{key[1]}" for key in samples if key[0] == "host_pressure_seconds_total"}
    assert pressure == {str(path) for path in Path("/proc/pressure").glob("*") if path.name != "irq"}


async def test_a_filesystem_that_hangs_is_reported_with_the_other_readings(tools: Path, collected: Collected) -> None:
    asked = tools / "asked"
    (tools / "stat").write_text(f"#!/bin/sh\ncase $4 in /proc) echo 1 ;; *) echo >>{asked}; exec sleep 60 ;; esac\n")
    (tools / "stat").chmod(0o755)
    await collected.of({"h": {**LOCAL, "collect": {"system": "4s"}}})
    await collected.becomes(0, "host_collect_success", "system")
    errors = [value for key, value in collected.samples.items() if key[0] == "host_filesystem_error"]
    assert set(errors) <= {1}
    assert collected.samples["host_cpu_count",] == os.cpu_count()
    await collected.value("host_cpu_usage_ratio")  # of the second run, which leaves these filesystems alone
    assert not errors or len(asked.read_text()) == len(errors)


@pytest.mark.parametrize(
    ("readings", "allowed"),
    [
        (("10000 0 5000 100000 9000 0 0 0|1790000000", "10080 0 5050 100065 8920 0 0 0|1790000001"), (0.5, 0.7)),
        (("10000 0 5000 100000 900 0 0 5000|1790000001", "10030 0 5015 100300 920 0 0 4900|1790000000"), (0.1, 0.2)),
    ],
)
async def test_kernel_times_that_go_back(
    tools: Path, collected: Collected, tmp_path: Path, readings: tuple[str, str], allowed: tuple[float, float]
) -> None:
    """Times of iowait and steal may go back, and the boot time may differ by a second from reading to reading."""
    first, second = (reading.split("|") for reading in readings)
    state = tmp_path / "second"
    answers = [f'echo "cpu  {cpu} 0 0"; echo "btime {booted}"' for cpu, booted in (first, second)]
    (tools / "grep").write_text(
        f'#!/bin/sh\ncase "$*" in */proc/stat*) [ ! -e {state} ] || {{ {answers[1]}; exit; }}; touch {state}; {answers[0]} ;;\n'
        f'*) exec {shutil.which("grep")} "$@" ;; esac\n'
    )
    (tools / "grep").chmod(0o755)
    await collected.of({"h": {**LOCAL, "collect": {"system": "4s"}}})
    low, high = allowed
    assert low <= await collected.value("host_cpu_usage_ratio") <= high
    assert collected.samples["host_boot_timestamp_seconds",] == float(first[1])


async def test_the_configured_number_of_gpus_is_published_while_the_driver_fails(
    tools: Path, collected: Collected
) -> None:
    write_nvidia_smi(tools / "nvidia-smi", (), before=ERRORS["not running"][0], status=9)
    await collected.of({"h": {**LOCAL, "collect": {"gpu": {"every": "1s", "gpus": 8}}}})
    await collected.becomes(0, "host_collect_success", "gpu")
    assert collected.samples["gpu_expected_count",] == 8


def late_first() -> str:
    """Return the name of a service whose first probe on schedule is almost a minute after the start."""
    return next(name for name in map("s{}".format, itertools.count()) if phase_offset(name) > 0.97)


HOURLY = {"every": "1h", "retry_every": "1h", "fail_after": 1}


@pytest.mark.needs("sshd")
async def test_the_services_of_a_host_whose_shell_fails_are_probed_at_once(
    launcher: Launcher, tmp_path: Path, collected: Collected
) -> None:
    made, host = await over_ssh(launcher, tmp_path, os.environ["PATH"])
    name = late_first()
    async with peers.web_server(_answer) as port:
        services = {name: {"host": "h", "probe": {**HOURLY, "http": {"url": f"http://127.0.0.1:{port}/"}}}}
        await collected.of({"h": {**host, "collect": {"system": "1s"}}}, services)
        await collected.becomes(1, "host_up")
        probed = collected.scheduler.services[name]
        assert (await collected.scheduler.probe_now(probed)).success
        assert made.pid is not None
        for pid in (made.pid, *descendants(made.pid)):
            os.kill(pid, signal.SIGKILL)
        await collected.becomes(0, "host_up")

        async def probed_again() -> bool:
            return probed.state.successes == 2

        await eventually(probed_again)


@pytest.mark.needs("sshd")
async def test_the_collectors_of_a_host_run_again_as_soon_as_one_of_its_services_is_up(
    launcher: Launcher, tmp_path: Path, collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector_scheduler, "RETRY_WITHIN", 3600.0)  # as after many runs without an answer
    made, host = await over_ssh(launcher, tmp_path, os.environ["PATH"])
    assert made.pid is not None
    await launcher.kill(made.pid, signal.SIGKILL)
    name, status = late_first(), 500

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with peers.web_server(answer) as port:
        services = {name: {"host": "h", "probe": {**HOURLY, "http": {"url": f"http://127.0.0.1:{port}/"}}}}
        await collected.of({"h": {**host, "collect": {"system": "1h"}}}, services)
        await collected.becomes(0, "host_up")
        probed = collected.scheduler.services[name]
        assert not (await collected.scheduler.probe_now(probed)).success
        await sshd.restart(launcher, tmp_path / "sshd", made)
        status = 200
        assert (await collected.scheduler.probe_now(probed)).success
        await collected.becomes(1, "host_up")


async def test_the_services_of_a_host_without_collectors_are_probed_when_one_goes_down(collected: Collected) -> None:
    name = late_first()
    async with peers.web_server(_answer) as lasting:
        slow = {**HOURLY, "http": {"url": f"http://127.0.0.1:{lasting}/"}}
        async with peers.web_server(_answer) as ending:
            quick = {"every": "200ms", "retry_every": "200ms", "tcp": {"address": f"127.0.0.1:{ending}"}}
            services = {
                name: {"host": "h", "probe": slow},
                "quick": {"host": "h", "probe": quick},
                "other": {"probe": slow},
            }
            await collected.of({"h": {"address": "127.0.0.1"}}, services)
            known = collected.scheduler.services
            for each in (name, "quick"):
                assert (await collected.scheduler.probe_now(known[each])).success

            async def up() -> bool:
                return known["quick"].state.is_steadily_up

            await eventually(up)
            assert known[name].state.successes == 1

        async def probed_again() -> bool:
            return known[name].state.successes == 2

        await eventually(probed_again)
        assert known["quick"].state.up is False


async def _answer(_request: web.Request) -> web.Response:
    return web.Response()


async def test_an_unreachable_host_is_logged_once(
    collected: Collected, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unreachable = {"address": "127.0.0.1", "ssh": {"port": 1, "user": "u", "known_hosts": str(tmp_path / "none")}}
    (tmp_path / "none").write_text("")
    await collected.of({"h": {**unreachable, "collect": {"system": "300ms"}}})
    await collected.becomes(0, "host_up")
    await asyncio.sleep(2)
    assert collected.samples["host_collect_success", "system"] == 0
    logged = capsys.readouterr()
    assert (logged.out + logged.err).count("collector_failed") == 1


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.long)])
async def test_many_unreachable_hosts(
    collected: Collected, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """Each has its metric and one log line; retries become rare, and no resources leak."""
    (tmp_path / "none").write_text("")
    ssh = {"port": 1, "user": "u", "known_hosts": str(tmp_path / "none")}
    hosts = {f"h{n}": {"address": "127.0.0.1", "ssh": ssh, "collect": {"system": "2s"}} for n in range(count)}
    files, tasks = len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())
    await collected.of(hosts)

    async def all_told() -> bool:
        return b"".join(collected.scheduler.page.chunks()).count(b"\nhost_up{") == count

    await eventually(all_told)
    text = b"".join(collected.scheduler.page.chunks()).decode()
    assert [line for line in text.splitlines() if line.startswith("host_up{") and not line.endswith(" 0")] == []
    logged = ""

    async def all_logged() -> bool:
        nonlocal logged
        captured = capsys.readouterr()
        logged += captured.out + captured.err
        return logged.count("Connection refused") >= count

    await eventually(all_logged)
    await asyncio.sleep(3)  # in which each was tried again
    captured = capsys.readouterr()
    logged += captured.out + captured.err
    errors_by_host: dict[str, list[str]] = {}
    for error, host in re.findall(r"collector_failed .* error=(.*) host=(\S+)", logged):
        errors_by_host.setdefault(host, []).append(error)
    assert len(errors_by_host) == count
    # A busy machine may log another error in between.
    repeated = [host for host, errors in errors_by_host.items() if any(a == b for a, b in itertools.pairwise(errors))]
    assert repeated == []
    assert len(list(Path("/proc/self/fd").iterdir())) - files < 200
    assert len(asyncio.all_tasks()) - tasks <= count + 200


@pytest.mark.needs("sshd")
async def test_a_banner_and_a_login_shell_of_another_kind(
    launcher: Launcher, tmp_path: Path, collected: Collected
) -> None:
    """What greets on stdout does not disturb, and csh is as good as sh."""
    csh = next((path for path in map(shutil.which, ("tcsh", "csh", "fish")) if path), None)
    login = tmp_path / "login"
    run = f'exec {csh} -c "$2"' if csh else 'exec sh -c "$2"'
    login.write_text(f"#!/bin/sh\necho 'Welcome to this host!'\necho '@defib nonsense'\n{run}\n")
    login.chmod(0o755)
    host, written = await over_ssh(launcher, tmp_path, os.environ["PATH"])
    passwd = tmp_path / "sshd" / "passwd"
    if passwd.is_file():
        passwd.write_text(passwd.read_text().replace(":/bin/sh\n", f":{login}\n", 1))
    await collected.of({"h": {**written, "collect": {"system": "1s"}}})
    await collected.becomes(1, "host_collect_success", "system")
    assert host.port


def captures() -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted((SHARED / "captures").iterdir())
    return []


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text)
    return None


SAME: dict[str, tuple[tuple[str, ...], Callable[[float], float]]] = {
    "utilization.gpu": (("gpu_utilization_ratio", "0"), lambda value: value / 100),
    "utilization.memory": (("gpu_memory_utilization_ratio", "0"), lambda value: value / 100),
    "memory.total": (("gpu_memory_total_bytes", "0"), lambda value: value * 2**20),
    "memory.used": (("gpu_memory_used_bytes", "0"), lambda value: value * 2**20),
    "memory.reserved": (("gpu_memory_reserved_bytes", "0"), lambda value: value * 2**20),
    "memory.free": (("gpu_memory_free_bytes", "0"), lambda value: value * 2**20),
    "temperature.gpu": (("gpu_temperature_celsius", "0", "gpu"), lambda value: value),
    "temperature.memory": (("gpu_temperature_celsius", "0", "memory"), lambda value: value),
    "power.draw": (("gpu_power_watts", "0"), lambda value: value),
    "power.draw.instant": (("gpu_power_instant_watts", "0"), lambda value: value),
    "enforced.power.limit": (("gpu_power_limit_watts", "0"), lambda value: value),
    "clocks.current.sm": (("gpu_clock_hertz", "0", "sm"), lambda value: value * 1e6),
    "clocks.current.memory": (("gpu_clock_hertz", "0", "memory"), lambda value: value * 1e6),
    "clocks.current.graphics": (("gpu_clock_hertz", "0", "graphics"), lambda value: value * 1e6),
    "clocks.current.video": (("gpu_clock_hertz", "0", "video"), lambda value: value * 1e6),
    "fan.speed": (("gpu_fan_speed_ratio", "0"), lambda value: value / 100),
    "ecc.errors.corrected.volatile.total": (("gpu_ecc_errors_total", "0", "corrected", "volatile"), lambda value: value),
    "ecc.errors.uncorrected.aggregate.total": (("gpu_ecc_errors_total", "0", "uncorrected", "aggregate"), lambda value: value),
    "remapped_rows.correctable": (("gpu_remapped_rows", "0", "correctable"), lambda value: value),
    "clocks_event_reasons_counters.sw_power_cap": (("gpu_throttle_seconds_total", "0", "sw_power_cap"), lambda value: value / 1e6),
}  # fmt: skip


GPU_SECTIONS = "fields\ninstances\nprocesses\nquery\nxids\n"


async def gpu_host(launcher: Launcher, folder: Path, *, by_wrapper: bool, **environment: str) -> dict[str, Any]:
    """A host of which the `gpu` collector reads, plainly or through the wrapper."""
    made, host = await over_ssh(launcher, folder, os.environ["PATH"], **environment)
    if by_wrapper:
        hardened(made, os.environ["PATH"], GPU_SECTIONS)
        host = {**host, "ssh": {**host["ssh"], "wrapper": True}}
    return {**host, "collect": {"gpu": "4s"}}  # of which a reading may take most


if captures():  # they are kept beside the project, not in it

    @pytest.mark.needs("sshd")
    @pytest.mark.parametrize("by_wrapper", [False, True])
    @pytest.mark.parametrize("phase", ["idle", "load"])
    @pytest.mark.parametrize("capture", captures(), ids=lambda path: path.stem)
    async def test_captures_of_real_cards(
        launcher: Launcher,
        tmp_path: Path,
        tools: Path,
        collected: Collected,
        capture: Path,
        phase: str,
        by_wrapper: bool,
    ) -> None:
        (tools / "nvidia-smi").symlink_to(SHARED / "nvidia-smi")
        environment = {"NVIDIA_SMI_CAPTURE": str(capture), "NVIDIA_SMI_PHASE": phase}
        host = await gpu_host(launcher, tmp_path, by_wrapper=by_wrapper, **environment)
        await collected.of({"h": host})
        await collected.becomes(1, "host_collect_success", "gpu")
        argv: list[Any] = [tools / "nvidia-smi", f"--query-gpu={','.join(SAME)}", "--format=csv,noheader,nounits"]
        asked = subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        for text, (key, unit) in zip(asked.stdout.strip().split(", "), SAME.values(), strict=True):
            number = _number(text)
            assert collected.samples.get(key) == (None if number is None else pytest.approx(unit(number))), (key, text)
        assert collected.samples["gpu_count",] == 1

    @pytest.mark.needs("sshd")
    @pytest.mark.parametrize("by_wrapper", [False, True])
    @pytest.mark.parametrize("answer", sorted((SHARED / "errors").glob("*_rc*.txt")), ids=lambda path: path.stem)
    async def test_answers_of_broken_drivers_and_cards(
        launcher: Launcher, tmp_path: Path, tools: Path, collected: Collected, answer: Path, by_wrapper: bool
    ) -> None:
        """Earlier runs give the index of a lost GPU; the collector fails, and the host is up."""
        broken = tmp_path / "broken"
        (tools / "nvidia-smi").write_text(
            f'#!/bin/sh\n[ ! -e {broken} ] || export NVIDIA_SMI_ANSWER={answer}\nexec {SHARED}/nvidia-smi "$@"\n'
        )
        (tools / "nvidia-smi").chmod(0o755)
        await collected.of({"h": await gpu_host(launcher, tmp_path, by_wrapper=by_wrapper)})
        await collected.becomes(1, "host_collect_success", "gpu")
        broken.touch()

        lost = "handle for GPU" in answer.read_text()

        async def failed() -> bool:
            samples = collected.samples
            # A run that a busy machine cut short knows of no lost card; another one follows.
            return (
                samples.get(("host_collect_success", "gpu")) == 0
                and samples["host_up",] == 1
                and any(key[0] == "gpu_healthy" and value == 0 for key, value in samples.items()) is lost
                and not any(key[0] == "gpu_utilization_ratio" for key in samples)
            )

        await eventually(failed)

    @pytest.mark.needs("sshd")
    @pytest.mark.parametrize(
        ("log", "xid", "card"),
        [
            ("dmesg-xid119.log", "119", "00000000:9B:00.0"),
            ("dmesg-xid-lines.log", "79", "00000000:05:00.0"),
            ("dmesg-xid-lines.log", "63", "00000000:10:1C.0"),
        ],
    )
    async def test_faults_in_the_kernel_s_log(
        launcher: Launcher, tmp_path: Path, tools: Path, collected: Collected, log: str, xid: str, card: str
    ) -> None:
        (tools / "nvidia-smi").symlink_to(SHARED / "nvidia-smi")
        (tools / "dmesg").write_text(f"#!/bin/sh\nexec cat {SHARED}/errors/{log}\n")
        (tools / "dmesg").chmod(0o755)
        await collected.of({"h": await gpu_host(launcher, tmp_path, by_wrapper=False)})
        at = await collected.value("gpu_xid_last_timestamp_seconds", card, xid)
        assert at == (1740328213 if xid == "119" else pytest.approx(_booted() + 100, abs=1))


def _booted() -> float:
    return float(Path("/proc/stat").read_text().split("btime ")[1].split()[0])


async def test_the_kernel_log_is_read_if_the_driver_hangs_from_the_start(tools: Path, collected: Collected) -> None:
    """nvidia-smi hangs in the kernel and cannot be killed."""
    (tools / "nvidia-smi").write_text("#!/bin/sh\n(trap '' TERM; setsid sleep 30) &\nsleep 30\n")
    (tools / "dmesg").write_text("#!/bin/sh\necho '[  100.5] NVRM: Xid (PCI:0000:05:00): 79, fallen off the bus.'\n")
    for each in ("nvidia-smi", "dmesg"):
        (tools / each).chmod(0o755)
    await collected.of({"h": {**LOCAL, "collect": {"gpu": {"every": "4s", "timeout": "4s"}}}})
    await collected.value("gpu_xid_last_timestamp_seconds", "00000000:05:00.0", "79")
    await collected.shows({("host_collect_success", "gpu"): 0, ("host_up",): 1})


@pytest.mark.needs("sshd")
async def test_a_host_whose_key_has_changed_is_sent_nothing_and_told_as_a_matter_of_security(
    launcher: Launcher, tmp_path: Path, collected: Collected, capsys: pytest.CaptureFixture[str]
) -> None:
    host, written = await over_ssh(launcher, tmp_path, os.environ["PATH"])
    another = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    sessions = (tmp_path / "sshd" / "log").read_text().count("Starting session")
    host.known_hosts.write_text(f"[127.0.0.1]:{host.port} {another}\n")
    await collected.of({"h": {**written, "collect": {"system": "1s"}}})
    await collected.becomes(1, "host_key_changed")
    assert collected.samples["host_up",] == 0
    logged = capsys.readouterr()
    assert (logged.out + logged.err).count("host_key_changed") == 1
    assert (tmp_path / "sshd" / "log").read_text().count("Starting session") == sessions


async def test_changed_labels_do_not_restart_a_collector(tools: Path, collected: Collected) -> None:
    write_nvidia_smi(tools / "nvidia-smi", (CARD,))
    host: dict[str, Any] = {**LOCAL, "collect": {"gpu": "10s"}}
    await collected.of({"h": host})
    before = await collected.value("host_collect_duration_seconds", "gpu")
    await collected.of({"h": {**host, "labels": {"rack": "a3"}}})
    assert collected.samples["host_collect_duration_seconds", "gpu"] == before
    assert collected.samples["gpu_healthy", "0"] == 1
    await collected.of({"h": {**host, "collect": {"gpu": "20s"}}})
    assert collected.samples["gpu_healthy", "0"] == 1  # until it was measured anew


def asked_of_the_wrapper(folder: Path, asked: str, tools: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [WRAPPER, "read", folder, tools], env={"PATH": "/usr/bin:/bin", "SSH_ORIGINAL_COMMAND": asked},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    ["", "id", "read @m proc:5:; id", "read @m $(id):5:", "read @m 'proc:5:'", "read", "read @m", "run 5 abc"],
)
def test_requests_that_the_wrapper_refuses(tmp_path: Path, asked: str) -> None:
    (tmp_path / "allowed").write_text("proc\n")
    done = asked_of_the_wrapper(tmp_path, asked, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.startswith("defib-shell: ")) == (126, "", True)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("df:5:", "df is not in"), ("nothing:5:", "unknown section nothing"),
        *((f"proc:{limit}:", "not a number of seconds below 60") for limit in ("0", "0.", "0.0", "60", "099", "062", "1.2.3", ".5", "")),
    ],
)  # fmt: skip
def test_sections_that_the_wrapper_refuses(tmp_path: Path, item: str, message: str) -> None:
    (tmp_path / "allowed").write_text("proc\n")
    done = asked_of_the_wrapper(tmp_path, f"read @m {item} proc:5:", tmp_path)
    section = item.split(":", maxsplit=1)[0]
    assert f"\n@m {section} 126\n" in done.stdout
    assert message in done.stdout
    assert done.stdout.endswith("@m proc 0\n")


def test_the_wrapper_leaves_filesystems_alone_that_hang(tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text("df\n")
    asked = asked_of_the_wrapper(tmp_path, "read @m df:5:", tmp_path).stdout
    numbers = re.findall(r"^sizes (\S+)", asked, re.MULTILINE)
    again = asked_of_the_wrapper(tmp_path, f"read @m df:5:{','.join(numbers)}", tmp_path).stdout
    assert re.findall(r"^skipped (\S+)", again, re.MULTILINE) == sorted(numbers, key=again.find)
    assert "sizes" not in again
    assert "\n@m df 0\n" in again


def test_a_refused_name_does_not_affect_other_names(tmp_path: Path) -> None:
    (tmp_path / "systemctl").write_text('#!/bin/sh\necho "ActiveState=active"\n')
    (tmp_path / "systemctl").chmod(0o755)
    (tmp_path / "allowed").write_text("systemd a.service\nsystemd b.service\n")
    done = asked_of_the_wrapper(tmp_path, "read @m systemd:5:a.service,new.service,b.service", tmp_path)
    told = systemd_units(done.stdout.partition("@m systemd\n")[2].rpartition("\n@m")[0])
    assert {name: isinstance(unit, UnitStatus) for name, unit in told.items()} == {
        "a.service": True, "b.service": True, "new.service": False,
    }  # fmt: skip
    assert "new.service is not in" in str(told["new.service"])


def test_the_wrapper_lists_only_files_that_are_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "db.dump").write_text("x")
    (tmp_path / "allowed").write_text(f"files {folder}/\n")
    asked = f"read @m files:5:{folder}/,{folder}/db.dump,/etc/shadow"
    done = asked_of_the_wrapper(tmp_path, asked, tmp_path)
    listings = parse_listings(done.stdout.partition("@m files\n")[2].rpartition("\n@m")[0])
    assert [each.name for each in listings[f"{folder}/"].files] == [f"{folder}/db.dump"]
    for name in (f"{folder}/db.dump", "/etc/shadow"):
        assert listings[name].files == ()
        assert f"files {name} is not in" in listings[name].error


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ("", True), ("chown 1000:0 s.conf", False), ("chown 1000:1000 s.conf; : > s.conf", False),
        ("chown 0:1000 s.conf", True), ("chmod g+w s.conf", False), ("chown 1000:0 .", False), ("chown 1000:0 ..", False),
        ("mv s.conf t.conf; ln -s t.conf s.conf", True), ("mv s.conf t.conf; chown 1000 t.conf; ln -s t.conf s.conf", False),
    ],
)  # fmt: skip
def test_configurations_writable_by_others_are_refused(change: str, taken: bool) -> None:
    """In /run, since temporary folders are writable by others."""
    top = Path(f"/run/defib-test-{os.getpid()}")
    folder = top / "a" / "b"
    folder.mkdir(parents=True)
    try:
        (folder / "s.conf").write_text("[supervisorctl]\n")
        (top / "supervisorctl").write_text("#!/bin/sh\necho 'web RUNNING pid 1' of \"$2\"\n")
        (top / "supervisorctl").chmod(0o755)
        (top / "allowed").write_text(f"supervisor {folder}/s.conf\n")
        subprocess.run(["sh", "-ec", f"cd {folder}; {change or ':'}"], check=True)
        done = asked_of_the_wrapper(top, f"read @m supervisor:5:{folder}/s.conf", top)
        assert ("web RUNNING" in done.stdout, "users other than root can change" in done.stdout) == (
            taken,
            not taken,
        ), done.stdout
        assert f"config: {folder}/s.conf\n" in done.stdout
        if taken:  # the file that was checked, since a link may lead elsewhere afterwards
            assert f" of {(folder / 's.conf').resolve()}\n" in done.stdout
    finally:
        shutil.rmtree(top)


@pytest.mark.needs("sshd")
async def test_a_wrapper_takes_nothing_else(launcher: Launcher, tmp_path: Path, collected: Collected) -> None:
    host, written = await over_ssh(launcher, tmp_path, os.environ["PATH"])
    hardened(host, "", "df\n")
    await collected.of({"h": {**written, "ssh": {**written["ssh"], "wrapper": True}, "collect": {"system": "1s"}}})
    await collected.becomes(0, "host_collect_success", "system")


def test_the_wrapper_is_current() -> None:
    assert WRAPPER.read_text() == render_wrapper()
    assert os.access(WRAPPER, os.X_OK)
