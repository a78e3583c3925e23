"""What each caller of the programs may do: with no credential, a wrong one, and that of each role."""

import asyncio
import base64
import itertools
import json
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import bcrypt
import httpx
import pytest
import yaml
from aiohttp import web

import console
from defib.demo.launcher import Launcher
from defib.demo.stack import Stack
from exporter import api as exporter_api
from gateway import api as api_of_gateway
from gateway.health import add_health_routes
from gateway.proxy import Proxy
from remediator.chat import feishu_callback
from remediator.http import (
    access_api,
    events_api,
    gateway_api,
    heartbeats_api,
    overview_api,
    read_api,
    report_api,
    webhook,
    write_api,
)
from runtime.access.audit import write_to_log
from runtime.access.control import AccessControl, WebUsers
from runtime.access.roles import AccessRequirement
from runtime.access.tokens import ConfiguredTokens
from runtime.errors import StartError
from runtime.web import create_application, list_requirements
from runtime.webconfig import WebConfigFile
from tests.forked_defib import run_defib
from tests.integration.loop import TOKEN, Loop
from tests.support import NO_TLS, eventually

PUBLIC, UNCHECKED = AccessRequirement.PUBLIC, AccessRequirement.UNCHECKED
SCRAPE, WEBHOOK = AccessRequirement.SCRAPE, AccessRequirement.WEBHOOK
VIEWER, OPERATOR, ADMIN = AccessRequirement.VIEWER, AccessRequirement.OPERATOR, AccessRequirement.ADMIN
COMMON: dict[tuple[str, str], AccessRequirement] = {
    ("GET", "/-/healthy"): UNCHECKED,
    ("GET", "/-/ready"): UNCHECKED,
    ("GET", "/api/v1/identity"): VIEWER,
    ("GET", "/api/v1/access"): ADMIN,
    ("GET", "/metrics"): SCRAPE,
    ("POST", "/-/reload"): ADMIN,
}
ROUTES: dict[str, dict[tuple[str, str], AccessRequirement]] = {
    "exporter": {
        **COMMON,
        ("GET", "/metrics/healthchecks"): SCRAPE,
        ("GET", "/metrics/agents"): SCRAPE,
        ("GET", "/api/v1/sd/node-exporter"): SCRAPE,
        ("GET", "/probe"): AccessRequirement.TARGETS,
        ("PUT", "/api/v1/pauses"): OPERATOR,
        ("GET", "/api/v1/services"): VIEWER,
        ("GET", "/api/v1/services/{id}"): VIEWER,
        ("POST", "/api/v1/services/{id}/probe"): OPERATOR,
        ("GET", "/api/v1/hosts"): VIEWER,
        ("GET", "/api/v1/hosts/{name}"): VIEWER,
        ("GET", "/api/v1/heartbeats"): VIEWER,
        ("GET", "/api/v1/heartbeats/{id}"): OPERATOR,
        ("DELETE", "/api/v1/heartbeats/{id}"): OPERATOR,
        ("GET", "/api/v1/heartbeats/{id}/urls"): OPERATOR,
        ("GET", "/api/v1/hosts/{name}/logs"): OPERATOR,
        ("POST", "/api/v1/heartbeats/{id}/ping"): OPERATOR,
        ("GET", "/api/v1/events"): VIEWER,
    },
    "gateway": {
        **COMMON,
        ("*", "/{path}"): UNCHECKED,  # but a client's token
        ("GET", "/health"): UNCHECKED,
        ("GET", "/health/ready"): UNCHECKED,
        ("GET", "/status"): VIEWER,
        ("GET", "/api/v1/status"): VIEWER,
        ("PUT", "/api/v1/limits"): ADMIN,
        ("POST", "/api/v1/upstreams/{name}/reset"): ADMIN,
    },
    "remediator": {
        **COMMON,
        ("POST", "/webhook/feishu/{channel}"): UNCHECKED,  # but Feishu's signature
        ("POST", "/webhook/alertmanager"): WEBHOOK,
        ("GET", "/"): VIEWER,
        ("GET", "/services/{id}"): VIEWER,
        ("GET", "/services/{id}/checks"): VIEWER,
        ("GET", "/services/{id}/logs"): OPERATOR,
        ("POST", "/services/{id}/{button}"): OPERATOR,
        ("POST", "/services/{id}/components/{component}/restart"): OPERATOR,
        ("GET", "/incidents"): VIEWER,
        ("GET", "/incidents/{id}"): VIEWER,
        ("POST", "/incidents/{id}/{button}"): OPERATOR,
        ("GET", "/hosts"): VIEWER,
        ("GET", "/hosts/{name}"): VIEWER,
        ("GET", "/heartbeats"): VIEWER,
        ("GET", "/heartbeats/{id}"): VIEWER,
        ("GET", "/events"): VIEWER,
        ("GET", "/settings"): VIEWER,
        ("GET", "/gateway"): VIEWER,
        ("POST", "/gateway/queue"): ADMIN,
        ("POST", "/gateway/upstreams/{name}/limits"): ADMIN,
        ("POST", "/gateway/upstreams/{name}/reset"): ADMIN,
        ("GET", "/wall"): VIEWER,
        ("POST", "/settings/begin-maintenance"): OPERATOR,
        ("POST", "/settings/end-maintenance"): OPERATOR,
        ("POST", "/settings/test-channel"): OPERATOR,
        ("POST", "/settings/create-token"): ADMIN,
        ("POST", "/settings/automation-on"): ADMIN,
        ("POST", "/settings/automation-off"): ADMIN,
        ("POST", "/settings/end-session"): ADMIN,
        ("POST", "/settings/revoke-token"): ADMIN,
        ("GET", "/stream"): VIEWER,
        ("GET", "/static/{version}/{name}"): PUBLIC,
        ("POST", "/preferences"): VIEWER,
        ("GET", "/sign-in"): PUBLIC,
        ("POST", "/sign-in"): PUBLIC,
        ("POST", "/sign-in/token"): PUBLIC,
        ("GET", "/sign-in/{service}"): PUBLIC,
        ("GET", "/sign-in/{service}/callback"): PUBLIC,
        ("POST", "/sign-out"): VIEWER,
        ("GET", "/api/v1/overview"): VIEWER,
        ("GET", "/api/v1/hosts"): VIEWER,
        ("GET", "/api/v1/heartbeats"): VIEWER,
        ("GET", "/api/v1/heartbeats/{id}"): VIEWER,
        ("DELETE", "/api/v1/heartbeats/{id}"): OPERATOR,
        ("GET", "/api/v1/heartbeats/{id}/urls"): OPERATOR,
        ("POST", "/api/v1/heartbeats/{id}/ping"): OPERATOR,
        ("GET", "/api/v1/gateway"): VIEWER,
        ("PUT", "/api/v1/gateway/limits"): ADMIN,
        ("POST", "/api/v1/gateway/upstreams/{name}/reset"): ADMIN,
        ("GET", "/api/v1/report"): VIEWER,
        ("GET", "/api/v1/incidents"): VIEWER,
        ("GET", "/api/v1/incidents/{id}"): VIEWER,
        ("POST", "/api/v1/incidents/{number}/notes"): OPERATOR,
        ("GET", "/api/v1/actions"): VIEWER,
        ("GET", "/api/v1/alerts"): VIEWER,
        ("GET", "/api/v1/notifications"): VIEWER,
        ("GET", "/api/v1/events"): VIEWER,
        ("POST", "/api/v1/channels/{name}/test"): OPERATOR,
        ("GET", "/api/v1/automation"): VIEWER,
        ("GET", "/api/v1/maintenance"): VIEWER,
        ("GET", "/api/v1/services/{id}/explain"): VIEWER,
        ("GET", "/api/v1/services/{id}/{verb}"): OPERATOR,
        ("POST", "/api/v1/services/{id}/{verb}"): OPERATOR,
        ("POST", "/api/v1/services/{id}/components/{component}/restart"): OPERATOR,
        ("POST", "/api/v1/services/{id}/reset"): OPERATOR,
        ("POST", "/api/v1/services/{id}/continue-in-storm"): OPERATOR,
        ("POST", "/api/v1/actions/{number}/approve"): OPERATOR,
        ("POST", "/api/v1/{subject}s/{number}/acknowledge"): OPERATOR,
        ("POST", "/api/v1/{subject}s/{number}/silence"): OPERATOR,
        ("POST", "/api/v1/maintenance"): OPERATOR,
        ("DELETE", "/api/v1/maintenance/{number}"): OPERATOR,
        ("PUT", "/api/v1/automation"): ADMIN,
        ("GET", "/api/v1/tokens"): ADMIN,
        ("POST", "/api/v1/tokens"): ADMIN,
        ("DELETE", "/api/v1/tokens/{name}"): ADMIN,
        ("GET", "/api/v1/sessions"): ADMIN,
        ("DELETE", "/api/v1/sessions/{number}"): ADMIN,
        ("GET", "/api/v1/audit"): ADMIN,
    },
}
NOT_THERE = {
    "{id}": "999", "{path}": "none", "{number}": "999", "{subject}": "incident", "{channel}": "none", "{service}": "oidc", "{name}": "none",
    "services/999/{button}": "services/999/probe", "{button}": "acknowledge", "{version}": "0", "{component}": "none",
}  # fmt: skip
ROLES = ("viewer", "operator", "admin")
METRICS_TOKEN = "a-token-for-metrics-only"
SAID = "what-only-the-service-said"


