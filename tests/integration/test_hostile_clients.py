"""Clients that are silent, slow or malformed: both programs answer the others, and their logs stay short."""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from aiohttp import web
from pydantic import SecretStr
from structlog.testing import capture_logs

from defib.demo.launcher import Launcher
from defib.demo.stack import Stack
from runtime.access.audit import write_to_log
from runtime.access.control import AccessControl, AccessSettings, WebUsers
from runtime.access.proxy import TrustedProxy
from runtime.access.roles import AccessRequirement, Role
from runtime.access.tokens import ConfiguredTokens
from runtime.addresses import group_address
from runtime.connections import connection, listener, registry
from runtime.connections.listener import Listener
from runtime.connections.registry import Connections
from runtime.metrics import ProgramMetrics
from runtime.tasks import cancel_and_wait
from runtime.tokens import ConfiguredToken
from runtime.web import MAX_READING, add_route, create_application
from runtime.webconfig import WebConfigFile
from tests.bench import peers
from tests.integration.peers import Authority
from tests.integration.test_probe_net import no_file_left
from tests.support import NO_TLS, eventually

PROGRAMS = ("exporter", "remediator")
LONG = "a" * 20_000
HEALTHY = "GET /-/healthy HTTP/1.1\r\n"
RELOAD = "POST /-/reload HTTP/1.1\r\nHost: h\r\n"
MALFORMED = {
    "two Host headers": f"{HEALTHY}Host: h\r\nHost: evil\r\n\r\n",
    "the same Host header twice": f"{HEALTHY}Host: h\r\nHost: h\r\n\r\n",
    "two Host headers in HTTP/1.0": "GET /-/healthy HTTP/1.0\r\nHost: h\r\nHost: evil\r\n\r\n",
    "a compressed body": f"{HEALTHY}Host: h\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    "no Host": f"{HEALTHY}\r\n",
    "an empty Host": f"{HEALTHY}Host:\r\n\r\n",
    "a list of hosts": f"{HEALTHY}Host: h, evil\r\n\r\n",
    "a Host with a user": f"{HEALTHY}Host: u@h\r\n\r\n",
    "a Host with a path": f"{HEALTHY}Host: h/evil\r\n\r\n",
    "a Host with a bad port": f"{HEALTHY}Host: h:99999\r\n\r\n",
    "a Host that is cut short": f"{HEALTHY}Host: [::1\r\n\r\n",
    "a target of another host": "GET http://evil/-/healthy HTTP/1.1\r\nHost: h\r\n\r\n",
    "a target of another port": "GET http://h:1/-/healthy HTTP/1.1\r\nHost: h\r\n\r\n",
    "a target with a user": "GET http://u@h/-/healthy HTTP/1.1\r\nHost: h\r\n\r\n",
    "a target of another protocol": "GET ftp://h/-/healthy HTTP/1.1\r\nHost: h\r\n\r\n",
    "a target with a host, and no Host": "GET http://h/-/healthy HTTP/1.0\r\n\r\n",
    "a target with a fragment": "GET /-/healthy#x HTTP/1.1\r\nHost: h\r\n\r\n",
    "CONNECT": "CONNECT h:443 HTTP/1.1\r\nHost: h:443\r\n\r\n",
    "Content-Length with Transfer-Encoding": f"{RELOAD}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding with Content-Length": f"{RELOAD}Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": f"{RELOAD}Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "a list of lengths": f"{RELOAD}Content-Length: 4, 4\r\n\r\nabcd",
    "a length with a sign": f"{RELOAD}Content-Length: +4\r\n\r\nabcd",
    "a compressed transfer": f"{RELOAD}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "an unknown transfer": f"{RELOAD}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": "POST /-/reload HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "NUL in the target": "GET /-/heal\0thy HTTP/1.1\r\nHost: h\r\n\r\n",
    "an encoded NUL in the target": "GET /-/heal%00thy HTTP/1.1\r\nHost: h\r\n\r\n",
    "NUL in a header": f"{HEALTHY}Host: h\r\nX-A: s3cret\0b\r\n\r\n",
    "NUL in the name of a header": f"{HEALTHY}Host: h\r\nX\0: s3cret\r\n\r\n",
    "a bare CR": f"{HEALTHY}Host: h\r\nX-A: s3cret\rb\r\n\r\n",
    "a bare LF": "GET /-/healthy HTTP/1.1\nHost: h\n\n",
    "a folded header": f"{HEALTHY}Host: h\r\nX-A: s3cret\r\n b\r\n\r\n",
    "a space before the colon": f"{HEALTHY}Host: h\r\nX-A : s3cret\r\n\r\n",
    "a huge header": f"{HEALTHY}Host: h\r\nX-A: s3cret{LONG}\r\n\r\n",
    "a huge target": f"GET /s3cret{LONG} HTTP/1.1\r\nHost: h\r\n\r\n",
    "many headers": HEALTHY + "Host: h\r\n" + "".join(f"X-{n}: s3cret\r\n" for n in range(500)) + "\r\n",
    "HTTP/0.9": "GET /-/healthy\r\n\r\n",
    "HTTP/1.2": "GET /-/healthy HTTP/1.2\r\nHost: h\r\n\r\n",
    "HTTP/2.0": "GET /-/healthy HTTP/2.0\r\nHost: h\r\n\r\n",
    "HTTP/2 without TLS": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no HTTP": "s3cret\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01",
}  # fmt: skip
WELL_FORMED = {
    "origin-form": f"{HEALTHY}Host: h\r\n\r\n",
    "absolute-form": "GET http://h:8080/-/healthy HTTP/1.1\r\nHost: h:8080\r\n\r\n",
    "absolute-form in other case": "GET HTTP://H/-/healthy HTTP/1.1\r\nHost: h\r\n\r\n",
    "IPv6": f"{HEALTHY}Host: [::1]:9095\r\n\r\n",
    "an underscore": f"{HEALTHY}Host: defib_exporter:9999\r\n\r\n",
    "HTTP/1.0 without Host": "GET /-/healthy HTTP/1.0\r\n\r\n",
    "chunks": f"{HEALTHY}Host: h\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
}


