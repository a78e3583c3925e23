"""Upstreams that answer what they should not: the gateway goes on for others, and passes no harm on."""

import asyncio
import time
from pathlib import Path

import pytest

from runtime import lookups
from tests.integration.model_api import Gateway, ModelApi, Received, whole
from tests.support import eventually

USAGE = b'{"usage": {"prompt_tokens": 2000000, "completion_tokens": 1}}'
JSON = "Content-Type: application/json"


@pytest.mark.parametrize("line", [b"100 Continue", b"103 Early Hints", b"199 x"])
async def test_interim_responses_without_end(gateway: Gateway, api: ModelApi, line: bytes) -> None:
    gateway.configure()
    await gateway.start()

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"HTTP/1.1 " + line + b"\r\n\r\n")
            await writer.drain()

    api.respond = respond
    began = time.monotonic()
    response = await gateway.chat()
    assert response.status_code == 502
    assert time.monotonic() - began < 30
    assert await gateway.is_healthy()


async def test_a_few_interim_responses(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()

    async def respond(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" * 5)
        await whole()(request, writer)

    api.respond = respond
    for _ in range(8):  # also later ones of a connection
        response = await gateway.chat()
        assert (response.status_code, response.content) == (200, b"{}")
        assert "Link" not in response.headers


@pytest.mark.parametrize("status", ["101 Switching Protocols", "000 x", "600 x", "999 x"])
async def test_a_status_that_is_no_answer(gateway: Gateway, api: ModelApi, status: str) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(b"{}", status, "Upgrade: x", "Connection: Upgrade")
    response = await gateway.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_failed")


async def test_reasons_and_headers_for_browsers_are_not_passed_on(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    dropped = ("Strict-Transport-Security: max-age=99", 'Alt-Svc: h3=":443"', "Clear-Site-Data: *", "Set-Cookie2: a=b")
    api.respond = whole(b"{}", "200 O\x07K", *dropped, "X-Kept: 1")
    response = await gateway.chat()
    assert (response.status_code, response.reason_phrase) == (200, "OK")
    assert response.headers["X-Kept"] == "1"
    for line in dropped:
        assert line.partition(":")[0] not in response.headers


async def test_names_that_servers_mix_up_are_not_passed_on(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    headers = {"Content_Length": "7", "Transfer_Encoding": "chunked", "X-Kept": "1"}
    await gateway.client.post("/v1/chat/completions", content=b"{}", headers=headers)
    assert api.received[0].header("X-Kept") == ["1"]
    assert [line for line in api.received[0].head if "_" in line.partition(":")[0]] == []


@pytest.mark.parametrize(
    ("path", "body", "content_type"),
    [
        ("/v1/files/f1/content", b"x", "application/json"),
        ("/v1/files/f1/content", b'{"a": 1}', "application/json"),
        ("/v1/chat/completions", b'{"model": "m"}', "text/plain"),
    ],
)
async def test_usage_that_a_client_could_have_written(
    gateway: Gateway, api: ModelApi, path: str, body: bytes, content_type: str
) -> None:
    upstream = gateway.upstream(tokens="100000/min")
    gateway.configure({"api": upstream})
    await gateway.start()
    api.respond = whole(USAGE, "200 OK", f"Content-Type: {content_type}")
    await gateway.chat(body, path)

    async def is_finished() -> bool:
        return bool((await gateway.status())["in_flight"] == 0)

    await eventually(is_finished)
    assert (await gateway.status())["tokens_in_window"] < 1000
    api.respond = whole(USAGE, "200 OK", JSON)
    await gateway.chat()
    await eventually(is_finished)
    assert (await gateway.status())["tokens_in_window"] > 2_000_000


async def test_names_that_are_not_found_leave_others_room(gateway: Gateway, api: ModelApi) -> None:
    """With libuv's 4 threads, two names whose servers do not answer would hold up all other connections."""
    gateway.configure({"api": gateway.upstream(url=f"http://localhost:{api.port}/v1")})
    await gateway.start()
    assert (await gateway.chat()).is_success
    assert len(list(Path(f"/proc/{gateway.pid}/task").iterdir())) >= lookups.THREADS