def access_control() -> AccessControl:
    return AccessControl(WebUsers, ConfiguredTokens(lambda _: None), write_audit=write_to_log, now=lambda: 0)


def empty(program: str) -> web.Application:
    """One of the applications with all its routes and nothing behind them."""
    access = access_control()
    app = create_application(access, WebConfigFile(None), ready=lambda: True)
    nothing = cast("Any", None)
    if program == "exporter":
        exporter_api.add_routes(app, nothing, nothing, nothing, nothing)
    elif program == "gateway":
        proxy = Proxy(cast("Any", None), nothing, nothing, nothing, access)
        api_of_gateway.add_routes(app, api_of_gateway.GatewayApi(nothing, nothing, nothing, access, nothing), proxy)
        add_health_routes(app, nothing, nothing)
    else:
        webhook.add_routes(app, nothing, nothing, nothing)
        read_api.add_routes(app, nothing, nothing, nothing)
        overview_api.add_routes(app, nothing, nothing, nothing)
        events_api.add_routes(app, nothing, nothing)
        heartbeats_api.add_routes(app, nothing, nothing, nothing, nothing)
        gateway_api.add_routes(app, nothing, nothing, nothing)
        report_api.add_routes(app, nothing, nothing, nothing)
        write_api.add_routes(app, nothing, nothing, nothing, nothing)
        access_api.add_routes(app, nothing, nothing)
        feishu_callback.add_routes(app, nothing, nothing)
        parts = dict.fromkeys(
            (
                "database",
                "redact",
                "operations",
                "administration",
                "sign_in_services",
                "public_url",
                "snapshot",
                "gateway",
            )
        )
        console.add_pages(app, cast("Any", SimpleNamespace(access=access, **parts)))
    return app