class Server:
    """One of the two programs, as a process."""

    def __init__(self, name: str, launcher: Launcher, folder: Path) -> None:
        self.name, self.launcher, self.folder = name, launcher, folder
        self.stack = Stack(launcher, folder)
        self.port = self.stack.ports[name]

    async def start(self, *arguments: str, limit: str = "") -> None:
        config = self.stack.configuration({"services": {}})
        argv = [sys.executable, "-m", "defib", self.name, "--config", str(config), *arguments]
        argv = ["sh", "-c", f'{limit}\nexec "$@"', "sh", *argv, "--listen", f"127.0.0.1:{self.port}"]
        self.pid = await self.launcher.start(argv, self.folder / "log")

        async def is_listening() -> bool:
            return b"listening" in (self.folder / "log").read_bytes()

        await eventually(is_listening)

    def log(self) -> list[dict[str, Any]]:
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def get(self, path: str) -> httpx.Response:
        """Request a path over a new connection."""
        headers = {"Authorization": f"Bearer {self.stack.token}", "Connection": "close"}
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=60) as client:
            return await client.get(f"http://127.0.0.1:{self.port}{path}", headers=headers)

    async def value(self, series: str) -> float:
        page = (await self.get("/metrics")).text
        return next(float(line.split(" ")[-1]) for line in page.splitlines() if line.startswith(series))


