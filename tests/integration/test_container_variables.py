"""Variables of containers arrive, and no process has them in its arguments: with a real dockerd and sudo."""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from fleet.inventory.model import SudoOptions
from fleet.managers.containers import ContainerSelector
from fleet.managers.docker import build_exec
from fleet.shells import CompletedCommand
from fleet.shells.local import LocalShell
from fleet.shells.ssh import Login, SshShell, WrapperMode, command_digest
from fleet.shells.sudo import build_sudo_command
from fleet.wrapper import render_command_file
from remediator.execution.controls.docker import DockerControlOptions, run_after_start
from remediator.execution.controls.recreate import recreate
from remediator.execution.controls.runner import ControlRunner
from tests.integration.test_host_setup import configure, create_keys, run_in_copy
from tests.support import eventually

pytestmark = pytest.mark.needs("dockerd", "busybox")
VARIABLES = {
    "API_KEY": "s3cret of a line",
    "CERTIFICATE": "-----BEGIN s3cret-----\n  it's $HOME+\n.\n\n'\"\\ `id` = s3cret\n",
    "CHINESE": "s3cret \u5bc6\u7801 # not = a comment ",
    "EMPTY": "",
    "LONG": "s3cret" * 12_000,
    "PATH": "/usr/bin:/bin:/s3cret",
    "RETURN": "s3cret\r",
}
IN_FILE = ("API_KEY", "CHINESE", "EMPTY", "PATH")
# Without the characters that cannot be written in sudoers.
WAIT = ["sh", "-c", "cat /proc/$$/environ > /variables; : > /started; until test -e /done; do sleep 0.1; done"]
INSIDE = r"""
mount -t proc proc /proc && ln -s /proc/self/fd/0 /dev/stdin || exit 23
cat > /usr/local/sbin/docker <<'END'
#!/bin/sh
{docker}
END
chmod 755 /usr/local/sbin/docker
sh -eu /tmp/setup.sh || exit 1
as_defib() {{ setpriv --reuid "$(id -u defib)" --regid "$(id -g defib)" --clear-groups env -i PATH=/usr/bin:/bin "$@"; }}
as_defib {command} <<'END_OF_STDIN' || exit 2
{stdin}END_OF_STDIN
"""
WRAPPER = Path(__file__).parents[2] / "deploy" / "ssh" / "defib-shell"


@pytest.fixture
def waiting(container: str) -> Iterator[str]:
    run("exec", container, "busybox", "rm", "-f", "/variables", "/started", "/done")
    yield container
    run("exec", container, "busybox", "touch", "/done")


@pytest.fixture
async def host(launcher: Launcher, tmp_path: Path) -> Sshd:
    """A real sshd whose commands find the docker daemon."""
    (port,) = reserve_ports(1)
    environment = {"PATH": os.environ["PATH"], "DOCKER_HOST": os.environ["DOCKER_HOST"]}
    return await sshd.start(launcher, tmp_path / "sshd", port, environment)


@pytest.fixture
async def connect(host: Sshd) -> AsyncIterator[Callable[[WrapperMode | None], SshShell]]:
    shells = []

    def make(mode: WrapperMode | None = None) -> SshShell:
        login = Login("127.0.0.1", host.port, host.user, host.key_file, host.known_hosts, mode)
        shells.append(SshShell(login, control=True))
        return shells[-1]

    yield make
    for each in shells:
        await each.close()


def run(*arguments: str) -> bytes:
    return subprocess.run(["docker", *arguments], capture_output=True, check=True).stdout


async def has_started(container: str) -> bool:
    argv = ["docker", "exec", container, "busybox", "test", "-e", "/started"]
    return (await asyncio.to_thread(subprocess.run, argv, check=False)).returncode == 0


