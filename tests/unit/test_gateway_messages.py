"""What the gateway reads in requests and responses: headers, limits, tokens, budgets."""

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from fleet.inventory.gateway import Budget, ClientSettings
from gateway import answers
from gateway.bodies import read_body, read_long_body
from gateway.clients import DAY, Client, Clients, find_priority
from gateway.errors import GatewayError
from gateway.headers import request_headers, response_headers
from gateway.state import StateWriter, load
from gateway.usage import Estimator, Usage, UsageReader, tells_usage

NOW = 1_764_547_200.0  # 2025-12-01 00:00:00 UTC


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None), ({"Retry-After": "30"}, 30), ({"Retry-After": "0.5"}, 0.5), ({"Retry-After": "-1"}, None),
        ({"Retry-After": "soon"}, None), ({"Retry-After": ""}, None), ({"Retry-After": "9" * 300}, None),
        ({"Retry-After": "99999999"}, 86_400), ({"Retry-After-Ms": "1500", "Retry-After": "9"}, 1.5),
        ({"Retry-After": "Mon, 01 Dec 2025 00:01:00 GMT"}, 60), ({"Retry-After": "Sun, 30 Nov 2025 00:01:00 GMT"}, 0),
        ({"Retry-After": "Mon, 01 Dec 2025 00:01:00 -0000"}, 60),
        ({"X-RateLimit-Remaining-Requests": "0", "X-RateLimit-Reset-Requests": "12ms"}, 0.012),
        ({"X-RateLimit-Remaining-Requests": "0", "X-RateLimit-Reset-Requests": "1.5s"}, 1.5),
        ({"X-RateLimit-Remaining-Requests": "0", "X-RateLimit-Reset-Requests": "6m0s"}, 60),
        ({"X-RateLimit-Remaining-Requests": "0", "X-RateLimit-Reset-Requests": "20"}, 20),
        ({"X-RateLimit-Remaining-Requests": "0", "X-RateLimit-Reset-Requests": "later"}, None),
        ({"X-RateLimit-Remaining-Requests": "0"}, None),
        ({"X-RateLimit-Remaining-Requests": "1", "X-RateLimit-Reset-Requests": "20s"}, None),
    ],
)  # fmt: skip
def test_when_an_upstream_wants_the_next_request(headers: dict[str, str], seconds: float | None) -> None:
    assert answers.find_retry_after(CIMultiDict(headers), NOW) == seconds


@given(st.dictionaries(st.sampled_from(["Retry-After", "Retry-After-Ms", "X-RateLimit-Reset-Requests"]), st.text()))
def test_no_header_is_a_crash(headers: dict[str, str]) -> None:
    found = answers.find_retry_after(CIMultiDict({**headers, "X-RateLimit-Remaining-Requests": "0"}), NOW)
    assert found is None or 0 <= found <= answers.MAX_PAUSE


@pytest.mark.parametrize(
    ("body", "is_out"),
    [
        (b'{"error": {"code": "insufficient_quota"}}', True), (b'{"error": {"type": "insufficient_quota"}}', True),
        (b'{"error": {"message": "insufficient_quota"}}', False), (b'"insufficient_quota"', False),
        (b'{"status":429,"title":"Too Many Requests"}', False), (b"insufficient_quota", False), (b"", False),
    ],
)  # fmt: skip
def test_a_lack_of_credit(body: bytes, is_out: bool) -> None:
    assert answers.is_out_of_quota(body) is is_out


CHAT = b'{"choices": [{"text": "\\"usage\\": {\\"prompt_tokens\\": 9}"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (CHAT, Usage(3, 4)),
        (b'data: {"usage": null}\n\ndata: {"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\ndata: [DONE]\n\n', Usage(1, 2)),
        (b'{"usage": {"input_tokens": 5, "output_tokens": 6}}', Usage(5, 6)),
        (b'{"usage": {"prompt_tokens": 8, "total_tokens": 8}}', Usage(8, 0)),
        (b"x" * 100_000 + CHAT, Usage(3, 4)),
        (b'{"usage": {"prompt_tokens": "many"}}', None), (b'{"usage": {"prompt_tokens": -1}}', None),
        (b'{"usage": {"prompt', None), (b'{"usage": ', None), (b"", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["", "gzip", "deflate"])
