"""The gateway between real clients and a stand-in for a model API."""

import asyncio
import gzip
import json
import math
import signal
import time
from email.utils import formatdate

import httpx
import pytest

from tests.integration.model_api import (
    ADMIN,
    EVENT_STREAM,
    KEY,
    NIM_429,
    Gateway,
    ModelApi,
    Received,
    Respond,
    chunk,
    completion,
    endless,
    whole,
)
from tests.support import eventually

EVENTS = [b'data: {"n": 1}\n\n', b": ping\r\n\r\n", b"data: \xe4\xbd\xa0\n\ndata: x\n\n", b"data: [DONE]\n\n"]
JSON = "Content-Type: application/json"


async def test_requests_and_responses_are_passed_on_as_they_are(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    body = b'{ "model":"m",  "messages": [ {"content": "\\ud83d secret prompt"} ], "x": 1e400 }'
    api.respond = whole(
        b"\x00\xff answer",
        "201 Made",
        "X-Own: a",
        "X-Own: b",
        "Content-Encoding: x-own",
        "Connection: X-Hop",
        "X-Hop: 1",
        "Set-Cookie: a=b",
    )
    response = await gateway.client.post(
        "/v1/chat/completions?a=%2Fb&c", content=body,
        headers={
            "Authorization": "Bearer own-key", "api-key": "own-key", "Cookie": "a=b", "X-Priority": "high",
            "X-Custom": "kept", "Connection": "X-Hop", "X-Hop": "dropped", "TE": "trailers",
        },
    )  # fmt: skip
    (request,) = api.received
    assert (request.method, request.target) == ("POST", "/v1/chat/completions?a=%2Fb&c")
    assert request.body == body
    assert request.header("Authorization") == [f"Bearer {KEY}"]
    assert request.header("Host") == [f"127.0.0.1:{api.port}"]
    assert request.header("X-Custom") == ["kept"]
    for name in ("api-key", "Cookie", "X-Priority", "X-Hop", "TE", "Connection"):
        assert request.header(name) == [], name
    assert (response.status_code, response.reason_phrase) == (201, "Made")
    assert response.headers.get_list("X-Own") == ["a", "b"]
    assert {"x-hop", "set-cookie", "connection"} & set(response.headers) == set()
    assert response.headers["Content-Length"] == "9"


@pytest.mark.parametrize(
    ("method", "body"), [("GET", b""), ("DELETE", b""), ("PUT", b"x"), ("PATCH", b"{}"), ("POST", b"")]
)
async def test_all_methods_and_paths(gateway: Gateway, api: ModelApi, method: str, body: bytes) -> None:
    gateway.configure()
    await gateway.start()
    response = await gateway.client.request(method, "/v1/files/a%2fb", content=body)
    assert response.json()["object"] == "chat.completion"
    (request,) = api.received
    assert (request.method, request.target, request.body) == (method, "/v1/files/a%2fb", body)
    assert request.header("Content-Length") == ([] if method == "GET" else [str(len(body))])


async def test_events_arrive_one_by_one(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    arrived = asyncio.Event()

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENT_STREAM)
        for event in EVENTS:
            await asyncio.wait_for(arrived.wait(), 10)  # what was sent before has reached the client
            arrived.clear()
            writer.write(chunk(event))
        writer.write(b"0\r\n\r\n")

    api.respond = respond
    got = b""
    async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m", "stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        arrived.set()  # the headers alone
        async for part in response.aiter_raw():
            got += part
            arrived.set()
    assert got == b"".join(EVENTS)
    assert (await gateway.logged("request"))[-1]["outcome"] == "ok"


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        ("401 Unauthorized", b'{"error": {"message": "wrong key"}}', "client_error"),
        ("500 Internal Server Error", b"oops", "upstream_error"),
        ("502 Bad Gateway", b"<html>bad gateway</html>", "upstream_error"),
        ("429 Too Many Requests", NIM_429, "limited"),
        ("429 Too Many Requests", b'{"error": {"code": "insufficient_quota"}}', "no_credit"),
        ("307 Temporary Redirect", b"elsewhere", "ok"),
    ],
)  # fmt: skip
async def test_errors_keep_their_status_and_body(
    gateway: Gateway, api: ModelApi, status: str, body: bytes, outcome: str
) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(body, status, "Location: http://127.0.0.1:1/")
    response = await gateway.chat()
    assert (response.status_code, response.content) == (int(status[:3]), body)
    assert len(api.received) == 1  # no hidden retries
    series = f'gateway_requests_total{{client="anonymous",outcome="{outcome}",priority="normal",provider="api"}}'
    assert (await gateway.metrics())[series] == 1
    rate = (await gateway.status())["rate_per_minute"]
    assert rate == (750 if outcome == "limited" else 1000)


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nX-A: b\r\nContent-Length: 100\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nX-A: b\r\n\r\n"),
    ],
)
async def test_responses_without_a_body(gateway: Gateway, api: ModelApi, method: str, head: bytes) -> None:
    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head)

    api.respond = respond
    gateway.configure()
    await gateway.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    for _ in range(2):  # the second one on the same connection: nothing was sent after the headers
        writer.write(f"{method} /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        got = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        assert got.startswith(head.removesuffix(b"\r\n"))
        assert b"Transfer-Encoding" not in got
    writer.close()
    assert [each["outcome"] for each in await gateway.logged("request", 2)] == ["ok", "ok"]


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        EVENT_STREAM + chunk(EVENTS[0]) + b'20\r\ndata: {"half',
        EVENT_STREAM + chunk(EVENTS[0]),
    ],
)  # fmt: skip
async def test_a_response_that_ends_too_early_does_not_look_complete(
    gateway: Gateway, api: ModelApi, sent: bytes
) -> None:
    gateway.configure()
    await gateway.start()

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.close()

    api.respond = respond
    got = bytearray()

    async def read() -> None:
        async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m"}) as response:
            async for part in response.aiter_raw():
                got.extend(part)

    with pytest.raises(httpx.RemoteProtocolError):
        await read()
    assert got.startswith(b"short" if b"short" in sent else EVENTS[0])
    assert (await gateway.logged("request"))[-1]["outcome"] == "broken"
    assert (await gateway.metrics())['gateway_upstream_errors_total{provider="api",status="connection"}'] == 1
    assert (await gateway.status())["in_flight"] == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "the upstream closed the connection"),
        (b"nonsense\r\n\r\n", "the upstream's response is not valid"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab",
            "the upstream's response is not valid",
        ),
    ],
)
async def test_no_response_is_a_502(gateway: Gateway, api: ModelApi, answer: bytes, message: str) -> None:
    gateway.configure()
    await gateway.start()

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    api.respond = respond
    response = await gateway.chat()
    assert response.status_code == 502
    assert response.json()["error"]["message"].startswith(message)
    assert response.json()["error"]["type"] == "server_error"


