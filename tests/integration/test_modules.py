"""`GET /probe` of the exporter: blackbox_exporter's modules and Prometheus' configuration for them."""

import asyncio
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from exporter.modules.prober import ModuleProber, create_options, read_modules
from exporter.probes import PROBES
from exporter.scheduler import probe_runner
from runtime.errors import DefibError
from runtime.redaction import Redactor
from tests.forked_defib import run_defib
from tests.integration.conftest import Serve
from tests.integration.exporter_process import Exporter
from tests.integration.test_exporter_api import exporter
from tests.support import NO_TLS, eventually

__all__ = ["exporter"]

TOKEN = {"Authorization": "Bearer a-token-for-prometheus"}
MODULES = {
    "http_2xx": {"prober": "http", "timeout": "5s", "http": {"fail_if_body_not_matches_regexp": ["hello"]}},
    "http_secret": {"prober": "http", "http": {"bearer_token": "t0p-secret-value"}},
    "ssh": {"prober": "tcp", "timeout": "1s", "tcp": {"query_response": [{"expect": "^SSH-2.0-"}]}},
}


def configure(exporter: Exporter, modules: Any = MODULES, **settings: Any) -> Path:
    file = exporter.folder / "blackbox.yml"
    file.write_text(yaml.safe_dump({"modules": modules}))
    own = {"token": "t0ken", "modules_file": "../blackbox.yml", **settings}
    exporter.configure({}, access={"metrics_token": "a-token-for-prometheus"}, exporter=own)
    return file


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    body = b"hello " + head[-200:].replace(b"\r\n", b" ")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def probe(exporter: Exporter, headers: Any = TOKEN, **query: str) -> httpx.Response:
    return await exporter.client.get("/probe", params=query, headers=headers)


async def test_targets_are_probed_with_modules(exporter: Exporter, serve: Serve) -> None:
    target = f"127.0.0.1:{await serve(answer)}"
    configure(exporter)
    await exporter.start()
    good = await probe(exporter, target=target)
    assert good.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "\nprobe_success 1.0\n" in good.text
    assert "\nprobe_http_status_code 200.0\n" in good.text
    assert "\nprobe_success 0.0\n" in (await probe(exporter, target=target, module="ssh")).text
    assert "\nprobe_success 0.0\n" in (await probe(exporter, target="127.0.0.1:1")).text
    debug = await probe(exporter, target=target, module="http_secret", debug="true")
    assert debug.text.startswith("The probe has succeeded\n")
    assert "t0p-secret-value" not in debug.text + (exporter.folder / "log").read_text()


async def test_who_may_probe_which_targets(exporter: Exporter, serve: Serve) -> None:
    target = f"127.0.0.1:{await serve(answer)}"
    configure(exporter)
    await exporter.start()
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:  # also on loopback
        url = exporter.client.base_url.join("/probe")
        assert (await client.get(url, params={"target": target})).status_code == 401
    assert (await probe(exporter, headers={"Authorization": "Bearer wrong"}, target=target)).status_code == 401
    for query, message in (
        ({}, "the parameter target is missing"),
        ({"target": "x" * 9000}, "too long"),
        ({"target": target, "module": "nothing"}, "unknown module 'nothing'"),
    ):
        refused = await probe(exporter, **query)
        assert (refused.status_code, message in refused.text) == (400, True), refused.text


async def test_modules_are_bound_to_targets(exporter: Exporter, serve: Serve) -> None:
    asked = []

    async def answer_and_count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(writer.get_extra_info("peername"))
        await answer(reader, writer)

    port = await serve(answer_and_count)
    modules = {
        **MODULES,
        "dns": {"prober": "dns", "dns": {"query_name": "a.example"}},
        "icmp": {"prober": "icmp"},
        "grpc": {"prober": "grpc"},
    }
    configure(exporter, modules, modules_targets=["localhost", "*.shop.invalid", "192.0.2.0/24"])
    await exporter.start()
    for target, module in (
        (f"127.0.0.1:{port}", "http_secret"),
        (f"http://localhost.:{port}@127.0.0.1/", "ssh"),
        (f"[::ffff:127.0.0.1]:{port}", "http_secret"),
        (f"2130706433:{port}", "http_secret"),
        (f"http://127.0.0.1:{port}/localhost", "http_secret"),
        (f"127.0.0.1:{port}", "ssh"),
        (f"127.0.0.1:{port}", "grpc"),
        ("127.0.0.1", "dns"),
        (f"127.0.0.1:{port}", "dns"),
        ("127.0.0.1", "icmp"),
        ("::1", "icmp"),
    ):
        refused = await probe(exporter, target=target, module=module, hostname="localhost")
        assert refused.status_code == (200 if "@" in target else 403), (target, refused.text)
        assert "@" in target or "is not in exporter.modules_targets" in refused.text
    assert asked == []
    assert "\nprobe_success 1.0\n" in (await probe(exporter, target=f"LocalHost:{port}", module="http_secret")).text
    assert len(asked) == 1
    for target in ("a.shop.invalid:1", "192.0.2.1:1"):
        assert (await probe(exporter, target=target, module="ssh")).status_code == 200
    exporter.configure({}, exporter={"token": "t0ken", "modules_targets": ["localhost"]})
    done = await asyncio.to_thread(run_defib, "check", "--config", str(exporter.folder / "config"))
    assert "exporter: modules_targets needs modules_file" in done.stderr


