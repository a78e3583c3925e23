"""The SSH shell over a real sshd, in good days and bad; the local shell alike."""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from fleet.host.sections import SectionOutput, read_sections
from fleet.host.system import PROC_SECTION
from fleet.inventory.model import Host, Ssh
from fleet.shells import (
    CommandNotRunError,
    CompletedCommand,
    HostKeyError,
    LoginError,
    Shell,
    ShellError,
    WrapperOutdatedError,
    get_wrapper_refusal,
)
from fleet.shells.local import LocalShell
from fleet.shells.pool import Shells
from fleet.shells.ssh import Login, SshShell, WrapperMode, command_digest
from fleet.wrapper import render_command_file
from tests.logins import logs_in_with
from tests.support import eventually, inventory_of, probed

pytestmark = pytest.mark.needs("sshd")
WRAPPER = Path(__file__).parents[2] / "deploy" / "ssh" / "defib-shell"
AWKWARD = ["a b", "$(id)", "`id`", "x;y", "'", '"', "\\", "*", "-n", "\n", "é字", "!", "#", "~", "{a,b}"]


Connect = Callable[..., SshShell]


@pytest.fixture
async def connect(host: Sshd) -> AsyncIterator[Connect]:
    """Make shells of the host; they are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        def made(wrapper: WrapperMode | None = None, *, control: bool = False) -> SshShell:
            login = Login("127.0.0.1", host.port, host.user, host.key_file, host.known_hosts, wrapper)
            shell = SshShell(login, control=control)
            stack.push_async_callback(shell.close)
            return shell

        yield made


@pytest.fixture(params=["local", "local look", "ssh", "ssh look"])
def any_shell(request: pytest.FixtureRequest, connect: Connect) -> Shell:
    """A shell of this machine and of another, to control and only to look."""
    looking = request.param.endswith("look")
    return LocalShell(read_only=looking) if request.param.startswith("local") else connect(control=not looking)


def forced(host: Sshd, command: str) -> None:
    """Have the account's key run this alone."""
    authorized = host.key_file.parent / "authorized"
    quoted = command.replace('"', '\\"')
    authorized.write_text(f'restrict,command="{quoted}" {authorized.read_text()}')


def hardened(host: Sshd, *commands: list[str], also: str = "") -> None:
    """Have the account's key run the wrapper, which may run these commands; `also` is run before it."""
    folder = host.key_file.parent
    (folder / "commands").mkdir()
    for argv in commands:
        (folder / "commands" / command_digest(argv)).write_text(render_command_file(argv))
    forced(host, f"{also}exec sh {WRAPPER} control {folder} {os.environ['PATH']}")


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
    assert time.monotonic() - started < 55

    async def gone() -> bool:
        return not Path(f"/proc/{pidfile.read_text().strip()}").exists()

    await eventually(gone)  # once it has been waited for


async def test_endless_output_is_bounded(any_shell: Shell) -> None:
    done = await any_shell.run(["sh", "-c", "head -c 20000000 /dev/zero | tr '\\0' x; echo end"], timeout=60)
    assert done.status == 0
    assert len(done.stdout) <= 1024 * 1024
    assert done.stdout.endswith("xend\n")


async def test_a_command_that_leaves_something_running_has_ended(any_shell: Shell) -> None:
    started = time.monotonic()
    done = await any_shell.run(["sh", "-c", "echo begun; sleep 60 &"], timeout=60)
    assert (done.status, done.stdout) == (0, "begun\n")
    assert time.monotonic() - started < 55