def list_arguments() -> list[bytes]:
    """Return the arguments of every process of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return found


def check_variables(container: str) -> None:
    found = run("exec", container, "cat", "/variables").decode().removesuffix("\0").split("\0")
    variables = dict(each.split("=", 1) for each in found)
    assert {name: variables.get(name) for name in VARIABLES} == VARIABLES


async def check_waiting(running: "asyncio.Future[Any]", container: str) -> None:
    """Check that no process has a variable as an argument while the command runs, then let it end."""

    async def has_started_or_failed() -> bool:
        return running.done() or await has_started(container)

    await eventually(has_started_or_failed)
    arguments = list_arguments()
    await asyncio.to_thread(run, "exec", container, "busybox", "touch", "/done")
    await running
    assert [each for each in arguments if b"\0exec\0" in each and b"/started" in each]
    assert [each for each in arguments if b"s3cret" in each] == []
    await asyncio.to_thread(check_variables, container)


def control(container: str, variables: Mapping[str, str]) -> dict[str, Any]:
    return {"container": container, "after_start": [{"exec": WAIT, "env": dict(variables)}]}


@pytest.mark.needs("sshd")
@pytest.mark.parametrize("over", ["local", "ssh", "wrapper"])
async def test_a_command_in_a_container_receives_its_variables(
    waiting: str, host: Sshd, connect: Callable[[WrapperMode | None], SshShell], over: str
) -> None:
    options = DockerControlOptions.model_validate(control(waiting, VARIABLES))
    folder = host.key_file.parent
    if over == "wrapper":
        recorder = Recorder()
        await run_after_start(options, ControlRunner(recorder, SudoOptions(), 60.0))
        (folder / "commands").mkdir()
        for command in recorder.commands:
            (folder / "commands" / command_digest(*command)).write_text(render_command_file(*command))
        forced = f'command="exec sh {WRAPPER} control {folder} {os.environ["PATH"]}"'
        (folder / "authorized").write_text(f"restrict,{forced} {(folder / 'authorized').read_text()}")
    shell = LocalShell() if over == "local" else connect("control" if over == "wrapper" else None)
    running = asyncio.create_task(run_after_start(options, ControlRunner(shell, SudoOptions(), 300.0)))
    await check_waiting(running, waiting)
    assert running.result() is None


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
@pytest.mark.parametrize("over", ["sudoers", "unread password", "wrapper"])
async def test_a_hardened_host_passes_variables(
    waiting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    """`defib host setup` allows the command that the remediator sends, with its references resolved."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(f"OF_{name}", value or "-")
    references = {name: f"${{OF_{name}}}" if value else "" for name, value in VARIABLES.items()}
    host: dict[str, Any] = {
        "address": "10.0.0.11",
        "ssh": {"user": "defib", "key_file": "read", "known_hosts": "known"},
        "control_ssh": {"key_file": "control", "wrapper": over == "wrapper"},
        "sudo": "none" if over == "wrapper" else "passwordless",
    }
    service = {
        "host": "gpu-01",
        "probe": {"container": {"name": waiting}},
        "control": {"docker": control(waiting, references)},
    }
    configure(tmp_path / "config", {"gpu-01": host}, {"web": service})
    create_keys(tmp_path / "config", "read", "control")
    argv = [sys.executable, "-m", "defib", "host", "setup", "gpu-01", "--config", str(tmp_path / "config")]
    made = await asyncio.to_thread(subprocess.run, argv, capture_output=True, check=True)
    is_secret = (b"contains secrets" in made.stderr, b"s3cret" in made.stdout)
    assert is_secret == (over == "wrapper", over == "wrapper")
    recorder = Recorder()
    await run_after_start(
        DockerControlOptions.model_validate(control(waiting, VARIABLES)),
        ControlRunner(recorder, SudoOptions(), 60.0),
    )
    ((arguments, stdin),) = recorder.commands
    sudo = {"password": "unread=password"} if over == "unread password" else "passwordless"
    argv, stdin = build_sudo_command(arguments, SudoOptions.model_validate(sudo), stdin)
    command = shlex.join(argv)
    if over == "wrapper":
        digest = command_digest(*recorder.commands[0])
        command = f'SSH_ORIGINAL_COMMAND="run 300 {digest} @a @b" sudo -n /usr/local/sbin/defib-shell control'
    # A socket cannot be opened through the copy.
    daemon = os.environ["DOCKER_HOST"].replace("unix://", f"unix:///proc/{os.getpid()}/root")
    inside = INSIDE.format(
        docker=f'exec {shutil.which("docker")} --host {daemon} "$@"', command=command,
        stdin=stdin.decode(),
    )  # fmt: skip
    running = asyncio.ensure_future(asyncio.to_thread(run_in_copy, tmp_path, made.stdout.decode(), inside))
    await check_waiting(running, waiting)
    done = running.result()
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)