async def test_targets_that_cannot_be_probed(exporter: Exporter) -> None:
    configure(exporter)
    await exporter.start()
    for query in (
        {"target": "http://user:pa ss@[/"},
        {"target": "a\\b"},
        {"target": "\u202e"},
        {"target": "http://[::1]a"},
        {"target": "\u00fc" * 70},
        {"target": "no-port", "module": "ssh"},
        {"target": "h:99999", "module": "ssh"},
    ):
        failed = await probe(exporter, debug="true", **query)
        assert failed.text.startswith("The probe has failed (error): module "), failed.text
        assert "\nprobe_success 0.0\n" in failed.text
        assert "pa ss" not in failed.text
    assert "probe_defect" not in (exporter.folder / "log").read_text()


async def test_defects_are_logged_a_limited_number_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail(*_arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(probe_runner, "PROBES", {"tcp": replace(PROBES["tcp"], probe=fail)})
    file = tmp_path / "blackbox.yml"
    file.write_text(yaml.safe_dump({"modules": MODULES}))
    prober = ModuleProber(Redactor())
    await prober.load(file)
    for number in range(100):
        done = await prober.probe("ssh", f"127.0.0.1:{number + 1}", "", None)
        assert "internal error in the probe: ZeroDivisionError" in done.result.message
    assert 0 < capsys.readouterr().out.count("probe_defect") <= 20


async def test_without_a_file_of_modules_there_are_none(exporter: Exporter) -> None:
    exporter.configure({}, access={"metrics_token": "a-token-for-prometheus"})
    await exporter.start()
    assert (await probe(exporter, target="127.0.0.1:1")).status_code == 404


async def test_a_reload_reads_the_modules_again(exporter: Exporter, serve: Serve) -> None:
    target = f"127.0.0.1:{await serve(answer)}"
    file = configure(exporter)
    await exporter.start()
    file.write_text(yaml.safe_dump({"modules": {"http_2xx": {"prober": "http", "http": {"unknown": 1}}}}))
    await exporter.client.post("/-/reload")

    async def is_refused() -> bool:
        return await exporter.value("defib_config_last_reload_successful") == 0

    await eventually(is_refused)
    assert "\nprobe_success 1.0\n" in (await probe(exporter, target=target)).text
    file.write_text(yaml.safe_dump({"modules": {"new": {"prober": "http"}}}))
    await exporter.client.post("/-/reload")
    assert "\nprobe_success 1.0\n" in (await probe(exporter, target=target, module="new")).text
    assert (await probe(exporter, target=target)).status_code == 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modules: {a: {prober: smtp}}", "modules.a.prober"),
        ("modules: {a: {prober: http, http: {methd: GET}}}", "modules.a.http.methd"),
        ("modules: {a: {prober: dns}}", "modules.a: dns: query_name is missing"),
        ("modules: {a: {prober: http, timeout: soon}}", "modules.a: "),
        ("modules: {a: {prober: http, http: {fail_if_body_matches_regexp: ['(']}}}", "modules.a: "),
        (
            "modules: {a: {prober: http, http: {valid_http_versions: [HTTP/3.0]}}}",
            "only HTTP/1.0, HTTP/1.1 and HTTP/2.0",
        ),
        ("modules: {a: {prober: http, http: {basic_auth: {username: u, password_file: /nonexistent}}}}", "cannot read"),
        ("modules: {a: {prober: http, http: {headers: {X: ['s3cret-value']}}}}", "modules.a.http.headers.X"),
        ("{", "not valid YAML ("),
        ("modules: {a: {prober: http, timeout: 2026-13-45}}", "modules.a: "),
        ("modules: {a: {[1]: http}}", "a key must be text"),
        ("modules: {a: {prober: http, http: {bearer_token: s3cret", "not valid YAML ("),
        ("modules: {a: {prober: http}, a: {prober: tcp}}", "duplicate key in line 1"),
        (
            "modules: {a: {prober: http, http: {bearer_token_file: /nonexistent}}}",
            "/nonexistent: there is no such file",
        ),
        ("modules: {a: {prober: http, http: {tls_config: {ca_file: /nonexistent}}}}", "there is no such file"),
        ("", "modules: is missing"),
        ("[1]", "must be a map"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "blackbox.yml"
    file.write_text(content)
    with pytest.raises(DefibError) as caught:
        read_modules(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "s3cret" not in str(caught.value)


async def test_check_finds_errors_of_modules(exporter: Exporter) -> None:
    configure(exporter, {"a": {"prober": "http", "http": {"methd": "GET"}}})
    done = await asyncio.to_thread(run_defib, "check", "--config", str(exporter.folder / "config"))
    assert done.returncode == 1
    assert "blackbox.yml: modules.a.http.methd: unknown key" in done.stderr


GOOD = """
modules:
  empty: {prober: http, timeout: , http: }
  sections: {prober: http, http: {tls_config: , headers: , valid_status_codes: , fail_if_body_matches_regexp: }}
  others: {prober: dns, tcp: , icmp: , grpc: , dns: {query_name: example.org, validate_answer_rrs: }}
  scalars:
    prober: http
    http:
      method: POST
      headers: {X-Number: 5, X-Truth: true}
      body: 5
      basic_auth: {username: 5, password: 0123456}
      fail_if_body_not_matches_regexp: [200]
      valid_status_codes: [200, 999]
      body_size_limit: 1.5MB
      proxy_url: http://user:p%40ss@127.0.0.1:1
  unlimited: {prober: http, http: {body_size_limit: 0B}}
  headers:
    prober: http
    http:
      fail_if_header_not_matches:
        - {header: Strict-Transport-Security, regexp: max-age}
        - {header: strict-transport-security, regexp: includeSubDomains, allow_missing: true}
  dialogue:
    prober: tcp
    tcp:
      query_response:
        - {expect: '^(?P<word>\\w+) (\\w+)', send: '${word} $2 $$5 $none ${word}!$1x'}
        - {send: 'costs $1'}
  ping: {prober: icmp, icmp: {payload_size: 65507}}
"""


def test_files_that_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "blackbox.yml"
    file.write_text(GOOD)
    modules = read_modules(file)
    options, secrets = create_options(modules["scalars"], "127.0.0.1", "")
    sent = options.request.data
    assert (b"X-Number: 5\r\n" in sent, b"X-Truth: true\r\n" in sent, b"Content-Type" in sent) == (True, True, False)
    assert (options.max_body, options.expect.status) == (1536 * 1024, [(200, 200), (999, 999)])
    assert "0123456" in secrets  # as it is written
    assert options.proxy.url == "http://127.0.0.1:1"
    assert options.proxy.sent_headers["Proxy-Authorization"] == f"Basic {b64encode(b'user:p@ss').decode()}"
    header = create_options(modules["headers"], "127.0.0.1", "")[0].expect.headers["strict-transport-security"]
    assert (header.matches, header.optional) == (["max-age", "includeSubDomains"], False)
    dialogue = create_options(modules["dialogue"], "127.0.0.1:1", "")[0].dialogue
    assert [step.send for step in dialogue if step.send] == ["{1} {2} $5  {1}!\n", "costs $1\n"]


@pytest.mark.parametrize(
    ("target", "line", "credentials"),
    [
        ("http://u%2F:p%40@127.0.0.1/a b?c=d e", b"GET /a%20b?c=d%20e HTTP/1.1\r\n", b"u/:p@"),
        ("127.0.0.1/x@y", b"GET /x@y HTTP/1.1\r\n", None),
    ],
)
def test_targets_as_people_write_them(tmp_path: Path, target: str, line: bytes, credentials: bytes | None) -> None:
    file = tmp_path / "blackbox.yml"
    file.write_text("modules: {a: {prober: http}}")
    sent = create_options(read_modules(file)["a"], target, "")[0].request.data
    assert sent.startswith(line)
    assert (b"Authorization: Basic " + b64encode(credentials) in sent) if credentials else b"Authorization" not in sent


async def test_a_file_with_a_password_is_read_again_when_it_changes(
    exporter: Exporter, serve: Serve, tmp_path: Path
) -> None:
    seen: list[str] = []

    async def remember(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        seen.append(head.partition("Authorization: ")[2].partition("\r\n")[0])
        writer.write(b"HTTP/1.1 204 OK\r\n\r\n")

    port = await serve(remember)
    password = tmp_path / "password"
    configure(
        exporter, {"a": {"prober": "http", "http": {"basic_auth": {"username": "u", "password_file": str(password)}}}}
    )
    for text in ("first-one", "the-second-one"):
        password.write_text(text)
        if not seen:
            await exporter.start()
        assert "\nprobe_success 1.0\n" in (await probe(exporter, target=f"127.0.0.1:{port}", module="a")).text
    assert seen == [f"Basic {b64encode(f'u:{text}'.encode()).decode()}" for text in ("first-one", "the-second-one")]
    password.unlink()
    assert "\nprobe_success 0.0\n" in (await probe(exporter, target=f"127.0.0.1:{port}", module="a")).text


async def test_a_refused_file_shows_no_value(exporter: Exporter) -> None:
    configure(
        exporter, {"a": {"prober": "http", "http": {"basic_auth": {"username": "u", "password": ["s3cr3t-value"]}}}}
    )
    argv = ["exporter", "--config", str(exporter.folder / "config"), "--listen", "127.0.0.1:0"]
    done = await asyncio.to_thread(run_defib, *argv)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("blackbox.yml: modules.a.http.basic_auth.password: must be a string")
    assert "s3cr3t-value" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
