"""The page of the gateway: a real gateway before a stand-in for a model API, the console, and a real browser."""

import asyncio
import itertools
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import yaml
from aiohttp import web
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, expect

from tests.integration import peers
from tests.integration.loop import Loop
from tests.integration.model_api import ModelApi
from tests.integration.past_samples import start_prometheus
from tests.integration.test_access import basic, write_users
from tests.integration.test_console import MODES, NAMELESS_CELLS, Window, browser, window
from tests.support import NO_TLS, eventually

__all__ = ["browser"]  # a fixture
pytestmark = pytest.mark.needs("sshd", "chromium")
CLIENTS = ("batch", "coder", "idle")
HOSTILE_NAME = "<img src=x onerror=alert(1)>\u202e"
COUNTS = {"urgent": 0, "high": 0, "normal": 3, "low": 0}
TOTALS = {"requests": 9, "answered": 7, "limited": 1, "refused": 1, "errors": 0, "cancelled": 0}
UPSTREAM: dict[str, Any] = {
    "provider": "p", "rate_per_minute": 45.0, "base_rate_per_minute": 60.0, "requests_in_window": 45,
    "requests_available": 0, "tokens_per_minute": None, "tokens_in_window": 0, "burst": 4, "concurrency": None,
    "in_flight": 0,
    "queue": COUNTS, "queue_size": 500, "when_full": "reject", "retreat": "steady", "paused_seconds": 0.0,
    "failing": False, "sent_last_minute": {"a": 44, "": 1}, "latency_seconds": {"p50": 0.5, "p95": None},
}  # fmt: skip
CLIENT: dict[str, Any] = {
    "priority": "normal", "share": 1.0, "waiting": 3, "queue": COUNTS, "in_flight": 0, "sent_last_minute": 44,
    "today": {"requests": 9, "tokens": 1234567}, "budget": {"requests": None, "tokens": None}, "totals": TOTALS,
}  # fmt: skip
STATUS: dict[str, Any] = {
    "started_at": "2026-01-01T00:00:00Z", "uptime_seconds": 60.0, "totals": {**TOTALS, "passed_through": 0},
    "upstreams": {"api": UPSTREAM}, "clients": {"a": CLIENT},
}  # fmt: skip


class Served:
    """The console and a gateway, whose clients send requests."""

    def __init__(self, loop: Loop, api: ModelApi) -> None:
        self.loop, self._api = loop, api
        self._sent: list[asyncio.Task[Any]] = []
        base = loop.stack.url("gateway")
        self._client = httpx.AsyncClient(verify=NO_TLS, base_url=base, trust_env=False, timeout=300)

    async def start(self, **more: Any) -> None:
        """Start both; the gateway has a rate of 5 a minute."""
        await start_console(
            self.loop,
            url=self.loop.stack.url("gateway"),
            default="api",
            upstreams={"api": {"url": self._api.url, "rate": "5/min", **more.pop("upstream", {})}},
            queue={"max_wait": "5m", "low_timeout": "5m"},
            clients={name: {"token": f"t-{name}"} for name in CLIENTS} | {"idle": {"token": "t-idle", "share": 2}},
            **more,
        )
        await self.loop.stack.start_program("gateway")

    def send(self, client: str, number: int = 1, **headers: str) -> list[asyncio.Task[httpx.Response]]:
        sent = [asyncio.create_task(self._chat(client, headers)) for _ in range(number)]
        self._sent += sent
        return sent

    async def _chat(self, client: str, headers: dict[str, str]) -> httpx.Response:
        named = {"Authorization": f"Bearer t-{client}", **{key.replace("_", "-"): headers[key] for key in headers}}
        return await self._client.post("/v1/chat/completions", json={"model": "m", "messages": []}, headers=named)

    async def use_up(self) -> list[asyncio.Task[httpx.Response]]:
        """Use the minute: 4 requests of one client and 1 of another; then 3 and 1 wait, which are returned."""
        await asyncio.gather(*self.send("batch", 4), *self.send("coder"))
        waiting = [*self.send("batch", 3), *self.send("coder", X_Priority="urgent")]
        await eventually(lambda: self.is_waiting(4))
        return waiting

    async def status(self) -> Any:
        return (await self.loop.stack.get("gateway", "/api/v1/status")) or {}

    async def is_waiting(self, number: int) -> bool:
        return bool(sum((await self.status())["upstreams"]["api"]["queue"].values()) == number)

    async def close(self) -> None:
        for each in self._sent:
            each.cancel()
        await asyncio.gather(*self._sent, return_exceptions=True)
        await self._client.aclose()


