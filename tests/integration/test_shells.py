"""The SSH shell over a real sshd, in good days and bad; the local shell alike."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from defib.demo.sshd import Sshd
from defib.demo.stack import free_ports
from fleet.model import Host, Ssh
from fleet.shells import Completed, HostKeyRefused, LoginRefused, Shell, ShellError
from fleet.shells.local import LocalShell
from fleet.shells.pool import Shells
from fleet.shells.ssh import Login, SshShell
from tests.support import eventually

pytestmark = pytest.mark.needs("sshd")
AWKWARD = ["a b", "$(id)", "`id`", "x;y", "'", '"', "\\", "*", "-n", "\n", "é字", "!", "#", "~", "{a,b}"]


@pytest.fixture(params=["local", "ssh"])
def any_shell(request: pytest.FixtureRequest, shell: SshShell) -> Shell:
    return LocalShell() if request.param == "local" else shell


async def test_an_argv_arrives_as_it_was_written(any_shell: Shell) -> None:
    done = await any_shell.run(["printf", "%s|", *AWKWARD], timeout=60)
    assert (done.status, done.stdout) == (0, "".join(f"{word}|" for word in AWKWARD))


async def test_status_output_and_input(any_shell: Shell) -> None:
    done = await any_shell.run(["sh", "-c", "cat; echo oops >&2; exit 3"], timeout=10, stdin=b"given")
    assert (done.status, done.stdout, done.stderr) == (3, "given", "oops\n")


async def test_without_input_there_is_an_end_of_it(any_shell: Shell) -> None:
    assert (await any_shell.run(["cat"], timeout=60)).status == 0


async def test_a_program_that_is_not_there(any_shell: Shell) -> None:
    assert (await any_shell.run(["no-such-program"], timeout=60)).status == 127


async def test_a_command_that_hangs_is_ended_on_both_ends(any_shell: Shell, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    started = time.monotonic()
    done = await any_shell.run(["sh", "-c", f"echo $$ > {pidfile}; exec sleep 60"], timeout=1)
    assert done.status is None
    assert "1 s" in done.why
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pidfile.read_text()), 0)


async def test_endless_output_is_bounded(any_shell: Shell) -> None:
    done = await any_shell.run(["sh", "-c", "head -c 20000000 /dev/zero | tr '\\0' x; echo end"], timeout=60)
    assert done.status == 0
    assert len(done.stdout) <= 1024 * 1024
    assert done.stdout.endswith("xend\n")


async def test_a_command_that_leaves_something_running_has_ended(any_shell: Shell) -> None:
    started = time.monotonic()
    done = await any_shell.run(["sh", "-c", "echo begun; sleep 60 &"], timeout=60)
    assert (done.status, done.stdout) == (0, "begun\n")
    assert time.monotonic() - started < 30


async def test_a_command_that_hangs_does_not_end_the_others_on_its_host(shell: SshShell) -> None:
    long = asyncio.create_task(shell.run(["sh", "-c", "sleep 12; echo done"], timeout=60))
    # It ignores the polite end of its deadline, and its answer comes too late to be waited for.
    await shell.run(["sh", "-c", "trap '' TERM; sleep 3; sleep 3; sleep 3; sleep 3"], timeout=0.5)
    assert (await long).stdout == "done\n"


async def test_a_slow_login_serves_whoever_asks_next(host: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = asyncssh.connect

    async def slowly(*args: Any, **options: Any) -> asyncssh.SSHClientConnection:
        await asyncio.sleep(0.5)
        return await connect(*args, **options)

    monkeypatch.setattr(asyncssh, "connect", slowly)
    shell = SshShell(Login("127.0.0.1", host.port, host.user, host.key_file, host.known_hosts))
    with pytest.raises(ShellError, match="no SSH connection within"):
        await shell.run(["true"], timeout=0.2)
    await asyncio.sleep(0.6)
    first = await shell.connection()
    assert (await shell.run(["true"], timeout=60)).status == 0
    assert await shell.connection() is first
    await shell.close()
    assert first.is_closed()


async def test_one_connection_serves_many_at_once(shell: SshShell) -> None:
    done = await asyncio.gather(*(shell.run(["echo", str(number)], timeout=60) for number in range(40)))
    assert [each.stdout for each in done] == [f"{number}\n" for number in range(40)]


async def test_a_connection_that_died_is_made_again(shell: SshShell) -> None:
    await shell.run(["true"], timeout=60)
    (await shell.connection()).abort()
    await asyncio.sleep(0)
    assert (await shell.run(["echo", "back"], timeout=60)).stdout == "back\n"


async def test_a_session_that_is_killed_is_unknown(shell: SshShell, host: Sshd, tmp_path: Path) -> None:
    running, parent = await _begin_a_long_one(shell, tmp_path, timeout=60)
    # sshd's own first, one or two of them as it runs as root or not; then what it ran.
    for pid in reversed(_ancestors_of(parent, host.pid or 0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    done = await running
    assert done.status is None
    assert "lost" in done.why


async def test_a_changed_host_key_is_refused_and_named(host: Sshd, tmp_path: Path) -> None:
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    pinned = tmp_path / "pinned"
    pinned.write_text(f"[127.0.0.1]:{host.port} {other}")
    shell = SshShell(Login("127.0.0.1", host.port, host.user, host.key_file, pinned))
    with pytest.raises(HostKeyRefused, match="HOST KEY CHANGED"):
        await shell.run(["true"], timeout=60)
    pinned.write_text("")
    with pytest.raises(HostKeyRefused, match="no host key is pinned"):
        await shell.run(["true"], timeout=60)


async def test_a_key_that_is_not_let_in(host: Sshd, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(stranger))
    shell = SshShell(Login("127.0.0.1", host.port, host.user, stranger, host.known_hosts))
    with pytest.raises(LoginRefused):
        await shell.run(["true"], timeout=60)
    missing = SshShell(Login("127.0.0.1", host.port, host.user, tmp_path / "gone", host.known_hosts))
    with pytest.raises(ShellError):
        await missing.run(["true"], timeout=60)


async def test_a_host_that_is_down(host: Sshd) -> None:
    (port,) = free_ports(1)
    shell = SshShell(Login("127.0.0.1", port, host.user, host.key_file, host.known_hosts))
    with pytest.raises(ShellError, match=f"127.0.0.1:{port}: "):
        await shell.run(["true"], timeout=60)


async def test_a_frozen_host_is_unknown_within_the_deadline(shell: SshShell, host: Sshd, tmp_path: Path) -> None:
    running, parent = await _begin_a_long_one(shell, tmp_path, timeout=1)
    frozen = _ancestors_of(parent, host.pid or 0)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        done = await running
        assert done.status is None
        assert time.monotonic() - started < 30
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    assert (await shell.run(["echo", "again"], timeout=60)).stdout == "again\n"


async def _begin_a_long_one(shell: SshShell, folder: Path, timeout: float) -> tuple[asyncio.Task[Completed], int]:
    """A command under way, and the process id of its parent on the host."""
    pidfile = folder / "pid"
    script = f"echo $PPID > {pidfile}.new; mv {pidfile}.new {pidfile}; sleep 60"
    running = asyncio.create_task(shell.run(["sh", "-c", script], timeout=timeout))
    while not pidfile.exists():
        await asyncio.sleep(0.01)
    return running, int(pidfile.read_text())


def _ancestors_of(pid: int, top: int) -> list[int]:
    """The processes above `pid`, up to and without `top`: the command's shell, then sshd's for this session."""
    found = []
    while pid not in (0, 1, top):
        found.append(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


async def test_a_host_behind_another(host: Sshd) -> None:
    ssh = Ssh(user=host.user, port=host.port, key_file=host.key_file, known_hosts=host.known_hosts)
    inner = ssh.model_copy(update={"via": "outer"})
    shells = Shells({"outer": Host(address="127.0.0.1", ssh=ssh), "inner": Host(address="127.0.0.1", ssh=inner)})
    try:
        assert (await shells.of("inner").run(["echo", "through"], timeout=60)).stdout == "through\n"
    finally:
        await shells.close()


@pytest.mark.parametrize("script", ["sleep 300 & echo left", "trap '' TERM; (trap '' TERM; sleep 300) & sleep 300"])
async def test_a_command_that_only_looks_leaves_nothing_running(script: str) -> None:
    """Neither one that ended, nor one that ignores its end."""
    mark = f"defib-{os.getpid()}-{len(script)}"
    began = asyncio.get_running_loop().time()
    await LocalShell(looking=True).run(["sh", "-c", script, mark], timeout=0.5)
    assert asyncio.get_running_loop().time() - began < 30

    async def gone() -> bool:
        return not [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in _text_of(path)]

    await eventually(gone)


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
