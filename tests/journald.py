"""A real journald of the tests' own, in namespaces."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

JOURNALD = Path("/lib/systemd/systemd-journald")
START = """
mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/systemd/journal /run/log/journal || exit 20
exec "$@"
"""


class Journal:
    """`path` is a folder with the `journalctl` that reads this journal, to be put on a PATH."""

    def __init__(self, path: Path, pid: int) -> None:
        self.path, self._pid = path, pid

    def write(self, unit: str, *messages: str | bytes) -> None:
        """Write messages about a unit, as root may."""
        for message in messages:
            data = message.encode() if isinstance(message, str) else message
            fields = b"MESSAGE=%s\nOBJECT_SYSTEMD_UNIT=%s\n\n" % (data, unit.encode())
            subprocess.run([*self._inside, "logger", "--journald"], input=fields, check=True)
        subprocess.run([*self._inside, "journalctl", "--sync"], check=True)

    def read_as(self, user: int | None) -> None:
        """Let `journalctl` run as another user; None for root."""
        by = f"setpriv --reuid {user} --regid {user} --clear-groups " if user is not None else ""
        script = self.path / "journalctl.new"
        script.write_text(f'#!/bin/sh\nexec {" ".join(self._inside)} {by}/usr/bin/journalctl "$@"\n')
        script.chmod(0o755)
        script.replace(self.path / "journalctl")

    @property
    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self._pid), "--mount", "--pid"]


@pytest.fixture
def journal() -> Iterator[Journal]:
    folder = Path(tempfile.mkdtemp(prefix="defib-journald-"))
    namespaces = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    process = subprocess.Popen(
        ["unshare", *namespaces, "sh", "-c", START, "sh", str(JOURNALD)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield _wait_for_journald(folder, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_journald(folder: Path, process: "subprocess.Popen[bytes]") -> Journal:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/root/run/systemd/journal/io.systemd.journal").exists():
            journal = Journal(folder, int(children[0]))
            journal.read_as(None)
            return journal
        time.sleep(0.05)
    raise AssertionError(f"journald did not start: exit status {process.poll()}")