@pytest.fixture(params=PROGRAMS)
async def program(request: pytest.FixtureRequest, launcher: Launcher, tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(request.param, launcher, tmp_path)
    yield made
    await made.stack.client.aclose()


async def exchange(port: int, data: str) -> bytes:
    """Send a request, and return everything until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data.encode("latin-1"))
        return await reader.read()
    finally:
        writer.close()


async def test_malformed_requests_are_refused_briefly(program: Server) -> None:
    await program.start()
    for name, data in MALFORMED.items():
        answer = await exchange(program.port, data)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == b"400", (name, answer)
        assert json.loads(body)["error"]["code"] == "malformed_request", name
        assert len(answer) < 600, name
        assert b"\r\nX-Content-Type-Options: nosniff\r\n" in head, name
        assert not any(shown in answer for shown in (b"s3cret", b"evil", b"aiohttp", b"Python", b"Traceback")), answer
    for name, data in WELL_FORMED.items():
        answer = await exchange(program.port, data.replace("Host:", "Connection: close\r\nHost:"))
        assert answer.split(b" ")[1] == b"200", (name, answer)
    assert await program.value("defib_http_requests_malformed_total") == len(MALFORMED)
    log = (program.folder / "log").read_text()
    assert log.count('"request_malformed"') == 20  # each minute
    assert all(shown not in log for shown in ("s3cret", "evil", "Traceback"))


async def test_refused_credentials_do_not_fill_the_log(program: Server) -> None:
    await program.start()
    paths = {"exporter": ["/-/reload"], "remediator": ["/-/reload", "/webhook/alertmanager"]}
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=60) as client:
        urls = [f"http://127.0.0.1:{program.port}{path}" for path in paths[program.name] * 100]
        headers = {"Authorization": "Bearer wr0ng"}  # from the sixth on, each is answered a second later
        answers = await asyncio.gather(*(client.post(url, headers=headers) for url in urls))
        assert {answer.status_code for answer in answers} == {401}
    assert len(program.log()) < 50
    assert "wr0ng" not in (program.folder / "log").read_text()


@pytest.mark.parametrize("addresses", [1, 1000])
async def test_it_is_healthy_with_1000_slow_clients(program: Server, addresses: int) -> None:
    """Also where only few files can be open."""
    await program.start(limit="ulimit -Sn 256; ulimit -Hn 512")
    assert re.search(r"^Max open files +512 +512 ", Path(f"/proc/{program.pid}/limits").read_text(), re.MULTILINE)
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(1000):
            own = f"127.1.{number % addresses // 250}.{number % addresses % 250 + 1}"
            reader, writer = await asyncio.open_connection("127.0.0.1", program.port, local_addr=(own, 0))
            stack.callback(writer.close)
            clients.append((reader, writer))
        for byte in ("", "G", "E", "T", " ", "/"):
            for _, writer in clients:
                with suppress(RuntimeError):  # the connection is closed
                    writer.write(byte.encode())
            assert (await program.get("/-/healthy")).text == "healthy\n"
        assert await program.value("defib_http_connections ") <= 128
        assert await program.value("defib_event_loop_lag_seconds") < 1
        for reader, _ in clients:
            assert await until_closed(reader) == b""
    assert await program.value("defib_http_connections ") == 1
    dropped = 'defib_http_connections_dropped_total{reason="%s"}'
    total = await program.value(dropped % "limit") + await program.value(dropped % "headers")
    assert 1000 <= total <= 1010  # also connections of the test, whose ends were not noticed yet
    assert len(program.log()) < 50


UPLOADS = {
    "a body": "POST /-/reload HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n\r\n",
    "a body that nothing reads": "POST /unknown HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n\r\n",
    "after an upgrade": f"{HEALTHY}Host: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
}


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("name", UPLOADS)
async def test_what_a_client_sends_is_not_collected_in_memory(
    program: Server, tmp_path: Path, certificate: Path, name: str, has_tls: bool
) -> None:
    """However fast it sends: 400 MB arrive in less than a second."""
    tls = {"cert_file": str(certificate), "key_file": str(certificate)}
    (tmp_path / "web.yml").write_text(yaml.safe_dump({"tls_server_config": tls} if has_tls else {}))
    await program.start("--web.config.file", str(tmp_path / "web.yml"))
    context = ssl.create_default_context(cafile=str(certificate)) if has_tls else None
    name_of_server = "web.test" if has_tls else None
    (await connect(program, context, name_of_server))[1].close()
    before = peers.resident(program.pid, "VmHWM")
    size = 400_000_000
    reader, writer = await connect(program, context, name_of_server)
    with closing(writer), suppress(ConnectionError):
        writer.write(UPLOADS[name].format(size=size).encode())
        async with asyncio.timeout(60):
            for _ in range(size // 1_000_000):
                writer.write(bytes(1_000_000))
                await writer.drain()
            await reader.read(1)
    reader, writer = await connect(program, context, name_of_server)
    with closing(writer):
        writer.write(f"{HEALTHY}Host: h\r\nConnection: close\r\n\r\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    assert peers.resident(program.pid, "VmHWM") - before < 50


async def connect(
    program: Server, tls: ssl.SSLContext | None, name: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", program.port, ssl=tls, server_hostname=name)


async def test_the_lag_of_the_event_loop_is_shown_to_the_next_scrapes(program: Server) -> None:
    await program.start()
    assert await program.value("defib_event_loop_lag_seconds") < 1
    os.kill(program.pid, signal.SIGSTOP)
    await asyncio.sleep(1.5)  # as long as it stands still
    os.kill(program.pid, signal.SIGCONT)
    for _ in range(3):
        assert await program.value("defib_event_loop_lag_seconds") > 1


async def test_headers_of_responses(program: Server, tmp_path: Path, certificate: Path) -> None:
    tls = {"cert_file": str(certificate), "key_file": str(certificate)}
    own = {"x-content-type-options": "own", "Server": "own"}
    (tmp_path / "web.yml").write_text(
        yaml.safe_dump({"tls_server_config": tls, "http_server_config": {"headers": own}})
    )
    await program.start()
    plain = {}
    for path in ("/-/healthy", "/metrics", "/nothing", "/api/v1/services/nothing"):
        plain = dict((await program.get(path)).headers)
        assert plain["x-content-type-options"] == "nosniff", path
        assert (plain["referrer-policy"], plain["server"]) == ("same-origin", "defib"), path
        assert "strict-transport-security" not in plain
    await program.launcher.kill(program.pid, signal.SIGTERM)
    (tmp_path / "log").unlink()
    await program.start("--web.config.file", str(tmp_path / "web.yml"))
    context = ssl.create_default_context(cafile=str(certificate))
    for data in (f"{HEALTHY}Host: h\r\nConnection: close\r\n\r\n", f"{HEALTHY}\r\n", "GET /nothing HTTP/1.0\r\n\r\n"):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", program.port, ssl=context, server_hostname="web.test"
        )
        writer.write(data.encode())
        head = (await reader.read()).partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
        writer.close()
        assert b"strict-transport-security: max-age=86400" in head
        assert {line for line in head if line.startswith((b"x-content-type-options", b"server"))} == {
            b"x-content-type-options: own", b"server: own",
        }  # fmt: skip


TOKEN, METRICS_TOKEN = "a" * 32, "m" * 32
KNOWN, SCRAPER = (f"Authorization: Bearer {token}" for token in (TOKEN, METRICS_TOKEN))


class Application:
    """A server in this process: `/read` returns the length of the body, `/wait` waits, `/big` is a large response.

    `/work`, `/page` and `/metrics` wait, too: for callers with a role, for all, and as the page of metrics.
    """

    def __init__(self, at_once: int = MAX_READING) -> None:
        self.metrics, self.at_once = ProgramMetrics(), at_once
        self.waiting, self.go_on = 0, asyncio.Event()
        self.port = 0

    @asynccontextmanager
    async def serve(self, context: ssl.SSLContext | None = None) -> AsyncIterator["Application"]:
        web_config = WebConfigFile(None)
        access = AccessControl(WebUsers, ConfiguredTokens(lambda _: None), write_audit=write_to_log, now=time.monotonic)
        tokens = [(TOKEN, Role.ADMIN), (METRICS_TOKEN, Role.METRICS)]
        await access.tokens.replace([(ConfiguredToken(role, SecretStr(value)), role) for value, role in tokens])
        access.settings = AccessSettings(proxy=TrustedProxy([ip_network("127.0.0.9")]))
        app = create_application(access, web_config, ready=lambda: True, at_once=self.at_once)
        add_route(app, "POST", "/read", self.read, AccessRequirement.UNCHECKED)
        add_route(app, "GET", "/wait", self.wait, AccessRequirement.UNCHECKED)
        add_route(app, "GET", "/work", self.wait, AccessRequirement.VIEWER)
        add_route(app, "GET", "/page", self.wait, AccessRequirement.PUBLIC)
        add_route(app, "GET", "/metrics", self.wait, AccessRequirement.SCRAPE)
        add_route(app, "GET", "/big", self.big, AccessRequirement.UNCHECKED)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        assert runner.server is not None
        opened = Connections(app, runner.server, self.metrics)
        listener = await Listener.bind("127.0.0.1", 0, opened, lambda: context)
        self.port = listener.address[1]
        try:
            yield self
        finally:
            listener.close()
            await runner.cleanup()

    async def read(self, request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    async def wait(self, _request: web.Request) -> web.Response:
        self.waiting += 1
        await self.go_on.wait()
        return web.Response(text="waited")

    async def big(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(100_000))

    async def connect(self, address: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0))

    def dropped(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("defib_http_connections_dropped_total", {"reason": reason}) or 0

    def open(self) -> float:
        return self.metrics.registry.get_sample_value("defib_http_connections") or 0


@pytest.fixture
async def application(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Application]:
    monkeypatch.setattr(registry, "HANDSHAKE_TIMEOUT", 0.5)
    for name in ("HEADERS_TIMEOUT", "BODY_TIMEOUT", "RESPONSE_TIMEOUT"):
        monkeypatch.setattr(connection, name, 0.5)
    monkeypatch.setattr(listener, "_CHECK_EVERY", 0.1)
    async with Application().serve() as made:
        yield made


def _limit(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    monkeypatch.setattr(registry, "DEFAULT_LIMITS", replace(registry.DEFAULT_LIMITS, **limits))


def request(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: h", *headers, "", ""]).encode()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    received = b""
    with suppress(ConnectionError):
        while data := await asyncio.wait_for(reader.read(65536), 60):
            received += data
    return received


@pytest.mark.parametrize("start", [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: h\r\nX-A: b\r\n"])
@pytest.mark.parametrize("earlier", [False, True])
async def test_slow_headers(application: Application, start: bytes, earlier: bool) -> None:
    reader, writer = await application.connect()
    if earlier:
        writer.write(request("GET /-/healthy"))
        assert (await reader.readuntil(b"healthy\n")).startswith(b"HTTP/1.1 200")
        start = start or b"\r"
    writer.write(start)
    assert await until_closed(reader) == b""
    assert application.dropped("headers") == 1
    writer.close()


async def test_a_connection_that_is_kept_alive_may_be_idle(application: Application) -> None:
    reader, writer = await application.connect()
    silent, other = await application.connect()
    writer.write(request("GET /-/healthy"))
    await reader.readuntil(b"healthy\n")
    assert await until_closed(silent) == b""  # after the time for headers
    writer.write(request("GET /-/healthy"))
    assert (await reader.readuntil(b"healthy\n")).startswith(b"HTTP/1.1 200")
    writer.close()
    other.close()


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", ["/read", "/nothing"])
async def test_slow_bodies(application: Application, framing: str, path: str) -> None:
    reader, writer = await application.connect()
    writer.write(request(f"POST {path}", framing))
    writer.write(b"5\r\nhello\r\n")
    answer = await until_closed(reader)
    assert answer.split(b" ")[1] == (b"408" if path == "/read" else b"404")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] in ("request_timeout", "not_found")
    writer.close()


async def test_a_response_that_nobody_reads(application: Application) -> None:
    _, writer = await application.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that also reads
    writer.write(request("GET /big"))

    async def is_dropped() -> bool:
        return application.dropped("response") == 1 and application.open() == 0

    await eventually(is_dropped)
    writer.close()


async def test_a_client_that_leaves_during_a_response_is_no_error(application: Application) -> None:
    with capture_logs() as logs:
        reader, writer = await application.connect()
        writer.write(request("GET /big"))
        await reader.readexactly(1000)
        writer.transport.abort()

        async def is_closed() -> bool:
            return application.open() == 0

        await eventually(is_closed)
    assert logs == []


async def test_a_slow_application_is_not_a_slow_client(application: Application) -> None:
    reader, writer = await application.connect()
    writer.write(request("GET /wait"))
    silent, other = await application.connect()
    assert await until_closed(silent) == b""  # after the time for headers, body and response
    application.go_on.set()
    assert (await reader.readuntil(b"waited")).startswith(b"HTTP/1.1 200")
    writer.close()
    other.close()


async def test_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Connections count from the beginning of the handshake, and a request may come together with its end."""
    _limit(monkeypatch, tls_per_address=5)
    authority = Authority.made(tmp_path / "ca.pem")
    client = ssl.create_default_context(cafile=str(authority.file))
    async with Application().serve(authority.server("h")) as application:

        async def all_are_closed() -> bool:
            return application.open() == 0

        # Long, so that on a busy machine none times out before the limit drops it.
        monkeypatch.setattr(registry, "HANDSHAKE_TIMEOUT", 300.0)
        many = [await application.connect() for _ in range(20)]

        async def some_are_dropped() -> bool:
            return (application.dropped("limit"), application.open()) == (15, 5)

        await eventually(some_are_dropped)
        for _, writer in many:
            writer.close()
        await eventually(all_are_closed)
        monkeypatch.setattr(registry, "HANDSHAKE_TIMEOUT", 0.5)
        silent = [await application.connect() for _ in range(3)]
        for reader, writer in silent:
            assert await until_closed(reader) == b""
            writer.close()
        assert application.dropped("handshake") == 3
        monkeypatch.setattr(registry, "HANDSHAKE_TIMEOUT", 300.0)
        reader, writer = await application.connect()
        writer.write(request("GET /-/healthy"))  # without TLS
        assert await until_closed(reader) == b""
        writer.close()
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", application.port)) as plain:
                answer = await asyncio.to_thread(exchange_early, plain, client)
            assert answer.endswith(b"healthy\n")
        await eventually(all_are_closed)


def exchange_early(plain: socket.socket, context: ssl.SSLContext) -> bytes:
    """Send a request in one packet with the end of the handshake, and return the response."""
    plain.settimeout(30)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="h")
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            plain.sendall(outgoing.read())
            incoming.write(plain.recv(65536) or b"closed")
    tls.write(request("GET /-/healthy", "Connection: close"))
    plain.sendall(outgoing.read())
    answer = b""
    while not answer.endswith(b"healthy\n"):
        try:
            answer += tls.read(65536)
        except ssl.SSLWantReadError:
            incoming.write(plain.recv(65536) or b"closed")
    return answer


