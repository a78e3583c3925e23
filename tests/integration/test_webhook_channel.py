"""The `webhook` channel against a real HTTP server: the JSON schema, retries, rejections, commands."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from defib.demo.feishu import FeishuSimulator
from remediator.clients.alerts import Alert
from remediator.incidents import intake
from remediator.notifications import sender
from remediator.notifications.channels import http
from tests.integration import peers
from tests.integration.sender_harness import SenderHarness
from tests.integration.test_notify_command import defib
from tests.support import eventually, inventory_of, leaves_the_loop_free, load_problems, write

TOKEN = "s3cr3t-of-the-hook"


@dataclass
class Hook:
    """An HTTP server that stores what it receives, and responds with `responses` first and then with 204."""

    port: int = 0
    requests: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    responses: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?key=u7l-t0ken"

    @property
    def bodies(self) -> list[Any]:
        return [body for _, body in self.requests]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((dict(request.headers), json.loads(await request.read())))
        self.times.append(time.monotonic())
        response = self.responses.pop(0) if self.responses else 204
        if response == "hang":
            await asyncio.sleep(5)
        if response == "endless":
            stream = web.StreamResponse(status=503)
            await stream.prepare(request)
            while True:
                await stream.write(b"x" * 65536)
        if isinstance(response, tuple):
            status, headers, text = response
            return web.Response(status=status, headers=headers, text=text)
        return web.Response(status=response if isinstance(response, int) else 500)


@pytest.fixture
async def hook() -> AsyncIterator[Hook]:
    server = Hook()
    async with peers.web_server(server.handle) as port:
        server.port = port
        yield server


def configuration(hook: Hook, **notify: Any) -> dict[str, Any]:
    probe, control = {"command": {"run": ["true"]}}, {"command": {"restart": ["true"]}}
    channel = {"webhook": {"url": hook.url, "headers": {"Authorization": f"Bearer {TOKEN}"}}}
    return {
        "hosts": {"h": {"address": "h", "shell": "local"}},
        "services": {"web": {"name": "Web page", "host": "h", "probe": probe, "control": control}},
        "notify": {
            "language": "en", "timezone": "UTC", "channels": {"hook": channel}, "routes": [{"channels": ["hook"]}],
            **notify,
        },
    }  # fmt: skip


@pytest.fixture
async def harness(tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SenderHarness]:
    monkeypatch.setattr(sender, "FIRST_RETRY", 0.05)
    inventory = (await asyncio.to_thread(inventory_of, tmp_path / "config", configuration(hook))).inventory
    harness = await asyncio.to_thread(SenderHarness, tmp_path, FeishuSimulator(), inventory)
    await harness.open()
    yield harness
    await harness.close()
    await harness.client.aclose()
    await asyncio.to_thread(harness.database.close)


def alert(name: str, status: Any = "firing", **labels: str) -> Alert:
    labels = {"alertname": name, "severity": "critical", **labels}
    annotations = {"summary": "no response", "summary_zh": "无响应"}
    return Alert(f"{name}{labels.get('instance', '')}", "1", "", status, labels, annotations)


async def fire(harness: SenderHarness, name: str, status: Any = "firing", **labels: str) -> None:
    await deliver(harness, alert(name, status, **labels))


async def deliver(harness: SenderHarness, *alerts: Alert) -> None:
    await harness.database.write(intake.receive_alerts, alerts)
    harness.sender.wake()


async def test_an_incident_is_posted_as_json(harness: SenderHarness, hook: Hook) -> None:
    await fire(harness, "ServiceDown", service="web", host="h")
    await eventually(harness.settled)
    ((headers, body),) = hook.requests
    assert (headers["Content-Type"], headers["Authorization"]) == ("application/json", f"Bearer {TOKEN}")
    (item,) = body.pop("notifications")
    assert body.pop("id")
    text = body.pop("text")
    assert text[:3] == ["Service: Web page (web)", "Host: h", "Severity: critical"]
    assert body == {
        "version": 1,
        "form": "one",
        "state": "down",
        "severity": "critical",
        "title": "Service down: Web page",
        "omitted": 0,
    }
    assert item.pop("since").endswith("Z")
    assert item == {
        "state": "down",
        "severity": "critical",
        "service": {"id": "web", "name": "Web page"},
        "host": "h",
        "incident": 1,
        "labels": {"alertname": "ServiceDown", "severity": "critical", "service": "web", "host": "h"},
        "annotations": {"summary": "no response"},
        "firing": ["ServiceDown"],
        "duration_seconds": None,
        "probe": None,
        "decision": None,
        "acknowledged_by": None,
        "acknowledged_at": None,
        "recovered_by": None,
        "links": {},
    }
    (row,) = await harness.rows()
    assert (row.state, row.response, row.card) == ("sent", "HTTP 204", 0)


async def test_several_notifications_are_one_message(harness: SenderHarness, hook: Hook) -> None:
    for number in range(3):
        await fire(harness, "DiskFull", instance=f"n{number}", secret="hunter2-secret")
    await eventually(harness.settled)
    (body,) = hook.bodies
    assert (body["form"], body["state"], body["title"]) == ("group", "alert", "Alert × 3: DiskFull")
    assert [each["labels"]["instance"] for each in body["notifications"]] == ["n0", "n1", "n2"]
    assert {each["service"] for each in body["notifications"]} == {None}
    assert "hunter2-secret" not in str(body)
    assert not set("\x01\x02\x03") & set("".join([body["title"], *body["text"]]))
    await fire(harness, "DiskFull", "resolved", instance="n1")
    await eventually(harness.settled)
    assert [hook.bodies[1][name] for name in ("form", "state", "title")] == [
        "one", "alert_over", "Alert resolved: DiskFull",
    ]  # fmt: skip


async def test_a_message_is_no_larger_than_its_limit(
    harness: SenderHarness, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remediator.notifications.channels.webhook.BODY_LIMIT", 10_000)
    await deliver(harness, *(alert("DiskFull", instance=f"n{number}", padding="x" * 300) for number in range(40)))
    await eventually(harness.settled)
    (body,) = hook.bodies
    assert len(body["notifications"]) + body["omitted"] == 40
    assert 0 < body["omitted"] < 40


@pytest.mark.parametrize(
    ("responses", "state", "requests", "response"),
    [
        ([200], "sent", 1, "HTTP 200"),
        ([429], "sent", 2, "HTTP 204"),
        ([500, 503], "sent", 3, "HTTP 204"),
        (["endless"], "sent", 2, "HTTP 204"),
        ([(404, {}, "no such\n hook")], "dead", 1, "HTTP 404: no such hook"),
        ([401], "dead", 1, "HTTP 401"),
        ([(302, {"Location": "/elsewhere"}, "")], "dead", 1, "HTTP 302: redirects are not followed"),
        ([(400, {}, f"bad: {TOKEN} hunter2-secret")], "dead", 1, f"HTTP 400: bad: {TOKEN} ***"),
    ],
)
async def test_the_result_of_a_response(
    harness: SenderHarness, hook: Hook, responses: list[Any], state: str, requests: int, response: str
) -> None:
    hook.responses = list(responses)
    await harness.notify(1)
    await eventually(harness.settled)
    (row,) = await harness.rows()
    assert (row.state, row.tries, row.response) == (state, requests, response)
    # A receiver can recognize a message that it received before.
    assert len({body["id"] for body in hook.bodies}) == 1


@pytest.mark.parametrize("header", ["1.2", "a date"])
async def test_retry_after_is_respected(harness: SenderHarness, hook: Hook, header: str) -> None:
    # Dates have whole seconds: this is between one and three seconds from now.
    value = formatdate(time.time() + 3, usegmt=True) if header == "a date" else header
    hook.responses = [(503, {"Retry-After": value}, "")]
    await harness.notify(1)
    await eventually(harness.settled)
    first, second = hook.times
    assert second - first > 1.1


async def test_a_timeout_is_retried(harness: SenderHarness, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "DEADLINE", 0.3)
    hook.responses = ["hang"]
    await harness.notify(1)
    await eventually(harness.settled)
    assert [(row.state, row.tries) for row in await harness.rows()] == [("sent", 2)]


async def test_a_server_that_is_down_delays_and_loses_nothing(harness: SenderHarness, hook: Hook) -> None:
    notify = harness.inventory.notify
    options = notify.channels["hook"].options
    broken = type(options).model_validate({"url": "http://127.0.0.1:1/hook"})

    def with_options(new: Any) -> None:
        channel = notify.channels["hook"].model_copy(update={"webhook": new})
        changed = notify.model_copy(update={"channels": {"hook": channel}})
        harness.inventory = harness.inventory.model_copy(update={"notify": changed})

    with_options(broken)
    await harness.notify(1)

    async def was_tried() -> bool:
        return bool((await harness.rows())[0].response == "cannot connect to 127.0.0.1:1")

    await eventually(was_tried)
    with_options(options)
    harness.sender.wake()
    await eventually(harness.settled)
    assert len(hook.requests) == 1


async def test_the_rate_is_limited(harness: SenderHarness, hook: Hook) -> None:
    for number in range(15):
        await harness.notify(number)
    await eventually(harness.settled)
    assert max(sum(1 for at in hook.times if start <= at < start + 0.9) for start in hook.times) <= 10


async def test_commands(tmp_path: Path, hook: Hook) -> None:
    await asyncio.to_thread((tmp_path / "defib.yaml").write_text, yaml.safe_dump(configuration(hook)))
    assert await defib(tmp_path, "notify", "test") == (0, "hook: HTTP 204\n", "")
    (body,) = hook.bodies
    assert (body["state"], body["severity"], body["form"]) == ("test", "info", "one")
    assert [each["state"] for each in body["notifications"]] == ["test"]
    hook.responses = [(403, {}, f"wrong token {TOKEN}")]
    assert await defib(tmp_path, "notify", "test", "hook") == (1, "hook: HTTP 403: wrong token ***\n", "")
    assert (await defib(tmp_path, "check"))[0] == 0
    status, shown, _ = await defib(tmp_path, "check", "--show")
    assert status == 0
    assert TOKEN not in shown
    assert "u7l-t0ken" not in shown


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("{}", "url: is missing"),
        ("{url: ftp://x}", "url: is not a URL"),
        ("{url: http://x/, headers: {'A B': x}}", "headers.A B"),
        ('{url: http://x/, headers: {A: "x\\ny"}}', "must contain only printable ASCII characters"),
        ("{url: http://x/, headers: {content-type: text/plain}}", "is set by Defib and cannot be configured"),
        ("{url: http://x/, secret: x}", "unknown key"),
    ],
)
def test_invalid_options_are_errors(tmp_path: Path, options: str, error: str) -> None:
    errors = load_problems(write(tmp_path, a=f"notify: {{channels: {{a: {{webhook: {options}}}}}}}"))
    assert any(error in each for each in errors), errors


def test_a_place_is_a_url_with_its_headers(tmp_path: Path) -> None:
    hook = {"url": "http://x/"}
    channels = {
        "a": {"webhook": hook}, "again": {"webhook": hook}, "tenant": {"webhook": {**hook, "headers": {"X-Tenant": "2"}}},
    }  # fmt: skip
    written = {"notify": {"channels": channels, "routes": [{"channels": list(channels)}]}}
    assert inventory_of(tmp_path, written).inventory.notify.channels_for({}, "down") == ["a", "tenant"]


async def test_an_accepted_message_is_not_sent_again_if_the_body_cannot_be_read(
    harness: SenderHarness, hook: Hook
) -> None:
    hook.responses = [(200, {"Content-Encoding": "gzip"}, "this is not gzip")]
    await harness.notify(1)
    await eventually(harness.settled)
    assert [row.response for row in await harness.rows()] == ["HTTP 200"]
    assert len(hook.requests) == 1


async def test_alerts_with_much_text_do_not_block_the_event_loop(harness: SenderHarness) -> None:
    await leaves_the_loop_free(harness.send_long_alerts)
    assert {row.state for row in await harness.rows()} == {"sent"}
