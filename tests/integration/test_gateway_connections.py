"""The gateway's connections with upstreams, seen by an upstream that reads and writes as it likes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.integration.model_api import KEY, Gateway

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def upstream(gateway: Gateway, serve: Serve, **more: object) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """Run an upstream that serves each connection with `serve`, and the gateway before it; yields the connections."""
    writers: list[asyncio.StreamWriter] = []
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(accept(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    gateway.configure({"api": {"url": f"http://127.0.0.1:{port}/v1", "api_key": KEY, "rate": "1000/min", **more}})
    await gateway.start()
    try:
        yield writers
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await read_head(reader)
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return await reader.readexactly(length)


async def test_a_connection_is_kept_for_the_next_request(gateway: Gateway) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(OK)

    async with upstream(gateway, serve) as connections:
        for _ in range(5):
            assert (await gateway.chat()).content == b"ok"
        assert len(connections) == 1


@pytest.mark.parametrize(
    ("method", "status"),
    [
        ("GET", "200 OK"), ("HEAD", "200 OK"), ("OPTIONS", "204 No Content"), ("DELETE", "200 OK"),
        ("POST", "404 Not Found"), ("POST", "307 Temporary Redirect"), ("PUT", "429 Too Many Requests"),
    ],
)  # fmt: skip
async def test_a_body_that_the_upstream_does_not_read_is_not_the_next_request(
    gateway: Gateway, method: str, status: str
) -> None:
    """The upstream would answer the second request with its own head, in which the key is."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            if head.startswith(b"POST /v1/echo"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                body = await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body)
            else:
                length = 0 if method == "HEAD" or status.startswith("204") else 2
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n".encode() + b"ok"[:length])

    async with upstream(gateway, serve) as connections:
        smuggled = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 150\r\n\r\n"
        first = await gateway.client.request(method, "/v1/x", content=smuggled)
        assert first.status_code == int(status[:3])
        second = await gateway.chat(b"x" * 200, "/v1/echo")
        assert second.text == "x" * 200
        assert len(connections) == 2


async def test_requests_without_a_body_share_a_connection(gateway: Gateway) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(OK.replace(b"200 OK", b"404 Not Found"))

    async with upstream(gateway, serve) as connections:
        for method in ("GET", "DELETE", "OPTIONS", "GET"):
            assert (await gateway.client.request(method, "/v1/x")).content == b"ok"
        assert len(connections) == 1


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad",
        OK + b"bad",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
    ids=["second response", "surplus bytes", "connection: close", "HTTP/1.0"],
)
async def test_no_response_is_taken_for_that_of_another_request(gateway: Gateway, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(answer)

    async with upstream(gateway, serve) as connections:
        for number in range(3):
            response = await gateway.chat()
            assert (response.status_code, response.content) == (200, b"ok")
            assert len(connections) == number + 1


async def test_what_comes_between_requests_ends_the_connection(gateway: Gateway) -> None:
    sent, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await sent.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await reader.read()
        ended.set()

    async with upstream(gateway, serve) as connections:
        assert (await gateway.chat()).status_code == 200
        sent.set()
        await ended.wait()
        assert (await gateway.chat()).status_code == 200
        assert len(connections) == 2


async def test_an_early_refusal_ends_a_long_request(gateway: Gateway) -> None:
    received = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await read_head(reader)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 8\r\n\r\ntoo long")
        while part := await reader.read(2**16):
            received += len(part)

    async with upstream(gateway, serve):
        response = await gateway.chat(b" " * 2**25)
        assert (response.status_code, response.content) == (413, b"too long")
        assert received < 2**25


async def test_a_response_that_begins_before_the_request_has_ended(gateway: Gateway) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        size = 2**23
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while size:
            part = await reader.read(2**16)
            size -= len(part)
            writer.write(part)
            await writer.drain()

    async with upstream(gateway, serve):
        body = bytes(range(256)) * 2**15
        assert (await gateway.chat(body)).content == body


async def test_an_upstream_that_takes_no_request(gateway: Gateway) -> None:
    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await asyncio.Event().wait()

    async with upstream(gateway, serve, timeout="1s"):
        response = await gateway.chat(b" " * 2**25)
        assert response.json()["error"]["message"] == "the upstream was silent for too long"


@pytest.mark.parametrize(
    "head",
    [
        b"X-A: 1\x00", b"X-A: 1\r", b"X-A: " + b"x" * 2**18, b"X-A: 1\r\n" * 2**15, b"Content-Length: 3", b"bad",
        b"Set-Cookie : a=b", b"X A: 1", b"X\xff: 1",
    ],
    ids=["NUL", "CR", "long header", "many headers", "two lengths", "no header", "blank", "two words", "other byte"],
)  # fmt: skip
async def test_heads_that_are_no_http(gateway: Gateway, head: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + head + b"\r\n\r\nok")
        await reader.read()

    async with upstream(gateway, serve):
        response = await gateway.chat()
        assert response.status_code == 502
        assert response.json()["error"]["message"].startswith("the upstream's response is not valid (")


@pytest.mark.parametrize(
    ("header", "passed", "body"),
    [
        (b"Content-Length : 6", b"Content-Length: 6", b"abcdef"), (b"Content-Length  : 3", b"Content-Length: 3", b"abc"),
        (b"Transfer-Encoding : x", b"Transfer-Encoding: chunked", b"6\r\nabcdef\r\n0\r\n\r\n"),
    ],
)  # fmt: skip
async def test_a_length_is_passed_on_as_it_was_understood(
    gateway: Gateway, header: bytes, passed: bytes, body: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n\r\nabcdef")

    async with upstream(gateway, serve):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        head, _, received = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
        writer.close()
        framing = (b"content-length", b"transfer-encoding")
        assert [line for line in head.split(b"\r\n") if line.lower().startswith(framing)] == [passed]
        assert received == body


async def test_a_length_after_a_blank_is_a_length(gateway: Gateway) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length : 6\r\n\r\nabc")

    async with upstream(gateway, serve):
        with pytest.raises(httpx.RemoteProtocolError):
            await gateway.chat()


async def test_many_small_chunks_do_not_delay_others(gateway: Gateway) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(40):
            writer.write(b"1\r\nx\r\n" * 50_000)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await reader.read()

    async with upstream(gateway, serve):
        streams = [asyncio.create_task(gateway.chat()) for _ in range(3)]
        delays = []
        while not all(each.done() for each in streams):
            began = time.monotonic()
            assert await gateway.is_healthy()
            delays.append(time.monotonic() - began)
            await asyncio.sleep(0.01)
        assert [len(each.result().content) for each in streams] == [2_000_000] * 3
        assert sorted(delays)[len(delays) // 2] < 0.1
