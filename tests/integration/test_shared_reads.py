"""Many viewers that open the same or many pages together: other servers and the engine notice little of it."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from console.history import History
from fleet.inventory.endpoints import Endpoint
from fleet.json_client import CONCURRENT, ClientError, JsonClient
from runtime.shared_reads import SharedReads
from tests.integration import peers


class Server:
    """An API that answers when it `may_answer`, and knows how many requests it has had at a time."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.now = self.most = self.all = 0
        self.port = 0

    async def answer(self, _request: web.Request) -> web.Response:
        self.now += 1
        self.all += 1
        self.most = max(self.most, self.now)
        try:
            await self.may_answer.wait()
        finally:
            self.now -= 1
        return web.json_response({"status": "success", "data": {"resultType": "matrix", "result": []}})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    async with peers.web_server(made.answer) as made.port:
        yield made


async def test_pages_that_give_up_take_no_connection_from_others(server: Server) -> None:
    """Requests that wait for a connection of httpx and are cancelled would take it from others for ever."""
    client = JsonClient(await asyncio.to_thread(Endpoint, url=f"http://127.0.0.1:{server.port}"))
    for _ in range(3):
        requests = [asyncio.create_task(client.request("GET", "/")) for _ in range(4 * CONCURRENT)]
        await asyncio.wait(requests, timeout=0.3)
        for each in requests:
            each.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
    assert server.all <= 3 * CONCURRENT
    server.may_answer.set()
    answers = await asyncio.gather(*(client.request("GET", "/", 30.0) for _ in range(2 * CONCURRENT)))
    assert {each["status"] for each in answers} == {"success"}
    await client.close()


async def test_charts_are_read_once_for_all_viewers(server: Server) -> None:
    endpoint = Endpoint(url=f"http://127.0.0.1:{server.port}")
    history = History(lambda: endpoint)
    slow = await asyncio.gather(*(history.read_host(f"h{number % 2}", 3600.0) for number in range(200)))
    assert {each.problem for each in slow} == {"Prometheus is slow"}
    assert server.all <= 2 * 9  # queries of a host's charts
    server.may_answer.set()
    asked = server.all
    shown = await asyncio.gather(*(history.read_host("h2", 3600.0) for _ in range(200)))
    assert ({each.problem for each in shown}, server.all - asked) == ({""}, 9)
    await history.close()


async def test_reads_are_shared_and_limited() -> None:
    reads, running, calls = SharedReads(running=2, waiting=3), 0, 0
    go_on = asyncio.Event()

    async def read() -> int:
        nonlocal running, calls
        running, calls = running + 1, calls + 1
        assert running <= 2
        await go_on.wait()
        running -= 1
        return calls

    waiting = [asyncio.create_task(reads.read(number % 5, read, 30.0)) for number in range(50)]
    await asyncio.sleep(0.01)
    with pytest.raises(TimeoutError, match="too many requests"):
        await reads.read("another", read, 30.0)
    with pytest.raises(TimeoutError):
        await reads.read(0, read, 0.01)  # gives up, which takes it from nobody else
    go_on.set()
    await asyncio.gather(*waiting)
    assert calls == 5


async def test_failures_are_not_kept() -> None:
    reads, calls = SharedReads(running=1, waiting=0, shared_for=60.0), 0

    async def read() -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ClientError("no")
        return "yes"

    with pytest.raises(ClientError):
        await reads.read("", read, 10.0)
    assert [await reads.read("", read, 10.0) for _ in range(3)] == ["yes"] * 3
    assert calls == 2
