"""The verbs of every control type, with a real dockerd, systemd and supervisord."""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web

from defib.demo import service
from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from fleet.inventory.model import SudoOptions
from fleet.shells import CompletedCommand, Shell, ShellError
from fleet.shells.local import LocalShell
from fleet.shells.sudo import build_sudo_command
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.runner import ControlRunner, TargetNotFoundError, TargetState, UnknownVerbError, Verb
from tests.integration import peers
from tests.integration.conftest import start_supervisord
from tests.support import eventually


async def control(kind: str, verb: Verb, options: object, shell: Shell | None = None) -> CompletedCommand:
    control_kind = CONTROLS[kind]
    validated = control_kind.options.model_validate(options)
    return await control_kind.run(verb, validated, ControlRunner(shell or LocalShell(), SudoOptions(), 60.0))


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

    asyncio.run(all_verbs())


@pytest.mark.needs("dockerd", "busybox")
def test_docker_runs_after_start_inside_the_container(container: str) -> None:
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


async def test_supervisor(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (port,) = reserve_ports(1)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "index.html").write_text(service.PAGE)
    await service._supervised(launcher, tmp_path, port)
    options = {"program": "web", "config": str(tmp_path / "supervisord.conf")}
    assert (await control("supervisor", "status", options)).status == 0
    assert (await control("supervisor", "stop", options)).status == 0
    assert (await control("supervisor", "status", options)).status == 3
    assert (await control("supervisor", "restart", options)).status == 0
    assert (await control("supervisor", "status", options)).status == 0
    assert "GET /" in (await control("supervisor", "logs", options)).stdout


