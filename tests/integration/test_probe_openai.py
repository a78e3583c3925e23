"""The `openai` probe against a server like vLLM, and against misbehaving servers."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.integration import peers
from tests.integration.peers import ModelServer
from tests.support import probed

ASKED = {"model": "m", "prompt": "2 + 2?"}


@pytest.mark.parametrize(
    ("server", "options", "reason", "message"),
    [
        (ModelServer(), {}, None, ""),
        (ModelServer(), {"stream": False}, None, ""),
        (ModelServer("k3y12345"), {"api_key": "k3y12345", "expect": {"body_matches": "^4 is the sum$", "body_lacks": "5"}}, None, ""),
        (ModelServer("k3y12345"), {"api_key": "wrong123"}, "auth", "answered 401, expected 200"),
        (ModelServer("k3y12345"), {}, "status", "answered 401, expected 200"),
        (ModelServer(misbehave="429"), {"api_key": "k3y12345"}, "status", "answered 429, expected 200"),
        (ModelServer(misbehave="503"), {}, "status", "answered 503"),
        (ModelServer(), {"expect": {"body_matches": "five"}}, "body", "the completion does not match 'five'; it begins with '4 is the sum'"),
        (ModelServer(), {"stream": False, "expect": {"body_matches": "five"}}, "body", "five"),
        (ModelServer(), {"expect": {"first_token_faster_than": "1ms"}}, "latency", "the first token took"),
        (ModelServer(), {"expect": {"tokens_per_second_above": 1e6}}, "latency", "tokens per second, expected more than 1e+06"),
        (ModelServer(), {"expect": {"faster_than": "10ms"}}, "latency", "the completion took"),
        (ModelServer(misbehave="empty"), {}, "body", "no token"),
        (ModelServer(misbehave="empty"), {"stream": False}, "body", "no token"),
        (ModelServer(misbehave="cut"), {}, "protocol", "the connection was closed after"),
        (ModelServer(misbehave="unended"), {}, "protocol", "the stream ended before the completion"),
        (ModelServer(misbehave="error"), {}, "status", "out of memory"),
        (ModelServer(misbehave="endless"), {"max_tokens": 4}, None, ""),
    ],
)  # fmt: skip
async def test_completions(tmp_path: Path, server: ModelServer, options: Any, reason: str | None, message: str) -> None:
    async with peers.web_server(server.answer) as port:
        asked = {"url": f"http://127.0.0.1:{port}", **ASKED, **options}
        result = await probed(tmp_path, "openai", asked)
    assert (result.reason, message in result.message) == (reason, True), result.message
    assert "k3y12345" not in result.message
    if reason is None:
        assert result.details.gauges["service_llm_tokens_per_second"] > 1
        assert ("service_llm_first_token_seconds" in result.details.gauges) == options.get("stream", True)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
async def test_urls_and_what_is_sent(tmp_path: Path, path: str) -> None:
    server = ModelServer()
    async with peers.web_server(server.answer) as port:
        options = {"url": f"http://127.0.0.1:{port}{path}", **ASKED, "max_tokens": 2, "parameters": {"temperature": 0}}
        result = await probed(tmp_path, "openai", options)
    assert result.success, result.message
    assert server.asked == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "2 + 2?"}],
            "max_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
    ]
    assert result.details.evidence["tokens"] == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_max_completion_tokens_replace_max_tokens(tmp_path: Path, stream: bool) -> None:
    server = ModelServer()
    async with peers.web_server(server.answer) as port:
        options = {"url": f"http://127.0.0.1:{port}", **ASKED, "max_completion_tokens": 2, "stream": stream}
        result = await probed(tmp_path, "openai", options)
    assert (result.success, result.details.evidence["tokens"]) == (True, 2), result.message
    assert (server.asked[0]["max_completion_tokens"], "max_tokens" in server.asked[0]) == (2, False)


@pytest.mark.parametrize(
    ("options", "misbehave", "reason", "message"),
    [
        ({"endpoint": "embeddings"}, "", None, ""),
        ({"endpoint": "embeddings", "expect": {"dimensions": 1024}}, "", None, ""),
        ({"endpoint": "embeddings", "parameters": {"dimensions": 256}, "expect": {"dimensions": 256}}, "", None, ""),
        ({"endpoint": "embeddings", "expect": {"dimensions": 768}}, "", "body", "the vector has 1024 dimensions, expected 768"),
        ({"endpoint": "embeddings"}, "empty", "body", "the answer has no vector of numbers"),
        ({"endpoint": "embeddings"}, "503", "status", "answered 503, expected 200"),
        ({"endpoint": "embeddings", "api_key": "wrong123"}, "", "auth", "answered 401, expected 200"),
        ({"endpoint": "embeddings", "expect": {"faster_than": "1ms"}}, "slow", "latency", "the answer took"),
        ({"endpoint": "models"}, "", None, ""),
        ({"endpoint": "models", "model": "bge-m4"}, "", "body", "does not list the model 'bge-m4'; it lists 'qwen3-32b, bge-m3'"),
    ],
)  # fmt: skip
async def test_embeddings_and_models(
    tmp_path: Path, options: Any, misbehave: str, reason: str | None, message: str
) -> None:
    server = ModelServer("k3y12345", misbehave)

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.01)
        return await server.answer(request)

    async with peers.web_server(answer) as port:
        asked = {"url": f"http://127.0.0.1:{port}/v1", "model": "bge-m3", "api_key": "k3y12345", **options}
        result = await probed(tmp_path, "openai", asked)
    assert (result.reason, message in result.message) == (reason, True), result.message
    if reason is None and options["endpoint"] == "embeddings":
        assert server.asked == [{"model": "bge-m3", "input": "Reply with OK.", **options.get("parameters", {})}]


@pytest.mark.parametrize(
    ("endpoint", "answer", "reason", "message"),
    [
        ("models", {"data": None}, "json", "the answer has no list `data`"),
        ("models", [], "json", "the answer is not a JSON object"),
        ("models", {"data": [1, {"id": 2}]}, "body", "it lists no model"),
        ("models", {"error": {"message": "out of memory"}}, "status", "out of memory"),
        ("embeddings", {"data": [{"embedding": "AACAPw=="}]}, "body", "no vector of numbers"),
        ("embeddings", {"data": [{"embedding": [0.5, True]}]}, "body", "no vector of numbers"),
        ("embeddings", {"data": []}, "body", "no vector of numbers"),
    ],
)
async def test_wrong_lists(tmp_path: Path, endpoint: str, answer: Any, reason: str, message: str) -> None:
    async def say(_request: web.Request) -> web.Response:
        return web.json_response(answer)

    async with peers.web_server(say) as port:
        asked = {"url": f"http://127.0.0.1:{port}", "model": "m", "endpoint": endpoint}
        result = await probed(tmp_path, "openai", asked)
    assert (result.reason, message in result.message) == (reason, True), result.message


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
async def test_a_stream_of_parts_of_content(tmp_path: Path, mark: bytes) -> None:
    parts = [{"type": "text", "text": "O"}, {"type": "image_url"}, "no part", {"type": "text", "text": "K"}]
    delta = json.dumps({"choices": [{"delta": {"content": parts}, "finish_reason": "stop"}]}).encode()

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=mark + b"data: " + delta + b"\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    async with peers.web_server(answer) as port:
        result = await probed(tmp_path, "openai", {"url": f"http://127.0.0.1:{port}", **ASKED})
    assert (result.success, result.details.evidence["body"]) == (True, "OK"), result.message


@pytest.mark.parametrize("counted", [10**400, -5, True, "7"])
async def test_implausible_token_counts_are_ignored(tmp_path: Path, counted: Any) -> None:
    async def answer(_request: web.Request) -> web.Response:
        told = {
            "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": counted},
        }
        return web.json_response(told)

    async with peers.web_server(answer) as port:
        result = await probed(tmp_path, "openai", {"url": f"http://127.0.0.1:{port}", **ASKED, "stream": False})
    assert (result.success, result.details.evidence["tokens"]) == (True, 1), result.message


async def test_a_url_with_a_query_keeps_it(tmp_path: Path) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        return web.json_response({"choices": [{"message": {"content": "hi"}}]})

    async with peers.web_server(answer) as port:
        url = f"http://127.0.0.1:{port}/openai/deployments/x/chat/completions?api-version=1"
        await probed(tmp_path, "openai", {"url": url, **ASKED, "stream": False})
    assert asked == ["/openai/deployments/x/chat/completions?api-version=1"]


async def test_a_server_that_exceeds_max_tokens_is_disconnected(tmp_path: Path) -> None:
    server = ModelServer(misbehave="endless")
    async with peers.web_server(server.answer) as port:
        options = {"url": f"http://127.0.0.1:{port}", **ASKED, "max_tokens": 10}
        result = await probed(tmp_path, "openai", options, "120s")
    assert result.success
    assert result.duration < 60
    assert server.sent < 30


async def test_servers_without_an_openai_api(tmp_path: Path) -> None:
    async def page(_request: Any) -> Any:
        return web.Response(text="<html>hello</html>")

    async with peers.web_server(page) as port:
        url = f"http://127.0.0.1:{port}"
        streamed = await probed(tmp_path, "openai", {"url": url, **ASKED})
        assert (streamed.reason, "<html>hello" in streamed.message) == ("protocol", True), streamed.message
        assert (await probed(tmp_path, "openai", {"url": url, **ASKED, "stream": False})).reason == "json"


@pytest.mark.parametrize("piece", [b"x", b'data: {"choices": []}\n\n' * 100, b": ping\n\n"])
async def test_endless_streams_do_not_block_the_event_loop(tmp_path: Path, piece: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
        while True:
            writer.write(chunk * max(1, 10_000 // len(chunk)))
            await writer.drain()

    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with peers.raw_server(handle) as port:
        task = asyncio.create_task(others())
        result = await probed(tmp_path, "openai", {"url": f"http://127.0.0.1:{port}", **ASKED}, "60s")
        task.cancel()
    assert result.reason == "protocol", result.message
    assert turns > 5  # there is one after each read, which may hold 256 KiB: some ten in all
