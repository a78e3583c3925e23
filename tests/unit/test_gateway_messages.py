"""What the gateway reads in requests and responses: headers, limits, tokens, budgets."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Generator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from fleet.inventory.gateway import Budget, ClientSettings
from gateway import answers
from gateway.bodies import SHORT, read_body
from gateway.body_scanner import TopLevel, scan
from gateway.clients import DAY, Client, Clients, find_priority
from gateway.errors import GatewayError
from gateway.headers import request_headers, response_headers
from gateway.state import StateWriter, load
from gateway.usage import Estimator, Usage, UsageReader
from tests.support import leaves_the_loop_free

NOW = 1_764_547_200.0  # 2025-12-01 00:00:00 UTC


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None), ({"Retry-After": "30"}, 30), ({"Retry-After": "0.5"}, 0.5), ({"Retry-After": "-1"}, None),
        ({"Retry-After": "soon"}, None), ({"Retry-After": ""}, None), ({"Retry-After": "9" * 300}, None),
        ({"Retry-After": "99999999"}, 86_400), ({"Retry-After-Ms": "1500", "Retry-After": "9"}, 1.5),
        ({"Retry-After": "Mon, 01 Dec 2025 00:01:00 GMT"}, 60), ({"Retry-After": "Sun, 30 Nov 2025 00:01:00 GMT"}, 0),
        ({"Retry-After": "Mon, 01 Dec 2025 00:01:00 -0000"}, 60),
        ({"Retry-After": "Mon, 99999999999999999999 Jan 2020 00:00:00 GMT"}, None),
        ({"Retry-After": "Mon, 01 Jan 2020 00:00:00 +99999999999999999999"}, None),
        ({"Retry-After": "Mon, 01 Jan 0001 00:00:00 +2359"}, 0), ({"Retry-After": "31 Dec 9999 23:59:59 -2359"}, 86_400),
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


NUMBERS = st.integers(0, 60).map(str) | st.integers(0, 10**25).map(str) | st.from_regex(r"\d{1,400}", fullmatch=True)
ZONES = st.sampled_from(["", "GMT", "-0000", "é"]) | st.builds("{}{}".format, st.sampled_from("+-"), NUMBERS)
DATES = st.builds("Mon, {} Jan {} {}:{}:{} {}".format, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, ZONES)
DURATIONS = st.lists(st.tuples(NUMBERS, st.sampled_from(["h", "m", "s", "ms", ".", "²", "-"]))).map(
    lambda parts: "".join(number + unit for number, unit in parts)
)
VALUES = st.text() | NUMBERS | DATES | DURATIONS


@given(st.dictionaries(st.sampled_from(["Retry-After", "Retry-After-Ms", "X-RateLimit-Reset-Requests"]), VALUES))
def test_no_header_is_a_crash(values: dict[str, str]) -> None:
    headers = CIMultiDict({**values, "X-RateLimit-Remaining-Requests": "0"})
    found, exhaustion = answers.find_retry_after(headers, NOW), answers.find_exhaustion(headers)
    assert found is None or 0 <= found <= answers.MAX_PAUSE
    assert exhaustion is None or 0 <= exhaustion <= answers.MAX_RESET


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
def test_the_usage_of_a_response(body: bytes, usage: Usage | None, encoding: str) -> None:
    sent = {"": body, "gzip": gzip.compress(body), "deflate": zlib.compress(body)}[encoding]
    for size in (1000, 7):
        reader = UsageReader(encoding)
        for start in range(0, len(sent), size):
            reader.add(sent[start : start + size])
        assert reader.find() == usage


def test_what_cannot_be_decoded_has_no_usage() -> None:
    for encoding in ("gzip", "br"):
        reader = UsageReader(encoding)
        reader.add(CHAT)
        reader.add(CHAT)
        assert reader.find() is None


def test_a_compressed_response_needs_little_memory() -> None:
    reader = UsageReader("gzip")
    reader.add(gzip.compress(b"\0" * 50_000_000))
    assert len(reader._tail) < 100_000
    assert reader._decoded < 9_000_000
    assert reader.find() is None


def test_estimates_learn() -> None:
    estimator = Estimator()
    assert estimator.estimate("a", 4000, 100) == 1100
    for _ in range(100):
        estimator.learn("a", 1000, Usage(500, 20))
    assert abs(estimator.estimate("a", 2000, None) - 1020) < 2
    assert abs(estimator.estimate("a", 2000, 5) - 1005) < 1
    estimator.learn("a", 0, Usage(0, 0))
    for _ in range(100):
        estimator.learn("a", 10, Usage(1_000_000, 20))  # of an earlier response, for example
    assert estimator.estimate("a", 1000, 5) < 2100
    assert estimator.estimate("b", 4000, 100) == 1100


@pytest.mark.parametrize(
    ("value", "limit"),
    [({}, None), ({"max_tokens": 5}, 5), ({"max_tokens": 7, "max_completion_tokens": 9}, 9), ({"max_tokens": -5}, 0), ({"max_tokens": "5"}, None)],
)  # fmt: skip
@pytest.mark.parametrize("padding", [0, SHORT])
async def test_the_largest_completion(value: dict[str, Any], limit: int | None, padding: int) -> None:
    body = await read_body(json.dumps({"prompt": "x" * padding, **value}).encode())
    assert body.max_completion == (limit if padding == 0 or limit != 0 else None)  # a negative number of a long body


@pytest.mark.parametrize("padding", [0, SHORT])
async def test_an_alias_is_replaced_and_nothing_else(padding: int) -> None:
    content = (
        b'{ "messages": [{"model": "fast", "content": "\\"model\\": \\\\"}, {"x": {"model": "fast"}}],'
        b'\t"mod\\u0065l" : "fast", "n": 1.0, "y":"\xe4\xbd\xa0\\ud83d' + b"z" * padding + b'" ,"model":"fa\\u0073t"}'
    )
    body = await read_body(content)
    assert body.model == "fast"
    assert await body.with_model(None) == content
    written = await body.with_model('nvidia/"nano')
    name = b'"nvidia/\\"nano"'
    expected = content.replace(b'l" : "fast"', b'l" : ' + name).replace(b'"fa\\u0073t"', name)
    assert written == expected


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "m", "a": [' + b"1," * 15_000_000 + b"1]}",
        b'{"a": "' + b"x" * 30_000_000 + b'", "model": "m"}',
        b'{"a": "' + b"\\" * 30_000_000 + b'", "model": "m"}',
        b'{"model": "m", "a": "' + b'\\"' * 15_000_000 + b'"}',
        b'{"model": "m", "a": ' + b"[" * 30_000_000,
        b'{"model": "m", ' + b'"a": {}, ' * 3_000_000 + b'"a": 1}',
        b'{"a" ' + b" " * 30_000_000 + b': 1, "model": "m"}',
        b'{"model": "m", "a": "' + b"\\n" * 15_000_000,
    ],
    ids=["numbers", "text", "backslashes", "quotes", "levels", "keys", "blanks", "escapes"],
)
async def test_long_bodies_do_not_block_the_event_loop(content: bytes) -> None:
    await leaves_the_loop_free(lambda: read_body(content))
    assert (await read_body(content)).model in ("m", None)


def run(steps: Generator[None, None, TopLevel]) -> TopLevel:
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            return cast("TopLevel", ended.value)


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(["model", "max_tokens", "a"]), st.text(max_size=5)),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(0, 10**9), st.floats(allow_nan=False), st.text(max_size=9)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
            ),
            max_leaves=12,
        ),
        max_size=6,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_a_scan_finds_what_a_parser_finds(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    content = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    found = run(scan(content, frozenset({"model", "max_tokens"}))).values
    wanted = {key: each for key, each in value.items() if key in ("model", "max_tokens")}
    assert found == {
        key: each for key, each in wanted.items() if isinstance(each, str | int) and not isinstance(each, bool)
    }


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