async def test_an_upstream_that_is_away_and_one_that_is_silent(gateway: Gateway, api: ModelApi) -> None:
    async def hang(_request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    api.respond = hang
    away = gateway.upstream(url="http://127.0.0.1:1/v1")
    gateway.configure({"api": gateway.upstream(timeout="300ms"), "away": away})
    await gateway.start()
    assert (await gateway.chat()).json()["error"]["message"] == "the upstream was silent for too long"
    failed = await gateway.chat(X_Upstream="away")
    assert failed.json()["error"]["message"] == "cannot connect to the upstream: Connection refused"
    status = await gateway.status("away")
    assert status["requests_in_window"] == 0  # it has received nothing


async def test_a_client_that_leaves_ends_the_request_upstream(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = endless
    async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m"}) as response:
        parts = response.aiter_raw()
        await anext(parts)
    left_at = time.monotonic()
    await asyncio.wait_for(api.received[0].closed.wait(), 5)
    assert (api.received[0].ended_at or 0) - left_at < 1
    assert (await gateway.logged("request"))[-1]["outcome"] == "cancelled"


async def test_a_hundred_streams_broken_off(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = endless

    async def break_off() -> None:
        async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m"}) as response:
            parts = response.aiter_raw()
            await anext(parts)

    await asyncio.gather(*(break_off() for _ in range(100)))
    left_at = time.monotonic()

    async def look() -> bool:
        return int((await gateway.status())["in_flight"]) == 0

    await eventually(look, 5)
    assert time.monotonic() - left_at < 1
    assert len(api.received) == 100


async def test_a_client_that_leaves_while_it_waits_causes_no_request(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(concurrency=1)})
    await gateway.start()
    api.respond = endless
    async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m"}) as response:
        parts = response.aiter_raw()
        await anext(parts)
        waits = asyncio.create_task(gateway.chat())

        async def is_queued(count: int) -> bool:
            return int((await gateway.status())["queue"]["normal"]) == count

        await eventually(lambda: is_queued(1), 10)
        waits.cancel()
        await eventually(lambda: is_queued(0), 1)
    api.respond = whole(completion())
    assert (await gateway.chat()).is_success
    assert len(api.received) == 2


async def test_its_own_429(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(rate="1/min")}, queue={"low_timeout": "200ms"})
    await gateway.start()
    assert (await gateway.chat()).is_success
    response = await gateway.chat(X_Priority="LOW")
    assert response.status_code == 429
    assert 1 <= int(response.headers["Retry-After"]) <= 120
    assert int(response.headers["Retry-After-Ms"]) > 0
    error = response.json()["error"]
    assert {**error, "message": ""} == {"message": "", "type": "rate_limit_error", "param": None, "code": "timeout"}
    assert len(api.received) == 1


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        ("429 Too Many Requests", ["Retry-After: 30"]),
        ("429 Too Many Requests", [f"Retry-After: {formatdate(time.time() + 3600, usegmt=True)}"]),
        ("429 Too Many Requests", ["Retry-After-Ms: 30000"]),
        ("429 Too Many Requests", ["X-RateLimit-Remaining-Requests: 0", "X-RateLimit-Reset-Requests: 1m30s"]),
        ("503 Service Unavailable", ["Retry-After: 30"]),
        ("200 OK", ["X-RateLimit-Remaining-Requests: 0", "X-RateLimit-Reset-Requests: 30s"]),
    ],
)
async def test_pauses_are_kept(gateway: Gateway, api: ModelApi, status: str, headers: list[str]) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(NIM_429, status, *headers)
    assert (await gateway.chat()).status_code == int(status[:3])
    low = await gateway.chat(X_Priority="low")
    assert (low.status_code, low.json()["error"]["code"]) == (429, "paused")
    assert 25 <= int(low.headers["Retry-After"]) <= 3600
    assert 25 <= (await gateway.status())["paused_seconds"] <= 3600
    assert 25 <= (await gateway.metrics())['gateway_pause_seconds{provider="api"}'] <= 3600
    assert len(api.received) == 1
    reset = await gateway.client.post("/api/v1/upstreams/api/reset", headers=ADMIN)
    assert reset.json()["paused_seconds"] == 0
    await gateway.chat(X_Priority="low")
    assert len(api.received) == 2


