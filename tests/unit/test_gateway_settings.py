"""The section `gateway` of the configuration: its errors, its defaults, and who sees its secrets."""

from pathlib import Path

import pytest

from fleet.inventory.gateway import format_rate, parse_rate
from runtime.tokens import TokenError
from tests.support import load_problems, loaded, write

UPSTREAM = "url: 'http://h/v1'"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("upstreams: {a: {}}", "upstreams.a.url: is missing"),
        ("upstreams: {a: {url: h}}", "upstreams.a.url: is not a URL; write http://host:port/path"),
        ("upstreams: {a: {" + UPSTREAM + ", rate: 40}}", "upstreams.a.rate: 40 is not a rate; write 40/min, 2/s or 600/h"),
        ("upstreams: {a: {" + UPSTREAM + ", rate: 0/min}}", "upstreams.a.rate: 0/min is not between 1/min and 1000000000/min"),
        ("upstreams: {a: {" + UPSTREAM + ", burst: 0}}", "upstreams.a.burst: must be at least 1, not 0"),
        ("upstreams: {a: {" + UPSTREAM + ", fallback: [b]}}", "upstreams.a.fallback[0]: there is no upstream 'b'"),
        ("upstreams: {a: {" + UPSTREAM + ", fallback: [a]}}", "upstreams.a.fallback: an upstream cannot replace itself"),
        ("upstreams: {a: {" + UPSTREAM + "}}, default: b", "default: there is no upstream 'b'"),
        ("upstreams: {a: {" + UPSTREAM + "}, b: {url: 'http://h/v1/'}}", ": upstreams.b: has the same url and api_key as a: one upstream has them all"),
        ("upstreams: {a: {" + UPSTREAM + ", match: ['']}}", "upstreams.a.match[0]: '' is not the name of a model: it must be printable, and not empty"),
        ("queue: {when_full: wait}", "queue.when_full: must be 'reject', 'drop-lowest' or 'passthrough', not 'wait'"),
        ("queue: {max_wait: 60}", "queue.max_wait: must be a map, not 60"),
        ("queue: {max_wait: {urgent: 1}}", "queue.max_wait.urgent: 1 is not a duration; write 500ms, 10s, 5m, 1h30m or 7d"),
        ("retreat: {cut_at: 5}", "retreat.cut_at: must be more than 0% and less than 100%, such as 80% or 0.8, not 5"),
        ("retreat: {cut_at: 30%}", "retreat: recover_below must not exceed cut_at, and cut_at must not exceed floor_at"),
        ("clients: {a: {}}", "clients.a.token: is missing"),
        ("clients: {a: {token: x}, b: {token: x}}", ": clients.b.token: must differ from clients.a.token"),
        ("token: x, clients: {a: {token: x}}", ": clients.a.token: must differ from token"),
        ("clients: {a: {token: x, share: 0}}", "clients.a.share: must be greater than 0, not 0"),
        ("clients: {a: {token: x, priority: Low}}", "clients.a.priority: must be 'urgent', 'high', 'normal' or 'low', not 'Low'"),
        ("listen: here", "listen: 'here' is not an address to listen on; write 127.0.0.1:9998, [v6]:9998 or :9998"),
        ("upstream: {}", "upstream: unknown key; did you mean upstreams?"),
    ],
)  # fmt: skip
def test_each_error_names_its_place_and_remedy(tmp_path: Path, text: str, problem: str) -> None:
    dot = "" if problem.startswith(":") else "."
    assert load_problems(write(tmp_path, a=f"gateway: {{{text}}}")) == [f"a.yaml:1: gateway{dot}{problem}"]


def test_a_client_has_no_token_of_a_server(tmp_path: Path) -> None:
    text = "access: {metrics_token: x}\ngateway: {clients: {a: {token: x}}}"
    problem = "gateway.clients.a.token: must differ from the tokens of Defib's servers"
    assert [each.partition(": ")[2] for each in load_problems(write(tmp_path, a=text))] == [problem]


