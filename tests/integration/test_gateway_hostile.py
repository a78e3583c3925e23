"""Clients and upstreams that want to harm the gateway, or other clients."""

import asyncio
import resource
from pathlib import Path

import pytest

from tests.integration.model_api import KEY, Gateway, ModelApi, Received, whole
from tests.support import eventually

CLIENTS = {"coder": {"token": "t-coder", "budget": {"requests": 5}}, "tester": {"token": "t-tester"}}


async def test_trace_does_not_show_the_key(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    response = await gateway.client.request("TRACE", "/v1/x")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert KEY not in response.text
    assert api.received == []


async def get(gateway: Gateway, path: str) -> bytes:
    """Request a path as it is written, and return the status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    status = await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    return status.split()[1]


LEAVING = (
    "/..", "/v1/.", "/v1/../x", "/v1/..;/x", "/v1/.%2E;a=b/x", "/v1/%252e%252e/x", "/v1/..%3bx", "/v1/x/..%255cy",
    "/v1/..%09/x", "/v1/..%0d%0a/x", "/v1/..%01y/x", "/v1/..%7f/x", "/v1/..%20/x", "/v1/%09../x", "/v1/.%0a./x",
    "/v1/..%23/x", "/v1/..%2523y/x", "/v1/..%3f/x", "/v1/..%3Fa=b/x", "/v1/..%253fx", "/v1/.%2%65/x", "/v1/%2%65./x",
    "/v1/%25%32%65./x", "/v1/%25252e%25252E/x", "/v1/%2525252e./x", "/v1/a%2f..%2fx", "/v1/a%5c..%5cx", "/v1/a\\..\\x",
    "/v1/.%09", "/v1/%2525252525", "/v1/a%3f/../x", "/v1/%e4/../x", f"/v1/{'%2e/' * 2000}",
)  # fmt: skip
STAYING = (
    "/v1/x?a=../b", "/v1/x?a=%2e%2e%2f", "/v1/...", "/v1/..a", "/v1/a..", "/v1/.a/b.", "/v1/a%2fb", "/v1/a%252fb",
    "/v1/100%25", "/v1/%", "/v1/%2", "/v1/%zz", "/v1/a;b", "/v1/a%23b", "/v1/a%20.b", "/v1/models/org/name-1.5",
    "/v1/%e4%bd%a0", "/v1//a", f"/v1/{'%41' * 2000}",
)  # fmt: skip


async def test_no_path_leaves_the_base_of_the_upstream(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    for path in LEAVING:
        assert await get(gateway, path) == b"400", path
    assert api.received == []
    for path in STAYING:
        assert await get(gateway, path) == b"200", path
        assert api.received[-1].target.encode("latin-1") == path.encode(), path


async def test_a_budget_holds_for_requests_that_begin_together(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure(clients=CLIENTS)
    await gateway.start()
    head = b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer t-coder\r\nExpect: 100-continue\r\n"
    opened = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(20)]
    for _, writer in opened:
        writer.write(head + b"Content-Length: 2\r\n\r\n")
    for reader, _ in opened:  # all bodies are being read
        await asyncio.wait_for(reader.readuntil(b"100 Continue\r\n\r\n"), 20)
    for _, writer in opened:
        writer.write(b"{}")
    answers = [(await asyncio.wait_for(reader.readline(), 20)).split()[1] for reader, _ in opened]
    for _, writer in opened:
        writer.close()
    assert (answers.count(b"200"), answers.count(b"429")) == (5, 15)
    assert len(api.received) == 5


async def test_long_bodies_cost_neither_memory_nor_time_of_others(gateway: Gateway, api: ModelApi) -> None:
    """Clients that leave take their bodies with them, and others do not wait for them."""
    gateway.configure(clients=CLIENTS)
    await gateway.start()
    before = _memory(gateway.pid)
    body = b'{"model":"m","a":[' + b'"",' * (15 * 2**20) + b"1]}"
    head = (
        b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer t-coder\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    for _ in range(6):
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(head + body)
        await writer.drain()
        response = await gateway.chat({"model": "m", "a": "x" * 300_000}, Authorization="Bearer t-tester")
        assert response.is_success
        writer.close()
    assert len(api.received) == 6
    assert _memory(gateway.pid) - before < 250 * 2**20


async def test_a_client_with_large_bodies_does_not_lock_out_others(gateway: Gateway, api: ModelApi) -> None:
    limit, part, ended = 8 * 2**20, 2**20, asyncio.Event()
    gateway.configure(clients=CLIENTS, max_body=f"{limit}B")
    await gateway.start()

    async def respond(request: Received, writer: asyncio.StreamWriter) -> None:
        if len(request.body) == limit:
            await ended.wait()
        await whole()(request, writer)

    async def upload(size: int, client: str) -> int:
        return (await gateway.chat(b"x" * size, Authorization=f"Bearer {client}")).status_code

    api.respond = respond
    long = asyncio.create_task(upload(limit, "t-coder"))
    await eventually(lambda: asyncio.sleep(0, bool(api.received)))
    assert await upload(1, "t-coder") == 503
    for _ in range(3):
        assert await upload(part, "t-tester") == 200
        assert await upload(part + 1, "t-tester") == 503
    ended.set()
    assert await long == 200
    assert await upload(part + 1, "t-tester") == 200


def _memory(pid: int) -> int:
    """Return the bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize(
    "answer",
    [b"*1\r\n" * 5000, b"+text\r\n", b"+" + b"x" * 200_000, b"*1\r\n:1\r\n", b"$abc\r\n", b"HTTP/1.1 200 OK\r\n\r\n"],
)
async def test_what_is_no_redis_server(gateway: Gateway, answer: bytes) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1")
    async with server:
        address = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        gateway.configure(shared={"redis": address, "password": "a-password", "gateways": 2})
        await gateway.start()
        await gateway.logged("shared_limits_lost")
        assert await gateway.is_healthy()
        assert "a-password" not in gateway.log.read_text()
