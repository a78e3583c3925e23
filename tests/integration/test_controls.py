"""The controls on a real dockerd and a real supervisord."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from defib.demo import service
from defib.demo.keeper import Keeper
from defib.demo.stack import free_ports
from fleet.model import Sudo
from fleet.shells import Completed, Shell, ShellError
from fleet.shells.local import LocalShell
from fleet.sudo import elevated
from remediator.controls import CONTROLS
from remediator.controls.hands import Hands, UnknownVerb, Verb
from tests.support import eventually


async def control(kind: str, verb: Verb, options: object, shell: Shell | None = None) -> Completed:
    chosen = CONTROLS[kind]
    made = chosen.options.model_validate(options)
    return await chosen.control(verb, made, Hands(shell or LocalShell(), Sudo(), 20.0))


def started_at(container: str) -> str:
    argv = ["docker", "inspect", "--format", "{{.State.StartedAt}}", container]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.mark.needs("dockerd", "busybox")
def test_docker(container: str) -> None:
    async def all_verbs() -> None:
        options = {"container": container}
        assert (await control("docker", "status", options)).status == 0
        before = started_at(container)
        assert (await control("docker", "restart", options)).status == 0
        assert started_at(container) != before
        assert (await control("docker", "stop", options)).status == 0
        assert (await control("docker", "status", options)).status == 1
        assert (await control("docker", "start", options)).status == 0
        assert (await control("docker", "restart", {"container": "no-such-container"})).status == 1

    asyncio.run(all_verbs())


@pytest.mark.needs("dockerd", "busybox")
def test_docker_starts_what_is_to_be_started_inside(container: str) -> None:
    awkward = 'it\'s $HOME; `id` "quoted"'
    script = 'echo "$GREETING $1"; exec sleep 1000'
    step = {
        "exec": ["sh", "-c", script, "sh", awkward],
        "env": {"GREETING": "hello"},
        "detach": True,
        "log": "/api.log",
    }

    async def restart_and_read() -> None:
        options = {"container": container, "after_start": [step]}
        assert (await control("docker", "restart", options)).status == 0

        async def logged() -> bool:
            return f"hello {awkward}" in (await control("docker", "logs", options)).stdout

        await eventually(logged)

    asyncio.run(restart_and_read())


async def test_supervisor(keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (port,) = free_ports(1)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "index.html").write_text(service.PAGE)
    await service._supervised(keeper, tmp_path, port)
    options = {"program": "web", "config": str(tmp_path / "supervisord.conf")}
    assert (await control("supervisor", "status", options)).status == 0
    assert (await control("supervisor", "stop", options)).status == 0
    assert (await control("supervisor", "status", options)).status == 3
    assert (await control("supervisor", "restart", options)).status == 0
    assert (await control("supervisor", "status", options)).status == 0
    assert (await control("supervisor", "restart", {**options, "program": "nothing"})).status != 0
    assert "GET /" in (await control("supervisor", "logs", options)).stdout


@pytest.mark.parametrize("name", ["all", "web:*", "-x", "a b", "", "*"])
async def test_names_that_would_mean_more_than_one_program(name: str) -> None:
    with pytest.raises(ValueError, match="is not a program of supervisor"):
        await control("supervisor", "restart", {"program": name})


@pytest.mark.parametrize("name", ["-f", "a b", "$(x)", "", "a;b"])
async def test_names_that_are_no_container(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        await control("docker", "restart", {"container": name})


async def test_commands(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = {"stop": ["sh", "-c", f"echo stop >> {log}"], "start": ["sh", "-c", f"echo start >> {log}"]}
    assert (await control("command", "restart", options)).status == 0
    assert log.read_text() == "stop\nstart\n"
    with pytest.raises(UnknownVerb):
        await control("command", "logs", options)


class LostHalfWay:
    wrapped = False

    """A shell whose host goes away after the first command."""

    def __init__(self) -> None:
        self.ran = 0

    async def run(self, argv: object, *, timeout: float, stdin: bytes = b"", heard: object = None) -> Completed:
        self.ran += 1
        if self.ran > 1:
            raise ShellError("gone")
        return Completed(0, "", "")

    async def close(self) -> None:
        pass


async def test_a_host_that_is_lost_half_way_is_unknown_not_untouched() -> None:
    options = {"stop": ["true"], "start": ["true"]}
    done = await control("command", "restart", options, LostHalfWay())
    assert (done.status, "half-way" in done.why) == (None, True)


def test_a_sudo_password_is_on_stdin_only() -> None:
    argv, stdin = elevated(["docker", "ps"], Sudo.model_validate({"password": "s3cret"}))
    assert (argv, stdin) == (["sudo", "-S", "-p", "", "--", "docker", "ps"], b"s3cret\n")
    assert elevated(["docker", "ps"], Sudo.model_validate("passwordless"))[0][:3] == ["sudo", "-n", "--"]
    assert elevated(["docker", "ps"], Sudo()) == (["docker", "ps"], b"")
