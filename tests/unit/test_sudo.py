"""Commands of sudo, whose arguments sudo compares as one text."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from fleet.managers import docker, supervisor, systemd
from fleet.managers.containers import ContainerSelector
from fleet.shells.sudo import enclose

IMAGE = ContainerSelector(image="registry.test:5000/web")
COMMANDS: list[Sequence[str]] = [
    ["change", "app", "/srv/my dir"],
    ["sh", "-c", "{ change app; }; change all"],
    ["sh", "-c", "change app", "x"],
    ["change", "it's"],
    ["change app"],
    ["docker", "compose", "-f", "/srv/compose.yml", "up"],
    docker.build_action("restart", IMAGE),
    docker.build_logs(IMAGE, 200),
    docker.build_inspect(IMAGE),
    docker.build_state_query(ContainerSelector("web")),
    docker.build_exec(ContainerSelector("web"), [], ["sh", "-c", "exec a >>'/b c' 2>&1"], ["A=b c"])[0],
    docker.build_compose_action("/srv/my dir", "restart", "web"),
    docker.build_compose_inspect("/srv/my dir", "web"),
    systemd.build_action("restart", "nginx.service"),
    systemd.build_logs("nginx.service", 200),
    systemd.build_show("nginx.service"),
    supervisor.build_action("restart", "web", Path("/etc/stack.conf")),
    supervisor.build_logs("web", None, 20),
]
PROGRAMS = ("change", "docker", "date", "systemctl", "journalctl", "supervisorctl", "change app")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that record that they ran."""
    (tmp_path / "bin").mkdir()
    for name in PROGRAMS:
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "$0" >> {tmp_path}/ran\n')
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "my dir").mkdir()
    (tmp_path / "my dir" / "compose.yaml").touch()
    return tmp_path / "bin"


def run(programs: Path, argv: Sequence[str]) -> bool:
    """Run a command; return whether it has run a program."""
    ran = programs.parent / "ran"
    ran.unlink(missing_ok=True)
    subprocess.run(argv, env={"PATH": f"{programs}:/usr/bin:/bin"}, capture_output=True, timeout=20, check=False)
    return ran.exists()


def test_no_command_starts_a_pager() -> None:
    """On a terminal, a pager of root runs commands."""
    for command in COMMANDS:
        words = " ".join(command).replace("$(", " ").split()
        for at, word in enumerate(words):
            if word == "journalctl" or words[at : at + 2] == ["systemctl", "show"]:
                assert "--no-pager" in words[at : at + 3], command


@pytest.mark.parametrize(
    "shell", [["sh"], ["bash"], pytest.param(["busybox", "sh"], marks=pytest.mark.needs("busybox"))]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_other_division_of_an_enclosed_command_runs_anything(
    programs: Path, shell: list[str], command: Sequence[str]
) -> None:
    argv = enclose(command)
    if len(argv) <= 2:
        assert " " not in "".join(argv[1:])
        return
    program, option, script = argv
    assert (program, option) == ("sh", "-c")
    script = script.replace("/srv/my dir", str(programs.parent / "my dir"))
    shell = [str(shutil.which(shell[0])), *shell[1:]]
    assert run(programs, [*shell, option, script])
    words = script.split(" ")
    for at in range(1, len(words)):
        assert not run(programs, [*shell, option, " ".join(words[:at]), *words[at:]]), words[at]
    for at in range(1, len(words) + 1):
        assert not run(programs, [*shell, " ".join([option, *words[:at]]), *words[at:]]), words[at - 1]
