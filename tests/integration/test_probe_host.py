"""Probes of a host's own state over a real sshd: dockerd, systemd, supervisord, and the kernel's sockets."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from exporter.metrics import ExporterMetrics
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.errors import DefibError
from runtime.redaction import Redactor
from tests.integration.conftest import start_supervisord
from tests.support import eventually, inventory_of, probed

LOCAL = {"address": "127.0.0.1", "shell": "local"}


@pytest.fixture(scope="module")
def containers(container: str) -> Iterator[str]:
    """Containers in several states, with the state as a suffix of the name, except for running."""
    run = ["docker", "run", "--detach", "--network", "host"]
    check = ["--health-interval", "1s", "--health-retries", "1", "--health-cmd"]
    states: dict[str, tuple[list[str], list[str]]] = {
        "exited": ([], ["/bin/sh", "-c", "exit 3"]),
        "healthy": ([*check, "true"], ["/bin/sleep", "1000"]),
        "unhealthy": ([*check, "false"], ["/bin/sleep", "1000"]),
    }
    for state, (options, command) in states.items():
        argv = [*run, "--name", f"{container}-{state}", *options, container, *command]
        subprocess.run(argv, check=True, capture_output=True)
    yield container
    names = [f"{container}-{state}" for state in states]
    subprocess.run(["docker", "rm", "--force", *names], capture_output=True, check=True)


@pytest.fixture
async def supervised(launcher: Launcher, tmp_path: Path) -> Path:
    """A supervisord with a program that runs and one that cannot."""
    programs = (
        "[program:well]\ncommand=/bin/sleep 1000\nstartsecs=0\n[program:broken]\ncommand=/bin/false\nstartretries=1000\n"
        "[group:stack]\nprograms=well\n"
    )
    return await start_supervisord(launcher, tmp_path, programs)


@pytest.fixture
async def equipped(launcher: Launcher, tmp_path: Path, docker: None, systemd: Path) -> Sshd:
    """An sshd whose account finds docker, systemctl and supervisorctl."""
    path = f"{systemd}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    (port,) = reserve_ports(1)
    environment = {"PATH": path, "DOCKER_HOST": os.environ["DOCKER_HOST"]}
    return await sshd.start(launcher, tmp_path / "sshd", port, environment)


def ssh_of(host: Sshd) -> dict[str, Any]:
    known = {"key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    return {"address": "127.0.0.1", "ssh": {"user": host.user, "port": host.port, **known}}


@pytest.mark.needs("dockerd", "busybox", "systemd", "sshd")
async def test_states_on_a_host(
    tmp_path: Path, containers: str, supervised: Path, equipped: Sshd, systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{systemd}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    config = str(supervised)
    table: list[tuple[str, dict[str, Any], str | None, str]] = [
        ("container", {"name": containers}, None, ""),
        ("container", {"name": f"{containers}-healthy"}, None, ""),
        ("container", {"name": f"{containers}-exited"}, "state", "is exited (exit code 3), expected running"),
        ("container", {"name": f"{containers}-unhealthy"}, "state", "is running, but its health is unhealthy"),
        ("container", {"name": "nothing"}, "state", "no container nothing on h"),
        ("unit", {"name": "well"}, None, ""),
        ("unit", {"name": "done.service"}, None, ""),
        ("unit", {"name": "broken.service"}, "state", "is failed (failed, exit-code), expected active"),
        ("unit", {"name": "missing.service"}, "state", "no unit missing.service on h"),
        ("program", {"name": "stack:well", "config": config}, None, ""),
        ("program", {"name": "broken", "config": config}, "state", "expected RUNNING"),
        ("program", {"name": "missing", "config": config}, "state", "no program missing"),
        ("program", {"name": "well", "config": "/nowhere"}, "shell", "cannot query supervisor"),
    ]

    async def healthy() -> bool:
        here = await probed(tmp_path, "container", {"name": f"{containers}-healthy"}, host=LOCAL)
        ill = await probed(tmp_path, "container", {"name": f"{containers}-unhealthy"}, host=LOCAL)
        running = await probed(tmp_path, "program", {"name": "stack:well", "config": config}, host=LOCAL)
        return here.success and "unhealthy" in ill.message and running.success

    await eventually(healthy)
    for host in (LOCAL, ssh_of(equipped)):
        for kind, options, reason, message in table:
            result = await probed(tmp_path, kind, options, "30s", host)
            assert (result.reason, message in result.message) == (reason, True), (kind, options, result.message)


async def test_ports(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert (await probed(tmp_path, "port", {"listening": port})).success
    closed = await probed(tmp_path, "port", {"listening": port})
    assert (closed.reason, closed.message) == ("state", f"nothing listens on port {port} of h")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
        assert (await probed(tmp_path, "port", {"listening": listening.getsockname()[1]})).success


@pytest.fixture
def backups(tmp_path: Path) -> Path:
    """A folder with yesterday's backup, one of last week, and others."""
    folder = tmp_path / "backups"
    (folder / "db-folder.dump").mkdir(parents=True)
    for name, size, age in (
        (".hidden", 2000, 86400), ("future", 5, -7 * 86400), ("ancient", 5, 70 * 365 * 86400),
        ("db-1.dump", 900, 7 * 86400), ("db-2.dump", 2000, 86400), ("other.dump", 5, 60), ("db 3\nx.dump", 5, 60),
    ):  # fmt: skip
        (folder / name).write_bytes(b"x" * size)
        os.utime(folder / name, (time.time() - age,) * 2)
    (folder / "latest").symlink_to("db-2.dump")
    (folder / "broken").symlink_to("nothing")
    return folder