async def test_a_command_that_hangs_does_not_end_the_others_on_its_host(shell: SshShell) -> None:
    await shell.connection()  # which may take longer than the deadline below
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


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_shell_closed_while_it_connects_ends_its_callers(
    host: Sshd, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    """A caller that is cancelled with the shell stays cancelled: its loop must end, not try again."""
    connecting = asyncio.Event()

    async def never(*_args: Any, **_options: Any) -> asyncssh.SSHClientConnection:
        connecting.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(asyncssh, "connect", never)
    shell = SshShell(Login("127.0.0.1", host.port, host.user, host.key_file, host.known_hosts))
    caller = asyncio.create_task(shell.run(["true"], timeout=60))
    await connecting.wait()
    await shell.close()
    if is_cancelled:
        caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled() == is_cancelled
    if not is_cancelled:
        assert "the shell was closed" in str(caller.exception())


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
    with pytest.raises(HostKeyError, match="HOST KEY CHANGED"):
        await shell.run(["true"], timeout=60)
    pinned.write_text("")
    with pytest.raises(HostKeyError, match="key is not pinned in"):
        await shell.run(["true"], timeout=60)


async def test_a_key_that_is_not_let_in(host: Sshd, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(stranger))
    shell = SshShell(Login("127.0.0.1", host.port, host.user, stranger, host.known_hosts))
    with pytest.raises(LoginError):
        await shell.run(["true"], timeout=60)
    missing = SshShell(Login("127.0.0.1", host.port, host.user, tmp_path / "gone", host.known_hosts))
    with pytest.raises(ShellError):
        await missing.run(["true"], timeout=60)


async def test_a_host_that_is_down(host: Sshd) -> None:
    (port,) = reserve_ports(1)
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
        assert time.monotonic() - started < 55
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    assert (await shell.run(["echo", "again"], timeout=60)).stdout == "again\n"


async def _begin_a_long_one(
    shell: SshShell, folder: Path, timeout: float
) -> tuple[asyncio.Task[CompletedCommand], int]:
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
        assert (await shells.get("inner").run(["echo", "through"], timeout=60)).stdout == "through\n"
    finally:
        await shells.close()


@pytest.mark.parametrize("script", ["sleep 300 & echo left", "trap '' TERM; (trap '' TERM; sleep 300) & sleep 300"])
async def test_a_command_that_only_looks_leaves_nothing_running(script: str) -> None:
    """Neither one that ended, nor one that ignores its end."""
    mark = f"defib-{os.getpid()}-{len(script)}"
    began = asyncio.get_running_loop().time()
    await LocalShell(read_only=True).run(["sh", "-c", script, mark], timeout=0.5)
    assert asyncio.get_running_loop().time() - began < 55

    async def gone() -> bool:
        return not [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in _text_of(path)]

    await eventually(gone)


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("kind", ["sh", "bash", "zsh", "tcsh", "fish"])
async def test_a_login_shell_changes_neither_arguments_nor_output(host: Sshd, connect: Connect, kind: str) -> None:
    """What it prints of its own is none of the command's."""
    program = shutil.which(kind)
    if program is None:
        pytest.skip(f"needs {kind}")
    greeting = "echo 'Welcome to web-01, ERROR count: 0'; echo '@defib-0 nonsense'; echo 'no tty' >&2"
    logs_in_with(host, f'{greeting}\nexec {program} -c "$2"')
    for control in (False, True):
        shell = connect(control=control)
        done = await shell.run(["printf", "%s|", *AWKWARD], timeout=60)
        assert (done.status, done.stdout, done.stderr) == (0, "".join(f"{word}|" for word in AWKWARD), "")
        done = await shell.run(["sh", "-c", "cat; echo oops >&2; exit 3"], timeout=60, stdin=b"s3cret\0\n")
        assert (done.status, done.stdout, done.stderr) == (3, "s3cret\0\n", "oops\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo 'Please login as the user ubuntu.'; exit 0", "Please login as the user ubuntu."),
        ("echo 'Please login as the user ubuntu.' >&2; exit 142", "Please login as the user ubuntu."),
        ("exit 0", "no output"),
        ("tee {sent}", "it sent the script back"),
        ("cat >&2", "it sent the script back"),
    ],
)
async def test_a_command_that_was_not_run_has_no_status(
    host: Sshd, connect: Connect, tmp_path: Path, command: str, said: str
) -> None:
    """A key that runs something else: whatever that exits with, and prints, nothing was run, nor any password sent."""
    sent = tmp_path / "sent"
    forced(host, command.format(sent=sent))
    for control in (False, True):
        shell = connect(control=control)
        for stdin in (b"", b"s3cret\n"):
            with pytest.raises(CommandNotRunError, match="did not run the command") as raised:
                await shell.run(["touch", str(tmp_path / "done")], timeout=60, stdin=stdin)
            assert said in str(raised.value)
    assert not (tmp_path / "done").exists()
    assert not sent.exists() or "s3cret" not in sent.read_text()
    ssh = {"user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    for run, expect in ((["false"], {}), (["true"], {}), (["true"], {"exit": 142})):
        result = await probed(
            tmp_path / "config", "command", {"run": run, "expect": expect}, host={"address": "127.0.0.1", "ssh": ssh}
        )
        assert (result.success, result.reason) == (False, "shell"), result.message


async def test_a_control_that_was_not_run_says_so(host: Sshd, tmp_path: Path) -> None:
    """It is neither done nor failed, and the doctor says what to look at."""
    forced(host, "echo 'Please login as the user ubuntu.'; exit 0")
    ssh = {"user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    services = {
        "job": {"host": "h", "probe": {"command": {"run": ["false"]}}, "control": {"docker": {"container": "web"}}}
    }
    folder = tmp_path / "config"
    await asyncio.to_thread(
        inventory_of, folder, {"hosts": {"h": {"address": "127.0.0.1", "ssh": ssh}}, "services": services}
    )
    for arguments in (["control", "job", "restart", "--direct"], ["doctor", "h"]):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "defib", *arguments, "--config", str(folder),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said = (await process.communicate())[0].decode()
        assert process.returncode == 1, said
        assert "did not run the command: Please login as the user ubuntu." in said


async def test_what_a_login_shell_prints_at_its_end_is_no_output(host: Sshd, connect: Connect) -> None:
    logs_in_with(host, 'sh -c "$2"\nstatus=$?\necho bye; echo bye >&2\nexit $status')
    done = await connect().run(["sh", "-c", "echo it; exit 3"], timeout=60)
    assert (done.status, done.stdout, done.stderr) == (3, "it\n", "")


async def test_a_login_shell_that_hangs_is_not_a_command_that_does(host: Sshd, connect: Connect) -> None:
    logs_in_with(host, "exec sleep 60")
    shell = connect()
    await shell.connection()
    done = await shell.run(["true"], timeout=0.5)
    assert (done.status, done.late) == (None, False)
    assert "did not start the command" in done.why


@pytest.mark.parametrize("signal_", ["HUP", "KILL", "TERM"])
async def test_a_command_that_somebody_ended_is_unknown(any_shell: Shell, signal_: str) -> None:
    done = await any_shell.run(["sh", "-c", f"kill -{signal_} $$"], timeout=60)
    assert (done.status, done.late) == (None, False)
    assert (await any_shell.run(["sh", "-c", "kill -SEGV $$"], timeout=60)).status == 128 + signal.SIGSEGV


async def test_the_wrapper_proves_that_it_ran(host: Sshd, connect: Connect) -> None:
    """Only what the command prints is its output; one that the wrapper does not run is refused, by name."""
    argv = ["sh", "-c", "echo it; echo oops >&2; cat; exit 3"]
    hardened(host, argv, also="echo Welcome; echo 'no tty' >&2; ")
    shell = connect("control", control=True)
    done = await shell.run(argv, timeout=60)
    assert (done.status, done.stdout, done.stderr) == (3, "it\n", "oops\n")
    refused = await shell.run(["id"], timeout=60)
    assert "run defib host setup again" in get_wrapper_refusal(refused)


async def test_a_wrapper_that_sends_back_what_it_is_asked(host: Sshd, connect: Connect) -> None:
    forced(host, "echo $SSH_ORIGINAL_COMMAND; printf '%s\\n' $SSH_ORIGINAL_COMMAND")
    shell = connect("control", control=True)
    with pytest.raises(CommandNotRunError, match="sent the script back"):
        await shell.run(["id"], timeout=60)


async def test_a_wrapper_of_an_earlier_version_asks_for_another_setup(host: Sshd, connect: Connect) -> None:
    forced(host, "echo 'defib-shell: it takes run SECONDS DIGEST' >&2; exit 126")
    shell = connect("control", control=True)
    with pytest.raises(WrapperOutdatedError, match="run defib host setup again"):
        await shell.run(["id"], timeout=60)


@pytest.mark.parametrize("over", ["local", "ssh", "wrapper"])
async def test_what_a_control_leaves_running_keeps_its_outputs(
    host: Sshd, connect: Connect, tmp_path: Path, over: str
) -> None:
    """It goes on writing after the command has ended and the connection is gone, and no write fails."""
    log, stop = tmp_path / "writes", tmp_path / "stop"
    daemon = (
        f"trap '' PIPE; while [ ! -e {stop} ]; do"
        f" {{ echo out && echo err >&2; }} 2>&1 >&1 && echo well >> {log} || echo failed >> {log}; sleep 0.1; done"
    )
    argv = ["sh", "-c", f"echo starting; ({daemon}) & echo started"]
    if over == "wrapper":
        hardened(host, argv)
    shell = LocalShell() if over == "local" else connect("control" if over == "wrapper" else None, control=True)
    done = await shell.run(argv, timeout=60)
    assert (done.status, [line for line in done.stdout.split() if line.startswith("start")]) == (
        0,
        ["starting", "started"],
    )
    await shell.close()
    written = len(log.read_text().split()) if log.exists() else 0

    async def went_on() -> bool:
        return log.exists() and len(log.read_text().split()) > written + 20

    try:
        await eventually(went_on)
        assert set(log.read_text().split()) == {"well"}
    finally:
        stop.touch()


@pytest.mark.parametrize("kind", ["no -k", "-t", "none"])
async def test_a_host_whose_timeout_is_an_old_busybox_s(
    host: Sshd, connect: Connect, tmp_path: Path, kind: str
) -> None:
    """Before 1.35 it has no -k, and runs nothing where it is asked for it; before 1.30 it takes seconds after -t."""
    tools = tmp_path / "tools"
    tools.mkdir()
    real = shlex.quote(shutil.which("timeout") or "timeout")
    usage = "echo 'timeout: unrecognized option: k' >&2; echo 'Usage: timeout SECS PROG' >&2; exit 1"
    (tools / "timeout").write_text(f'#!/bin/sh\ncase $1 in -k*) {usage} ;; esac\nexec {real} "$@"\n')
    if kind == "-t":
        (tools / "timeout").write_text(
            f'#!/bin/sh\ncase $1 in -k*) {usage} ;; -t) [ "$2" -gt 0 ] || exit 1; shift; exec {real} "$@" ;; esac\nexec "$@"\n'
        )
    if kind == "none":
        (tools / "timeout").write_text(f"#!/bin/sh\n{usage}\n")
    (tools / "timeout").chmod(0o755)
    logs_in_with(host, f'PATH={tools}:$PATH\nexport PATH\nexec sh -c "$2"')
    for control in (False, True):
        shell = connect(control=control)
        done = await shell.run(["sh", "-c", "cat; echo oops >&2; exit 1"], timeout=60, stdin=b"given")
        assert (done.status, done.stdout, done.stderr) == (1, "given", "oops\n")
        if kind != "none":
            done = await shell.run(["sh", "-c", "sleep 20 >/dev/null 2>&1"], timeout=1.5)
            assert done.late
        found: dict[str, SectionOutput] = {}
        await read_sections(shell, [PROC_SECTION], timeout=60, on_section=found.__setitem__)
        assert found[PROC_SECTION.name].status == 0


@pytest.mark.parametrize("turns", range(6))
async def test_a_command_that_is_cancelled_while_it_starts_has_ended(turns: int) -> None:
    argv = ["sleep", f"60.{os.getpid()}{turns}"]
    running = asyncio.create_task(LocalShell(read_only=True).run(argv, timeout=60))
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            assert path.read_bytes() != "\0".join([*argv, ""]).encode()
