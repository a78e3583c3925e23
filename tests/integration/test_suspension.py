"""Requests that are suspended while they wait, on real connections."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from aiohttp import web

from runtime.access.audit import write_to_log
from runtime.access.control import AccessControl, AccessSettings, WebUsers
from runtime.access.roles import AccessRequirement
from runtime.access.tokens import ConfiguredTokens
from runtime.connections.connection import Connection
from runtime.connections.listener import Listener
from runtime.connections.registry import CONNECTION_LIMITS, ConnectionLimits, Connections
from runtime.lifecycle import raise_file_limit
from runtime.metrics import ProgramMetrics
from runtime.suspension import RESUMED, SuspendedError, may_suspend
from runtime.web import add_route, create_application
from runtime.webconfig import WebConfigFile
from tests.integration.peers import Authority
from tests.support import LONGEST_GAP, eventually, longest_gap

BODY = b"a body of 26 bytes, in all"
POST = b"POST /a%2Fb?c=%20d HTTP/1.1\r\nHost: h\r\nX-One: 1\r\nx-two:  2\r\nX-Two: 3\r\n"


class Waiting:
    """The work of a request that waits until `resume` is called."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.resume: Callable[[], None] | None = None
        self.closed = self.answered = 0

    def wait(self, resume: Callable[[], None]) -> None:
        self.resume = resume

    def close(self) -> None:
        self.closed += 1