async def start_console(loop: Loop, **gateway: Any) -> None:
    users = write_users(loop.folder, {role: role for role in ("viewer", "operator", "admin")})
    loop.stack.options = {"remediator": ["--web.config.file", str(users)]}
    more = {"remediator": gateway.pop("remediator", None)}
    await loop.start({}, automatic=False, gateway=gateway, **more)


@pytest.fixture
async def served(loop: Loop) -> AsyncIterator[Served]:
    api = ModelApi()
    await api.start()
    made = Served(loop, api)
    yield made
    await made.close()
    await api.stop()


def row(opened: Window, client: str) -> Locator:
    return opened.page.locator("#live-part tbody tr", has_text=client)


async def open_page(opened: Window, user: str) -> None:
    await opened.sign_in(user)
    await opened.page.get_by_role("link", name="Gateway").click()
    await expect(opened.page.locator("#live-part")).to_have_attribute("data-state", "answers")


async def test_the_page_shows_live_who_uses_up_the_rate(served: Served, browser: Browser) -> None:
    await served.start()
    async with window(browser, served.loop) as viewer:
        await open_page(viewer, "viewer")
        page, live = viewer.page, viewer.page.locator("#live-part")
        await expect(live).to_contain_text("Queue: 0 of 500")
        await expect(row(viewer, "batch")).to_contain_text("0")
        await served.use_up()
        # Without a reload.
        await expect(row(viewer, "batch")).to_contain_text("4 (80 %)")
        await expect(row(viewer, "batch")).to_contain_text("Normal 3")
        await expect(row(viewer, "coder")).to_contain_text("1 (20 %)")
        await expect(row(viewer, "coder")).to_contain_text("Urgent 1")
        await expect(live).to_contain_text("Queue: 4 of 500")
        await expect(live).to_contain_text("5 of 5")
        names = await live.locator("tbody strong").all_inner_texts()
        assert names == ["batch", "coder", "idle"]  # the one that uses most is the first
        await expect(page.locator(".count", has_text="answered").locator("b")).to_have_text("5")
        served.send("idle", 2)
        await expect(row(viewer, "idle")).to_contain_text("Normal 2")
        await viewer.keep("gateway")
    plain = (await served.loop.ask("GET", "/gateway")).text  # without scripts
    assert all(text in plain for text in ("4 (80 %)", "Normal 3", "Queue: 6 of 500", "<h2>Limits</h2>"))
    status = (await served.loop.ask("GET", "/api/v1/gateway")).json()
    batch = status["clients"]["batch"]
    assert (batch["waiting"], batch["queue"]["normal"], batch["sent_last_minute"], batch["in_flight"]) == (3, 3, 4, 0)
    assert (batch["today"]["requests"], batch["totals"]["answered"]) == (7, 4)
    assert status["upstreams"]["api"]["sent_last_minute"] == {"batch": 4, "coder": 1}
    assert 0 < status["upstreams"]["api"]["latency_seconds"]["p95"] < 30
    assert (status["totals"]["requests"], status["totals"]["answered"]) == (5, 5)


