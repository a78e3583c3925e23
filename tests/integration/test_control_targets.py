"""Controls act only on the target in the inventory, and report it if no command was run."""

import asyncio
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from fleet.inventory.model import SudoOptions
from fleet.managers import docker, supervisor
from fleet.managers.containers import ContainerSelector
from fleet.managers.guarded_scripts import find_not_run
from fleet.shells import CompletedCommand, ShellError
from fleet.shells.local import LocalShell
from fleet.shells.ssh import command_digest
from fleet.shells.sudo import find_failure, find_refusal
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.runner import VERBS, ControlRunner, TargetNotFoundError, Verb
from tests.integration.conftest import start_supervisord
from tests.integration.loop import Loop
from tests.integration.test_host_setup import configure, create_keys, defib, run_in_copy
from tests.support import eventually


async def control(kind: str, verb: Verb, options: object) -> CompletedCommand:
    control_kind = CONTROLS[kind]
    validated = control_kind.options.model_validate(options)
    return await control_kind.run(verb, validated, ControlRunner(LocalShell(), SudoOptions(), 60.0, "gpu-01"))


async def read_state(kind: str, options: object) -> object:
    control_kind = CONTROLS[kind]
    validated = control_kind.options.model_validate(options)
    return await control_kind.read_state(validated, ControlRunner(LocalShell(), SudoOptions(), 60.0))


def state_of(container: str) -> str:
    argv = ["docker", "inspect", "--format", "{{.Id}} {{.Name}} {{json .State}}", container]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.mark.needs("dockerd", "busybox")
def test_an_abbreviated_container_id_is_not_found(container: str) -> None:
    """Docker interprets an unknown name as the beginning of an ID."""
    before = state_of(container)
    neighbour = before[:6]
    options = {"container": neighbour, "after_start": [{"exec": ["sh", "-c", "kill 1"], "log": "/log"}]}

    async def all_verbs() -> None:
        for verb in sorted(VERBS):
            with pytest.raises(TargetNotFoundError, match=f"^there is no container {neighbour} on gpu-01$"):
                await control("docker", verb, options)
        assert await read_state("docker", options) is None

    asyncio.run(all_verbs())
    assert state_of(container) == before
    assert neighbour not in docker.parse_containers(f"/{container}\trunning\t\t0\tnow\t0\timage\n")


@pytest.mark.needs("dockerd", "busybox", "docker-compose")
@pytest.mark.usefixtures("compose_plugin")
def test_a_compose_project_of_the_same_name_in_another_folder_is_refused(container: str, tmp_path: Path) -> None:
    """Compose identifies a project by the name of its folder, and searches the parent folders for its file."""
    one, other = tmp_path / "one" / f"app{os.getpid()}", tmp_path / "other" / f"app{os.getpid()}"
    for folder in (one, other):
        (folder / "below").mkdir(parents=True)
        (folder / "docker-compose.yml").write_text(
            f"version: '3'\nservices:\n  web: {{image: {container}, command: sleep 1000, network_mode: host, stop_signal: KILL}}\n"
        )

    async def run_all_verbs() -> None:
        assert (await control("compose", "start", {"directory": str(one), "service": "web"})).status == 0
        listed = subprocess.run(["docker-compose", "ps", "-q"], cwd=one, capture_output=True, text=True, check=True)
        before = state_of(listed.stdout.strip())
        for verb in sorted(VERBS):
            with pytest.raises(ShellError, match=f"is of the compose project in {one} and not in {other}"):
                await control("compose", verb, {"directory": str(other), "service": "web"})
        for verb in ("start", "restart"):
            with pytest.raises(ShellError, match="there is no compose file in"):
                await control("compose", verb, {"directory": str(one / "below"), "service": "web"})
        assert state_of(listed.stdout.strip()) == before

    try:
        asyncio.run(run_all_verbs())
    finally:
        subprocess.run(["docker-compose", "down", "-t", "0"], cwd=one, capture_output=True, check=True)