async def test_bodies_that_are_no_json(gateway: Gateway, api: ModelApi) -> None:
    other = gateway.upstream(url=f"{api.url}/other", match=["m"])
    gateway.configure({"api": gateway.upstream(), "other": other})
    await gateway.start()
    zipped = gzip.compress(b'{"model": "m"}')
    bodies: list[tuple[bytes, dict[str, str]]] = [
        (b'{"model": "m"', {}), (b'["m"]', {}), (b'{"model": 7}', {}), (b"\xff", {}), (b'{"a":' * 100_000, {}),
        (zipped, {"Content_Encoding": "gzip"}),
    ]  # fmt: skip
    for body, headers in bodies:
        assert (await gateway.chat(body, X_Priority="whatever", **headers)).is_success
        assert api.received[-1].body == body
        assert api.received[-1].target == "/v1/chat/completions"
    assert api.received[-1].header("Content-Encoding") == ["gzip"]
    assert {each["priority"] for each in await gateway.logged("request", len(bodies))} == {"normal"}
    assert (await gateway.chat(b'{"model": "m"}')).is_success
    assert api.received[-1].target == "/v1/other/chat/completions"


async def test_large_bodies(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure(max_body="60MiB")
    await gateway.start()
    body = json.dumps({"model": "m", "image": "x" * 50_000_000}).encode()
    assert (await gateway.chat(body)).is_success
    assert api.received[-1].body == body
    response = await gateway.chat(b"x" * (61 * 2**20))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert (await gateway.chat()).is_success
    assert len(api.received) == 2


async def test_a_thousand_models_make_no_series(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(rate="100000/min")})
    await gateway.start()
    await gateway.chat()
    before = set(await gateway.metrics())
    for number in range(1000):
        assert (await gateway.chat({"model": f"model-{number}"})).is_success
    assert set(await gateway.metrics()) == before


