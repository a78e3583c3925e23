"""`defib`, forked from a process that has already imported all modules: a command takes a tenth of the CPU time.

`python -m tests.forked_defib SOCKET` runs that process, with `--stdin` until its stdin is closed. Its clients are
`run_defib` and, for shells, `documented/bin/defib`.
"""

import atexit
import importlib
import json
import os
import pkgutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import defib
from tests import preloaded_launcher

REQUEST_LIMIT = 1 << 20


def run_defib(
    *arguments: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",  # noqa: A002 - as of subprocess.run()
    timeout: float = 200.0,
) -> subprocess.CompletedProcess[str]:
    """Run a command as subprocess.run() would, with `env` in addition to the environment."""
    request = {
        "arguments": arguments, "cwd": str(cwd or Path.cwd()), "env": {**os.environ, **(env or {})},
        "groups": os.getgroups(), "umask": _read_umask(),
    }  # fmt: skip
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        given.write(input.encode())
        given.seek(0)
        connection.settimeout(timeout)
        connection.connect(str(_start_server()))
        files = [given.fileno(), out.fileno(), err.fileno()]
        socket.send_fds(connection, [json.dumps(request).encode()], files)
        (pid,) = struct.unpack("i", connection.recv(4))
        try:
            (status,) = struct.unpack("i", connection.recv(4))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(["defib", *arguments], timeout) from None
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["defib", *arguments], status, out.read().decode(), err.read().decode())


def _read_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


@cache
def _start_server() -> Path:
    """Start the process for this one, and return its socket."""
    folder = tempfile.TemporaryDirectory(prefix="defib-forked-")
    path = Path(folder.name) / "socket"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked_defib", str(path), "--stdin"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        process.communicate()
        folder.cleanup()

    atexit.register(end)
    assert process.stdout is not None
    process.stdout.read(1)  # it listens
    return path


def serve(connection: socket.socket) -> None:
    """Run one command for a client, and send its process ID, then its exit status."""
    request, files, _flags, _address = socket.recv_fds(connection, REQUEST_LIMIT, 3)
    pid = os.fork()
    if not pid:
        run(json.loads(request), files, connection)
    connection.send(struct.pack("i", pid))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.send(struct.pack("i", status if status >= 0 else 128 - status))


def run(request: dict[str, Any], files: list[int], connection: socket.socket) -> NoReturn:
    _pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))

    def prepare() -> None:
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, 1024)
        os.setgroups(request["groups"])
        os.setgid(gid)
        os.setuid(uid)
        os.umask(request["umask"])

    preloaded_launcher.run_defib(request["arguments"], request["env"], request["cwd"], prepare)


def main(path: str, *, until_stdin_ends: bool) -> None:
    for module in pkgutil.walk_packages(defib.__path__, "defib."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    preloaded_launcher.preload()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        Path(path).chmod(0o666)  # for all users of the machine
        listener.listen(100)
        if until_stdin_ends:
            os.write(1, b"!")
        preloaded_launcher.fork_for_each(listener, serve, until_stdin_ends=until_stdin_ends)


if __name__ == "__main__":
    main(sys.argv[1], until_stdin_ends="--stdin" in sys.argv)
