"""What callers of the two programs may do without a credential, with a wrong one, and with the right one."""

import asyncio
import json
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
from aiohttp import web

from defib.demo.launcher import Launcher
from defib.demo.stack import Stack
from exporter import api as exporter_api
from remediator import console
from remediator.chat import feishu_callback
from remediator.http import read_api, webhook, write_api
from runtime.errors import StartError
from runtime.tokens import ApiToken
from runtime.web import AccessControl, AccessRequirement, create_application, list_requirements
from runtime.webconfig import WebConfig
from tests.integration.loop import TOKEN, Loop

ROUTES: dict[str, dict[tuple[str, str], AccessRequirement]] = {
    "exporter": {
        ("GET", "/-/healthy"): AccessRequirement.PUBLIC,
        ("GET", "/-/ready"): AccessRequirement.PUBLIC,
        ("GET", "/metrics"): AccessRequirement.SCRAPE,
        ("GET", "/api/v1/sd/node-exporter"): AccessRequirement.SCRAPE,
        ("GET", "/api/v1/services"): AccessRequirement.READ,
        ("GET", "/api/v1/services/{id}"): AccessRequirement.READ,
        ("POST", "/api/v1/services/{id}/probe"): AccessRequirement.CREDENTIAL,
        ("POST", "/-/reload"): AccessRequirement.CREDENTIAL,
    },
    "remediator": {
        ("GET", "/-/healthy"): AccessRequirement.PUBLIC,
        ("GET", "/-/ready"): AccessRequirement.PUBLIC,
        ("POST", "/webhook/feishu/{channel}"): AccessRequirement.PUBLIC,  # but Feishu's signature
        ("POST", "/webhook/alertmanager"): AccessRequirement.WEBHOOK,
        ("GET", "/metrics"): AccessRequirement.SCRAPE,
        ("GET", "/"): AccessRequirement.READ,
        ("GET", "/incidents/{id}"): AccessRequirement.READ,
        ("GET", "/api/v1/incidents"): AccessRequirement.READ,
        ("GET", "/api/v1/incidents/{id}"): AccessRequirement.READ,
        ("GET", "/api/v1/actions"): AccessRequirement.READ,
        ("GET", "/api/v1/alerts"): AccessRequirement.READ,
        ("GET", "/api/v1/notifications"): AccessRequirement.READ,
        ("GET", "/api/v1/automation"): AccessRequirement.READ,
        ("GET", "/api/v1/maintenance"): AccessRequirement.READ,
        ("GET", "/api/v1/services/{id}/explain"): AccessRequirement.CREDENTIAL,
        ("GET", "/api/v1/services/{id}/{verb}"): AccessRequirement.CREDENTIAL,
        ("POST", "/api/v1/services/{id}/{verb}"): AccessRequirement.CREDENTIAL,
        ("POST", "/api/v1/services/{id}/reset"): AccessRequirement.CREDENTIAL,
        ("POST", "/api/v1/actions/{number}/approve"): AccessRequirement.CREDENTIAL,
        ("POST", "/api/v1/{subject}s/{number}/acknowledge"): AccessRequirement.CREDENTIAL,
        ("POST", "/api/v1/{subject}s/{number}/silence"): AccessRequirement.CREDENTIAL,
        ("PUT", "/api/v1/automation"): AccessRequirement.CREDENTIAL,
        ("POST", "/api/v1/maintenance"): AccessRequirement.CREDENTIAL,
        ("DELETE", "/api/v1/maintenance/{number}"): AccessRequirement.CREDENTIAL,
        ("POST", "/-/reload"): AccessRequirement.CREDENTIAL,
    },
}
NOT_THERE = {"{id}": "999", "{number}": "999", "{subject}": "incident", "{channel}": "none"}
SAID = "what-only-the-service-said"


def empty(program: str) -> web.Application:
    """One of the two applications with all its routes and nothing behind them."""
    app = create_application(AccessControl(ApiToken("t", None, None)), WebConfig(), ready=lambda: True)
    nothing = cast("Any", None)
    if program == "exporter":
        exporter_api.add_routes(app, nothing, nothing, nothing)
    else:
        webhook.add_routes(app, nothing, nothing, nothing)
        read_api.add_routes(app, nothing, nothing, nothing)
        write_api.add_routes(app, nothing, nothing, nothing, nothing)
        feishu_callback.add_routes(app, nothing, nothing)
        console.add_routes(app, nothing, nothing)
    return app