async def test_an_admin_changes_limits_and_what_was_refused_stays(served: Served, browser: Browser) -> None:
    await served.start(upstream={"tokens": "100000/min"})
    changes: list[Any] = []

    async def is_audited() -> bool:
        audit = (await served.loop.ask("GET", "/api/v1/audit")).json()["audit"]
        changes[:] = [each for each in audit if "gateway" in each["event"]]
        return len(changes) == 4

    async with window(browser, served.loop) as admin:
        await open_page(admin, "admin")
        page, limits = admin.page, admin.page.locator("#limits")
        waiting = await served.use_up()
        await expect(limits).to_contain_text("last until the gateway loads its configuration again")
        rate = limits.locator("input[name=rate]")
        await expect(rate).to_have_value("5/min")
        await rate.fill("1000 a minute")
        await expect(row(admin, "batch")).to_contain_text("Normal 3")  # updates do not touch what is being entered
        await limits.get_by_role("button", name="Change api", exact=True).click()
        await expect(limits.get_by_role("alert")).to_contain_text("'1000 a minute' is not a rate")
        size = limits.locator("input[name=queue_size]")
        await size.fill("1")
        await limits.get_by_role("button", name="Change the queue").click()
        await expect(limits.get_by_role("alert")).to_contain_text("More requests wait than the queue would have places")
        served.send("idle")
        await expect(row(admin, "idle")).to_contain_text("Normal 1")  # updated since
        await expect(size).to_have_value("1")
        await admin.keep("gateway-refused")
        await rate.fill("1000/min")
        await limits.locator("input[name=tokens]").fill("")
        await limits.locator("input[name=burst]").fill("500")
        await limits.locator("input[name=concurrency]").fill("7")
        await limits.get_by_role("button", name="Change api", exact=True).click()
        answers = await asyncio.wait_for(asyncio.gather(*waiting), 30)  # instead of after a minute
        assert [each.status_code for each in answers] == [200] * 4
        await expect(rate).to_have_value("1000/min")
        await expect(limits.get_by_role("alert")).to_have_count(0)
        await size.fill("20")
        await limits.locator("select").select_option("drop-lowest")
        await limits.get_by_role("button", name="Change the queue").click()
        await expect(page.locator("#live-part")).to_contain_text("Queue: 0 of 20")
        await limits.get_by_role("button", name="Return api to its base rate").click()
        await eventually(is_audited, 30)
        admin.expect_faults("409")
    api = (await served.status())["upstreams"]["api"]
    found = [api[name] for name in ("base_rate_per_minute", "tokens_per_minute", "burst", "concurrency", "when_full")]
    assert found == [1000, None, 500, 7, "drop-lowest"]
    assert [(each["event"], each["outcome"], each["name"]) for each in reversed(changes)] == [
        ("change gateway limits", "refused", "admin"), ("change gateway limits", "done", "admin"),
        ("change gateway limits", "done", "admin"), ("reset gateway rate", "done", "admin"),
    ]  # fmt: skip
    assert changes[2]["detail"] == (
        '{"upstreams":{"api":{"rate":"1000/min","tokens":null,"burst":500,"concurrency":7}}}'
    )