@pytest.mark.parametrize("program", ROUTES)
def test_the_table_has_every_route(program: str) -> None:
    table = {
        (each, path): requirement
        for (method, path), requirement in ROUTES[program].items()
        for each in (("GET", "HEAD") if method == "GET" else (method,))
    }
    assert list_requirements(empty(program)) == table


async def test_an_application_with_a_route_without_a_requirement_does_not_start() -> None:
    app = create_application(access_control(), WebConfigFile(None), ready=lambda: True)

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
        yield "POST" if method == "*" else method, path, requirement
        if method == "GET":
            yield "HEAD", path, requirement


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def write_users(folder: Path, users: Mapping[str, str], **more: Any) -> Path:
    """Write a web configuration with users of these roles, each with their name as password."""
    path = folder / "web.yml"
    hashes = {name: bcrypt.hashpw(name.encode(), bcrypt.gensalt(4)).decode() for name in users}
    roles = {name: role for name, role in users.items() if role}
    path.write_text(yaml.safe_dump({"basic_auth_users": hashes, "roles": roles, **more}))
    return path


async def request_from(
    address: str, method: str, url: str, headers: dict[str, str], content: bytes | None = None
) -> httpx.Response:
    """Send a request from one of this machine's addresses: each has its own limit of refused credentials."""
    transport = httpx.AsyncHTTPTransport(verify=NO_TLS, local_address=address)
    async with (
        httpx.AsyncClient(transport=transport, timeout=120) as client,
        client.stream(method, url, headers=headers, content=content) as answer,
    ):
        if answer.headers.get("Content-Type") == "text/event-stream":  # without an end
            answer._content = await anext(answer.aiter_bytes(), b"")
        else:
            await answer.aread()
        return answer


@pytest.fixture
async def anyone() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=120) as client:
        yield client