@pytest.fixture
def units(systemd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the unit files of the systemd that systemctl uses."""
    monkeypatch.setenv("PATH", f"{systemd}:{os.environ['PATH']}")
    return systemd.parent / "units"


def unit(units: Path, name: str, text: str) -> None:
    (units / name).write_text(f"[Unit]\nDefaultDependencies=no\n{text}")


@pytest.mark.needs("systemd")
async def test_missing_masked_and_aliased_units(units: Path) -> None:
    unit(units, "real.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    (units / "alias.service").symlink_to("real.service")
    (units / "masked.service").symlink_to("/dev/null")
    await LocalShell().run(["systemctl", "daemon-reload"], timeout=20)
    assert (await control("systemd", "restart", {"unit": "alias"})).status == 0
    assert (await control("systemd", "status", {"unit": "real"})).status == 0
    for verb in ("status", "start", "stop", "restart"):
        with pytest.raises(TargetNotFoundError, match=r"^there is no unit no-such\.service on gpu-01$"):
            await control("systemd", verb, {"unit": "no-such"})
    with pytest.raises(ShellError, match=r"gpu-01: the unit masked\.service: .*LoadState=masked"):
        await control("systemd", "restart", {"unit": "masked"})


@pytest.mark.needs("systemd")
async def test_a_unit_at_its_start_limit_is_restarted(units: Path, tmp_path: Path) -> None:
    repaired = tmp_path / "repaired"
    unit(
        units,
        "limited.service",
        "StartLimitIntervalSec=1h\nStartLimitBurst=2\n"
        f"[Service]\nExecStart=/bin/sh -c 'test -e {repaired} && exec sleep infinity; exit 1'\nRestart=always\nRestartSec=0\n",
    )
    shell = LocalShell()
    for argv in (["systemctl", "daemon-reload"], ["systemctl", "start", "limited.service"]):
        await shell.run(argv, timeout=20)

    async def at_its_limit() -> bool:
        shown = await shell.run(["systemctl", "show", "--property=ActiveState", "limited.service"], timeout=20)
        return "ActiveState=failed" in shown.stdout

    await eventually(at_its_limit)
    await asyncio.to_thread(repaired.touch)
    for _ in range(4):
        completed = await control("systemd", "restart", {"unit": "limited"})
        assert completed.status == 0, completed
    assert (await control("systemd", "status", {"unit": "limited"})).status == 0


async def test_a_supervisor_group_is_not_found_and_a_stopped_supervisord_is_reported(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    programs = "".join(f"[program:{name}]\ncommand=/bin/sleep 1000\nstartsecs=0\n" for name in "ab")
    config = tmp_path / "supervisord.conf"
    options = {"program": "web", "config": str(config)}
    with pytest.raises(ShellError, match="gpu-01: Error: could not find config file"):
        await control("supervisor", "restart", options)
    await start_supervisord(launcher, tmp_path, f"{programs}[group:web]\nprograms=a,b\n")

    async def answers() -> bool:
        completed = await LocalShell().run(supervisor.build_action("status", "web:a", config), timeout=20)
        return "RUNNING" in completed.stdout

    await eventually(answers)
    status = supervisor.build_action("status", "web:a", config)
    before = (await LocalShell().run(status, timeout=20)).stdout.split()[3]
    for verb in sorted(VERBS):
        with pytest.raises(TargetNotFoundError, match=r"^there is no program web in supervisor on gpu-01$"):
            await control("supervisor", verb, options)
    assert (await LocalShell().run(status, timeout=20)).stdout.split()[3] == before  # its pid
    assert (await control("supervisor", "restart", {**options, "program": "web:a"})).status == 0
    socket = tmp_path / "supervisor.sock"
    socket.rename(tmp_path / "away.sock")
    for verb in ("status", "start", "restart", "logs"):
        with pytest.raises(ShellError, match=r"gpu-01: unix://.* no such file"):
            await control("supervisor", verb, {**options, "program": "web:a"})


@pytest.mark.parametrize(
    "message",
    [
        "unix:///var/run/supervisor/supervisor.sock no such file",
        "error: <class 'socket.error'>, [Errno 111] Connection refused: file: /usr/lib/python2.7/socket.py line: 224",
    ],
)
async def test_supervisorctl_3_without_a_supervisord_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """Its exit status is 0 in this case."""
    program = tmp_path / "supervisorctl"
    program.write_text(f'#!/bin/sh\necho "{message}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for verb in ("status", "start", "stop", "restart"):
        with pytest.raises(ShellError, match="gpu-01: "):
            await control("supervisor", verb, {"program": "web"})
    assert await read_state("supervisor", {"program": "web"}) is None


@pytest.mark.needs("docker", "systemd")
async def test_a_manager_that_is_not_running_or_not_installed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    for verb in sorted(VERBS):
        with pytest.raises(ShellError, match=r"^gpu-01: Cannot connect to the Docker daemon at "):
            await control("docker", verb, {"container": "web"})
    for tool in ("sh", "cat"):  # the only programs in PATH
        (tmp_path / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(tmp_path))
    project = {"directory": str(tmp_path), "service": "web"}
    (tmp_path / "compose.yaml").touch()
    for kind, options, message in (
        ("docker", {"container": "web"}, "docker: not found"),
        ("compose", project, "docker has no compose plugin"),
        ("systemd", {"unit": "web"}, "systemctl: not found"),
        ("supervisor", {"program": "web"}, "supervisorctl: not found"),
    ):
        with pytest.raises(ShellError, match=message):
            await control(kind, "restart", options)


def test_messages_of_managers_after_a_command_was_run_are_ignored() -> None:
    """A log, or the second part of a restart, does not show that nothing was run."""
    half = CompletedCommand(1, "web: stopped\nunix:///run/supervisor.sock refused connection\n", "")
    assert find_not_run(half, supervisor.MESSAGES) is None
    log = CompletedCommand(0, "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", "")
    assert find_not_run(log, docker.MESSAGES) is None
    assert find_not_run(CompletedCommand(None, "", "", "no answer within 5 s", late=True), docker.MESSAGES) is None


SUDO = r"""
mount -t proc proc /proc || exit 23
useradd --system --create-home --shell /bin/sh ops || exit 24
as_ops() { setpriv --reuid "$(id -u ops)" --regid "$(id -g ops)" --clear-groups $1 env -i PATH=/usr/bin:/bin sudo -n -- id 2>&1; }
for rule in 'Defaults requiretty' 'ops ALL=(ALL) NOPASSWD: ALL' '# nothing'; do
    printf '%s\n' 'root ALL=(ALL:ALL) ALL' "$rule" > /etc/sudoers
    echo "rule $rule"
    as_ops
done
printf 'ops ALL=(ALL) NOPASSWD: ALL\n' > /etc/sudoers
echo rule no-new-privs
as_ops --no-new-privs
exit 0
"""


@pytest.mark.needs("root", "sudo", "unshare")
def test_refusals_and_failures_of_sudo_are_recognized(tmp_path: Path) -> None:
    """Uses the messages of a real sudo."""
    completed = run_in_copy(tmp_path, "", SUDO)
    assert completed.returncode == 0, (completed.stdout, completed.stderr)
    outputs = {part.partition("\n")[0]: part.partition("\n")[2] for part in completed.stdout.split("rule ")[1:]}
    sudo = SudoOptions.model_validate("passwordless")
    reasons = {
        rule: (find_refusal(completed, sudo), find_failure(completed, sudo))
        for rule, text in outputs.items()
        for completed in (CompletedCommand(1, "", text),)
    }
    assert reasons["Defaults requiretty"] == ("", "sudo: sorry, you must have a tty to run sudo")
    assert reasons["ops ALL=(ALL) NOPASSWD: ALL"] == ("", "")
    assert reasons["# nothing"] == ("sudo: a password is required", "")
    assert "no new privileges" in reasons["no-new-privs"][1]
    warned = CompletedCommand(
        1, "", "sudo: unable to resolve host gpu-01: Name or service not known\nError: No such container: x"
    )
    assert find_failure(warned, sudo) == ""


DOCKER = r"""#!/bin/sh
echo "docker $*" >> /tmp/commands
case "$1 $*" in
ps* | inspect*) echo 4d5c7c9d3f6a ;;
esac
"""
HARDENED = r"""
mount -t proc proc /proc || exit 23
cat > /usr/local/sbin/docker <<'END'
{docker}END
chmod 755 /usr/local/sbin/docker
sh -eu /tmp/setup.sh || exit 1
as_defib() {{ setpriv --reuid "$(id -u defib)" --regid "$(id -g defib)" --clear-groups env -i PATH=/usr/bin:/bin "$@"; }}
as_defib {run} || exit 2
grep -qx 'docker restart 4d5c7c9d3f6a' /tmp/commands || exit 3
rm /tmp/commands
try() {{ as_defib sudo -n "$@" 2>/dev/null && exit 4; }}
{parts}
[ ! -e /tmp/commands ] || exit 5
"""


@pytest.mark.needs("root", "sudo", "unshare", "ssh-keygen")
@pytest.mark.parametrize("wrapper", [False, True], ids=["sudoers", "wrapper"])
@pytest.mark.parametrize(
    ("options", "selector"),
    [
        ({"container": "web"}, ContainerSelector("web")),
        ({"label": "app=web: a b"}, ContainerSelector(labels=("app=web: a b",))),
        ({"image": "registry.test:5000/web"}, ContainerSelector(image="registry.test:5000/web")),
    ],
    ids=["container", "label", "image"],
)
def test_a_hardened_host_allows_exactly_the_commands_of_its_controls(
    tmp_path: Path, wrapper: bool, options: dict[str, str], selector: ContainerSelector
) -> None:
    """With sudoers or the wrapper; no part of a script can be run."""
    ssh = {"user": "defib", "key_file": "read", "known_hosts": "known"}
    host: dict[str, Any] = {
        "address": "10.0.0.11",
        "ssh": ssh,
        "control_ssh": {"key_file": "control", "wrapper": wrapper},
    }
    if not wrapper:
        host["sudo"] = "passwordless"
    service = {"host": "gpu-01", "probe": {"container": {"name": "web"}}, "control": {"docker": options}}
    configure(tmp_path / "config", {"gpu-01": host}, {"web": service})
    create_keys(tmp_path / "config", "read", "control")
    made = defib(tmp_path / "config", "host", "setup", "gpu-01")
    assert made.returncode == 0, made.stderr
    argv = docker.build_action("restart", selector)
    script = argv[2]
    run = shlex.join(["sudo", "-n", *argv])
    if wrapper:
        run = f'SSH_ORIGINAL_COMMAND="run 5 {command_digest(argv)}" sudo -n /usr/local/sbin/defib-shell control'
    # sudo compares the arguments as one string, which can be divided at any space.
    ends = [at for at, character in enumerate(script) if character == " "]
    divided = [["try", *argv[:2], script[:at], script[at + 1 :]] for at in ends[:: len(ends) // 10]]
    parts = "\n".join(map(shlex.join, divided))
    completed = run_in_copy(tmp_path, made.stdout, HARDENED.format(docker=DOCKER, run=run, parts=parts))
    assert completed.returncode == 0, (completed.returncode, completed.stdout, completed.stderr)


async def test_a_missing_target_counts_as_no_attempt_and_is_notified_once(loop: Loop) -> None:
    """Each try fails without a command, and the next follows after a back-off."""
    config = await start_supervisord(loop.launcher, loop.folder, "[program:other]\ncommand=/bin/sleep 1000\n")
    gone = loop.service("web", control={"supervisor": {"program": "web", "config": str(config)}, "start_within": "2s"})
    await loop.start({"web": gone}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")

    async def was_tried_twice() -> bool:
        return len((await loop.incident())["actions"]) >= 3

    await eventually(was_tried_twice)
    ended = [action for action in (await loop.incident())["actions"] if action["state"] != "running"]
    assert {(action["state"], action["counts"], action["why"]) for action in ended} == {
        ("failed", 0, "nothing was run: there is no program web in supervisor on h")
    }
    await loop.until_cards("Service down: web", "Could not restart: web")