async def test_models_lead_to_upstreams(gateway: Gateway, api: ModelApi) -> None:
    small = gateway.upstream(url=f"{api.url}/small", match=["qwen/*"], aliases={"fast": "qwen/small"})
    gateway.configure({"api": gateway.upstream(match=["nvidia/*"]), "small": small}, default=None)
    await gateway.start()
    for model, path in (("nvidia/x", "/v1/e"), ("qwen/y", "/v1/small/e"), ("fast", "/v1/small/e")):
        assert (await gateway.chat({"model": model, "n": 1}, "/v1/e")).is_success
        assert api.received[-1].target == path
    assert json.loads(api.received[-1].body) == {"model": "qwen/small", "n": 1}
    assert (await gateway.chat({"model": "x"}, X_Upstream="small")).is_success
    assert api.received[-1].header("X-Upstream") == []
    for body, headers, code in (
        ({"model": "unknown"}, {}, "model_not_found"), ({"n": 1}, {}, "model_not_found"),
        ({"model": "x"}, {"X_Upstream": "none"}, "upstream_not_found"),
    ):  # fmt: skip
        response = await gateway.chat(body, **headers)
        assert (response.status_code, response.json()["error"]["code"]) == (404, code)
    assert len(api.received) == 4


async def test_another_upstream_replaces_one_that_fails(gateway: Gateway, api: ModelApi) -> None:
    spare = gateway.upstream(url=f"{api.url}/spare", aliases={"m": "other"})
    first = gateway.upstream(match=["*"], fallback=["spare"])
    gateway.configure({"api": first, "spare": spare})
    await gateway.start()

    async def respond(request: Received, writer: asyncio.StreamWriter) -> None:
        is_spare = request.target.startswith("/v1/spare/")
        answer = whole(b"spare") if is_spare else whole(b"", "503 Away", "Retry-After: 40")
        await answer(request, writer)

    api.respond = respond
    response = await gateway.chat({"model": "x"})
    assert (response.status_code, response.content) == (200, b"spare")
    assert [each.target for each in api.received] == ["/v1/chat/completions", "/v1/spare/chat/completions"]
    assert (await gateway.chat({"model": "x"})).content == b"spare"  # at once, while the first one pauses
    assert len(api.received) == 3


async def test_a_client_that_leaves_while_it_waits_for_another_upstream(gateway: Gateway, api: ModelApi) -> None:
    spare = gateway.upstream(url=f"{api.url}/spare", concurrency=1)
    gateway.configure({"api": gateway.upstream(fallback=["spare"]), "spare": spare})
    await gateway.start()

    async def respond(request: Received, writer: asyncio.StreamWriter) -> None:
        await (endless if request.target.startswith("/v1/spare/") else whole(b"", "503 Away"))(request, writer)

    api.respond = respond
    async with gateway.client.stream("POST", "/v1/x", json={"model": "m"}, headers={"X-Upstream": "spare"}) as stream:
        parts = stream.aiter_raw()
        await anext(parts)
        waits = asyncio.create_task(gateway.chat())

        async def is_queued() -> bool:
            return int((await gateway.status("spare"))["queue"]["normal"]) == 1

        await eventually(is_queued, 20)
        waits.cancel()
        assert (await gateway.logged("request"))[0]["outcome"] == "cancelled"


