"""`defib discover` over a real sshd, with dockerd, supervisord and servers that answer as the real ones do."""

import asyncio
import contextlib
import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from aiohttp import web

from defib.demo import service, sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from defib.discovery import endpoints, sections
from defib.discovery.endpoints import find_endpoints
from defib.discovery.model import Endpoint, Findings, Listener
from defib.discovery.run import HostResult, discover_hosts
from fleet.inventory.model import Inventory
from fleet.shells.local import LocalShell
from tests.gpu import CARD, write_nvidia_smi
from tests.integration.conftest import start_supervisord
from tests.integration.peers import web_server
from tests.integration.test_collectors import hardened
from tests.logins import logs_in_with
from tests.support import eventually, inventory_of
from tests.terminal import Terminal

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Serve = Callable[[Handler], Awaitable[int]]
VLLM = {"object": "list", "data": [{"id": "qwen3-32b", "object": "model", "created": 1, "owned_by": "vllm", "root": "/models/qwen3-32b", "parent": None, "max_model_len": 32768}]}  # fmt: skip
OLLAMA = {"models": [{"name": "llama3:8b", "model": "llama3:8b", "size": 4661224676}]}
FASTAPI = {"openapi": "3.1.0", "info": {"title": "FastAPI", "version": "0.1.0"}}
MISSING = (404, {"detail": "Not Found"})
PAGE = "<html><head>\n<title>\n Open &amp; free </title></head></html>"


@contextlib.asynccontextmanager
async def serving(
    answers: Mapping[str, Any], context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[int, list[str]]]:
    """A server with an answer for each path: text, JSON, or a status with JSON; gives its port and the requests."""
    requests: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        requests.append(request.path)
        assert "Authorization" not in request.headers
        assert "Cookie" not in request.headers
        answer = answers.get(request.path, MISSING)
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        if status in range(300, 400):
            return web.Response(status=status, headers={"Location": body})
        if isinstance(body, str):
            return web.Response(status=status, text=body, content_type="text/html")
        return web.json_response(body, status=status)

    async with web_server(handle, context) as port:
        yield port, requests


async def ask(port: int) -> Endpoint | None:
    return (await find_endpoints("127.0.0.1", [port], within=60.0)).get(port)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"/": PAGE}, {"kind": "http", "status": 200, "title": "Open & free"}),
        ({"/": (302, "/login"), "/login": PAGE}, {"kind": "http", "status": 200, "title": "Open & free"}),
        ({"/": (302, "/")}, {"kind": "http", "status": 302}),
        ({"/v1/models": VLLM, "/version": {"version": "0.8.5"}}, {"kind": "vllm", "models": ("qwen3-32b",)}),
        ({"/v1/models": (401, {"error": "Unauthorized"}), "/version": {"version": "0.8.5"}}, {"kind": "vllm", "needs_key": True}),
        ({"/v1/models": (401, {"error": "Unauthorized"}), "/metrics": "# HELP x\nvllm:num_requests_running{} 0\n"}, {"kind": "vllm", "needs_key": True}),
        ({"/v1/models": (401, {"error": "no"})}, {"kind": "http", "needs_key": False}),
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "sglang"}]}}, {"kind": "openai", "models": ("m",)}),
        ({"/": "Ollama is running", "/api/tags": OLLAMA}, {"kind": "ollama", "models": ("llama3:8b",)}),
        ({"/openapi.json": {**FASTAPI, "paths": {"/file_parse": {"post": {}}}}}, {"kind": "mineru"}),
        ({"/openapi.json": {**FASTAPI, "paths": {}}, "/health": {}}, {"kind": "http", "title": "FastAPI", "path": "/health", "status": 200}),
        ({"/v1/models": {"data": [{"id": "x" * 5000}, {"id": 7}, 3, {"id": "\ud800"}]}}, {"kind": "openai", "models": ("?",)}),
        ({"/v1/models": [1], "/openapi.json": "no JSON", "/api/tags": 7}, {"kind": "http", "status": 404}),
    ],
)  # fmt: skip
async def test_what_answers(answers: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    async with serving(answers) as (port, _):
        found = await ask(port)
        assert found is not None
        assert {name: getattr(found, name) for name in expected} == expected


async def test_no_other_server_is_asked_because_of_a_redirect() -> None:
    async with serving({"/": PAGE}) as (other, requests):
        async with serving({"/": (302, f"http://127.0.0.1:{other}/")}) as (port, _):
            found = await ask(port)
        assert (found and found.status, requests) == (302, [])


async def test_tls_with_a_certificate_that_cannot_be_verified() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("web.test").configure_cert(context)
    async with serving({"/": PAGE}, context) as (port, _):
        found = await ask(port)
    assert found is not None
    assert (found.kind, found.scheme, found.verified, found.title) == ("http", "https", False, "Open & free")


async def test_servers_that_misbehave_take_little_time(serve: Serve) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def greeting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail ESMTP\r\n")
        await reader.read()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n<title>big</title>")
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"x" * 65536)
                await writer.drain()

    async def interim(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 500)
                await writer.drain()

    ports = [await serve(each) for each in (silent, greeting, endless, interim)]
    (closed,) = reserve_ports(1)
    started = time.monotonic()
    found = await find_endpoints("127.0.0.1", [*ports, closed], within=60.0)
    assert [found[port].kind for port in (*ports, closed)] == ["tcp", "tcp", "http", "tcp", "closed"]
    assert found[ports[2]].title == "big"
    assert time.monotonic() - started < 40