@pytest.mark.parametrize("program", ROUTES)
def test_the_table_has_every_route_and_only_reading_is_open(program: str) -> None:
    table = {
        (each, path): requirement
        for (method, path), requirement in ROUTES[program].items()
        for each in (("GET", "HEAD") if method == "GET" else (method,))
    }
    assert list_requirements(empty(program)) == table
    open_ones = {
        (method, path)
        for (method, path), requirement in ROUTES[program].items()
        if requirement in (AccessRequirement.PUBLIC, AccessRequirement.SCRAPE, AccessRequirement.READ)
    }
    changing = {route for route in open_ones if route[0] != "GET"}
    assert changing == ({("POST", "/webhook/feishu/{channel}")} if program == "remediator" else set())


async def test_an_application_with_a_route_without_a_requirement_does_not_start() -> None:
    app = create_application(AccessControl(ApiToken("t", None, None)), WebConfig(), ready=lambda: True)

    async def answer(_request: web.Request) -> web.Response:
        return web.Response()

    app.router.add_get("/open", answer)
    with pytest.raises(StartError, match="routes without an access requirement: GET /open, HEAD /open"):
        await web.AppRunner(app).setup()


def requests(program: str) -> Iterator[tuple[str, str, AccessRequirement]]:
    """Every route, of something that is not there, so that the right credential changes nothing."""
    for (method, path), requirement in ROUTES[program].items():
        verb = "restart" if method == "POST" else "logs"
        for name, value in {**NOT_THERE, "{verb}": verb}.items():
            path = path.replace(name, value)  # noqa: PLW2901
        yield method, path, requirement
        if method == "GET":
            yield "HEAD", path, requirement


@pytest.fixture
async def anyone() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        yield client


async def test_every_route_on_loopback_by_what_is_shown(loop: Loop, anyone: httpx.AsyncClient) -> None:
    await loop.start({"web": loop.service("web")})
    right = {"Authorization": f"Bearer {loop.stack.token}"}
    shown: dict[str, dict[str, str]] = {
        "none": {}, "empty": {"Authorization": "Bearer"}, "wrong": {"Authorization": f"Bearer {loop.stack.token}x"},
        "basic": {"Authorization": "Basic YWRtaW46YWRtaW4="}, "webhook": TOKEN, "right": right,
        "foreign": {**right, "Origin": "http://evil.test"}, "nonsense": {**right, "Origin": "http://["},
    }  # fmt: skip
    others = ("foreign", "nonsense")
    everyone, reading, token = set(shown), {"none", "right", *others}, {"right", *others}
    allowed = {
        AccessRequirement.PUBLIC: everyone, AccessRequirement.READ: reading, AccessRequirement.CREDENTIAL: token,
        AccessRequirement.WEBHOOK: {"webhook", *token},
    }  # fmt: skip
    for program in ROUTES:
        # Only the remediator has a token of its own for scrapes: the webhook's.
        allowed[AccessRequirement.SCRAPE] = everyone if program == "exporter" else {"webhook", *token}
        for method, path, requirement in requests(program):
            url = f"{loop.stack.url(program)}{path}"
            for name, headers in shown.items():
                body = {"content": b"[]"} if method in ("POST", "PUT") else {}
                answer = await anyone.request(method, url, headers=headers, **body)  # type: ignore[arg-type]
                may = name in allowed[requirement] and not (name in others and method not in ("GET", "HEAD"))
                may = may and not path.startswith("/webhook/feishu/")  # its credential is a signature
                assert answer.status_code != 500, (program, method, path, name)
                assert (answer.status_code not in (401, 403)) is may, (program, method, path, name, answer.text)
                assert loop.stack.token not in answer.text
    for name in ("exporter", "remediator"):
        assert loop.stack.token not in loop.stack.log_path(name).read_text()


async def test_head_sends_no_body(loop: Loop) -> None:
    """What follows the headers on a connection that stays open is the next response; no client hides a body here."""
    await loop.start({"web": loop.service("web")})
    for program, routes in ROUTES.items():
        address = urlsplit(loop.stack.url(program))
        paths = [path for method, path in routes if method == "GET"]
        for template in [*paths, "/api/v1/services/unknown", "/unknown"]:
            path = template.replace("{id}", "web").replace("{verb}", "status").replace("{number}", "999")
            for accept in ("", "Accept-Encoding: gzip\r\n", "Accept: application/openmetrics-text\r\n"):
                reader, writer = await asyncio.open_connection(address.hostname, address.port)
                common = f"Host: {address.netloc}\r\nAuthorization: Bearer {loop.stack.token}\r\n{accept}"
                writer.write(f"HEAD {path} HTTP/1.1\r\n{common}\r\n".encode())
                headers = await reader.readuntil(b"\r\n\r\n")
                assert headers.startswith(b"HTTP/1.1 "), (path, headers)
                assert b"transfer-encoding" not in headers.lower()
                writer.write(f"GET /-/healthy HTTP/1.1\r\n{common}Connection: close\r\n\r\n".encode())
                rest = await reader.read()
                assert rest.startswith(b"HTTP/1.1 200 OK\r\n"), (program, path, accept, rest[:200])
                assert rest.endswith(b"\r\n\r\nhealthy\n")
                writer.close()