async def start_with_users(loop: Loop, services: dict[str, Any] | None = None, **more: Any) -> None:
    """Start both programs with a user of each role, a metrics token, and the service `web`, or other ones."""
    users = write_users(loop.folder, {role: role for role in ROLES} | {"newcomer": ""})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ROUTES}
    services = {"web": loop.service("web")} if services is None else services
    await loop.start(services, access={"metrics_token": METRICS_TOKEN}, **more)


async def start_gateway(loop: Loop) -> None:
    """Start a gateway whose upstream no request reaches."""
    settings = {"url": loop.stack.url("gateway"), "upstreams": {"none": {"url": "http://127.0.0.1:1/v1"}}}
    (loop.folder / "config" / "gateway.yaml").write_text(yaml.safe_dump({"gateway": settings}))
    await loop.stack.start_program("gateway")


async def create_token(loop: Loop, name: str, role: str, **more: Any) -> str:
    created = await loop.ask("POST", "/api/v1/tokens", {"name": name, "role": role, **more})
    assert created.status_code == 201, created.text
    return str(created.json()["token"])


async def test_every_route_by_what_is_shown(loop: Loop) -> None:
    await start_with_users(loop)
    await start_gateway(loop)
    right = bearer(loop.stack.token)
    expired = await create_token(loop, "expired", "admin", expires_in="1s")
    revoked = await create_token(loop, "revoked", "admin")
    assert (await loop.ask("DELETE", "/api/v1/tokens/revoked")).status_code == 200
    tokens = {f"token of {role}": bearer(await create_token(loop, f"ci-{role}", role)) for role in ROLES}
    passwords = {f"password of {role}": basic(role, role) for role in ROLES}
    nobody: dict[str, dict[str, str]] = {
        "nothing": {}, "empty": {"Authorization": "Bearer"}, "wrong": bearer(f"{loop.stack.token}x"),
        "wrong user": {}, "not base64": {"Authorization": "Basic %%"},
        "other scheme": {"Authorization": "Digest x"}, "revoked": bearer(revoked), "expired": bearer(expired),
        "proxy": {"X-Remote-User": "admin"}, "name only": {"X-Defib-User": "admin"},
        "cookie": {"Cookie": "defib_session=fixed"},
    }  # fmt: skip
    shown: dict[str, tuple[str, dict[str, str]]] = {
        **{name: ("", headers) for name, headers in nobody.items()},
        "newcomer": ("viewer", basic("newcomer", "newcomer")),
        **{name: (name.split()[-1], headers) for name, headers in {**tokens, **passwords}.items()},
        "local token": ("admin", right), "metrics": ("metrics", bearer(METRICS_TOKEN)), "webhook": ("webhook", TOKEN),
        "foreign": ("", {**right, "Origin": "http://evil.test"}), "nonsense": ("", {**right, "Origin": "http://["}),
    }  # fmt: skip
    allowed: dict[AccessRequirement, set[str]] = {
        UNCHECKED: {"", "viewer", "operator", "admin", "metrics", "webhook"},
        PUBLIC: {"", "viewer", "operator", "admin", "metrics", "webhook"},
        SCRAPE: {"viewer", "operator", "admin", "metrics"},
        AccessRequirement.TARGETS: {"metrics", "admin"},
        WEBHOOK: {"webhook", "admin"},
        VIEWER: {"viewer", "operator", "admin"},
        OPERATOR: {"operator", "admin"},
        ADMIN: {"admin"},
    }
    without_record = {"expired": "", "revoked": "", **dict.fromkeys(tokens, ""), "webhook": ""}
    sources = (f"127.0.{number // 250 + 1}.{number % 250 + 1}" for number in itertools.count())
    await asyncio.sleep(1)  # for the token that expires
    for program in ROUTES:
        for method, path, requirement in requests(program):
            url = f"{loop.stack.url(program)}{path}"
            for name, (role, headers) in shown.items():
                as_role = without_record.get(name, role) if program != "remediator" else role
                body = b"[]" if method in ("POST", "PUT") else None
                source = next(sources)
                if name == "wrong user":
                    headers = basic(source, "admin")  # noqa: PLW2901 - a user has a limit, too
                answer = await request_from(source, method, url, headers, body)
                is_foreign = name in ("foreign", "nonsense")
                may = as_role in allowed[requirement]
                if is_foreign and requirement is not UNCHECKED:
                    may = method in ("GET", "HEAD")
                if path.startswith("/webhook/feishu/"):  # whose credential is a signature
                    assert answer.json()["error"]["code"] == "not_verified"
                    continue
                if (program, path) == (
                    "gateway",
                    "/none",
                ):  # whose credential is a client's token, and there are no clients
                    assert answer.status_code == (403 if is_foreign else 404)
                    continue
                where = (program, method, path, name, answer.status_code, answer.text[:200])
                assert answer.status_code < 500, where
                is_form = path in ("/sign-in", "/sign-in/token", "/sign-out") and method == "POST"
                assert is_form or (answer.status_code not in (401, 403)) is may, where
                if not may and answer.text and not is_foreign:
                    assert answer.json()["error"]["code"] in ("unauthorized", "expired", "forbidden"), where
                    assert answer.status_code == (403 if as_role else 401), where
                assert loop.stack.token not in answer.text
    for name in ("exporter", "remediator"):
        log = loop.stack.log_path(name).read_text()
        assert not [secret for secret in (loop.stack.token, expired, revoked, METRICS_TOKEN) if secret in log]