async def test_at_most_so_many_ports_are_asked_and_for_so_long(serve: Serve) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    port = await serve(silent)
    assert await find_endpoints("127.0.0.1", [port], within=0.2) == {}
    found = await find_endpoints("127.0.0.1", range(1, 1025), within=60.0)
    assert len(found) == endpoints.PORTS_LIMIT


class Machine:
    """An sshd whose account finds the tools of a folder first, and of this machine only the listeners that are shown.

    Tests run in parallel: the servers of others must not be asked.
    """

    def __init__(self, folder: Path, host: Sshd) -> None:
        self.tools, self.sshd = folder, host
        self.config = folder.parent / "config"

    @property
    def host(self) -> dict[str, Any]:
        ssh = {
            "user": self.sshd.user,
            "port": self.sshd.port,
            "key_file": str(self.sshd.key_file),
            "known_hosts": str(self.sshd.known_hosts),
        }
        return {"address": "127.0.0.1", "ssh": ssh}

    def show(self, *ports: int) -> None:
        (self.tools / "shown").write_text("".join(f":{port:04X} \n" for port in ports))

    def tool(self, name: str, script: str) -> None:
        (self.tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.tools / name).chmod(0o755)

    def write(self, hosts: Mapping[str, Any], services: Mapping[str, Any] | None = None) -> Inventory:
        return inventory_of(self.config, {"hosts": hosts, "services": services or {}}).inventory

    async def discover(self, *hosts: str, deadline: float = 100.0) -> list[HostResult]:
        inventory = await asyncio.to_thread(self.write, dict.fromkeys(hosts, self.host))
        return await discover_hosts(inventory, list(inventory.hosts.values()), (), deadline=deadline)

    async def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(run_defib, self.config, *arguments)

    @property
    def written(self) -> set[str]:
        return {each.name for each in self.config.iterdir()}

    async def found(self) -> Findings:
        (result,) = await self.discover("h")
        assert result.error == ""
        return result.found


@pytest.fixture
async def machine(launcher: Launcher, tmp_path: Path) -> Machine:
    tools = tmp_path / "tools"
    tools.mkdir()
    (port,) = reserve_ports(1)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "DOCKER_HOST": os.environ.get("DOCKER_HOST", "unix:///nowhere")}
    made = Machine(tools, await sshd.start(launcher, tmp_path / "sshd", port, environment))
    made.show()
    filtered = f'case "$*" in *socket*net/tcp*) /usr/bin/awk "$@" | grep -F -f {tools}/shown || : ;; *) exec /usr/bin/awk "$@" ;; esac'
    made.tool("awk", filtered)
    return made


def run_defib(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "defib", "discover", *arguments, "--config", str(config)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False, stdin=subprocess.DEVNULL)


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for each in started:
        each.kill()
        each.wait()