class Recorder:
    """A shell that runs nothing and records the commands."""

    wrapped = False

    def __init__(self) -> None:
        self.commands: list[tuple[Sequence[str], bytes]] = []

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", **_: object) -> CompletedCommand:
        self.commands.append((argv, stdin))
        return CompletedCommand(0, "", "")

    async def close(self) -> None:
        pass


async def test_a_container_is_recreated_with_its_variables(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `docker create` runs, no process has one as an argument."""
    name, real = f"{container}-variables", shutil.which("docker")
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\n[ "$1" != create ] || cat /proc/[0-9]*/cmdline > {tmp_path}/arguments 2>/dev/null\nexec {real} "$@"\n'
    )
    (tmp_path / "docker").chmod(0o755)
    variables = [f"{name}={value}" for name, value in {**VARIABLES, "dotted.name": "s3cret"}.items()]
    flags = [part for each in variables for part in ("--env", each)]
    run("run", "-d", "--name", name, "--network", "host", *flags, container, "sleep", "1000")
    try:
        before = json.loads(run("inspect", name))[0]
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        runner = ControlRunner(LocalShell(), SudoOptions(), 120.0)
        completed = await recreate(DockerControlOptions(container=name), runner)
        assert completed.status == 0, completed
        after = json.loads(run("inspect", name))[0]
        assert (after["Id"] != before["Id"], sorted(after["Config"]["Env"])) == (True, sorted(before["Config"]["Env"]))
        assert set(variables) <= set(after["Config"]["Env"])
        arguments = (tmp_path / "arguments").read_bytes()
        assert (b"create\0" in arguments, b"s3cret" in arguments) == (True, False)
    finally:
        run("rm", "--force", name)


async def test_a_container_whose_variables_cannot_be_passed_is_not_changed(container: str) -> None:
    name = f"{container}-unusual"
    run("run", "-d", "--name", name, "--network", "host", "--env", "HTTP_PROXY=a\nb", container, "sleep", "1000")
    try:
        before = run("inspect", "--format", "{{.Id}} {{.State.StartedAt}}", name)
        runner = ControlRunner(LocalShell(), SudoOptions(), 120.0)
        completed = await recreate(DockerControlOptions(container=name), runner)
        assert (completed.status, "would differ in: Config.Env" in completed.stderr) == (1, True), completed
        assert run("inspect", "--format", "{{.Id}} {{.State.StartedAt}}", name) == before
    finally:
        run("rm", "--force", name)


@pytest.mark.parametrize("sh", [["sh"], ["bash"], ["busybox", "sh"]], ids=" ".join)
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_shell_passes_variables(tmp_path: Path, sh: list[str], *, wrapped: bool) -> None:
    (tmp_path / "docker").write_text(
        "#!/bin/sh\ncase $1 in inspect) echo 4d5c ;; exec) cat /dev/stdin && printf '%s' \"$CERTIFICATE\" ;; esac\n"
    )
    (tmp_path / "docker").chmod(0o755)
    argv, stdin = build_exec(
        ContainerSelector("web"), [], ["true"], [f"{name}={value}" for name, value in VARIABLES.items()]
    )
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if wrapped:
        (tmp_path / "command").write_text(render_command_file(argv, stdin), newline="")
        command, stdin = [*sh, str(tmp_path / "command")], b""
    else:
        command = [*sh, *argv[1:]]
    done = subprocess.run(command, input=stdin, env=environment, capture_output=True, check=True)
    in_file = "".join(f"{name}={value}\n" for name, value in VARIABLES.items() if name in IN_FILE)
    assert done.stdout.decode() == in_file + VARIABLES["CERTIFICATE"]


@pytest.mark.parametrize("variable", ["PATH", "DOCKER_HOST", "https_proxy", "LD_PRELOAD", "id"])
def test_variables_of_docker_itself_must_fit_in_a_line(variable: str) -> None:
    DockerControlOptions.model_validate(control("web", {variable: "a b"}))
    with pytest.raises(ValidationError, match=f"{variable} cannot have several lines") as raised:
        DockerControlOptions.model_validate(control("web", {variable: "s3cret\nb"}))
    assert "s3cret" not in str(raised.value.errors(include_input=False))
