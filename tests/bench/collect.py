"""100 hosts read over SSH: CPU and memory of the exporter, how long a run takes, and CPU against `ssh` with ControlMaster.

The hosts are sessions of one sshd; their nvidia-smi is a shell script that prints a recorded answer.
"""

import asyncio
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import uvloop
import yaml

from defib.demo import service, sshd
from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from fleet.host import gpu, system
from fleet.host.sections import Section, build_script
from fleet.managers import docker
from tests.bench import peers
from tests.docker import running_docker
from tests.gpu import CARD

HOSTS, WINDOWS, SECONDS = 100, 5, 15.0
CORES, RESIDENT, P95, RATIO = 0.5, 300.0, 1.0, 0.42  # at most: cores, megabytes, seconds, times ssh's
EVERY = {"system": 30, "gpu": 15, "docker": 30}
CARDS = 8


def run() -> bool:
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(running_docker())
        return uvloop.run(_run())


async def _run() -> bool:
    if os.geteuid() == 0:
        await service.run_container("bench", "bench", ["/bin/sleep", "1000"])
    async with peers.workplace() as (launcher, folder):
        return await _measure(launcher, folder)


async def _measure(launcher: Launcher, folder: Path) -> bool:
    (folder / "bin").mkdir()
    _write_nvidia_smi(folder / "bin" / "nvidia-smi")
    ssh_port, port = reserve_ports(2)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    if "DOCKER_HOST" in os.environ:
        environment["DOCKER_HOST"] = os.environ["DOCKER_HOST"]
    host = await sshd.start(launcher, folder / "sshd", ssh_port, environment)
    _configure(folder / "config", host)
    argv = [sys.executable, "-m", "defib", "exporter", "--config", str(folder / "config")]
    pid = await launcher.start([*argv, "--listen", f"127.0.0.1:{port}"], folder / "exporter.log")
    theirs = [_ssh_seconds(folder, host) for _ in range(WINDOWS)]
    async with httpx.AsyncClient(trust_env=False, timeout=30, base_url=f"http://127.0.0.1:{port}") as client:
        await peers.answers(client, "/-/ready")
        await asyncio.sleep(2 * SECONDS)
        cores, took, healthy = [], [], 0
        for _ in range(WINDOWS):
            before = peers.cpu(pid)
            await asyncio.sleep(SECONDS)
            cores.append((peers.cpu(pid) - before) / SECONDS)
            page = (await client.get("/metrics")).text.splitlines()
            took += [float(line.split()[-1]) for line in page if line.startswith("host_collect_duration_seconds")]
            healthy = sum(line.startswith("gpu_healthy") and line.endswith(" 1") for line in page)
    runs = HOSTS * sum(1 / every for every in EVERY.values())
    core = statistics.median(cores)
    p95 = statistics.quantiles(took, n=20)[-1]
    ratio = core / runs / statistics.median(theirs)
    resident = peers.resident(pid)
    good = core <= CORES and resident <= RESIDENT and p95 <= P95 and ratio <= RATIO and healthy == HOSTS * CARDS
    print(
        f"{HOSTS} hosts, {runs:.1f} runs/s: {core:.2f} cores, median of {WINDOWS} (at most {CORES}); {resident:.0f} MB (at"
        f" most {RESIDENT:g}); p95 of a run {p95:.2f} s (at most {P95:g}); CPU per run {core / runs * 1000:.1f} ms, ssh"
        f" with ControlMaster {statistics.median(theirs) * 1000:.1f} ms, ratio {ratio:.2f} (at most {RATIO}); {healthy}"
        f" cards: {'good' if good else 'NOT GOOD ENOUGH'}"
    )
    return good


def _write_nvidia_smi(path: Path) -> None:
    offered = gpu.map_fields_to_driver_names("".join(f'"{name}"\n' for name in CARD))
    rows = "\n".join(
        ", ".join({**CARD, "index": str(index), "uuid": f"GPU-{index}"}[name] for name in offered.values())
        for index in range(CARDS)
    )
    help_text = "\n".join(f'"{name}"' for name in CARD)
    path.write_text(
        f"#!/bin/sh\ncase $1 in\n--help-query-gpu) cat <<'E'\n{help_text}\nE\n;;\n"
        f"--query-gpu=*) cat <<'E'\n{rows}\nE\n;;\n--query-compute-apps=*) echo 'GPU-0, 1, 100, x' ;;\nesac\n"
    )
    path.chmod(0o755)


def _configure(directory: Path, host: sshd.Sshd) -> None:
    directory.mkdir()
    keys = {"key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    ssh: dict[str, Any] = {"user": host.user, "port": host.port, **keys}
    collect = {name: f"{every}s" for name, every in EVERY.items() if name != "docker" or "DOCKER_HOST" in os.environ}
    hosts = {f"host-{n}": {"address": "127.0.0.1", "ssh": dict(ssh), "collect": dict(collect)} for n in range(HOSTS)}
    (directory / "hosts.yaml").write_text(yaml.safe_dump({"hosts": hosts}))


def _ssh_seconds(folder: Path, host: sshd.Sshd) -> float:
    """CPU seconds of `ssh` for one run of the same scripts over a connection that is kept, master and client."""
    program = shutil.which("ssh") or str(Path(shutil.which("ssh-keygen") or "").resolve().with_name("ssh"))
    control = folder / "control"
    common = [
        program, "-F", "none", "-p", str(host.port), "-i", str(host.key_file), "-o", f"ControlPath={control}",
        "-o", f"UserKnownHostsFile={host.known_hosts}", "-o", "ControlPersist=no", f"{host.user}@127.0.0.1",
    ]  # fmt: skip
    master = subprocess.Popen([*common[:1], "-M", "-N", *common[1:]])
    try:
        while not control.exists():
            assert master.poll() is None
        before, cpu = peers.cpu(master.pid), _children()
        texts = _scripts()
        for text in texts:
            subprocess.run([*common, "sh", "-s"], input=text, capture_output=True, check=True)
        return (peers.cpu(master.pid) - before + _children() - cpu) / len(texts)
    finally:
        master.terminate()
        master.wait()


def _scripts() -> list[bytes]:
    """What an interval's runs of one host send: two of gpu, one of system and one of docker."""
    offered = gpu.map_fields_to_driver_names("".join(f'"{name}"\n' for name in CARD)).values()
    cards: list[Section] = [gpu.build_nvidia_smi_section(offered), gpu.PROCESSES_SECTION, gpu.XIDS_SECTION]
    machine = [system.PROC_SECTION, system.FILESYSTEMS_SECTION]
    one_each: list[list[Section]] = [cards, cards, machine, [docker.SECTION]]
    return [build_script(sections, "@mark").encode() for sections in one_each * 5]


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