async def test_the_usage_of_a_response(body: bytes, usage: Usage | None, encoding: str) -> None:
    sent = {"": body, "gzip": gzip.compress(body), "deflate": zlib.compress(body)}[encoding]
    for size in (1000, 7):
        reader = UsageReader(encoding)
        for start in range(0, len(sent), size):
            await reader.add(sent[start : start + size])
        assert reader.find() == usage


async def test_what_cannot_be_decoded_has_no_usage() -> None:
    for encoding in ("gzip", "br"):
        reader = UsageReader(encoding)
        await reader.add(CHAT)
        await reader.add(CHAT)
        assert reader.find() is None


async def test_a_compressed_response_needs_little_memory_and_blocks_nobody() -> None:
    reader, turns = UsageReader("gzip"), 0
    reading = asyncio.create_task(reader.add(gzip.compress(b"\0" * 50_000_000)))
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(reader._tail) < 100_000
    assert turns > 100


@pytest.mark.parametrize(
    ("method", "kind", "told"),
    [
        ("POST", "application/json; charset=utf-8", True), ("POST", "text/event-stream", True), ("POST", "", True),
        ("POST", "application/octet-stream", False), ("POST", "text/plain", False), ("GET", "application/json", False),
    ],
)  # fmt: skip
async def test_which_responses_tell_their_usage(method: str, kind: str, told: bool) -> None:
    assert tells_usage(method, kind) is told
    reader = UsageReader("", is_told=told)
    await reader.add(CHAT)
    assert reader.find() == (Usage(3, 4) if told else None)


def test_estimates_learn() -> None:
    estimator = Estimator()
    assert estimator.estimate("a", 4000, 100) == 1100
    for _ in range(100):
        estimator.learn("a", 1000, Usage(500, 20))
    assert abs(estimator.estimate("a", 2000, None) - 1020) < 2
    assert abs(estimator.estimate("a", 2000, 5) - 1005) < 1
    estimator.learn("a", 0, Usage(0, 0))


def test_estimates_learn_nothing_of_other_clients() -> None:
    estimator = Estimator()
    estimator.learn("a", 100, Usage(100_000, 100_000))
    assert estimator.estimate("a", 1000, None) > 100_000
    assert estimator.estimate("b", 1000, None) == Estimator().estimate("b", 1000, None)


@pytest.mark.parametrize(
    ("value", "limit"),
    [({}, None), ({"max_tokens": 5}, 5), ({"max_tokens": 9, "max_completion_tokens": 7}, 7), ({"max_tokens": -5}, 0), ({"max_tokens": "5"}, None)],
)  # fmt: skip
def test_the_largest_completion(value: dict[str, Any], limit: int | None) -> None:
    assert read_body(json.dumps(value).encode()).max_completion == limit


@pytest.mark.parametrize("length", [10, 100_000])
async def test_an_alias_is_replaced_and_nothing_else(length: int) -> None:
    value = {"n": 1, "model": "fast", "messages": [{"content": "你\ud83d fast" + "x" * length}]}
    content = json.dumps(value, indent=3).encode()
    for body in (read_body(content), await read_long_body(content)):
        assert body.with_model(None) == body.content
        written = body.with_model("nvidia/nano").decode("utf-8", "surrogatepass")
        assert json.loads(written) == {**value, "model": "nvidia/nano"}