async def test_a_log_line_like_an_error_of_supervisor_is_no_error(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    program = "[program:web]\ncommand=sh -c 'echo Error: mine; exec sleep 1000'\nstartsecs=0\n"
    config = await start_supervisord(launcher, tmp_path, program)
    options = {"program": "web", "config": str(config)}

    async def logged() -> bool:
        with contextlib.suppress(ShellError):
            return "Error: mine" in (await control("supervisor", "logs", options)).stdout
        return False

    await eventually(logged)
    with pytest.raises(TargetNotFoundError):
        await control("supervisor", "logs", {**options, "program": "nothing"})


async def read_state(kind: str, options: object) -> TargetState | None:
    control_kind = CONTROLS[kind]
    validated = control_kind.options.model_validate(options)
    return await control_kind.read_state(validated, ControlRunner(LocalShell(), SudoOptions(), 20.0))


@pytest.mark.needs("dockerd", "busybox", "docker-compose")
@pytest.mark.usefixtures("compose_plugin")
async def test_compose(container: str, tmp_path: Path) -> None:
    project = tmp_path / f"project{os.getpid()}"
    project.mkdir()
    (project / "docker-compose.yml").write_text(
        f"version: '3'\nservices:\n  worker: {{image: {container}, command: sleep 1000, network_mode: host, stop_signal: KILL}}\n"
    )
    options = {"directory": str(project), "service": "worker"}
    with pytest.raises(
        TargetNotFoundError, match=f"there is no container of the compose service worker of {project} on the host"
    ):
        await control("compose", "status", options)
    assert (await control("compose", "start", options)).status == 0
    try:
        assert (await control("compose", "status", options)).status == 0
        before = await read_state("compose", options)
        assert (await control("compose", "restart", options)).status == 0
        after = await read_state("compose", options)
        assert before is not None
        assert after is not None
        assert (before.state, before.started < after.started) == ("running", True)
        assert (await control("compose", "logs", options)).status == 0
        assert (await control("compose", "stop", options)).status == 0
        assert (await control("compose", "status", options)).status == 1
        with pytest.raises(TargetNotFoundError, match="there is no container of the compose service nothing"):
            await control("compose", "restart", {**options, "service": "nothing"})
    finally:
        subprocess.run(["docker-compose", "down", "-t", "0"], cwd=project, capture_output=True, check=True)


@pytest.mark.needs("systemd")
async def test_systemd(systemd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{systemd}:{os.environ['PATH']}")
    options = {"unit": "well"}
    assert (await control("systemd", "status", options)).status == 0
    before = await read_state("systemd", options)
    assert (await control("systemd", "restart", options)).status == 0
    after = await read_state("systemd", options)
    assert before is not None
    assert after is not None
    assert (before.state, before.pid != after.pid, bool(after.pid)) == ("active (running), result success", True, True)
    assert (await control("systemd", "stop", options)).status == 0
    assert (await control("systemd", "status", options)).status == 3
    assert (await control("systemd", "start", options)).status == 0
    broken = await read_state("systemd", {"unit": "broken"})
    assert broken is not None
    assert broken.state == "failed (failed), result exit-code"


@pytest.mark.parametrize("unit", ["*", "a*", "-f", "a b", "a;b", ""])
async def test_invalid_unit_names_are_refused(unit: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a systemd unit"):
        await control("systemd", "restart", {"unit": unit})


async def test_http_restarts_by_stop_and_start() -> None:
    requests: list[tuple[str, str, str, Any]] = []

    async def channel(request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        requests.append((request.method, request.path, request.headers.get("Authorization", ""), body))
        return web.json_response({"state": "running"}, status=500 if request.path == "/broken" else 200)

    async with peers.web_server(channel) as port:
        url = f"http://127.0.0.1:{port}"
        options = {
            "stop": {"url": f"{url}/7/stop", "json": {"force": True}, "auth": {"bearer": "t0ken-secret"}},
            "start": f"{url}/7/start", "status": f"{url}/7",
        }  # fmt: skip
        assert (await control("http", "restart", options)).status == 0
        assert requests == [("POST", "/7/stop", "Bearer t0ken-secret", {"force": True}), ("POST", "/7/start", "", None)]
        status = await control("http", "status", options)
        assert (status.status, '"state": "running"' in status.stdout) == (0, True)
        assert (await control("http", "start", {"start": f"{url}/broken"})).status == 1
        state = await read_state("http", options)
        assert state is not None
        assert state.state.startswith("HTTP 200")
    nowhere = "http://127.0.0.1:1/"
    for verb, verbs in (("start", {"start": nowhere}), ("restart", {"stop": nowhere, "start": nowhere})):
        with pytest.raises(ShellError, match="cannot connect"):  # does not count as an attempt
            await control("http", verb, verbs)  # type: ignore[arg-type] # mypy infers str for the verbs
    with pytest.raises(UnknownVerbError):
        await control("http", "logs", options)


NAMES = [
    "ch1",
    "../x",
    "a/b",
    "a?b=c&d#e",
    'q"}',
    "back\\slash",
    "50%",
    "%2e%2e",
    "线路 3",
    "a+b;c",
    "{component}",
    "ch\u00e9 'x'",
]


@pytest.mark.parametrize("name", NAMES)
async def test_the_name_of_a_component_changes_nothing_else_of_a_request(name: str) -> None:
    requests: list[tuple[str, str, Any]] = []

    async def transcoder(request: web.Request) -> web.Response:
        requests.append((request.raw_path, request.headers["X-Key"], await request.json()))
        return web.Response()

    async with peers.web_server(transcoder) as port:
        url, headers = f"http://127.0.0.1:{port}/ch/{{component}}/go?id={{component}}", {"X-Key": "{component}"}
        component = {
            "stop": {"url": url, "headers": headers, "body": '{"id": "{component}", "{component}": [1, true]}'},
            "start": {"url": url, "headers": headers, "json": {"all": ["no {component}"], "{component}": None}},
        }
        options = CONTROLS["http"].options.model_validate({"components": NAMES, "component": component})
        runner = ControlRunner(None, SudoOptions(), 60.0)
        completed = await CONTROLS["http"].run("restart", options.for_component(name), runner)
    assert completed.status == 0
    quoted = quote(name, safe="")
    target = f"/ch/{quoted}/go?id={quoted}"
    assert requests == [
        (target, "{component}", {"id": name, "{component}": [1, True]}),
        (target, "{component}", {"all": [f"no {name}"], "{component}": None}),
    ]


async def test_the_outcome_of_a_request_without_a_response_is_unknown() -> None:
    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        await reader.read()

    async with peers.raw_server(silent) as port:
        http = CONTROLS["http"]
        options = http.options.model_validate({"restart": f"http://127.0.0.1:{port}/"})
        completed = await http.run("restart", options, ControlRunner(None, SudoOptions(), 0.5))
    assert (completed.status, completed.late) == (None, True)


@pytest.mark.needs("dockerd", "busybox")
def test_a_container_that_docker_is_restarting_is_reported_as_healing(container: str) -> None:
    name = f"{container}-loops"
    argv = [
        "docker",
        "run",
        "-d",
        "--network",
        "host",
        "--restart",
        "always",
        "--name",
        name,
        container,
        "/bin/sh",
        "-c",
        "exit 1",
    ]
    subprocess.run(argv, capture_output=True, check=True)
    try:

        async def restarting() -> TargetState | None:
            state = await read_state("docker", {"container": name})
            return state if state is not None and state.state == "restarting" else None

        state = asyncio.run(eventually(restarting))
        assert state is not None
        assert state.healing.startswith("docker is restarting it (restart policy always")
        assert state.exit_status == 1
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=True)


@pytest.mark.parametrize("name", ["all", "web:*", "-x", "a b", "", "*"])
async def test_names_of_several_programs_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a program in supervisor"):
        await control("supervisor", "restart", {"program": name})


@pytest.mark.parametrize("name", ["-f", "a b", "$(x)", "", "a;b"])
async def test_invalid_container_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        await control("docker", "restart", {"container": name})


async def test_command_restarts_by_stop_and_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = {"stop": ["sh", "-c", f"echo stop >> {log}"], "start": ["sh", "-c", f"echo start >> {log}"]}
    assert (await control("command", "restart", options)).status == 0
    assert log.read_text() == "stop\nstart\n"
    with pytest.raises(UnknownVerbError):
        await control("command", "logs", options)


class ShellLostAfterFirstCommand:
    """A shell whose host cannot be reached after the first command."""

    wrapped = False

    def __init__(self) -> None:
        self.ran = 0

    async def run(
        self, argv: object, *, timeout: float, stdin: bytes = b"", on_output: object = None
    ) -> CompletedCommand:
        self.ran += 1
        if self.ran > 1:
            raise ShellError("gone")
        return CompletedCommand(0, "", "")

    async def close(self) -> None:
        pass


async def test_the_outcome_is_unknown_if_the_host_is_lost_after_the_first_command() -> None:
    options = {"stop": ["true"], "start": ["true"]}
    completed = await control("command", "restart", options, ShellLostAfterFirstCommand())
    assert (completed.status, "connection was lost" in completed.why) == (None, True)


def test_a_sudo_password_is_on_stdin_only() -> None:
    argv, stdin = build_sudo_command(["docker", "ps"], SudoOptions.model_validate({"password": "s3cret"}))
    assert (argv, stdin) == (["sudo", "-S", "-p", "", "--", "docker", "ps"], b"s3cret\n")
    argv, _ = build_sudo_command(["docker", "ps", "a b"], SudoOptions.model_validate("passwordless"))
    assert argv == ["sudo", "-n", "--", "sh", "-c", "{ exec docker ps 'a b'; }"]
    assert build_sudo_command(["docker", "ps"], SudoOptions.model_validate("passwordless"))[0][:3] == [
        "sudo",
        "-n",
        "--",
    ]
    assert build_sudo_command(["docker", "ps"], SudoOptions()) == (["docker", "ps"], b"")
