"""The `status` and `python` probes."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from exporter.exposition.metrics_page import MetricsPage
from exporter.exposition.service_series import FAMILIES, ServiceSeries
from exporter.results import Component
from exporter.service_state import ServiceState
from tests.integration import peers
from tests.support import inventory_of, patience, probed

CHANNELS = [{"name": f"ch{n}", "state": "running" if n else "stopped", "fps": 25} for n in range(5)]
TRANSCODER = {"cpu": {"usage": 37.5}, "channels": CHANNELS}
SECRET = "hunter2-secret"
EACH = {"each": "$.channels[*]", "name": "$.name", "up": {"$.state": "running", "$.fps": {"above": 20}}}


@pytest.mark.parametrize(
    ("page", "options", "reason", "message"),
    [
        (TRANSCODER, {}, "state", "1 of 5 components are down: ch0; expected all up"),
        (TRANSCODER, {"up_when": "any"}, None, ""),
        (TRANSCODER, {"up_when": "80%"}, None, ""),
        (TRANSCODER, {"up_when": 0.9}, "state", "expected 90% up"),
        ({"channels": CHANNELS[:1] * 4 + CHANNELS[1:2]}, {"up_when": "50%"}, None, ""),
        ({"channels": [*({"name": str(n)} for n in range(9)), CHANNELS[1]]}, {"up_when": "10%"}, None, ""),
        ({"channels": [*({"name": str(n)} for n in range(4)), CHANNELS[1]]}, {"up_when": "20%"}, None, ""),
        (TRANSCODER, {"up_when": "any", "expect": {"json": {"$.cpu.usage": {"below": 30}}}}, "json", "$.cpu.usage is 37.5, expected below 30"),
        ({"channels": []}, {}, "json", "$.channels[*] selects no component"),
        ({"channels": [{"name": "a"}]}, {"up_when": "any"}, "state", "1 of 1"),
        ("no page", {}, "json", "selects no component"),
    ],
)  # fmt: skip
async def test_components_of_a_transcoder(
    tmp_path: Path, page: Any, options: Any, reason: str | None, message: str
) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(page)

    async with peers.web_server(answer) as port:
        options = {"url": f"http://127.0.0.1:{port}/status", "components": EACH, **options}
        result = await probed(tmp_path, "status", options)
    assert (result.reason, message in result.message) == (reason, True), result.message
    if page is TRANSCODER and reason != "json":
        assert result.details.components == {f"ch{n}": Component(up=n > 0) for n in range(5)}


async def test_values_of_components(tmp_path: Path) -> None:
    left_out = {"list": [1], "null": None, "long": "x" * 101, "huge": 10**101, "endless": float("inf")}
    parts = [
        {"name": "a", "cpu": 37.5, "on": True, "text": "hé \ud800", "many": [1, 2], "key": SECRET, **left_out},
        {"name": "b", "cpu": 0},
        {"name": "a", "cpu": 99},
    ]

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=json.dumps(parts).replace("Infinity", "1e999"))

    async with peers.web_server(answer) as port:
        values = {name: f"$.{name}" for name in ("cpu", "on", "text", "key", *left_out)} | {"many": "$.many[*]"}
        components = {"each": "$[*]", "name": "$.name", "up": {"$.cpu": {"below": 90}}, "values": values}
        options = {"url": f"http://127.0.0.1:{port}", "headers": {"X-Key": SECRET}, "components": components}
        result = await probed(tmp_path, "status", options)
    assert result.details.components == {
        "a": Component(up=False, values={"cpu": 37.5, "on": True, "text": "hé ?", "key": "***", "many": 1}),
        "b": Component(up=True, values={"cpu": 0}),
    }


async def test_components_are_limited_and_named_by_their_keys(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"parts": {f"p{n}": n < 290 for n in range(300)}} if request.path == "/a" else "x")

    async with peers.web_server(answer) as port:
        components = {"each": "$.parts.*", "up": {"$": True}}
        options = {"url": f"http://127.0.0.1:{port}/a", "components": components}
        result = await probed(tmp_path, "status", options)
        assert (result.reason, "10 of 300" in result.message) == ("state", True), result.message
        assert "p290, p291, p292, p293, p294 and 5 more" in result.message
        assert len(result.details.components) == 200
        none = await probed(tmp_path, "status", {**options, "url": f"http://127.0.0.1:{port}/b"})
        assert none.reason == "json"


async def test_secrets_are_redacted_in_component_names(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"parts": [{"name": request.headers["X-Key"]}]})

    async with peers.web_server(answer) as port:
        options = {"url": f"http://127.0.0.1:{port}", "headers": {"X-Key": SECRET}}
        result = await probed(
            tmp_path, "status", {**options, "components": {"each": "$.parts[*]", "name": "$.name", "up": {"$.x": 1}}}
        )
    assert (list(result.details.components), "hunter2" in result.message) == (["***"], False)


async def test_json_size_limit(tmp_path: Path) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=b"[" + b"[]," * 400_000 + b"1]")

    async with peers.web_server(answer) as port:
        http = {"url": f"http://127.0.0.1:{port}", "expect": {"json": {"$..x": 1}}}
        result = await probed(tmp_path, "http", http)
    assert (result.reason, "longer than 1048576 bytes, the limit for JSON" in result.message) == ("json", True), (
        result.message
    )


async def test_unencodable_component_names(tmp_path: Path) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(
            text='{"parts": [{"name": "\\ud800\\u0000\\n\\"", "up": true}, {"name": "b", "up": false}]}'
        )

    async with peers.web_server(answer) as port:
        components = {"each": "$.parts[*]", "name": "$.name", "up": {"$.up": True}}
        result = await probed(tmp_path, "status", {"url": f"http://127.0.0.1:{port}/", "components": components})
    written = {"services": {"it": {"probe": {"http": {"url": "http://h/"}}}}}
    service = (await asyncio.to_thread(inventory_of, tmp_path / "c", written)).inventory.services["it"]
    page = MetricsPage(FAMILIES)
    page.put("it", ServiceSeries(service).render(ServiceState(), result, {}))
    text = b"".join(page.chunks()).decode()
    assert "service_component_up" in {family.name for family in text_string_to_metric_families(text)}
    assert json.loads(json.dumps(result.message)).encode()


MODULE = """
import asyncio, os, signal, sys, threading, time