async def test_only_an_admin_changes_limits(served: Served, browser: Browser) -> None:
    await served.start()
    for user in ("viewer", "operator"):
        async with window(browser, served.loop) as opened:
            await open_page(opened, user)
            await expect(opened.page.locator("main form[method=post]")).to_have_count(0)
            await expect(opened.page.locator("#limits")).to_contain_text("5/min")
            csrf = await opened.page.locator("input[name=csrf]").first.get_attribute("value")
            for path in ("gateway/queue", "gateway/upstreams/api/limits", "gateway/upstreams/api/reset"):
                forged = await opened.page.request.post(
                    f"{opened.url}{path}",
                    form={"csrf": csrf or "", "rate": "9/min"},
                    headers={"Origin": opened.url[:-1]},
                )
                assert forged.status == 403, path
    url, body = f"{served.loop.stack.url('remediator')}/api/v1/gateway", {"upstreams": {"api": {"rate": "9/min"}}}
    client = served.loop.stack.client
    assert (await client.get(url, headers=basic("viewer", "viewer"))).status_code == 200
    for user, status in (("viewer", 403), ("operator", 403), ("admin", 200)):
        answer = await client.put(f"{url}/limits", json=body, headers=basic(user, user))
        assert answer.status_code == status, user
        reset = await client.post(f"{url}/upstreams/api/reset", headers=basic(user, user))
        assert reset.status_code == status, user
    assert (await served.status())["upstreams"]["api"]["base_rate_per_minute"] == 9
    for path, code in (("limits", "bad_request"), ("upstreams/other/reset", "not_found")):
        method, sent = ("PUT", {"queue_size": -1}) if path == "limits" else ("POST", None)
        refused = await served.loop.ask(method, f"/api/v1/gateway/{path}", sent)
        assert refused.json()["error"]["code"] == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_gateway_that_is_gone_is_masked_within_seconds(
    served: Served, browser: Browser, number: signal.Signals
) -> None:
    await served.start()
    pid = served.loop.stack.pids["gateway"]
    async with window(browser, served.loop) as admin:
        await open_page(admin, "admin")
        page, live = admin.page, admin.page.locator("#live-part")
        await asyncio.gather(*served.send("batch", 3))
        await expect(row(admin, "batch")).to_contain_text("3 (100 %)")
        began = time.monotonic()
        await served.loop.launcher.kill(pid, number)
        await expect(live).to_contain_text("The gateway has not answered since")
        assert time.monotonic() - began < 20  # on a busy machine
        await expect(live).not_to_contain_text("100 %")
        await expect(page.locator("#limits")).to_have_text("")
        await admin.keep("gateway-gone")
        refused = await served.loop.ask("GET", "/api/v1/gateway")
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "gateway_unreachable")
        changed = await served.loop.ask("PUT", "/api/v1/gateway/limits", {"queue_size": 7})
        assert (changed.status_code, changed.json()["error"]["code"]) == (503, "gateway_unavailable")
        if number == signal.SIGKILL:
            await served.loop.stack.start_program("gateway")
        else:
            await served.loop.launcher.kill(pid, signal.SIGCONT)
        await expect(row(admin, "batch")).to_be_visible()
        await expect(page.locator("#limits input[name=rate]")).to_have_value("5/min")  # all of the page is back


def wild_answers() -> Iterator[tuple[str, Any]]:
    yield "nothing", {}
    yield "a list", [STATUS]
    yield "text", b"<html>"
    yield "huge", b'{"x": "' + b"x" * 3_000_000 + b'"}'
    yield "deep", b"[" * 100_000
    for name, value in (
        ("wrong type", "45"), ("negative", -1), ("endless", 1e300), ("big", 10**400), ("list", [1]), ("null", None),
    ):  # fmt: skip
        yield name, STATUS | {"upstreams": {"api": UPSTREAM | {"rate_per_minute": value}}}
    yield "not a number", b'{"started_at": NaN}'
    yield "state", STATUS | {"upstreams": {"api": UPSTREAM | {"retreat": HOSTILE_NAME}}}
    yield "long name", STATUS | {"clients": {"x" * 101: CLIENT}}
    yield "surrogate", STATUS | {"clients": {"\ud800": CLIENT}}
    yield "time", STATUS | {"started_at": "yesterday"}


async def test_answers_that_are_not_a_gateways(loop: Loop) -> None:
    """Or of one that lies: the page says so, or shows what it can, as text."""
    answers = dict(wild_answers())
    said: dict[str, Any] = {"": STATUS}

    async def answer(_request: web.Request) -> web.Response:
        (body,) = said.values()
        return web.Response(body=body) if isinstance(body, bytes) else web.json_response(body)

    async with peers.web_server(answer) as port:
        await start_console(loop, url=f"http://127.0.0.1:{port}", upstreams={"api": {"url": "http://x/v1"}})

        async def read(body: Any) -> str:
            said[""] = body
            await asyncio.sleep(1.1)  # the last answer is shared for so long
            page = await loop.ask("GET", "/gateway")
            assert page.status_code == 200, page.text
            return page.text

        assert "44 (98 %)" in await read(STATUS)
        for name, body in answers.items():
            page = await read(body)
            assert 'data-state="unavailable"' in page, name
            assert "44 (98 %)" not in page, name
            assert len(page) < 50_000, name
        many = {f"c{number}": CLIENT for number in range(2000)}
        page = await read(STATUS | {"clients": many, "upstreams": {HOSTILE_NAME: UPSTREAM}})
        assert "&lt;img src=x" in page
        assert "<img src=x" not in page
        assert "\u202e" not in page
        assert "and 1800 more" in page