def start_quietly(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.usefixtures("docker")
@pytest.mark.needs("dockerd", "busybox", "sshd")
async def test_each_thing_is_one_service(launcher: Launcher, machine: Machine, tmp_path: Path) -> None:
    inside, supervised = reserve_ports(2)
    (tmp_path / "www").mkdir()
    name = f"mineru-{os.getpid()}"
    await launcher.remove_docker_at_end("image", name)
    for each in (name, f"{name}-done"):
        await launcher.remove_docker_at_end("container", each)
    await service.run_container(name, name, ["/bin/httpd", "-f", "-p", f"127.0.0.1:{inside}", "-h", "/www"])
    argv = ["docker", "run", "--detach", "--network", "host", "--name", f"{name}-done", name, "/bin/sh", "-c", "exit 0"]
    await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True)
    command = f"{sys.executable} -m http.server {supervised} --bind 127.0.0.1 --directory {tmp_path}/www"
    programs = f"[program:web]\ncommand={command}\n[program:worker]\ncommand=sleep 1000\nstartsecs=0\n"
    config = str(await start_supervisord(launcher, tmp_path, programs))
    async with serving({"/v1/models": VLLM}) as (api, _):
        machine.show(inside, supervised, api, machine.sshd.port)
        host = {**machine.host, "collect": {"system": "30s", "supervisor": {"every": "30s", "configs": [config]}}}
        inventory = await asyncio.to_thread(machine.write, {"h": host})

        async def complete() -> HostResult | None:
            (result,) = await discover_hosts(inventory, [inventory.hosts["h"]], ())
            states = {program.state for program in result.found.programs}
            answering = {port for port, each in result.found.endpoints.items() if each.kind == "http"}
            return result if states == {"RUNNING"} and {inside, supervised} <= answering else None

        result = await eventually(complete)
    assert result is not None
    services = {each.id: each.service for each in result.proposed.proposals}
    assert list(services) == [f"{name}-h", "web-h", "worker-h", f"vllm-{api}-h"]
    assert services[f"{name}-h"]["control"] == {"docker": {"container": name}}
    assert services[f"{name}-h"]["probe"] == {"http": {"url": f"http://{{host.address}}:{inside}/"}}
    assert services["web-h"]["control"] == {"supervisor": {"program": "web", "config": config}}
    assert services["web-h"]["probe"] == {"http": {"url": f"http://{{host.address}}:{supervised}/"}}
    assert services["worker-h"]["probe"] == {"program": {"name": "worker", "config": config}}
    assert services[f"vllm-{api}-h"]["probe"]["openai"]["model"] == "qwen3-32b"
    assert f"container {name}-done: it is exited" in result.proposed.left_out
    assert result.proposed.collect == {"docker": "30s"}  # the others are collected already


@pytest.mark.needs("systemd", "sshd")
async def test_units_of_a_real_systemd(machine: Machine, systemd: Path) -> None:
    machine.tool("systemctl", f'exec {systemd}/systemctl "$@"')
    units = {each.name: each for each in (await machine.found()).units}
    assert (units["well.service"].active, units["well.service"].sub) == ("active", "running")
    assert units["well.service"].path.endswith("/well.service")
    assert units["done.service"].type == "oneshot"
    assert units["broken.service"].active == "failed"


@pytest.mark.needs("root", "ss", "setpriv")
async def test_the_unit_of_a_socket_is_seen_without_rights(
    machine: Machine, servers: list[subprocess.Popen[bytes]]
) -> None:
    """An account that may not see the process of a socket can see its control group."""
    mounted = Path("/sys/fs/cgroup")
    root = mounted / "unified" if (mounted / "unified").is_dir() else mounted
    group = root / f"defib-discovery-{os.getpid()}" / "own.service"
    group.mkdir(parents=True)
    (port,) = reserve_ports(1)
    script = f"echo $$ >{group}/cgroup.procs && exec {sys.executable} -m http.server {port} --bind 127.0.0.1"
    try:
        servers.append(await asyncio.to_thread(start_quietly, "sh", "-c", script))
        for drop in ([], ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]):

            async def listening(drop: list[str] = drop) -> Listener | None:
                argv = [*drop, "sh", "-c", sections.LISTENERS.script]
                done = await LocalShell(read_only=True).run(argv, timeout=20.0)
                listeners = sections.parse_listeners(done.stdout)
                return next((each for each in listeners if each.port == port), None)

            found = await eventually(listening)
            assert found is not None
            assert found.cgroup.endswith("/own.service")
            assert (found.process is None) == bool(drop)
    finally:
        for each in servers:
            each.kill()
            each.wait()

        async def removed() -> bool:
            with contextlib.suppress(OSError):  # busy until the process has gone
                group.rmdir()
                group.parent.rmdir()
            return not group.parent.exists()

        await eventually(removed)