def well(context):
    print("looking at", context.service)
    assert (context.service, context.host, context.timeout) == ("it", "h", 30.0)
    assert context.options == {"at": [1, "a"]}

async def well_too(context):
    await asyncio.sleep(0)
    return True

def lingering(context):
    threading.Thread(target=time.sleep, args=(60,)).start()

def told(context): return "the queue is full"
def false(context): return False
def failed(context): context.fail("too slow", "latency")
def strange(context): context.fail("hm", "no such reason")
def broken(context): raise KeyError("s3cretkey")
def leaving(context): sys.exit(3)
def dying(context): os.kill(os.getpid(), signal.SIGKILL)
def wrong(context): context.fail(42, None)
def half(context): return "\\ud800 half"
def noisy(context): print("x" * 10_000_000)
def hanging(context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("call", "reason", "message"),
    [
        ("well", None, ""),
        ("well_too", None, ""),
        ("lingering", None, ""),
        ("noisy", None, ""),
        ("told", "state", "the queue is full"),
        ("false", "state", "checks.mine:false returned False"),
        ("failed", "latency", "too slow"),
        ("strange", "error", "hm"),
        ("wrong", "error", "42"),
        ("half", "state", "? half"),
        ("broken", "error", "checks.mine:broken raised KeyError"),
        ("leaving", "error", "checks.mine:leaving raised SystemExit: 3"),
        ("dying", "error", "signal 9 ended"),
        ("missing", "error", "AttributeError"),
        ("hanging", "timeout", "no answer within 2 s"),
    ],
)
async def test_python_functions(tmp_path: Path, call: str, reason: str | None, message: str) -> None:
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "mine.py").write_text(MODULE)
    result = await probed(
        tmp_path, "python", {"call": f"checks.mine:{call}", "options": {"at": [1, "a"]}}, patience(reason, "2s")
    )
    assert (result.reason, message in result.message) == (reason, True), result.message
    assert result.duration < 30
    assert ("traceback" in result.details.evidence) == (call in ("broken", "leaving", "missing"))
    if call == "well":
        assert "looking at it" in result.details.evidence["printed"]


@pytest.mark.parametrize(
    ("expect", "reason", "message"),
    [
        ({"$.a": 1}, None, ""),
        ({"$.a": 1.0}, None, ""),
        ({"$.a": True}, "json", "$.a is 1, expected true"),
        ({"$.a": "1"}, "json", '$.a is 1, expected "1"'),
        ({"$.t": True, "$.n": None, "$.l": [1, "b"]}, None, ""),
        ({"$.t": 1}, "json", "$.t is true, expected 1"),
        ({"$.l": [1, 2]}, "json", '$.l is [1, "b"], expected [1, 2]'),
        ({"$.gone": 1}, "json", "$.gone selects nothing, expected 1"),
        ({"$.o[*].x": {"above": 0}}, None, ""),
        ({"$.o[*].x": {"above": 1}}, "json", "$.o[*].x is 1, expected above 1"),
        ({"$.s": {"matches": "^he"}}, None, ""),
        ({"$.a": {"matches": "1"}}, "json", "expected a string that matches '1'"),
        ({"$.s": {"below": 3}}, "json", "expected below 3"),
        ({"$.o[?@.x > 1].y": "b"}, None, ""),
        ({"$['o'][0]['x']": 1, "$..y": {"matches": "^[ab]$"}}, None, ""),
    ],
)
async def test_expectations_of_json(tmp_path: Path, expect: Any, reason: str | None, message: str) -> None:
    page = {"a": 1, "t": True, "n": None, "s": "hello", "l": [1, "b"], "o": [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]}

    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(page)

    async with peers.web_server(answer) as port:
        options = {"url": f"http://127.0.0.1:{port}/", "expect": {"json": expect}}
        result = await probed(tmp_path, "http", options)
    assert (result.reason, message in result.message) == (reason, True), result.message


@pytest.mark.parametrize("body", ["<html>", "", "{", "NaN", "[" * 100_000, '{"a": 1} x'])
async def test_invalid_json(tmp_path: Path, body: str) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=body)

    async with peers.web_server(answer) as port:
        result = await probed(tmp_path, "http", {"url": f"http://127.0.0.1:{port}/", "expect": {"json": {"$": 1}}})
    assert result.reason == "json", result.message