async def test_no_answer_shows_the_token(loop: Loop) -> None:
    """A server that is no gateway may repeat the headers of the request in its error."""
    received: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        received.append(request.headers["Authorization"])
        return web.json_response({"error": {"code": "x", "message": f"what is {received[-1]}?"}}, status=500)

    async with peers.web_server(answer) as port:
        await start_console(loop, url=f"http://127.0.0.1:{port}", upstreams={"api": {"url": "http://x/v1"}})
        base = "/api/v1/gateway"
        for method, path in (("GET", "/gateway"), ("GET", base), ("POST", f"{base}/upstreams/api/reset")):
            shown = (await loop.ask(method, path)).text
            assert "what is Bearer ***?" in shown, path
            assert received[-1].removeprefix("Bearer ") not in shown, path


async def test_viewers_share_one_reading_and_without_them_there_is_none(loop: Loop) -> None:
    asked: list[float] = []

    async def answer(_request: web.Request) -> web.Response:
        asked.append(time.monotonic())
        return web.json_response(STATUS) if len(asked) % 2 else web.Response(status=500)

    async with peers.web_server(answer) as port:
        await start_console(loop, url=f"http://127.0.0.1:{port}", upstreams={"api": {"url": "http://x/v1"}})
        assert asked == []
        ends = time.monotonic() + 5

        async def view() -> None:
            while time.monotonic() < ends:
                assert (await loop.ask("GET", "/gateway?now")).is_success

        await asyncio.gather(*(view() for _ in range(10)))
        number, gaps = len(asked), [later - one for one, later in itertools.pairwise(asked)]
        assert number >= 2
        assert min(gaps) > 0.9
        await asyncio.sleep(3)
        assert len(asked) == number


async def test_without_a_gateway_the_page_says_how_to_start_one(loop: Loop, browser: Browser) -> None:
    await start_console(loop)
    async with window(browser, loop) as viewer:
        await viewer.sign_in("viewer")
        await expect(viewer.page.get_by_role("link", name="Gateway")).to_have_count(0)
        await viewer.open("gateway")
        await expect(viewer.page.locator("main")).to_contain_text("No gateway is configured")
        await expect(viewer.page.locator("main")).to_contain_text("docs/gateway.md")
    assert (await loop.ask("GET", "/api/v1/gateway")).status_code == 404
    changed = await loop.ask("PUT", "/api/v1/gateway/limits", {"queue_size": 7})
    assert (changed.status_code, changed.json()["error"]["code"]) == (404, "not_configured")
    settings = {"url": "http://127.0.0.1:1", "upstreams": {"api": {"url": "http://x/v1", "api_key": "${KEY}"}}}
    (loop.folder / "config" / "gateway.yaml").write_text(yaml.safe_dump({"gateway": settings}))
    assert (await loop.ask("POST", "/-/reload")).is_success
    assert (await loop.ask("GET", "/api/v1/gateway")).status_code == 502
    assert 'data-state="unavailable"' in (await loop.ask("GET", "/gateway")).text


async def test_limits_are_changed_without_scripts(served: Served, browser: Browser) -> None:
    await served.start()
    async with window(browser, served.loop, java_script_enabled=False) as admin:
        await admin.sign_in("admin")
        await admin.open("gateway")
        for text, is_refused in (("fast", True), ("2/s", False)):
            await admin.page.fill("input[name=rate]", text)
            await admin.page.get_by_role("button", name="Change api").click()
            await expect(admin.page.locator("#limits [role=alert]")).to_have_count(1 if is_refused else 0)
            await expect(admin.page.locator("input[name=rate]")).to_have_value(text if is_refused else "120/min")
        admin.expect_faults("409")
    assert (await served.status())["upstreams"]["api"]["base_rate_per_minute"] == 120