async def test_texts_in_bodies_can_be_stored(loop: Loop, anyone: httpx.AsyncClient) -> None:
    """JSON may have halves of surrogate pairs in any text: no change fails because of one, or is stored with it."""
    await loop.start({"web": loop.service("web")})
    lone = "a\ud800b"
    bodies: dict[tuple[str, str], list[dict[str, Any]]] = {
        ("POST", "/api/v1/tokens"): [{"name": lone, "role": "viewer"}, {"name": "a", "role": lone}],
        ("POST", "/api/v1/maintenance"): [
            {"scope": "service", "name": "web", "reason": lone, "for": "1m"}, {"scope": lone, "name": lone, "reason": "r"},
            {"scope": "service", "name": "web", "reason": "r", "until": lone},
        ],
        ("PUT", "/api/v1/automation"): [{"enabled": True, "reason": lone}],
        ("POST", "/api/v1/services/web/continue-in-storm"): [{"reason": lone}],
        ("POST", "/api/v1/services/web/restart"): [{"overrule": [lone]}, {"reason": lone}, {lone: lone}],
        ("POST", "/api/v1/incidents/1/notes"): [{"text": lone}],
        ("POST", "/api/v1/incidents/1/silence"): [{"for": lone}, {"for": "1h", "comment": lone}],
    }  # fmt: skip
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.incident)
    for (method, path), each in bodies.items():
        for body in each:
            url, headers = f"{loop.stack.url('remediator')}{path}", bearer(loop.stack.token)
            answer = await anyone.request(method, url, content=json.dumps(body), headers=headers)
            assert answer.status_code != 500, (path, body, answer.text)
            answer.text.encode()
    maintenance = (await loop.ask("GET", "/api/v1/maintenance")).json()["maintenance"]
    assert [entry["reason"] for entry in maintenance] == ["a?b"]
    assert "request_failed" not in loop.stack.log_path("remediator").read_text()


async def test_who_may_read_metrics(loop: Loop, anyone: httpx.AsyncClient) -> None:
    shown = {"nothing": {}, "wrong": bearer("x"), "webhook": TOKEN, "metrics": bearer(METRICS_TOKEN)}
    proxied = {"X-Forwarded-For": "10.9.8.7"}  # what a proxy on this machine adds

    async def read(program: str, headers: dict[str, str]) -> dict[str, int]:
        url = f"{loop.stack.url(program)}/metrics"
        return {name: (await anyone.get(url, headers={**headers, **own})).status_code for name, own in shown.items()}

    await loop.start({"web": loop.service("web")}, access={"metrics_token": METRICS_TOKEN})
    await start_gateway(loop)
    for program in ROUTES:
        assert await read(program, {}) == dict.fromkeys(shown, 200)  # on loopback, with no proxy between
        webhook_status = 403 if program == "remediator" else 401
        assert await read(program, proxied) == {"nothing": 401, "wrong": 401, "webhook": webhook_status, "metrics": 200}


async def test_head_sends_no_body(loop: Loop) -> None:
    """What follows the headers on a connection that stays open is the next response; no client hides a body here."""
    await loop.start({"web": loop.service("web")})
    await start_gateway(loop)
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