@pytest.mark.needs("sshd")
async def test_gpus_and_what_cannot_be_read(machine: Machine) -> None:
    write_nvidia_smi(machine.tools / "nvidia-smi", [CARD, {**CARD, "index": "1"}])
    machine.tool("docker", "echo 'permission denied while trying to connect to the Docker daemon socket' >&2; exit 1")
    machine.tool("systemctl", "sleep 60")
    machine.tool("supervisorctl", "exit 127")
    (result,) = await machine.discover("h")
    assert [card.values["name"] for card in result.found.gpus] == ["NVIDIA A100-SXM4-80GB"] * 2
    assert "docker: permission denied; --as USER reads as the administrator" in result.found.notes
    assert "systemctl did not answer in time" in result.found.notes
    assert result.proposed.collect == {"system": "30s", "gpu": "15s"}


@pytest.mark.needs("sshd")
async def test_a_hardened_host_shows_what_its_wrapper_allows(machine: Machine) -> None:
    status = "/box\\trunning\\t\\t0\\t2026-01-01T00:00:00Z\\t0\\timg"
    machine.tool("docker", f"case $1 in ps) echo listed ;; *) printf '{status}\\n' ;; esac")
    (port,) = reserve_ports(1)
    machine.tool(
        "awk", f'case "$*" in *tcp6*) ;; *net/tcp*) echo 0100007F:{port:04X} ;; *) exec /usr/bin/awk "$@" ;; esac'
    )
    write_nvidia_smi(machine.tools / "nvidia-smi")
    hardened(machine.sshd, str(machine.tools), "docker\nports\n")
    host = {**machine.host, "ssh": {**machine.host["ssh"], "wrapper": True}}
    inventory = await asyncio.to_thread(machine.write, {"h": host})
    (result,) = await discover_hosts(inventory, [inventory.hosts["h"]], ())
    assert result.error == ""
    assert [each.name for each in result.found.containers] == ["box"]
    assert any("wrapper" in note for note in result.found.notes)
    assert any("query is not in" in note for note in result.found.notes)
    assert [each.port for each in result.found.listeners] == [port]
    assert "box-h" in {each.id for each in result.proposed.proposals}