async def test_it_accepts_again_after_too_many_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_PAUSE_AFTER_FAILURE", 0.1)
    async with Application().serve() as application:
        earlier, writer = await application.connect()
        with socket.socket() as waiting, capture_logs() as lines:
            with no_file_left():
                waiting.connect(("127.0.0.1", application.port))  # the kernel accepts it
                waiting.sendall(request("GET /-/healthy"))

                async def has_failed() -> bool:
                    return any(line["event"] == "accept_failed" for line in lines)

                await eventually(has_failed)
                writer.write(request("GET /-/healthy"))
                await earlier.readuntil(b"healthy\n")
            waiting.settimeout(60)
            assert (await asyncio.to_thread(waiting.recv, 65536)).endswith(b"healthy\n")
        writer.close()


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("", ""),
    ],
)
def test_the_address_by_which_a_client_is_counted(address: str, group: str) -> None:
    assert group_address(address) == group


Check = Callable[[], Awaitable[bool]]


async def test_one_address_locks_out_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADERS_TIMEOUT", "BODY_TIMEOUT"):
        monkeypatch.setattr(connection, name, 3600.0)
    _limit(monkeypatch, total=20, per_address=15)
    async with Application().serve() as application, AsyncExitStack() as stack:

        async def connect(address: str, data: bytes = b"") -> asyncio.StreamReader:
            reader, writer = await application.connect(address)
            stack.callback(writer.close)
            writer.write(data)
            return reader

        def count(limit: int, opened: int) -> Check:
            async def reached() -> bool:
                return (application.dropped("limit"), application.open()) == (limit, opened)

            return reached

        prometheus, writer = await application.connect()
        stack.callback(writer.close)
        writer.write(request("GET /-/healthy"))
        await prometheus.readuntil(b"healthy\n")
        running = await connect("127.0.0.2", request("GET /work", KNOWN))
        silent = [await connect("127.0.0.2") for _ in range(30)]
        await eventually(count(16, 16))
        slow = [await connect("127.0.0.3", request("POST /read", "Content-Length: 9")) for _ in range(30)]
        await eventually(count(42, 20))
        # The two bad addresses had to give up their own connections, the oldest first.
        assert all([await until_closed(reader) == b"" for reader in silent[:16]])
        for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
            answer = await connect(address, request("GET /-/healthy", "Connection: close"))
            assert (await until_closed(answer)).endswith(b"healthy\n")
        writer.write(request("GET /-/healthy"))
        await prometheus.readuntil(b"healthy\n")
        application.go_on.set()
        assert (await running.readuntil(b"waited")).startswith(b"HTTP/1.1 200")
        assert len(slow) == 30