def past_samples(now: float) -> Iterator[str]:
    """Yield the metrics of a gateway over half an hour, in which 30 requests a minute were sent, 6 of them in vain."""
    outcomes = {("batch", "ok"): 20, ("coder", "ok"): 4, ("batch", "limited"): 6, ("batch", "queue_full"): 3}
    times = range(int(now) - 1800, int(now), 15)
    yield "# TYPE gateway_requests counter"
    for (client, outcome), rate in outcomes.items():
        labels = f'provider="p",client="{client}",priority="normal",outcome="{outcome}"'
        yield from (f"gateway_requests_total{{{labels}}} {rate * (at - times[0]) / 60} {at}" for at in times)
    yield "# TYPE gateway_upstream_errors counter"
    for at in times:
        yield f'gateway_upstream_errors_total{{provider="p",status="429"}} {6 * (at - times[0]) / 60} {at}'
    for name, value in (("in_flight", 2), ("rate_limit_per_minute", 45), ("base_rate_per_minute", 60)):
        yield f"# TYPE gateway_{name} gauge"
        yield from (f'gateway_{name}{{provider="p"}} {value} {at}' for at in times)
    for name, labels in (
        ("upstream_seconds", 'provider="p"'),
        ("queue_wait_seconds", 'provider="p",priority="normal"'),
    ):
        yield f"# TYPE gateway_{name} histogram"
        for bucket in ("1", "+Inf"):
            series = f'gateway_{name}_bucket{{{labels},le="{bucket}"}}'
            yield from (f"{series} {at - times[0]} {at}" for at in times)
    yield "# EOF"


@pytest.mark.needs("prometheus")
async def test_charts_of_what_prometheus_knows(loop: Loop) -> None:
    folder = loop.folder / "past"
    folder.mkdir()
    url = await start_prometheus(loop.launcher, folder, past_samples(time.time()), "1m")
    async with AsyncExitStack() as stack:

        async def answer(_request: web.Request) -> web.Response:
            return web.json_response(STATUS)

        port = await stack.enter_async_context(peers.web_server(answer))
        await start_console(
            loop, url=f"http://127.0.0.1:{port}", upstreams={"api": {"url": "http://x/v1"}},
            remediator={"prometheus_url": url},
        )  # fmt: skip
        page = (await loop.ask("GET", "/gateway?span=1h")).text
        figures = dict(re.findall(r"<figcaption>(.*?)[ <].*?</figcaption>\s*(<svg.*?</svg>)", page, re.DOTALL))
        titles = re.findall(r"<figcaption>(.*?) +<small>", page)
        assert titles == [
            "Requests", "Sent by client", "Rate", "Refused by the upstream (429)", "Time until the upstream answers",
            "Time in the queue (p95)",
        ]  # fmt: skip
        for title, values in (
            ("Requests", {"all": 33, "answered": 24, "refused by the upstream (429)": 6, "refused by the gateway": 3}),
            ("Sent", {"batch": 26, "coder": 4}),
            ("Rate", {"sent": 30, "effective rate": 45, "base rate": 60}),
            ("Refused", {"p": 6}),
        ):
            for name, value in values.items():
                pattern = rf"&#34;name&#34;: &#34;{re.escape(name)}&#34;, &#34;points&#34;: (\[\[.*?\]\])"
                points = re.findall(pattern, figures[title])
                assert points, (title, name)
                middle = [float(each) for each in re.findall(r", ([\d.]+)\]", points[0])][5:-3]
                assert middle, (title, name)
                assert all(abs(each - value) < 0.1 * value for each in middle), (title, name, middle)
        assert "Prometheus has no metrics of the gateway" not in page
        assert "<figure>" not in (await loop.ask("GET", "/gateway?now")).text


@pytest.mark.parametrize("mode", MODES)
async def test_the_page_is_accessible_and_fits(served: Served, browser: Browser, mode: str) -> None:
    await served.start(upstream={"concurrency": 8, "tokens": "100000/min"})
    await served.use_up()
    axe = Axe()
    async with window(browser, served.loop, **MODES[mode]) as admin:
        await admin.sign_in("admin")
        await admin.open("gateway")
        found = await axe.run(admin.page)
        serious = [each for each in found.response["violations"] if each["impact"] in ("serious", "critical")]
        assert serious == [], [(each["id"], each["nodes"][0]["html"]) for each in serious]
        assert await admin.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert await admin.page.evaluate(NAMELESS_CELLS) == []
        await admin.keep(f"{mode}-gateway")