async def test_what_commands_printed_is_for_operators(loop: Loop, anyone: httpx.AsyncClient) -> None:
    (loop.folder / "said").write_text(SAID)
    web_ = loop.service("web", f"cat {loop.folder}/said; touch {{alive}}", host="here")
    web_["control"]["command"]["logs"] = ["cat", f"{loop.folder}/said"]
    await loop.start({"web": web_})
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_event("service_up")
    await loop.fire("web", status="resolved")
    await loop.until("recovered")
    viewer, operator = [bearer(await create_token(loop, role, role)) for role in ("viewer", "operator")]

    async def read(path: str, headers: dict[str, str]) -> httpx.Response:
        answer = await anyone.get(f"{loop.stack.url('remediator')}{path}", headers=headers)
        assert answer.status_code == 200, (path, answer.text)
        return answer

    whole = (await read("/api/v1/incidents/1", operator)).json()
    assert {SAID in json.dumps(whole["actions"][0][part]) for part in ("output", "evidence")} == {True}
    assert SAID in (await read("/incidents/1", operator)).text
    assert SAID in (await read("/api/v1/services/web/logs", operator)).text
    paths = (
        "/", "/incidents/1", "/api/v1/incidents", "/api/v1/incidents/1", "/api/v1/actions", "/api/v1/alerts",
        "/api/v1/notifications", "/api/v1/services/web/explain", "/api/v1/overview", "/api/v1/hosts",
        "/api/v1/report",
    )  # fmt: skip
    for path in paths:
        text = (await read(path, viewer)).text
        assert SAID not in text, f"{path}: {text[: text.find(SAID)][-300:]}"
    part = (await read("/api/v1/incidents/1", viewer)).json()
    assert part.keys() == whole.keys()
    (action,) = part["actions"]
    assert (action["state"], action["output"], action["why"], action["evidence"]) == ("succeeded", None, None, [])
    assert "defib incidents 1" in (await read("/incidents/1", viewer)).text


async def test_a_removed_user_and_another_token_are_refused_soon(loop: Loop, anyone: httpx.AsyncClient) -> None:
    await start_with_users(loop)
    await start_gateway(loop)
    for program in ROUTES:
        url = f"{loop.stack.url(program)}/api/v1/identity"
        assert (await anyone.get(url, headers=basic("operator", "operator"))).json()["role"] == "operator"
    write_users(loop.folder, {"viewer": "viewer", "operator": "viewer"})
    loop.stack.token_file.write_text("another-token")
    for program in ROUTES:
        url = f"{loop.stack.url(program)}/api/v1/identity"

        async def changed(url: str = url) -> bool:
            answers = [
                await anyone.get(url, headers=headers)
                for headers in (
                    basic("admin", "admin"), basic("operator", "operator"), bearer(loop.stack.token),
                    bearer("another-token"),
                )
            ]  # fmt: skip
            seen = [(answer.status_code, answer.json().get("role")) for answer in answers]
            return seen == [(401, None), (200, "viewer"), (401, None), (200, "admin")]

        await eventually(changed)
    # An invalid file changes nothing.
    (loop.folder / "new.yml").write_text("basic_auth_users: {viewer: nonsense}")
    (loop.folder / "new.yml").replace(loop.folder / "web.yml")  # no program may read it half written

    async def is_logged() -> bool:
        return "web_configuration_refused" in loop.stack.log_path("remediator").read_text()

    await eventually(is_logged)
    answer = await anyone.get(f"{loop.stack.url('remediator')}/api/v1/identity", headers=basic("viewer", "viewer"))
    assert answer.json() == {"name": "viewer", "role": "viewer", "means": "password"}


@pytest.fixture
async def stack(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Stack]:
    made = Stack(launcher, tmp_path)
    yield made
    await made.client.aclose()


async def test_the_first_start_writes_the_token_that_commands_find(stack: Stack, tmp_path: Path) -> None:
    config = stack.configuration({"services": {"web": {"probe": {"every": "1h", "tcp": {"address": "127.0.0.1:1"}}}}})
    stack.token_file.unlink()

    async def defib(*arguments: str) -> tuple[int, str]:
        done = await asyncio.to_thread(run_defib, *arguments, "--config", str(config))
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


def test_check_validates_a_web_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{}")
    users = write_users(tmp_path, {"ann": "admin"}).rename(tmp_path / "users")

    def check() -> tuple[int, str]:
        argv = [sys.executable, "-m", "defib", "check", "--config", str(tmp_path), "--web.config.file", str(users)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    users.chmod(0o600)
    assert check() == (0, "")
    users.chmod(0o666)
    assert check()[0] == 0
    assert "others can change it, and make themselves admin" in check()[1]
    users.write_text(users.read_text() + "roles: {}\n")
    status, said = check()
    assert (status, "duplicate key 'roles'" in said) == (1, True)