async def test_open_answers_hold_nothing_that_a_service_or_a_command_said(
    loop: Loop, anyone: httpx.AsyncClient
) -> None:
    script = f"echo {SAID} >&2; touch {{alive}}"
    web_ = loop.service("web", script, host="here")
    web_["probe"]["command"]["run"] = ["sh", "-c", f"test -e {loop.folder}/web.alive || {{ echo {SAID}; exit 1; }}"]
    web_["control"]["command"]["logs"] = ["echo", SAID]
    await loop.start({"web": web_})
    await loop.kill("web")
    assert SAID in (await loop.stack.get("exporter", "/api/v1/services/web"))["last"]["message"]
    assert SAID in json.dumps(await loop.stack.get("exporter", "/api/v1/services"))
    open_ = (await anyone.get(f"{loop.stack.url('exporter')}/api/v1/services/web")).json()
    assert (open_["last"]["reason"], open_["last"]["message"]) == ("exit", None)
    await loop.fire("web")
    await loop.until_event("service_up")
    await loop.fire("web", status="resolved")
    await loop.until("recovered")
    whole = await loop.incident()
    assert {SAID in json.dumps(whole["actions"][0][part]) for part in ("output", "evidence")} == {True}
    assert SAID in (await loop.ask("GET", "/incidents/1")).text
    paths = {
        "exporter": ("/metrics", "/api/v1/services", "/api/v1/services/web"),
        "remediator": (
            "/", "/incidents/1", "/api/v1/incidents", "/api/v1/incidents/1", "/api/v1/actions", "/api/v1/alerts",
            "/api/v1/notifications",
        ),
    }  # fmt: skip
    for program, each in paths.items():
        for path in each:
            answer = await anyone.get(f"{loop.stack.url(program)}{path}")
            assert answer.status_code == 200, path
            assert SAID not in answer.text, f"{path}: {answer.text[: answer.text.find(SAID)][-300:]}"
    part = (await anyone.get(f"{loop.stack.url('remediator')}/api/v1/incidents/1")).json()
    assert part.keys() == whole.keys()
    (action,) = part["actions"]
    assert (action["state"], action["output"], action["why"], action["evidence"]) == ("succeeded", None, None, [])
    assert "defib incidents 1" in (await anyone.get(f"{loop.stack.url('remediator')}/incidents/1")).text


@pytest.fixture
async def stack(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Stack]:
    made = Stack(launcher, tmp_path)
    yield made
    await made.client.aclose()


async def test_the_first_start_writes_the_token_that_commands_find(stack: Stack, tmp_path: Path) -> None:
    config = stack.configuration({"services": {"web": {"probe": {"every": "1h", "tcp": {"address": "127.0.0.1:1"}}}}})
    stack.token_file.unlink()

    async def defib(*arguments: str) -> tuple[int, str]:
        argv = [sys.executable, "-m", "defib", *arguments, "--config", str(config)]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=200, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    status, said = await defib("automation", "off")
    assert status == 1
    assert f"there is no token file {stack.token_file}" in said
    assert "sudo -u defib" in said
    await stack.start_program("remediator")
    assert stat.S_IMODE(stack.token_file.stat().st_mode) == 0o600
    token = stack.token_file.read_text().strip()
    assert await defib("automation", "off") == (0, (await defib("automation"))[1])
    other = tmp_path / "other"
    other.touch(mode=0o600)
    other.write_text("an-other-token")
    status, said = await defib("automation", "on", "--token-file", str(other))
    assert (status, "HTTP 401" in said, "an-other" in said) == (1, True, False)
    other.write_text(token)
    assert (await defib("automation", "on", "--token-file", str(other)))[0] == 0
    other.chmod(0o644)
    status, said = await defib("incidents", "--token-file", str(other))
    assert (status, f"{other} has mode 0644" in said) == (1, True)
    # The file is what counts while it runs, and another start does not write over it.
    stack.token_file.write_text("one-of-our-own")
    assert (await defib("automation"))[0] == 0
    assert (await defib("automation", "on", "--token-file", str(other)))[0] == 1
    log = stack.log_path("remediator").read_text()
    assert token not in log
    assert "one-of-our-own" not in log


def test_a_remediator_whose_token_others_may_read_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"remediator: {{database: 'sqlite:///{tmp_path}/record.db'}}\n")
    (tmp_path / "token").write_text("s3cret-token")
    (tmp_path / "token").chmod(0o640)
    argv = [sys.executable, "-m", "defib", "remediator", "--config", str(tmp_path), "--listen", "127.0.0.1:0"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert f"{tmp_path}/token has mode 0640" in done.stderr
    assert "s3cret" not in done.stderr
    assert (tmp_path / "token").read_text() == "s3cret-token"
