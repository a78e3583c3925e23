"""Servers that send too much, or in many small parts: the event loop is never blocked for long."""

import asyncio
import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import SudoOptions
from fleet.shells.local import LocalShell
from remediator.clients.alerts import MAX_BODY, MAX_LABELS, PayloadTooLargeError, parse_webhook
from remediator.clients.json_client import RESPONSE_LIMIT as CLIENT_LIMIT
from remediator.clients.json_client import ClientError, JsonClient
from remediator.execution.controls.http import HTTP, HttpControlOptions
from remediator.execution.controls.http import RESPONSE_LIMIT as CONTROL_LIMIT
from remediator.execution.controls.runner import ControlRunner
from remediator.notifications.channels.http import RESPONSE_LIMIT, HttpReply, send_request
from runtime.payloads import parse_body
from tests.integration import peers
from tests.support import leaves_the_loop_free

MIB = 2**20
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _build_bomb(size: int) -> bytes:
    """Return the beginning of a gzip stream of `size` MiB of zeros; a full flush makes all of its blocks equal."""
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    first, second = (stream.compress(bytes(MIB)) + stream.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + second * (size - 1)


BOMB = _build_bomb(500)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
# The headers, and what follows them without end.
ANSWERS = {
    "500 MB of gzip": (OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB), BOMB),
    "1 GB": (OK + b"Content-Length: 1000000000\r\n\r\n", bytes(65536)),
    "chunks of one byte": (CHUNKED, b"1\r\n \r\n" * 11_000),
    "interim responses": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 2000),
}


def answering(name: str) -> Serve:
    head, rest = ANSWERS[name]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        while True:
            writer.write(rest)
            await writer.drain()

    return serve


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "interim responses"])
async def test_answers_to_a_control(name: str) -> None:
    async with peers.raw_server(answering(name)) as port:
        options = HttpControlOptions.model_validate({"start": {"url": f"http://127.0.0.1:{port}/start"}})

        async def start() -> None:
            completed = await HTTP.run("start", options, ControlRunner(LocalShell(), SudoOptions(), 60.0))
            assert (completed.status, completed.output[:8]) == (0, "HTTP 200")
            assert len(completed.output) <= CONTROL_LIMIT + len("HTTP 200 ")

        await leaves_the_loop_free(start)


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "interim responses"])
async def test_answers_of_a_chat_server(name: str) -> None:
    async with peers.raw_server(answering(name)) as port, httpx.AsyncClient(trust_env=False) as client:

        async def send() -> None:
            reply = await send_request(client, "POST", f"http://127.0.0.1:{port}/hook", b"{}", {})
            assert (reply.status, reply.error, len(reply.body)) == (200, "", RESPONSE_LIMIT)

        await leaves_the_loop_free(send)


async def test_a_short_answer_is_read_although_the_connection_is_lost() -> None:
    """A message that was sent must not be sent again."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b'Content-Length: 99\r\n\r\n{"code": 0}')

    async with peers.raw_server(serve) as port, httpx.AsyncClient(trust_env=False) as client:
        reply = await send_request(client, "POST", f"http://127.0.0.1:{port}/hook", b"{}", {})
    assert reply == HttpReply(200, reply.headers, b'{"code": 0}')


@pytest.mark.parametrize("name", ["500 MB of gzip", "1 GB"])
async def test_answers_of_an_api(name: str) -> None:
    async with peers.raw_server(answering(name)) as port:
        client = JsonClient(Endpoint(url=f"http://127.0.0.1:{port}"))

        async def request() -> None:
            with pytest.raises(ClientError, match=f"longer than {CLIENT_LIMIT} bytes"):
                await client.request("GET", "/api/v2/alerts")

        await leaves_the_loop_free(request)
        await client.close()


@pytest.mark.parametrize("name", ["chunks of one byte", "interim responses"])
async def test_answers_of_an_api_end_with_the_timeout(name: str) -> None:
    async with peers.raw_server(answering(name)) as port:
        client = JsonClient(Endpoint(url=f"http://127.0.0.1:{port}"))

        async def request() -> None:
            with pytest.raises(ClientError, match="Timeout"):
                await client.request("GET", "/api/v2/alerts", 1.0)

        await leaves_the_loop_free(request)
        await client.close()


def _alert(**fields: Any) -> dict[str, Any]:
    return {"status": "firing", "fingerprint": "f", "startsAt": "2026-11-29T00:00:00Z", **fields}


def _payload(*alerts: Any, **fields: Any) -> bytes:
    return json.dumps({"version": "4", "alerts": alerts, **fields}, separators=(",", ":")).encode()


LABELS = {f"{number:x}": "" for number in range(800_000)}
TOO_LARGE = {
    "labels": _payload(_alert(labels=dict(list(LABELS.items())[:370_000]))),
    "annotations": _payload(_alert(annotations=dict(list(LABELS.items())[:370_000]))),
    "alerts": _payload(*([{}] * 1_300_000)),
    "lists": _payload(other=[[]] * 1_300_000),
    "maps": _payload(other=[{"": 1}] * 500_000),
    "members": _payload(other=dict(list(LABELS.items())[:370_000])),
}
IGNORED = {
    "lists": _payload(other=[["a" * 20]] * 140_000),
    "strings": _payload(other=["a"] * 1_000_000),
    "numbers": _payload(other=[10**4000] * 1000),
    "a string": _payload(other="é" * 600_000),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TOO_LARGE)
async def test_webhooks_that_are_too_large(name: str) -> None:
    body = TOO_LARGE[name]
    assert len(body) <= MAX_BODY

    async def receive() -> None:
        with pytest.raises(PayloadTooLargeError):
            await parse_body(parse_webhook, body)

    await leaves_the_loop_free(receive)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", IGNORED)
async def test_webhooks_with_large_unknown_fields(name: str) -> None:
    body = IGNORED[name]
    assert MAX_BODY // 2 < len(body) <= MAX_BODY

    async def receive() -> None:
        assert (await parse_body(parse_webhook, body)).alerts == []

    await leaves_the_loop_free(receive)


async def test_large_webhooks_are_accepted() -> None:
    labels = {f"label{number}": "\ud800 é" for number in range(20)}
    body = _payload(*[_alert(fingerprint=f"{number:016x}", labels=labels) for number in range(4000)])
    assert MAX_BODY // 2 < len(body) <= MAX_BODY

    async def receive() -> None:
        payload = await parse_body(parse_webhook, body)
        assert len(payload.alerts) == 4000
        assert payload.alerts[-1].labels == dict.fromkeys(labels, "? é")

    await leaves_the_loop_free(receive)


def test_limit_of_labels() -> None:
    most = {f"{number}": "" for number in range(MAX_LABELS)}
    assert len(parse_webhook(_payload(_alert(labels=most))).alerts[0].labels) == MAX_LABELS
    with pytest.raises(PayloadTooLargeError, match="more than 500 labels"):
        parse_webhook(_payload(_alert(labels={**most, "x": ""})))