@pytest.mark.needs("sshd")
async def test_names_of_a_hostile_host_stay_data(machine: Machine, tmp_path: Path) -> None:
    names = ["ok", "a\nb", "x: {y}", "\x1b[2J", "${file:/etc/passwd}", "x" * 3000, "-rf", "all"]
    lines = [
        json.dumps([f"{n:012}", name, "running", f"img\u202e{name}", "Up", name, "", name, name, name])
        for n, name in enumerate(names)
    ]
    (machine.tools / "told").write_text("\n".join(lines))
    machine.tool("docker", f"cat {machine.tools}/told")
    machine.tool(
        "systemctl",
        "printf 'Id=%s\\nActiveState=failed\\nSubState=x\\nLoadState=loaded\\nFragmentPath=/etc/systemd/system/x\\n\\n' 'a b.service' '*.service' 'fine.service'",
    )
    machine.tool("nvidia-smi", "printf '0, 80, \\033[31mred\\n'")
    await asyncio.to_thread(machine.write, {"h": machine.host})
    done = await machine.run("h", "--yes")
    assert done.returncode == 0, done.stderr
    text = (machine.config / "discovered-h.yaml").read_text()
    assert {"ok-h", "fine-h"} <= set(yaml.safe_load(text)["services"]) <= {"ok-h", "fine-h", "all-h"}
    assert "\x1b" not in text + done.stdout
    assert "\u202e" not in text
    checked = subprocess.run(
        [sys.executable, "-m", "defib", "check", "--config", str(machine.config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.needs("sshd")
async def test_thousands_of_containers_and_ports(machine: Machine) -> None:
    machine.tool(
        "docker",
        'i=0; while [ $i -lt 7000 ]; do echo "[\\"$i\\",\\"c$i\\",\\"running\\",\\"i\\",\\"Up\\",\\"\\",\\"\\",\\"\\",\\"\\",\\"\\"]"; i=$((i+1)); done',
    )
    machine.tool(
        "awk",
        'case "$*" in *socket*net/tcp6*) ;; *socket*net/tcp*) i=20000; while [ $i -lt 23000 ]; do printf "socket 0B00000A:%04X %d\\n" $i $i; i=$((i+1)); done ;; *) exec /usr/bin/awk "$@" ;; esac',
    )
    (result,) = await machine.discover("h")
    assert len(result.found.containers) == 5000
    assert any("lines were left out" in note for note in result.found.notes)
    assert len(result.found.listeners) == 3000
    assert any(
        note.startswith(f"{3000 - endpoints.PORTS_LIMIT} of 3000 ports not checked") for note in result.found.notes
    )


@pytest.mark.needs("sshd")
async def test_a_noisy_login_does_not_matter(machine: Machine) -> None:
    logs_in_with(
        machine.sshd, 'echo "*** AUTHORIZED USE ONLY ***"; echo "[1]" >&2; yes banner | head -n 1000; exec /bin/sh "$@"'
    )
    machine.tool("docker", f"echo '{json.dumps(['1', 'box', 'running', 'i', 'Up', '', '', '', '', ''])}'")
    assert [each.name for each in (await machine.found()).containers] == ["box"]


@pytest.mark.needs("sshd")
async def test_hosts_that_fail_do_not_hold_up_the_others(machine: Machine) -> None:
    """One refuses connections, one dies while it is read, one hangs, one is fine."""
    (closed,) = reserve_ports(1)
    logs_in_with(
        machine.sshd, f'[ -e {machine.tools}/dies ] && rm {machine.tools}/dies && kill -9 $PPID; exec /bin/sh "$@"'
    )
    machine.tool("docker", f"echo '{json.dumps(['1', 'box', 'running', 'i', 'Up', '', '', '', '', ''])}'")
    gone = {**machine.host, "ssh": {**machine.host["ssh"], "port": closed}}
    unpinned = {**machine.host, "ssh": {**machine.host["ssh"], "known_hosts": "/dev/null"}}
    hosts = {"fine": machine.host, "gone": gone, "unpinned": unpinned, "shellless": {"address": "127.0.0.1"}}
    await asyncio.to_thread(machine.write, hosts)
    done = await asyncio.to_thread(
        run_defib, machine.config, "--all", "--yes", "--json", "--output", f"{machine.config}/new.yaml"
    )
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    errors = {host["host"]: host["error"] for host in answer["hosts"]}
    assert errors["fine"] is None
    assert "Connection refused" in errors["gone"]
    assert "no shell" in errors["shellless"]
    assert errors["unpinned"]
    assert answer["written"] == f"{machine.config}/new.yaml"
    assert list(yaml.safe_load((machine.config / "new.yaml").read_text())["services"]) == ["box-fine"]
    (machine.config / "new.yaml").unlink()
    (machine.tools / "dies").touch()
    (died,) = await machine.discover("h")
    assert died.error != ""
    machine.tool("docker", "trap '' TERM; sleep 100")
    (slow,) = await machine.discover("h", deadline=1.0)
    assert slow.error == "not finished within 1s"


BOX = json.dumps(["1", "box", "running", "i", "Up", "", "", "", "", ""])


@pytest.mark.needs("sshd")
async def test_what_is_written_and_what_is_not(machine: Machine) -> None:
    machine.tool("docker", f"echo '{BOX}'")
    await asyncio.to_thread(machine.write, {"h": machine.host})

    shown_on_stdout: list[tuple[str, ...]] = [("h",), ("h", "--output", "-"), ("h", "--yes", "--output", "-")]
    for arguments in shown_on_stdout:
        shown = await machine.run(*arguments)
        assert (shown.returncode, list(yaml.safe_load(shown.stdout)["services"])) == (0, ["box-h"])
    assert json.loads((await machine.run("h", "--json", "--yes")).stdout)["written"] is None
    assert machine.written == {"defib.yaml"}


async def test_what_cannot_be_done_is_refused_before_hosts_are_read(tmp_path: Path) -> None:
    config = tmp_path / "config"
    await asyncio.to_thread(inventory_of, config, {"hosts": {"h": {"address": "192.0.2.1", "ssh": {}}}})
    refusals: list[tuple[tuple[str, ...], str]] = [
        ((), "no hosts: name them, or use --group GROUP or --all"),
        (("hh",), "did you mean h?"),
        (("--group", "g"), "no group 'g'"),
        (("h", "--output", f"{config}/defib.yaml"), "exists already"),
        (("h", "--output", f"{config}/new.txt"), "is not read as configuration"),
        (("h", "--output", "/nowhere/x.yaml"), "/nowhere: there is no such directory"),
    ]
    runs = await asyncio.gather(*(asyncio.to_thread(run_defib, config, *arguments) for arguments, _ in refusals))
    for refused, (_, message) in zip(runs, refusals, strict=True):
        assert refused.returncode == 1
        assert message in refused.stderr
    assert {each.name for each in config.iterdir()} == {"defib.yaml"}


@pytest.mark.needs("sshd")
async def test_a_file_is_written_once_and_never_changed(machine: Machine) -> None:
    machine.tool("docker", f"echo '{BOX}'")
    await asyncio.to_thread(machine.write, {"h": machine.host})
    added = await machine.run("h", "--yes")
    path = machine.config / "discovered-h.yaml"
    assert added.returncode == 0, added.stderr
    assert f"defib probe box-h --config {machine.config}" in added.stdout
    assert (path.stat().st_mode & 0o777, machine.written) == (0o644, {"defib.yaml", "discovered-h.yaml"})
    again = await machine.run("h", "--yes")
    assert (again.returncode, again.stderr) == (0, "nothing to propose\n")
    machine.tool("docker", f"echo '{BOX}'; echo '{BOX.replace('box', 'other')}'")
    content = path.read_bytes()
    assert (await machine.run("h", "--yes")).returncode == 0
    assert machine.written == {"defib.yaml", "discovered-h.yaml", "discovered-h-2.yaml"}
    assert path.read_bytes() == content


@pytest.mark.needs("sshd")
async def test_a_service_that_is_not_enabled_keeps_its_id(machine: Machine) -> None:
    machine.tool("docker", f"echo '{BOX}'")
    off = {"box-h": {"enabled": False, "probe": {"tcp": {"address": "x:1"}}}}
    await asyncio.to_thread(machine.write, {"h": machine.host}, off)
    done = await machine.run("h", "--yes")
    assert done.returncode == 0, done.stderr
    assert "box-h-2:" in (machine.config / "discovered-h.yaml").read_text()


@pytest.mark.needs("sshd")
async def test_a_person_chooses_at_a_terminal(machine: Machine) -> None:
    machine.tool("docker", f"echo '{BOX}'; echo '{BOX.replace('box', 'other')}'")
    hosts = {name: {**machine.host, "group": "gpu"} for name in ("gpu-01", "gpu-02", "gpu-03")}
    await asyncio.to_thread(machine.write, hosts)

    def choose() -> str:
        argv = [sys.executable, "-m", "defib", "discover", "--group", "gpu", "--config", str(machine.config)]
        terminal = Terminal(argv, {**os.environ, "COLUMNS": "120"}, machine.config)
        try:
            terminal.until("Services to add", within=200)
            shown = terminal.seen
            terminal.type("3\n")
            terminal.until(r"'3' is not understood: write numbers from 1 to 2(.|\s)*Services to add", within=200)
            terminal.type("2\n")
            terminal.until("File to write", within=200)
            terminal.type(f"{machine.config}/defib.yaml\n")
            terminal.until(r"exists already(.|\s)*File to write", within=200)
            terminal.type("\n")
            terminal.until("Then reload", within=200)
        finally:
            terminal.close()
        return shown

    shown = await asyncio.to_thread(choose)
    assert re.search(r"1  box +3 hosts \(gpu-01 … gpu-03\): container box \(i\) +container  docker", shown), shown
    assert "gpu-01, gpu-02, gpu-03: 2 containers" in shown
    written = yaml.safe_load((machine.config / "discovered.yaml").read_text())
    assert list(written) == ["templates"]
    assert written["templates"]["other"]["for_hosts"] == {"group": "gpu"}