async def test_headers_have_a_limit_together(application: Application) -> None:
    reader, writer = await application.connect()
    line = f"X-A: {'a' * 8000}\r\n".encode()
    writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n" + 6 * line)
    assert await until_closed(reader) == b""
    assert application.dropped("headers") == 1
    writer.close()
    # A body that arrives with the headers is none of them.
    reader, writer = await application.connect()
    writer.write(request("POST /read", "Content-Length: 60000", "Connection: close") + bytes(60000))
    assert (await until_closed(reader)).endswith(b"60000")
    writer.close()


async def test_a_refusal_that_is_delayed_gives_way_to_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    _limit(monkeypatch, per_address=5)
    async with Application().serve() as application, AsyncExitStack() as stack:
        wrong = request("GET /api/v1/identity", "Authorization: Bearer wrong")
        paused = [await application.connect() for _ in range(5)]
        for _, writer in paused:
            stack.callback(writer.close)
            writer.write(2 * wrong)  # the second answer waits for a second
        for reader, _ in paused:
            assert (await reader.readuntil(b'password"}}')).startswith(b"HTTP/1.1 401")
        answer, writer = await application.connect()
        stack.callback(writer.close)
        writer.write(request("GET /-/healthy", "Connection: close"))
        assert (await until_closed(answer)).endswith(b"healthy\n")


