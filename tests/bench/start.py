"""CPU until a command has done its work, against `python -c pass` in the same run."""

import asyncio
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop
import yaml

from defib.demo.stack import reserve_ports
from tests.bench import peers

ROUNDS = 15
SERVICES = 20
PASS = 0.02  # CPU seconds of `python -c pass` on the machine that the limits are for
AT_MOST = {"defib --help": 0.25, "defib check": 0.6, "defib probe": 0.6}


def run() -> bool:
    return uvloop.run(_run())


async def _run() -> bool:
    async with peers.workplace() as (launcher, folder):
        (port,) = reserve_ports(1)
        await peers.start_nginx(launcher, folder, port, "http")
        _write(folder / "config", port)
        return await asyncio.to_thread(_measure, folder / "config")


def _write(config: Path, port: int) -> None:
    """A configuration of 20 services as a small fleet has them: pages, models, containers, units, restarts, a channel."""
    config.mkdir()
    probes = (
        {"http": {"url": f"http://127.0.0.1:{port}/", "expect": {"status": 200}}},
        {"openai": {"url": f"http://127.0.0.1:{port}/v1", "model": "m"}},
        {"tcp": {"address": f"127.0.0.1:{port}"}},
        {"container": {"name": "web"}},
        {"unit": {"name": "nginx.service"}},
    )
    controls = (
        {"docker": {"container": "web"}},
        {"systemd": {"unit": "nginx.service"}},
        {"supervisor": {"program": "web"}},
    )
    written = {
        "hosts": {"h": {"address": "127.0.0.1", "ssh": {"user": "defib"}, "collect": {"system": "30s", "gpu": "30s"}}},
        "services": {
            f"s{n}": {
                "host": "h", "on_failure": "restart",
                "probe": probes[n % len(probes)], "control": controls[n % len(controls)],
            }
            for n in range(SERVICES)
        },
        "notify": {
            "channels": {"ops": {"feishu": {"webhook": "https://chat.example/hook"}}}, "routes": [{"channels": ["ops"]}],
        },
    }  # fmt: skip
    (config / "defib.yaml").write_text(yaml.safe_dump(written))


def _measure(config: Path) -> bool:
    defib = [sys.executable, "-m", "defib"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "defib --help": [*defib, "--help"],
        "defib check": [*defib, "check", "--config", str(config)],
        "defib probe": [*defib, "probe", "s0", "--config", str(config)],
    }
    rounds = [{name: _cpu(argv) for name, argv in commands.items()} for _ in range(ROUNDS + 1)][1:]
    succeeded = True
    for name, seconds in AT_MOST.items():
        ratio = statistics.median(each[name] / each["python -c pass"] for each in rounds)
        well = ratio <= seconds / PASS
        succeeded = succeeded and well
        print(
            f"{name}: CPU {statistics.median(each[name] for each in rounds):.3f} s, python -c pass"
            f" {statistics.median(each['python -c pass'] for each in rounds):.3f} s; ratio {ratio:.1f}, median of {ROUNDS}"
            f" (at most {seconds / PASS:.1f}): {'succeeded' if well else 'TOO SLOW'}"
        )
    return succeeded


def _cpu(argv: Sequence[str]) -> float:
    """CPU seconds, user and system, of a process that must succeed."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit status {process.returncode}")
    return used.ru_utime + used.ru_stime
