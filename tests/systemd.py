"""A real systemd of the tests' own: a user manager in namespaces and a control group of its own."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cgroups import remove

INSTALLED = Path("/lib/systemd/systemd")
UNPACKED = Path(__file__).parents[1] / ".parts" / "root"
UNITS = {
    "well.service": "[Service]\nExecStart=/bin/sleep infinity\n",
    "done.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n",
    "once.service": "[Service]\nType=oneshot\nExecStart=/bin/true\n",
    "broken.service": "[Service]\nExecStart=/bin/false\n",
    "default.target": "Wants=well.service done.service broken.service\n",
    "basic.target": "",
    "shutdown.target": "",
}


def manager() -> Path | None:
    """The systemd there is, if any."""
    return next((path for path in (INSTALLED, UNPACKED / "lib/systemd/systemd") if path.is_file()), None)


@pytest.fixture(scope="session")
def systemd() -> Iterator[Path]:
    """Start the manager; gives a folder with the `systemctl` that asks it, to be put on a PATH."""
    folder = Path(tempfile.mkdtemp(prefix="defib-systemd-"))
    run, units, path = (folder / name for name in ("run", "units", "bin"))
    for each in (run, units, path):
        each.mkdir(mode=0o700)
    for name, text in UNITS.items():
        (units / name).write_text(f"[Unit]\nDefaultDependencies=no\n{text}")
    mounted = Path("/sys/fs/cgroup")
    cgroup = (mounted / "unified" if (mounted / "unified").is_dir() else mounted) / f"defib-systemd-{os.getpid()}"
    cgroup.mkdir()
    # Not the first process of its namespace, nor in a control group with others: it would take that for its own.
    begin = 'echo $$ >"$0"/cgroup.procs && exec "$@"'
    mounts = (
        # Shared with the namespaces of units, as systemd expects it for their credentials.
        "mount -n --make-rshared / && mount -n -t cgroup2 cgroup2 /sys/fs/cgroup && mount -n -t tmpfs -o mode=755 tmpfs /run &&"
        ' mkdir -p /run/systemd/system /run/systemd/inaccessible/dir && "$@"'
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "XDG_RUNTIME_DIR": str(run),
        "SYSTEMD_UNIT_PATH": str(units),
        "SYSTEMD_LOG_TARGET": "null",
        **libraries(),
    }
    namespaces = ["--cgroup", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL"]
    process = subprocess.Popen(
        ["sh", "-c", begin, cgroup, "unshare", *namespaces, "--mount-proc", "sh", "-c", mounts, "sh",
         str(manager()), "--user"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    _write_systemctl(path / "systemctl", process.pid, run)
    try:
        _wait_for_units(path / "systemctl")
        yield path
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        remove(cgroup)
        shutil.rmtree(folder, ignore_errors=True)


def libraries() -> dict[str, str]:
    if manager() == INSTALLED:
        return {}
    return {"LD_LIBRARY_PATH": ":".join(map(str, UNPACKED.glob("usr/lib/*/systemd")))}


def _write_systemctl(path: Path, pid: int, run: Path) -> None:
    own = "systemctl" if manager() == INSTALLED else str(UNPACKED / "bin" / "systemctl")
    real = shutil.which(own)
    variables = [f"{name}={value}" for name, value in {"XDG_RUNTIME_DIR": str(run), **libraries()}.items()]
    inside = ["nsenter", f"--pid=/proc/{pid}/ns/pid_for_children", "--", "env", *variables, str(real), "--user"]
    path.write_text(f'#!/bin/sh\nexec {shlex.join(inside)} "$@"\n')
    path.chmod(0o755)


def _wait_for_units(systemctl: Path) -> None:
    ends = time.monotonic() + 20
    while True:
        asked: list[Any] = [systemctl, "show", "--property=ActiveState", "broken.service"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if "ActiveState=failed" in done.stdout:
            return
        assert time.monotonic() < ends, done.stdout + done.stderr
        time.sleep(0.05)