async def test_idle_connections_give_way_to_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a proxy, for example, which keeps them after a request."""
    _limit(monkeypatch, per_address=5)
    async with Application().serve() as application, AsyncExitStack() as stack:
        for number in range(10):
            reader, writer = await application.connect()
            stack.callback(writer.close)
            writer.write(request("GET /-/healthy"))
            assert (await reader.readuntil(b"healthy\n")).startswith(b"HTTP/1.1 200"), number
        assert (application.dropped("limit"), application.open()) == (5, 5)


@pytest.mark.parametrize(("limit", "address"), [("per_address", "127.0.0.1"), ("total", "127.0.0.2")])
async def test_requests_in_progress_are_not_dropped_for_new_connections(
    monkeypatch: pytest.MonkeyPatch, limit: str, address: str
) -> None:
    _limit(monkeypatch, **{limit: 5})
    async with Application().serve() as application:
        running = [await application.connect() for _ in range(5)]
        for _, writer in running:
            writer.write(request("GET /work", "Connection: close", KNOWN))

        async def all_wait() -> bool:
            return application.waiting == 5

        await eventually(all_wait)
        reader, refused = await application.connect(address)
        assert await until_closed(reader) == b""
        refused.close()
        application.go_on.set()
        for reader, writer in running:
            assert (await until_closed(reader)).endswith(b"waited")
            writer.close()


@pytest.mark.parametrize("attack", ["GET /wait", "GET /-/healthy", "GET /api/v1/identity", "GET /", ""])
async def test_clients_without_a_credential_do_not_lock_out_those_of_the_same_address(
    monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    """Such as Prometheus and Alertmanager, which run on the same machine as a user who attacks it."""
    _limit(monkeypatch, per_address=100)
    async with Application().serve() as application, AsyncExitStack() as stack:

        async def repeat() -> None:
            while True:
                reader, writer = await application.connect()
                with suppress(ConnectionError, asyncio.IncompleteReadError), closing(writer):
                    while True:
                        writer.write(request(attack, "Authorization: Bearer wrong") if attack else b"")
                        await reader.readuntil(b"\r\n\r\n")

        attackers = [asyncio.create_task(repeat()) for _ in range(150)]
        stack.push_async_callback(cancel_and_wait, attackers)

        async def is_full() -> bool:
            return application.dropped("limit") >= 200

        kept, kept_writer = await application.connect()
        stack.callback(kept_writer.close)
        kept_writer.write(request("GET /api/v1/identity", KNOWN))
        assert (await kept.readuntil(b"}")).startswith(b"HTTP/1.1 200")

        async def is_answered() -> bool:
            reader, writer = await application.connect()
            writer.write(request("GET /api/v1/identity", "Connection: close", KNOWN))
            answer = await until_closed(reader)
            writer.close()
            return answer.startswith(b"HTTP/1.1 200")

        await eventually(is_full)
        for _ in range(30):
            # Where a busy machine reads a request only after `NEW_FOR`, its connection may be dropped.
            assert await is_answered() or await is_answered() or await is_answered()
        kept_writer.write(request("GET /api/v1/identity", KNOWN))
        assert (await kept.readuntil(b"}")).startswith(b"HTTP/1.1 200")


async def test_requests_of_one_caller_wait_for_each_other() -> None:
    """Those of other callers do not wait for them, nor do requests of clients that have gone take a turn."""
    async with Application(at_once=2).serve() as application:
        opened = [await application.connect() for _ in range(6)]
        for _, writer in opened[:2]:
            writer.write(request("GET /work", KNOWN))

        async def are_two_at_work() -> bool:
            return application.waiting == 2

        await eventually(are_two_at_work)
        for _, writer in opened[2:]:
            writer.write(request("GET /work", KNOWN))
        reader, writer = await application.connect()
        writer.write(request("GET /wait"))  # of another caller: it has no route with a requirement

        async def is_at_work() -> bool:
            return application.waiting == 3

        await eventually(is_at_work)
        writer.close()
        for _, each in opened[4:]:
            each.transport.abort()

        async def have_gone() -> bool:
            return application.open() == 4

        await eventually(have_gone)
        application.go_on.set()
        for reader, each in opened[:4]:
            assert (await reader.readuntil(b"waited")).startswith(b"HTTP/1.1 200")
            each.close()
        assert application.waiting == 5


async def test_one_caller_has_a_limited_number_of_requests_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose clients have gone, which are answered to their end."""
    monkeypatch.setattr("runtime.web.MAX_READING", 5)
    async with Application().serve() as application, AsyncExitStack() as stack:

        async def send() -> asyncio.StreamReader:
            reader, writer = await application.connect()
            stack.callback(writer.close)
            writer.write(request("GET /work", "Connection: close", KNOWN))
            return reader

        waiting = [await send() for _ in range(5)]

        async def all_wait() -> bool:
            return application.waiting == 5

        await eventually(all_wait)
        assert (await until_closed(await send())).startswith(b"HTTP/1.1 503")
        application.go_on.set()
        for reader in waiting:
            assert (await until_closed(reader)).endswith(b"waited")
        assert (await until_closed(await send())).endswith(b"waited")