def test_only_the_gateway_reads_the_secrets_of_upstreams_and_clients(tmp_path: Path) -> None:
    text = (
        "gateway: {token: '${T}', upstreams: {a: {"
        + UPSTREAM
        + ", api_key: '${KEY}', rate: '${R}'}}, clients: {c: {token: '${C}'}}}"
    )
    environ = {"T": "t0ken", "KEY": "k3y", "R": "7/min", "C": "cl1ent"}
    write(tmp_path, a=text)
    own = loaded(tmp_path, environ, ["gateway"])
    assert own.secrets == {"t0ken", "k3y", "cl1ent"}
    assert own.inventory.gateway.upstreams["a"].rate == 7
    assert own.local_token("gateway").read().get_secret_value() == "t0ken"
    for program in ("exporter", "client"):
        assert loaded(tmp_path, {}, [program]).secrets == set()
    # The remediator asks the gateway, and can do without.
    assert loaded(tmp_path, {"T": "t0ken"}, ["remediator"]).secrets == {"t0ken"}
    unknown = loaded(tmp_path, {}, ["remediator"])
    assert unknown.secrets == set()
    with pytest.raises(TokenError, match=r"gateway\.token is not set"):
        unknown.local_token("gateway").read()
    others = "notify: {channels: {ops: {feishu: {webhook: '${HOOK}'}}}}\nhosts: {h: {address: h, sudo: {password: '${SUDO}'}}}"
    assert loaded(write(tmp_path, b=others), environ, ["gateway"]).secrets == own.secrets


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (
            "upstreams: {a: {url: 'http://a/v1', match: ['meta/*']}, b: {url: 'http://b/v1', match: [own, 'meta/llama-*']}}",
            "upstreams.b.match[1]: 'meta/*' of a, which is written before it, has all of its models",
        ),
        (
            "upstreams: {a: {url: 'http://a/v1', match: ['*']}, b: {url: 'http://b/v1', match: ['*']}}",
            "upstreams.b.match[0]: '*' of a, which is written before it, has all of its models",
        ),
        (
            "upstreams: {a: {url: 'http://a/v1', aliases: {fast: x}}, b: {url: 'http://b/v1', aliases: {fast: y}}}",
            "upstreams.b.aliases.fast: a, which is written before it, has the same alias: only X-Upstream leads here",
        ),
        (
            "upstreams: {a: {url: 'http://a/v1'}}",
            "upstreams.a: has no `match` and no `aliases`, and is neither default nor fallback: only X-Upstream leads to it",
        ),
        (
            "default: a, upstreams: {a: {url: 'http://a/v1'}}, clients: {c: {token: x, budget: {requests: 1}}}",
            "clients.c.budget: what the client has used is forgotten at each restart: set gateway.state_file",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_warnings(tmp_path: Path, text: str, warning: str) -> None:
    (found,) = loaded(write(tmp_path, a=f"gateway: {{{text}}}")).warnings
    assert f"{found.path}: {found.message}" == f"gateway.{warning}"


def test_settings_that_are_meant_so_have_no_warnings(tmp_path: Path) -> None:
    text = (
        "state_file: s, clients: {c: {token: x, budget: {requests: 1}}}, upstreams: {"
        "a: {url: 'http://a/v1', match: ['meta/llama-*', 'meta/*', x], aliases: {fast: x}, fallback: [b]},"
        "b: {url: 'http://b/v1', match: ['*'], aliases: {fast: y}}}"
    )
    assert loaded(write(tmp_path, a=f"gateway: {{{text}}}")).warnings == []


def test_waits_of_each_priority(tmp_path: Path) -> None:
    for text, waits in (
        ("{}", (120, 120, 120, 2)), ("{max_wait: 30s}", (30, 30, 30, 2)), ("{low_timeout: 5s}", (120, 120, 120, 5)),
        ("{max_wait: {urgent: 3m, low: 10s}}", (180, 120, 120, 10)),
    ):  # fmt: skip
        queue = loaded(write(tmp_path, a=f"gateway: {{queue: {text}}}")).inventory.gateway.queue
        assert tuple(queue.waits.values()) == waits


@pytest.mark.parametrize(("text", "rate"), [("40/min", 40), ("2/s", 120), ("600/h", 10), ("0.5/s", 30)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate
    assert parse_rate(format_rate(rate)) == rate


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("", "http://127.0.0.1:9190"),
        ("listen: 10.0.0.5:9200", "http://10.0.0.5:9200"),
        ("listen: ':9200'", "http://127.0.0.1:9200"),
        ("listen: 0.0.0.0:9200", "http://127.0.0.1:9200"),
        ("listen: '[::]:9200'", "http://[::1]:9200"),
        ("{listen: ':9200', url: 'http://gateway:9190'}", "http://gateway:9190"),
    ],
)
def test_the_gateway_is_reached_where_it_listens(tmp_path: Path, written: str, url: str) -> None:
    config = write(tmp_path, a=f"gateway:\n  {written or '{}'}\n")
    assert loaded(config).inventory.gateway.url.url == url