@pytest.mark.parametrize(
    ("options", "reason", "message"),
    [
        ({"path": "db-2.dump"}, None, ""),
        ({"path": "db-*.dump", "newer_than": "26h", "larger_than": "1KiB"}, None, ""),
        ({"path": "latest", "newer_than": "26h"}, None, ""),
        ({"path": "db-[12].dump", "newer_than": "1h"}, "state", "db-2.dump was changed 1d"),
        ({"path": "db-1.dump", "newer_than": "26h"}, "state", "db-1.dump was changed 7d"),
        ({"path": "db-1.dump", "larger_than": "1KiB"}, "state", "db-1.dump has 900 bytes, expected more than 1024"),
        ({"path": "db-4.dump"}, "state", "there is no file "),
        ({"path": "db-?.sql"}, "state", "there is no file "),
        ({"path": "db 3*"}, "state", "there is no file "),
        ({"path": "db-folder.dump"}, "state", "is not a regular file"),
        ({"path": ".*"}, None, ""),
        ({"path": "*hidden"}, "state", "there is no file "),
        ({"path": "future", "newer_than": "1h"}, "state", "was changed in the future"),
        ({"path": "ancient", "newer_than": "1h"}, "state", "was changed "),
        ({"path": "broken"}, "state", "there is no file "),
        ({"path": "none/*.dump"}, "state", "there is no file "),
        ({"path": "db-1.dump/*"}, "state", "there is no file "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tools", ["GNU", "busybox"])
async def test_files(
    tmp_path: Path, backups: Path, monkeypatch: pytest.MonkeyPatch,
    tools: str, options: dict[str, Any], reason: str | None, message: str,
) -> None:  # fmt: skip
    if tools == "busybox":
        use_busybox(tmp_path, monkeypatch)
    result = await probed(tmp_path, "file", {**options, "path": f"{backups}/{options['path']}"})
    assert (result.reason, message in result.message) == (reason, True), result.message
    if reason is None:
        assert result.details.gauges["service_file_size_bytes"] == 2000
        assert time.time() - result.details.gauges["service_file_modified_timestamp_seconds"] > 86000


def use_busybox(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let shells find busybox's tools only."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox")
    (folder / "bin").mkdir()
    for name in ("sh", "stat", "find", "sort", "awk", "date", "timeout", "cat", "printf", "env", "setsid"):
        (folder / "bin" / name).symlink_to(busybox)
    monkeypatch.setenv("PATH", str(folder / "bin"))


async def test_files_of_a_large_folder(tmp_path: Path, backups: Path) -> None:
    now = time.time()
    for number in range(1500):
        (backups / f"new-{number}").touch()
        os.utime(backups / f"new-{number}", (now - number / 1000,) * 2)
    assert (await probed(tmp_path, "file", {"path": f"{backups}/new-*", "newer_than": "1h"})).success
    missed = await probed(tmp_path, "file", {"path": f"{backups}/db-*"})
    assert missed.reason == "shell"
    assert missed.message.endswith("; only the newest 1000 of 1507 files of the folder were looked at")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("backups/db.dump", "is not an absolute path"),
        ("/backups/", "must be the path of a file"),
        ("/backups/../x", "must be the path of a file"),
        ("/backups/*/db.dump", "are possible in the last part only"),
        ("/a,b", "is not an absolute path"),
        ("/a\nb", "is not an absolute path"),
    ],
)
async def test_paths_that_are_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DefibError, match=re.escape(message)):
        await probed(tmp_path, "file", {"path": path})


@pytest.mark.parametrize(
    ("name", "script", "kind", "options", "reason", "message"),
    [
        ("docker", "echo 'permission denied while trying to connect' >&2; exit 1", "container", {"name": "it"}, "shell", "h: cannot query docker: permission denied"),
        ("docker", "sleep 60", "container", {"name": "it"}, "shell", "docker did not answer in time"),
        ("docker", "[ $1 = ps ] || exec sleep 60; printf 'listed\\tabc\\tother/x,it\\trunning\\timage\\tUp 3 hours (healthy)\\n'", "container", {"name": "it"}, None, ""),
        ("docker", "[ $1 = ps ] || exec sleep 60; printf 'listed\\tabd\\tother/y\\trunning\\timage\\tUp 1 hour\\nlisted\\tabc\\tother/x,it\\trunning\\timage\\tUp 3 hours (healthy)\\n'", "container", {"name": "it"}, None, ""),
        ("docker", "[ $1 = ps ] || exec sleep 60; printf 'listed\\tabc\\tit\\texited\\timage\\tExited (137) 3 hours ago\\n'", "container", {"name": "it"}, "state", "is exited (exit code 137), expected running"),
        ("docker", "[ $1 = ps ] || exec sleep 60; printf 'listed\\tabc\\tit\\trunning\\timage\\tUp 3 hours (unhealthy)\\n'", "container", {"name": "it"}, "state", "its health is unhealthy"),
        ("docker", "", "container", {"name": "it"}, "state", "no container it"),
        ("systemctl", "echo 'System has not been booted with systemd' >&2; exit 1", "unit", {"name": "it"}, "shell", "not been booted"),
        ("supervisorctl", "echo 'unix:///s.sock refused connection'; exit 4", "program", {"name": "it"}, "shell", "refused connection"),
        ("supervisorctl", "echo 'unix:///s.sock no such file'", "program", {"name": "it"}, "shell", "no such file"),
        ("supervisorctl", "echo 'it   BACKOFF   Exited too quickly'; exit 3", "program", {"name": "it"}, "state", "is BACKOFF (Exited too quickly)"),
    ],
)  # fmt: skip
async def test_failing_tools(
    tmp_path: Path, name: str, script: str, kind: str, options: Any, reason: str, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The outputs are those of the real programs; only the failures are simulated."""
    tool = tmp_path / "bin" / name
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    result = await probed(tmp_path, kind, options, "10s")
    assert (result.reason, message in result.message) == (reason, True), result.message
    assert result.duration < 30


async def test_a_hanging_docker_does_not_delay_other_probes(
    tmp_path: Path, scheduler: ProbeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "docker"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nsleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        services: dict[str, Any] = {
            "container": {"host": "h", "probe": {"timeout": "60s", "container": {"name": "it"}}},
            "port": {"host": "h", "probe": {"timeout": "20s", "port": {"listening": port}}},
        }
        known = await asyncio.to_thread(inventory_of, tmp_path / "c", {"hosts": {"h": LOCAL}, "services": services})
        await scheduler.apply(known.inventory)
        hanging = asyncio.create_task(scheduler.probe_now(scheduler.services["container"]))
        result = await scheduler.probe_now(scheduler.services["port"])
        assert result.success, result.message
        assert not hanging.done()
        hanging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await hanging


async def test_docker_ps_works_but_docker_inspect_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is dockerd's, about an authorization plugin."""
    tool = tmp_path / "bin" / "docker"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\n[ $1 != ps ] || { echo abc; exit; }\necho 'authorization denied by plugin' >&2; exit 1\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    result = await probed(tmp_path, "container", {"name": "it"})
    assert (result.reason, "authorization denied" in result.message) == ("shell", True), result.message


@pytest.fixture
async def scheduler() -> AsyncIterator[ProbeScheduler]:
    made = ProbeScheduler(ExporterMetrics(), Redactor())
    yield made
    await made.close()


@pytest.mark.needs("sshd", "dockerd", "busybox", "systemd")
async def test_one_round_trip_per_host_and_interval(
    tmp_path: Path, containers: str, equipped: Sshd, scheduler: ProbeScheduler
) -> None:
    probes: list[dict[str, Any]] = [
        {"container": {"name": containers}}, {"container": {"name": f"{containers}-exited"}},
        {"unit": {"name": "well"}}, {"unit": {"name": "broken"}}, {"port": {"listening": equipped.port}},
    ]  # fmt: skip
    services = {
        f"s{number}": {"host": "h", "probe": {"every": "2s", "retry_every": "2s", **probe}}
        for number, probe in enumerate(probes * 3)
    }
    known = await asyncio.to_thread(
        inventory_of, tmp_path / "c", {"hosts": {"h": ssh_of(equipped)}, "services": services}
    )
    log = tmp_path / "sshd" / "log"
    await scheduler.apply(known.inventory)

    async def probed_three_times() -> bool:
        return all(probed.state.successes + probed.state.failures >= 3 for probed in scheduler.services.values())

    before = log.read_text().count("Accepted publickey")
    sessions = log.read_text().count("Starting session")
    await eventually(probed_three_times)
    assert log.read_text().count("Starting session") - sessions <= 4
    assert log.read_text().count("Accepted publickey") - before == 1
    assert {name: probed.state.up for name, probed in scheduler.services.items() if name in ("s0", "s1", "s2", "s3", "s4")} == {
        "s0": True, "s1": False, "s2": True, "s3": False, "s4": True,
    }  # fmt: skip

    # Asked now, a host is read anew, whatever was read a moment ago.
    probed = scheduler.services["s0"]
    subprocess.run(["docker", "stop", "--time", "0", containers], check=True, capture_output=True)
    try:
        stopped = await scheduler.probe_now(probed)
        assert (stopped.reason, "is exited" in stopped.message) == ("state", True)
    finally:
        subprocess.run(["docker", "start", containers], check=True, capture_output=True)
    assert (await scheduler.probe_now(probed)).success