@pytest.mark.parametrize(
    ("path", "address", "same", "other"),
    [
        ("/page", "127.0.0.9", "X-Forwarded-For: 10.0.0.1", "X-Forwarded-For: 10.0.0.2"),  # of a proxy
        ("/metrics", "127.0.0.1", "Accept: */*", SCRAPER),
    ],
)
async def test_others_of_the_same_address_are_other_callers(
    monkeypatch: pytest.MonkeyPatch, path: str, address: str, same: str, other: str
) -> None:
    """Other clients of a proxy, and Prometheus with its token beside a client that reads metrics without one."""
    monkeypatch.setattr("runtime.web.MAX_READING", 5)
    async with Application().serve() as application, AsyncExitStack() as stack:

        async def send(header: str) -> asyncio.StreamReader:
            reader, writer = await application.connect(address)
            stack.callback(writer.close)
            sent = request(f"GET {path}", "Connection: close", header)
            writer.write(sent.replace(b"Host: h\r\n", b"Host: localhost\r\n"))
            return reader

        for _ in range(5):
            await send(same)

        async def all_wait() -> bool:
            return application.waiting == 5

        await eventually(all_wait)
        assert (await until_closed(await send(same))).startswith(b"HTTP/1.1 503")
        reader = await send(other)

        async def waits_too() -> bool:
            return application.waiting == 6

        await eventually(waits_too)
        application.go_on.set()
        assert (await until_closed(reader)).endswith(b"waited")