async def test_the_breaker(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(b"", "500 No")
    assert [(await gateway.chat()).status_code for _ in range(5)] == [500] * 5
    assert (await gateway.client.get("/-/ready")).status_code == 503
    response = await gateway.chat(X_Priority="low")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert int(response.headers["Retry-After"]) <= 30
    assert len(api.received) == 5
    assert (await gateway.metrics())['gateway_breaker_open{provider="api"}'] == 1


async def test_the_models_of_all_upstreams(gateway: Gateway, api: ModelApi) -> None:
    other = gateway.upstream(url=f"{api.url}/other", match=["qwen/*"])
    first = gateway.upstream(match=["nvidia/*"], aliases={"fast": "nvidia/x"})
    gateway.configure({"api": first, "other": other}, default=None)
    await gateway.start()

    async def respond(request: Received, writer: asyncio.StreamWriter) -> None:
        found = ["qwen/a", "nvidia/y"] if "other" in request.target else ["nvidia/x", "qwen/b"]
        await whole(json.dumps({"data": [{"id": name} for name in found]}).encode())(request, writer)

    api.respond = respond
    for _ in range(2):
        models = (await gateway.client.get("/v1/models")).json()
        assert [each["id"] for each in models["data"]] == ["fast", "nvidia/x", "qwen/a"]
    assert sorted(each.target for each in api.received) == ["/v1/models", "/v1/other/models"]
    assert (await gateway.client.get("/v1/models/qwen/a")).is_success
    assert api.received[-1].target == "/v1/other/models/qwen/a"


async def test_a_list_of_models_that_arrives_in_parts(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    names = [f"nvidia/model-{number}" for number in range(1000)]
    whole_list = json.dumps({"data": [{"id": name} for name in names]}).encode()

    async def drip(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(whole_list))
        for start in range(0, len(whole_list), 10_000):
            writer.write(whole_list[start : start + 10_000])
            await writer.drain()
            await asyncio.sleep(0.02)

    api.respond = drip
    models = (await gateway.client.get("/v1/models")).json()
    assert [each["id"] for each in models["data"]] == names


async def test_a_long_list_of_models_does_not_delay_others(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(aliases={"fast": "m0"})})
    await gateway.start()
    api.respond = whole(json.dumps({"data": [{"id": f"m{number}"} for number in range(140_000)]}).encode())
    found = [each["id"] for each in (await gateway.client.get("/v1/models")).json()["data"]]
    assert found == ["fast", *(f"m{number}" for number in range(10_000))]
    readings = [asyncio.create_task(gateway.client.get("/v1/models")) for _ in range(100)]
    delays = []
    while not all(each.done() for each in readings):
        began = time.monotonic()
        assert await gateway.is_healthy()
        delays.append(time.monotonic() - began)
    assert sorted(delays)[len(delays) // 2] < 0.4  # less than one list takes that is built anew
    assert len({each.result().content for each in readings}) == 1
    assert len(api.received) == 1
    gateway.configure({"api": gateway.upstream(aliases={"slow": "m0"})})
    assert (await gateway.client.post("/-/reload", headers=ADMIN)).is_success
    response = await gateway.client.get("/v1/models")
    assert response.json() == {
        "object": "list",
        "data": [{"id": "slow", "object": "model", "created": 0, "owned_by": "api"}]
        + [{"id": name} for name in found[1:]],
    }
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"data": ' + b"[" * 100_000, b'{"data": 1}', b"\xff"])
async def test_what_is_no_list_of_models(gateway: Gateway, api: ModelApi, body: bytes) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(body)
    for _ in range(2):
        response = await gateway.client.get("/v1/models")
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_failed")
    assert len(api.received) == 1


async def test_a_model_that_is_no_json_is_left_out(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(b'{"data": [{"id": "bad", "a": NaN}, {"id": "worse", "a": [1e999]}, {"id": "good", "a": 1.5}]}')
    body = (await gateway.client.get("/v1/models")).content
    assert b"NaN" not in body
    assert [each["id"] for each in json.loads(body)["data"]] == ["good"]


@pytest.mark.parametrize("levels", [880, 930, 980])
async def test_a_model_with_many_levels(gateway: Gateway, api: ModelApi, levels: int) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(b'{"data": [{"id": "m", "a": ' + b"[" * levels + b"]" * levels + b"}]}")
    assert (await gateway.client.get("/v1/models")).status_code in (200, 502)


async def test_an_upstream_without_a_list_of_models_is_not_asked_again_at_once(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    api.respond = whole(b"", "500 No")
    for _ in range(4):
        await gateway.chat()
    for _ in range(3):
        assert (await gateway.client.get("/v1/models")).status_code == 502
    assert [each.target for each in api.received].count("/v1/models") == 1
    assert (await gateway.status())["failing"] is True  # the fifth failure in a row


async def test_the_models_are_read_when_the_rate_permits(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(rate="1/min")}, queue={"max_wait": "1s"})
    await gateway.start()
    assert (await gateway.chat()).is_success
    refused = await asyncio.gather(*(gateway.client.get("/v1/models") for _ in range(3)))
    assert [(each.status_code, each.json()["error"]["code"]) for each in refused] == [(429, "timeout")] * 3
    assert [each["error"] for each in await gateway.logged("models_not_read")] == ["timeout"]  # one reading for all
    assert [each.target for each in api.received] == ["/v1/chat/completions"]


async def test_what_may_be_sent_now(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(burst=2)}, queue={"max_wait": "1s"})
    await gateway.start()
    assert (await gateway.status())["requests_available"] == 2
    gateway.configure({"api": gateway.upstream(concurrency=1)})
    assert (await gateway.client.post("/-/reload", headers=ADMIN)).is_success
    assert (await gateway.status())["requests_available"] == 1
    released = asyncio.Event()

    async def hold(request: Received, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        await whole()(request, writer)

    api.respond = hold
    async with asyncio.TaskGroup() as group:
        group.create_task(gateway.chat())

        async def is_sent() -> bool:
            return len(api.received) == 1

        await eventually(is_sent)
        assert (await gateway.status())["requests_available"] == 0
        assert (await gateway.client.get("/health/ready")).json()["requests_available"] is False
        released.set()


async def test_the_log_says_how_long_a_refused_request_has_waited(gateway: Gateway) -> None:
    gateway.configure({"api": gateway.upstream(rate="1/min")}, queue={"max_wait": "1s"})
    await gateway.start()
    assert (await gateway.chat()).is_success
    assert (await gateway.chat()).json()["error"]["code"] == "timeout"
    first, second = await gateway.logged("request", 2)
    assert first["waited"] < 1 <= second["waited"] <= second["seconds"]


async def test_clients_show_their_tokens(gateway: Gateway, api: ModelApi) -> None:
    clients = {
        "coder": {"token": "t-coder", "priority": "high", "share": 2, "budget": {"requests": 2}},
        "tester": {"token": "t-tester", "budget": {"tokens": 10}},
    }
    gateway.configure(clients=clients)
    await gateway.start()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {KEY}"}, ADMIN):
        response = await gateway.chat(**headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert api.received == []
    for _ in range(2):
        assert (await gateway.chat(Authorization="Bearer t-coder")).is_success
    response = await gateway.chat(Authorization="Bearer t-coder")
    assert (response.status_code, response.json()["error"]["code"]) == (429, "budget_exceeded")
    assert response.headers["X-Should-Retry"] == "false"
    assert (await gateway.chat(api_key="t-tester")).is_success  # 12 tokens
    assert (await gateway.chat(api_key="t-tester")).status_code == 429
    assert [each["priority"] for each in await gateway.logged("request", 3)] == ["high", "high", "normal"]
    assert (await gateway.client.get("/api/v1/status", headers={"Authorization": "Bearer t-coder"})).status_code == 401
    await gateway.launcher.kill(gateway.pid, signal.SIGTERM)
    await gateway.start()
    assert (await gateway.chat(api_key="t-tester")).status_code == 429  # still the same day


async def test_a_request_that_is_not_sent_uses_no_budget(gateway: Gateway, api: ModelApi) -> None:
    clients = {"coder": {"token": "t-coder", "budget": {"requests": 2}}}
    away = gateway.upstream(url="http://127.0.0.1:1/v1")
    limited = gateway.upstream(rate="1/min", fallback=["away"])
    gateway.configure({"api": limited, "away": away}, clients=clients, queue={"low_timeout": "100ms"})
    await gateway.start()
    headers = {"Authorization": "Bearer t-coder", "X_Priority": "low"}
    assert (await gateway.chat(**headers)).is_success
    for _ in range(3):
        response = await gateway.chat(**headers)
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_failed")
    shown = (await gateway.client.get("/api/v1/status", headers=ADMIN)).json()["clients"]["coder"]
    assert shown["today"]["requests"] == 1
    assert len(api.received) == 1


async def test_pages_of_other_sites_cannot_use_the_key(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    for headers in ({"Origin": "http://evil.test"}, {"Host": "evil.test"}, {"Sec_Fetch_Site": "cross-site"}):
        assert (await gateway.chat(**headers)).status_code == 403
    assert api.received == []


SMUGGLED = [
    b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    b"POST /v1/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    b"GET /v1/x\r\nX: 1 HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /v1/../secret HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /v1/%2e%2E/secret HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /v1/x/..%2fsecret HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b\r\n\tfolded: c\r\n\r\n",
]


@pytest.mark.parametrize("sent", SMUGGLED)
async def test_ambiguous_requests_are_not_passed_on(gateway: Gateway, api: ModelApi, sent: bytes) -> None:
    gateway.configure()
    await gateway.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(sent)
    status = await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    assert status.split()[1] in (b"400", b"404"), status
    assert api.received == []


async def test_the_connection_header_names_what_is_not_passed_on(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(
        b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close, authorization, x-secret\r\n"
        b"X-Secret: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n"
    )
    assert (await asyncio.wait_for(reader.readline(), 20)).startswith(b"HTTP/1.1 200")
    writer.close()
    (request,) = api.received
    assert request.header("Authorization") == [f"Bearer {KEY}"]
    assert request.header("X-Secret") == request.header("X-Trailer") == request.header("Transfer-Encoding") == []
    assert (request.body, request.header("Content-Length")) == (b"{}", ["2"])


async def test_limits_are_changed_by_admins_and_audited(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(concurrency=1)})
    await gateway.start()
    url = "/api/v1/limits"
    assert (await gateway.client.put(url, json={})).status_code == 401
    wrong = await gateway.client.put(url, json={"upstreams": {"api": {"rate": "fast"}}}, headers=ADMIN)
    assert "is not a rate" in wrong.json()["error"]["message"]
    assert (await gateway.client.put(url, json={"upstreams": {"x": {}}}, headers=ADMIN)).status_code == 404
    for limits in (
        {"queue_size": "200"},
        {"upstreams": {"api": {"burst": True}}},
        {"upstreams": {"api": {"concurrency": 2.5}}},
    ):
        refused = await gateway.client.put(url, json=limits, headers=ADMIN)
        assert (refused.status_code, "must be a whole number" in refused.text) == (400, True), limits
    api.respond = endless
    async with gateway.client.stream("POST", "/v1/chat/completions", json={"model": "m"}) as response:
        parts = response.aiter_raw()
        await anext(parts)
        waiting = [asyncio.create_task(gateway.chat()) for _ in range(3)]

        async def are_queued() -> bool:
            return int((await gateway.status())["queue"]["normal"]) == 3

        await eventually(are_queued, 20)
        refused = await gateway.client.put(url, json={"queue_size": 2}, headers=ADMIN)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "queue_in_use")
        assert (await gateway.status())["queue_size"] == 500
        api.respond = whole(completion())
        changes = {
            "queue_size": 3,
            "when_full": "drop-lowest",
            "upstreams": {"api": {"rate": "30/min", "concurrency": 5}},
        }
        changed = await gateway.client.put(url, json=changes, headers={**ADMIN, "X-Defib-User": "ann"})
        shown = changed.json()["upstreams"]["api"]
        assert (shown["queue_size"], shown["when_full"], shown["base_rate_per_minute"]) == (3, "drop-lowest", 30)
        assert [each.status_code for each in await asyncio.gather(*waiting)] == [200] * 3
    (entry,) = await gateway.logged("audit")
    assert (entry["operation"], entry["name"]) == ("change_limits", "local (ann, unverified)")
    assert '"30/min"' in entry["detail"] or "30" in entry["detail"]


async def test_logs_have_no_prompts_and_no_keys(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure(clients={"coder": {"token": "t-coder-secret"}})
    await gateway.start()
    body = {"model": "m", "messages": [{"content": "my secret prompt"}]}
    assert (await gateway.chat(body, Authorization="Bearer t-coder-secret")).is_success
    api.respond = whole(b"my secret answer", "500 No")
    await gateway.chat(body, Authorization="Bearer t-coder-secret")
    await gateway.chat(body, Authorization="Bearer t-wrong-secret")
    text = gateway.log.read_text() + (await gateway.client.get("/metrics")).text
    assert "secret" not in text
    assert KEY not in text
    first = (await gateway.logged("request"))[0]
    assert {"model", "client", "priority", "waited", "tokens", "outcome"} <= first.keys()
    assert first["tokens"] == 12


async def test_usage_of_streams_and_compressed_responses(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(tokens="1000/min")})
    await gateway.start()
    api.respond = whole(gzip.compress(completion(prompt=100, completion=50)), "200 OK", JSON, "Content-Encoding: gzip")
    assert (await gateway.chat()).json()["object"] == "chat.completion"
    assert (await gateway.status())["tokens_in_window"] == 150

    async def stream(_request: Received, writer: asyncio.StreamWriter) -> None:
        last = json.dumps({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 30}}).encode()
        writer.write(
            EVENT_STREAM + chunk(b"data: " + last[:30]) + chunk(last[30:] + b"\n\ndata: [DONE]\n\n") + b"0\r\n\r\n"
        )

    api.respond = stream
    assert (await gateway.chat()).is_success
    assert (await gateway.status())["tokens_in_window"] == 200
    api.respond = whole(b"", "500 No")
    await gateway.chat()
    assert (await gateway.status())["tokens_in_window"] == 200


async def used_tokens(gateway: Gateway) -> int:
    """Return the tokens of all clients, after the requests in progress."""

    async def is_finished() -> bool:
        return bool((await gateway.status())["in_flight"] == 0)

    await eventually(is_finished)
    shown = (await gateway.client.get("/api/v1/status", headers=ADMIN)).json()["clients"]["anonymous"]
    return int(shown["today"]["tokens"])


PLAIN = b'{"model": "m"}'
ZIPPED = gzip.compress(PLAIN)
NO_USAGE = whole(b"{}", "200 OK", JSON)
COUNTED = whole(completion(), "200 OK", JSON)  # 12 tokens


async def stream_without_usage(_request: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(EVENT_STREAM + chunk(EVENTS[0]) + b"0\r\n\r\n")


async def test_tokens_are_estimated_where_the_response_does_not_say(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    expected = 0
    zipped = {"Content-Encoding": "gzip"}
    estimated: list[tuple[bytes, dict[str, str], Respond]] = [
        (PLAIN, {}, stream_without_usage), (PLAIN, {}, NO_USAGE), (PLAIN, {}, whole(b"sound")),
        (ZIPPED, zipped, stream_without_usage), (ZIPPED, zipped, NO_USAGE), (b"[1]", {}, stream_without_usage),
        (b"[1]", {}, whole(b"unreadable", "200 OK", JSON, "Content-Encoding: x-other")),
    ]  # fmt: skip
    for body, headers, api.respond in estimated:
        assert (await gateway.client.post("/v1/x", content=body, headers=headers)).is_success
        expected += math.ceil(256 + len(body) / 4)
        assert await used_tokens(gateway) == expected, (body, api.respond)
    api.respond = COUNTED
    counted: list[tuple[bytes, dict[str, str]]] = [(ZIPPED, zipped), (b"[1]", {}), (b"{}", {}), (PLAIN, {})]
    for body, headers in counted:
        assert (await gateway.client.post("/v1/x", content=body, headers=headers)).is_success
        expected += 12
        assert await used_tokens(gateway) == expected, body
    without: list[tuple[str, bytes, Respond]] = [
        ("POST", b"--a\r\n a file", NO_USAGE), ("POST", b"{}", NO_USAGE), ("POST", b"{}", whole(b"text")),
        ("GET", b"", COUNTED), ("GET", b"", stream_without_usage), ("DELETE", b"", NO_USAGE),
        ("POST", PLAIN, whole(completion(), "404 No", JSON)), ("POST", PLAIN, whole(b"{}", "500 No", JSON)),
    ]  # fmt: skip
    for method, body, api.respond in without:
        await gateway.client.request(method, "/v1/files", content=body)
        assert await used_tokens(gateway) == expected, (method, body)
    metrics = await gateway.metrics()
    assert metrics['gateway_tokens_total{client="anonymous",provider="api"}'] == expected


async def test_tokens_of_clients_that_leave_are_estimated(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    expected = 0
    api.respond = endless
    for body in (PLAIN, b"{}"):
        async with gateway.client.stream("POST", "/v1/x", content=body) as response:
            await anext(response.aiter_bytes())
        expected += math.ceil(256 + len(body) / 4)
        assert await used_tokens(gateway) == expected

    async def be_silent(request: Received, _writer: asyncio.StreamWriter) -> None:
        await request.closed.wait()

    api.respond = be_silent
    for body, tokens in ((PLAIN, math.ceil(256 + len(PLAIN) / 4)), (b"{}", 0)):
        api.received.clear()
        leaving = asyncio.create_task(gateway.client.post("/v1/x", content=body))
        await eventually(lambda: asyncio.sleep(0, bool(api.received)))
        leaving.cancel()
        expected += tokens
        await api.received[-1].closed.wait()
        assert await used_tokens(gateway) == expected


@pytest.mark.long
async def test_the_rate_is_kept_and_used(gateway: Gateway, api: ModelApi) -> None:
    api.rate = 40
    gateway.configure({"api": gateway.upstream(rate="40/min")}, queue={"max_wait": "200s"})
    await gateway.start()
    started = time.monotonic()

    async def ask_for_ever() -> None:
        while True:
            await gateway.chat()

    agents = [asyncio.create_task(ask_for_ever()) for _ in range(15)]
    await asyncio.sleep(200)
    for each in agents:
        each.cancel()
    await asyncio.gather(*agents, return_exceptions=True)
    assert api.refused == 0
    minutes = [sum(start <= each.at - started < start + 61 for each in api.received) for start in (0, 61, 122)]
    assert minutes == [40, 40, 40]
