"""The variables `SIDECAR_…`: what they mean, and what is wrong with them."""

import logging
from functools import partial
from pathlib import Path

import pytest

from fleet.inventory.gateway import GatewaySettings
from fleet.inventory.sidecar import list_variables, load_with_variables, read_variables
from runtime.errors import StartError
from tests.support import loaded, write

KEY = {"SIDECAR_API_KEY": "nvapi-secret"}


def read(**variables: str) -> GatewaySettings:
    return read_variables({**KEY, **{f"SIDECAR_{name}": value for name, value in variables.items()}}).gateway


def test_the_key_alone() -> None:
    settings = read()
    assert (settings.listen, settings.metrics_listen) == ("127.0.0.1:9190", "127.0.0.1:9191")
    upstream = settings.upstreams["nvidia"]
    assert upstream.url == "https://integrate.api.nvidia.com/v1"
    assert upstream.api_key is not None
    assert upstream.api_key.get_secret_value() == "nvapi-secret"
    assert (upstream.rate, upstream.burst, upstream.timeout) == (40, 40, 60)
    queue = settings.queue
    assert (queue.size, queue.when_full, queue.low_timeout, queue.waits["normal"]) == (500, "reject", 2, 120)
    assert (settings.default, settings.token, settings.clients) == ("nvidia", None, {})


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("HOST", "0.0.0.0", "listen", "0.0.0.0:9190"),
        ("HOST", "0.0.0.0", "metrics_listen", "0.0.0.0:9191"),
        ("HOST", "::1", "listen", "[::1]:9190"),
        ("PORT", "8080", "listen", "127.0.0.1:8080"),
        ("METRICS_PORT", "8081", "metrics_listen", "127.0.0.1:8081"),
        ("METRICS_PORT", "9190", "metrics_listen", None),
        ("UPSTREAM", "http://h:8000/v1/", "upstreams.upstream.url", "http://h:8000/v1"),
        ("UPSTREAM", "http://h:8000", "upstreams.upstream.url", "http://h:8000/v1"),
        ("UPSTREAM", "http://h/openai", "upstreams.upstream.url", "http://h/openai"),
        ("UPSTREAM", "https://integrate.api.nvidia.com", "default", "nvidia"),
        ("RATE_RPM", "100", "upstreams.nvidia.rate", 100),
        ("RATE_RPM", "12.5", "upstreams.nvidia.rate", 12.5),
        ("BUCKET_CAPACITY", "10", "upstreams.nvidia.burst", 10),
        ("TIMEOUT", "300", "upstreams.nvidia.timeout", 300),
        ("TIMEOUT", "0.5", "upstreams.nvidia.timeout", 0.5),
        ("QUEUE_MAX", "0", "queue.size", 0),
        ("LOW_TIMEOUT", "1.5", "queue.low_timeout", 1.5),
        ("FALLBACK_PASSTHROUGH", "True", "queue.when_full", "passthrough"),
        ("FALLBACK_PASSTHROUGH", "0", "queue.when_full", "reject"),
        ("FALLBACK_PASSTHROUGH", " ", "queue.when_full", "reject"),
    ],
)  # fmt: skip
def test_each_variable(name: str, text: str, key: str, value: object) -> None:
    found: object = read(**{name: text})
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(("text", "level"), [("debug", logging.DEBUG), ("WARNING", logging.WARNING)])
def test_the_level_of_the_log(text: str, level: int) -> None:
    assert read_variables(KEY).log_level == logging.INFO
    assert read_variables({**KEY, "SIDECAR_LOG_LEVEL": text}).log_level == level


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("PORT", "http", "must be a whole number from 1 to 65535, not 'http'"),
        ("PORT", "70000", "must be a whole number from 1 to 65535, not '70000'"),
        ("METRICS_PORT", "0", "must be a whole number from 1 to 65535, not '0'"),
        ("HOST", "a b", "must be an address to listen on, not 'a b'"),
        ("UPSTREAM", "integrate.api.nvidia.com", "is not a URL; write http://host:port/path"),
        ("UPSTREAM", "https://a:secret@h/v1", "must not contain credentials; use `auth:`"),
        ("RATE_RPM", "40/min", "must be a number of requests a minute from 1 to 1000000000, not '40/min'"),
        ("RATE_RPM", "0", "must be a number of requests a minute from 1 to 1000000000, not '0'"),
        ("BUCKET_CAPACITY", "-1", "must be a whole number from 1 to 1000000000, not '-1'"),
        ("TIMEOUT", "301", "must be a number of seconds from 0.001 to 300, not '301'"),
        ("TIMEOUT", "nan", "must be a number of seconds from 0.001 to 300, not 'nan'"),
        ("QUEUE_MAX", "1e3", "must be a whole number from 0 to 100000, not '1e3'"),
        ("LOW_TIMEOUT", "2s", "must be a number of seconds from 0.001 to 86400, not '2s'"),
        ("FALLBACK_PASSTHROUGH", "maybe", "must be one of true, 1, yes, on, false, 0, no, off, not 'maybe'"),
        ("LOG_LEVEL", "loud", "must be one of debug, info, warn, warning, error, critical, not 'loud'"),
        ("ADMIN_TOKEN", "a secret", "must be one line of printable ASCII characters without spaces"),
        ("API_KEY", "nvapi secret", "must be one line of printable ASCII characters without spaces"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(name: str, text: str, problem: str) -> None:
    with pytest.raises(StartError) as raised:
        read(**{name: text})
    assert str(raised.value) == f"SIDECAR_{name}: {problem}"
    assert "secret" not in str(raised.value)


def test_all_problems_are_named_together() -> None:
    with pytest.raises(StartError) as raised:
        read_variables({"SIDECAR_PORT": "x", "SIDECAR_TIMEOUT": "y", "SIDECAR_API_KEY": ""})
    problems = str(raised.value).splitlines()
    assert [each.partition(":")[0] for each in problems[:2]] == ["SIDECAR_PORT", "SIDECAR_TIMEOUT"]
    assert problems[2] == (
        "SIDECAR_API_KEY is not set, and gateway.upstreams is not configured, but SIDECAR_PORT, SIDECAR_TIMEOUT is set"
    )


def test_the_variables_stand_for_upstreams_that_are_not_configured(tmp_path: Path) -> None:
    environ = {**KEY, "SIDECAR_ADMIN_TOKEN": "t-admin", "STATE_DIRECTORY": "/var/lib/defib-gateway", "UNRELATED": "x"}
    assert list_variables(environ) == ["SIDECAR_API_KEY", "SIDECAR_ADMIN_TOKEN"]
    write(tmp_path, a="gateway: {listen: '127.0.0.1:1', max_body: 1MiB, clients: {coder: {token: t-coder}}}")
    found = load_with_variables(partial(loaded, tmp_path, environ, ["gateway"]), environ)
    gateway = found.inventory.gateway
    assert (gateway.listen, gateway.max_body, list(gateway.clients)) == ("127.0.0.1:9190", 2**20, ["coder"])
    assert gateway.state_file == Path("/var/lib/defib-gateway/state")
    assert found.secrets == {"nvapi-secret", "t-admin", "t-coder"}
    assert found.local_token("gateway").read().get_secret_value() == "t-admin"


def test_configured_upstreams_are_in_force_alone(tmp_path: Path) -> None:
    write(tmp_path, a="gateway: {upstreams: {own: {url: 'http://h/v1'}}}")
    found = load_with_variables(partial(loaded, tmp_path, {}, ["gateway"]), {"SIDECAR_PORT": "wrong"})
    assert list(found.inventory.gateway.upstreams) == ["own"]


@pytest.mark.parametrize("other", ["access: {metrics_token: same}", "gateway: {clients: {coder: {token: same}}}"])
def test_the_admin_token_gives_no_other_access(tmp_path: Path, other: str) -> None:
    environ = {**KEY, "SIDECAR_ADMIN_TOKEN": "same"}
    with pytest.raises(StartError, match="SIDECAR_ADMIN_TOKEN: must differ"):
        load_with_variables(partial(loaded, write(tmp_path, a=other), environ, ["gateway"]), environ)