async def test_requests_that_do_not_wait_for_responses(application: Application) -> None:
    """A few are answered; a connection with many is closed, so that it cannot keep the program busy."""
    reader, writer = await application.connect()
    writer.write(request("GET /-/healthy") * 3 + request("GET /-/healthy", "Connection: close"))
    assert (await until_closed(reader)).count(b"HTTP/1.1 200 OK") == 4
    writer.close()
    reader, writer = await application.connect()
    writer.write(request("GET /-/healthy") * 60)
    await until_closed(reader)
    writer.close()
    assert application.dropped("pipelining") == 1
    assert application.open() == 0


async def test_many_requests_that_begin_together_do_not_hold_up_others() -> None:
    """Nor those of an address without many connections, nor those of a connection with a credential."""
    async with Application().serve() as application:
        known_reader, known = await application.connect("127.0.0.2")
        known.write(request("GET /work", KNOWN))
        application.go_on.set()
        assert b"200 OK" in await asyncio.wait_for(known_reader.readuntil(b"waited"), 60)
        clients = [await application.connect("127.0.0.3") for _ in range(400)]
        other_reader, other = await application.connect("127.0.0.4")
        order: list[str] = []

        async def read(name: str, reader: asyncio.StreamReader) -> None:
            await reader.readuntil(b"healthy\n")
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for reader, writer in clients:
                writer.write(request("GET /-/healthy"))
                group.create_task(read("many", reader))
            other.write(request("GET /-/healthy"))
            known.write(request("GET /-/healthy", KNOWN))
            group.create_task(read("other", other_reader))
            group.create_task(read("known", known_reader))
        assert max(order.index("other"), order.index("known")) < len(clients) // 4
        for _, writer in [*clients, (known_reader, known), (other_reader, other)]:
            writer.close()


async def test_refused_requests_with_a_credential_do_not_hold_up_others() -> None:
    async with Application().serve() as application:
        application.go_on.set()
        clients = [await application.connect("127.0.0.3") for _ in range(400)]
        reader, writer = await application.connect("127.0.0.3")
        writer.write(request("GET /work", KNOWN))
        assert b"200 OK" in await reader.readuntil(b"waited")
        order: list[str] = []

        async def read(name: str, reader: asyncio.StreamReader) -> None:
            await reader.readuntil(b"waited" if name == "known" else b"}}")
            order.append(name)

        for _ in range(2):  # with their first requests, they become known
            order.clear()
            async with asyncio.TaskGroup() as group:
                for each, its_writer in clients:
                    its_writer.write(request("GET /work", SCRAPER))
                    group.create_task(read("refused", each))
                writer.write(request("GET /work", KNOWN))
                group.create_task(read("known", reader))
        assert order.index("known") < len(clients) // 4
        for _, each_writer in [*clients, (reader, writer)]:
            each_writer.close()


async def test_bodies_in_tiny_chunks(application: Application) -> None:
    """Each chunk takes time and memory, however short it is; a body in ordinary chunks is read."""
    head = request("POST /read", "Transfer-Encoding: chunked", "Connection: close")
    for size, number in ((4096, 10), (1, 200_000), (16, 200_000)):
        reader, writer = await application.connect()
        chunks = b"%x\r\n%b\r\n" % (size, b"x" * size) * number + b"0\r\n\r\n"
        with suppress(ConnectionError):
            writer.write(head + chunks)
            await writer.drain()
        answer = await until_closed(reader)
        writer.close()
        if size == 4096:
            assert answer.endswith(b"\r\n\r\n%d" % (size * number)), answer[:100]
        else:  # the application may read it up to its limit meanwhile
            assert answer == b"" or b" 413 " in answer, answer[:100]
    assert application.dropped("body") >= 1