@given(
    st.dictionaries(
        st.sampled_from(["model", "max_tokens", "max_completion_tokens", "a", "model\\", '"', "é"]),
        st.recursive(
            st.integers(-5, 10**6)
            | st.text('model"\\{}[]:, é', max_size=9)
            | st.floats(0, 9)
            | st.none()
            | st.booleans(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "max_tokens"]), inner)
            ),
            max_leaves=8,
        ),
    ),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_long_bodies_are_read_as_short_ones(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    value = {name: None if isinstance(each, bool) else each for name, each in value.items()}
    content = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
    short, long = read_body(content), asyncio.run(read_long_body(content))
    assert (long.model, long.max_completion) == (short.model, short.max_completion)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model":"m',
        b'{"model":"m"',
        b'{"model":"m\\',
        b'{"model":"m"}}',
        b'{"\\x":1}',
        b'{"model":"m\x00"}',
        b'{"model":"\xff"}',
    ],
)
async def test_what_is_no_json_names_no_model(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it says
        await read_long_body(content)


@pytest.mark.parametrize("part", [b'"",', b"[],", b"1,", b"\\n", b"\\u4e2d", b"x", b" "])
async def test_reading_a_long_body_blocks_nobody(part: bytes) -> None:
    inner = part * (2**20 // len(part))
    content = b'{"model": "m", "a": [' + (b"%s1" if part.endswith((b",", b" ")) else b'"%s"') % inner + b"]}"
    turns = 0
    reading = asyncio.create_task(read_long_body(content))
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert reading.result().model == "m"
    assert turns >= 2**20 // (128 * 1024)


def test_headers_that_are_named_by_others() -> None:
    headers = CIMultiDictProxy(
        CIMultiDict([("Connection", "close, X-A"), ("connection", "x-b"), ("X-A", "1"), ("X-B", "2"), ("X-C", "3"), ("x-c", "4")])
    )  # fmt: skip
    assert list(request_headers(headers, None).items()) == [("X-C", "3"), ("x-c", "4")]
    assert list(response_headers(headers).items()) == [("X-C", "3"), ("x-c", "4")]
    assert request_headers(headers, "k")["Authorization"] == "Bearer k"


def make_clients(unix: list[float], **budget: int) -> tuple[Clients, Client]:
    clients = Clients(lambda: unix[0])
    clients.replace({"a": ClientSettings.model_validate({"token": "t", "budget": Budget(**budget)})})
    client = clients.find("t")
    assert client is not None
    return clients, client


def test_a_budget_is_of_one_day() -> None:
    unix = [NOW + 3600]
    clients, client = make_clients(unix, requests=2, tokens=100)
    clients.count(client, requests=1, tokens=99)
    clients.check_budget(client)
    clients.count(client, tokens=1)
    with pytest.raises(GatewayError, match=r"a has used its 100 tokens of today, which ends in 23 h \(UTC\)"):
        clients.check_budget(client)
    unix[0] = NOW + DAY
    clients.check_budget(client)


def test_budgets_survive_a_restart_if_they_can_be_read() -> None:
    unix = [NOW]
    clients, client = make_clients(unix, requests=1)
    clients.count(client, requests=1)
    again, _ = make_clients(unix, requests=1)
    again.restore(json.loads(json.dumps(clients.dump())))
    with pytest.raises(GatewayError):
        again.check_budget(client)
    unusable: list[Any] = [
        None,
        [],
        {"day": 1},
        {"day": 1, "used": {"a": 7}},
        {"day": "x", "used": {}},
        {"day": float("inf"), "used": {}},
    ]
    for nonsense in unusable:
        again, _ = make_clients(unix, requests=1)
        again.restore(nonsense)
        again.check_budget(client)


def test_priorities_of_headers() -> None:
    client = Client("a", "high")
    named = {text: find_priority(text, client) for text in ("URGENT", " low ", "normal", "", "urgent, low", "5")}
    assert list(named.values()) == ["urgent", "low", "normal", "high", "high", "high"]
    assert find_priority(None, client) == "high"


async def test_a_state_that_cannot_be_written_is_written_later(tmp_path: Any) -> None:
    path = tmp_path / "folder" / "state"
    writer = StateWriter(path, lambda: {"rates": {"a": 7.0}})
    await writer.save()
    await asyncio.to_thread(path.parent.mkdir)
    await writer.save()
    assert (await asyncio.to_thread(load, path))["rates"] == {"a": 7.0}
    await asyncio.to_thread(path.write_text, "[]")
    assert await asyncio.to_thread(load, path) == {}