class Server:
    """Suspends each request, and answers with what it then knows of it."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self.tls = tls
        self.works: list[Waiting] = []
        self.metrics = ProgramMetrics()
        self.at_once = False  # whether requests go on immediately
        self.drops = False  # whether their connections are dropped just before

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Server"]:
        web_config = WebConfigFile(None)
        access = AccessControl(WebUsers, ConfiguredTokens(lambda _: None), write_audit=write_to_log, now=time.monotonic)
        access.settings = AccessSettings()
        app = create_application(access, web_config, ready=lambda: True)
        app[CONNECTION_LIMITS] = ConnectionLimits(per_address=2048)
        add_route(app, "*", "/{path:.*}", self.answer, AccessRequirement.UNCHECKED)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        assert runner.server is not None
        opened = Connections(app, runner.server, self.metrics)
        self.listener = await Listener.bind("127.0.0.1", 0, opened, lambda: self.tls)
        self.port = self.listener.address[1]
        try:
            yield self
        finally:
            self.listener.close()
            self.listener.end_suspended()
            await runner.cleanup()

    async def answer(self, request: web.Request) -> web.Response:
        resumed = request.get(RESUMED)
        if resumed is None:
            work = Waiting(await request.read())
            self.works.append(work)
            if request.method != "POST" or not may_suspend(request):
                return web.Response(text="not suspended")
            if self.at_once:
                work.wait = lambda resume: resume()  # type: ignore[method-assign]
            if self.drops:
                cast("Connection", request.protocol).drop("limit")
            raise SuspendedError(work)
        assert isinstance(resumed, Waiting)
        resumed.answered += 1
        headers = ",".join(f"{name}={value}" for name, value in request.headers.items())
        text = f"{request.method} {request.raw_path} {headers} {resumed.body.decode()} {await request.text()}"
        return web.Response(text=text)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if self.tls is not None else None
        if tls is not None:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=tls)

    async def suspend(self, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Waiting]:
        before = len(self.works)
        reader, writer = await self.connect()
        writer.write(sent)

        async def is_suspended() -> bool:
            return len(self.works) > before and self.works[-1].resume is not None

        await eventually(is_suspended, 30)
        return reader, writer, self.works[-1]

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(params=["plain", "tls"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    tls = Authority.made(tmp_path / "ca.pem").server("localhost") if request.param == "tls" else None
    async with Server(tls).serve() as made:
        yield made


@pytest.fixture
async def plain() -> AsyncIterator[Server]:
    async with Server(None).serve() as made:
        yield made


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 26\r\n\r\n" + BODY,
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\na bod\r\n15\r\ny of 26 bytes, in all\r\n0\r\n\r\n",
        POST + b"Content-Length: 26\r\nConnection: keep-alive\r\n\r\n" + BODY + POST,  # the start of another one
        POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 26\r\n\r\n" + BODY,
    ],
)
async def test_a_request_goes_on_as_it_was(server: Server, sent: bytes) -> None:
    reader, writer, work = await server.suspend(sent)
    assert server.count("defib_http_connections") == 1
    assert work.resume is not None
    work.resume()
    answer = await asyncio.wait_for(reader.read(), 30)  # to the end: it is closed
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head.lower()
    fields = b"Host=h,X-One=1,x-two=2,X-Two=3,Connection=close"
    assert body == b"POST /a%2Fb?c=%20d " + fields + b" " + BODY + b" "
    assert work.closed == 0
    await eventually(lambda: _is(lambda: server.count("defib_http_connections") == 0), 10)
    writer.close()


async def test_names_of_the_connection_header_are_kept(plain: Server) -> None:
    head = b"Connection: keep-alive, x-one\r\nConnection: Close\r\nExpect: 100-continue\r\nContent-Length: 26\r\n\r\n"
    reader, writer, work = await plain.suspend(POST + head + BODY)
    assert work.resume is not None
    work.resume()
    answer = await asyncio.wait_for(reader.read(), 30)
    assert answer.count(b"100 Continue") == 1  # for the first time only
    assert b"Connection=x-one,Connection=close " in answer
    writer.close()


async def _is(check: Callable[[], bool]) -> bool:
    return check()


@pytest.mark.parametrize("ending", ["close", "abort"])
async def test_a_client_that_leaves(server: Server, ending: str) -> None:
    await _leave(server, ending)


async def test_a_client_that_only_ends_its_side(plain: Server) -> None:
    await _leave(plain, "half")


async def _leave(server: Server, ending: str) -> None:
    _, writer, work = await server.suspend(POST + b"\r\n")
    if ending == "half":
        writer.write_eof()
    elif ending == "abort":
        writer.transport.abort()
    else:
        writer.close()
    await eventually(lambda: _is(lambda: work.closed == 1), 10)
    assert server.count("defib_http_connections") == 0
    assert work.resume is not None
    writer.close()


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13])
async def test_clients_that_leave_while_their_requests_go_on(plain: Server, turns: int) -> None:
    opened = [await plain.suspend(POST + b"\r\n") for _ in range(40)]
    for _, _, work in opened:
        assert work.resume is not None
        work.resume()
    for _ in range(turns):
        await asyncio.sleep(0)
    for _, writer, _ in opened:
        writer.transport.abort()
    await eventually(lambda: _is(lambda: plain.count("defib_http_connections") == 0), 30)
    assert [work.closed + work.answered for _, _, work in opened] == [1] * 40
    assert (await _get(plain)).endswith(b"not suspended")


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"X-%d: %d\r\n" % (number, number) for number in range(124)),  # with those of POST, the most possible
        b"Connection: " + b"a," * 2500 + b"b\r\nConnection: " + b"c," * 2500 + b"d\r\n",
    ],
)
async def test_headers_at_the_limits(plain: Server, head: bytes) -> None:
    reader, writer, work = await plain.suspend(POST + head + b"\r\n")
    assert work.resume is not None
    work.resume()
    assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.1 200")
    assert (work.answered, work.closed) == (1, 0)
    writer.close()


async def test_a_connection_that_is_dropped_just_before(plain: Server) -> None:
    plain.drops = True
    reader, writer = await plain.connect()
    writer.write(POST + b"\r\n")
    assert await asyncio.wait_for(reader.read(), 30) == b""
    await eventually(lambda: _is(lambda: plain.count("defib_http_connections") == 0), 30)
    assert [each.closed for each in plain.works] == [1]
    writer.close()


async def _get(server: Server) -> bytes:
    reader, writer = await server.connect()
    writer.write(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return answer


async def test_a_request_that_goes_on_at_once(server: Server) -> None:
    server.at_once = True
    reader, writer = await server.connect()
    writer.write(POST + b"Content-Length: 26\r\n\r\n" + BODY)
    assert (await asyncio.wait_for(reader.read(), 30)).endswith(BODY + b" ")
    writer.close()


async def test_a_client_that_goes_on_sending_is_not_stored(server: Server) -> None:
    reader, writer, work = await server.suspend(POST + b"Content-Length: 26\r\n\r\n" + BODY)
    for _ in range(200):
        writer.write(b"x" * 100_000)
        await asyncio.wait_for(writer.drain(), 30)
    assert work.resume is not None
    work.resume()
    answer = await asyncio.wait_for(reader.readuntil(BODY), 30)
    assert answer.startswith(b"HTTP/1.1 200")
    writer.close()


async def test_pipelined_requests_are_not_suspended(plain: Server) -> None:
    reader, writer = await plain.connect()
    sent = POST + b"Content-Length: 26\r\n\r\n" + BODY
    writer.write(sent + b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 30)
    assert answer.count(b"not suspended") == 2
    writer.close()


async def test_at_the_limit_they_are_dropped_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Server(None).serve() as server:
        opened = [await server.suspend(POST + b"\r\n") for _ in range(3)]
        monkeypatch.setattr(server.listener._connections, "_limits", ConnectionLimits(per_address=3))
        assert (await _get(server)).endswith(b"not suspended")
        assert server.count("defib_http_connections_dropped_total", reason="limit") == 1
        assert sorted(work.closed for _, _, work in opened) == [0, 0, 1]
        for _, writer, _ in opened:
            writer.close()


async def test_a_stop_ends_them(plain: Server) -> None:
    reader, writer, work = await plain.suspend(POST + b"\r\n")
    plain.listener.end_suspended()
    assert await asyncio.wait_for(reader.read(), 10) == b""
    assert work.closed == 1
    assert plain.count("defib_http_connections_dropped_total", reason="limit") == 0
    writer.close()
    reader, writer = await plain.connect()
    writer.write(POST + b"Connection: close\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"not suspended")
    writer.close()


async def test_many_that_go_on_together_block_nothing() -> None:
    raise_file_limit()
    async with Server(None).serve() as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
        for each in clients:
            each.sendall(POST + b"Content-Length: 26\r\n\r\n" + BODY)

        async def are_suspended() -> bool:
            return sum(each.resume is not None for each in server.works) == len(clients)

        await eventually(are_suspended)

        async def go_on() -> None:
            for each in server.works:
                assert each.resume is not None
                each.resume()
            await eventually(lambda: _is(lambda: server.count("defib_http_connections") == 0))

        assert await longest_gap(go_on()) < LONGEST_GAP
        for each in clients:
            with each:
                assert each.recv(10_000).startswith(b"HTTP/1.1 200")
