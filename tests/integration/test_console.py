"""The console in a real browser: an operator finds what is broken, restarts it and watches it recover.

Every page is checked for errors of scripts, requests to other servers, and faults that axe-core finds.
"""

import asyncio
import json
import re
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import yaml
from aiohttp import web
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    Request,
    Response,
    async_playwright,
    expect,
)

from defib.demo.stack import reserve_ports
from tests.integration import peers
from tests.integration.loop import Loop
from tests.integration.peers import Transcoder
from tests.integration.test_access import bearer, create_token, start_with_users, write_users
from tests.integration.test_heartbeat_commands import KEY, start_with_heartbeats
from tests.support import NO_TLS, SCREENSHOTS, eventually

pytestmark = pytest.mark.needs("sshd", "chromium")
TIMEOUT = 120_000  # milliseconds: the machine may be busy
HOSTILE = "<img src=x onerror=alert(1)>\u202e\x1b[31m"
expect.set_options(timeout=TIMEOUT)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield launched
        await launched.close()


class Window:
    """A page of a browser, and what went wrong in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.faults: list[str] = []
        page.on("console", lambda message: self._note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("request", self._check_request)
        page.on("response", self._check_response)
        page.set_default_timeout(TIMEOUT)

    def _note(self, text: str) -> None:
        if "net::ERR_NETWORK_CHANGED" not in text:  # this machine's network did, and the browser ended its requests
            self.faults.append(text)

    def expect_faults(self, *parts: str) -> None:
        """Take back the faults so far that contain one of these texts: the test has caused them."""
        self.faults = [fault for fault in self.faults if not any(part in fault for part in parts)]

    def _check_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:")):
            self._note(f"a request to another server: {request.url}")

    def _check_response(self, response: Response) -> None:
        if response.status >= 500:
            self._note(f"{response.status} {response.url}")

    async def open(self, path: str) -> None:
        await self.page.goto(f"{self.url}{path}")

    async def sign_in(self, user: str) -> None:
        await self.open("")
        await self.page.fill("input[name=user]", user)
        await self.page.fill("input[name=password]", user)
        await self.page.press("input[name=password]", "Enter")
        await expect(self.page.locator("#list")).to_be_visible()

    async def keep(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        await self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@asynccontextmanager
async def window(browser: Browser, loop: Loop, **options: Any) -> AsyncIterator[Window]:
    context: BrowserContext = await browser.new_context(locale=options.pop("locale", "en-US"), **options)
    opened = Window(await context.new_page(), f"{loop.stack.url('remediator')}/")
    yield opened
    await context.close()
    assert opened.faults == []


async def test_an_operator_restarts_a_service_and_watches_it_recover(loop: Loop, browser: Browser) -> None:
    loop.service("web")
    await start_with_users(loop, automatic=False)
    async with window(browser, loop) as operator:
        await operator.sign_in("operator")
        page = operator.page
        row = page.locator("#s-web")
        await expect(row.locator(".state")).to_have_text("Up")
        await loop.kill("web")
        await loop.fire("web")
        # Without a reload.
        await expect(row.locator(".state")).to_have_text("Down")
        await expect(row).to_contain_text("exit")
        await expect(page.locator(".count.down b")).to_have_text("1")
        await expect(page).to_have_title(re.compile(r"^1 · "))
        await operator.keep("services-down")
        await row.locator("a").click()
        await expect(page.locator("h1")).to_have_text("web")
        await expect(page.locator("#live-part")).to_contain_text("automation is off")
        await operator.keep("service-down")
        button = page.get_by_role("button", name="Restart web on h")
        form = page.locator("form[action$='/restart']")
        action = await form.get_attribute("action")
        await button.dblclick()
        await expect(form).to_have_attribute("action", action or "")  # relative to the page, below any prefix
        await expect(page.locator(".subject .state")).to_have_text("Degraded")  # the alert still fires
        assert loop.restarts() == ["web"]
        await loop.fire("web", status="resolved")
        await loop.until("recovered")
        await expect(page.locator(".subject .state")).to_have_text("Up")
        await operator.keep("service-up")
        await page.locator(".card .checks").hover(position={"x": 198, "y": 8})  # the newest
        await expect(page.locator(".tip")).to_contain_text("successful")
        await page.get_by_role("link", name="Incident 1").first.click()
        await expect(page.locator("main")).to_contain_text("Action 1 (restart) started; requested by operator")
        await page.locator("summary", has_text="Add a note").click()
        await page.fill("textarea[name=text]", HOSTILE)
        await page.get_by_role("button", name="Add a note").click()
        await expect(page.locator(".timeline")).to_contain_text("Note by operator: <img src=x onerror=alert(1)>")
        await page.locator("summary", has_text="Summary as text").click()
        await expect(page.locator("[data-copy] pre")).to_contain_text("web (web, h): Recovered")
        await expect(page.locator("[data-copy] button")).to_have_text("Copy")
        await operator.keep("incident")


async def test_a_service_is_restarted_on_the_page_of_its_incident(loop: Loop, browser: Browser) -> None:
    """A gate that holds it is named, and can be overruled there."""
    await start_with_users(loop, notify={"links": {"grafana": "https://grafana.example"}}, automatic=False)
    await loop.ask("POST", "/api/v1/maintenance", {"scope": "service", "name": "web", "reason": "r", "for": "1h"})
    await loop.kill("web")
    await loop.fire("web")
    async with window(browser, loop) as operator:
        await operator.sign_in("operator")
        page = operator.page
        await operator.open("incidents/1")
        await page.get_by_role("button", name="Restart web").click()
        await expect(page.locator("#answer")).to_contain_text("Held by: maintenance")
        operator.expect_faults("409")
        await page.get_by_role("button", name="Restart web although it is held by: maintenance").click()
        await expect(page.locator("main")).to_contain_text("started; requested by operator, overruling maintenance")
        await operator.open("services/web")
        link = page.get_by_role("link", name="Grafana")
        await expect(link).to_have_attribute("href", "https://grafana.example/d/defib-service?var-service=web")
        await operator.open("hosts/h")
        await expect(page.get_by_role("link", name="Grafana")).to_have_attribute("href", re.compile("var-host=h$"))


async def test_an_action_that_hangs_is_shown_until_its_timeout_and_holds_others(loop: Loop, browser: Browser) -> None:
    service = loop.service("web", restart="sleep 600", on_failure="notify")
    service["control"] |= {"timeout": "40s"}
    service["control"]["command"]["stop"] = ["true"]
    users = write_users(loop.folder, {"operator": "operator"})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ("exporter", "remediator")}
    await loop.start({"web": service})
    await loop.kill("web")
    await loop.fire("web")

    async def is_running() -> bool:
        return [each["state"] for each in (await loop.incident())["actions"]] == ["running"]

    async with window(browser, loop) as operator:
        await operator.sign_in("operator")
        await operator.open("services/web")
        page, progress = operator.page, operator.page.locator(".banner .progress")
        restart = page.get_by_role("button", name="Restart web on h")
        await restart.click()
        await expect(progress).to_have_text("in progress: restart")
        await expect(restart).to_be_enabled()
        await restart.click()
        await expect(page.locator("#answer")).to_contain_text("Held by: another action on it is in progress")
        await page.locator("summary", has_text="Stop web on h").click()
        await page.locator("form[action$='/stop'] input[name=reason]").fill("it hangs")
        async with page.expect_response(re.compile("/stop$")) as answer:
            await page.get_by_role("button", name="Stop web on h").click()
        assert "target-busy" in await (await answer.value).text()
        await expect(page.locator("#answer")).to_contain_text("Held by: another action on it is in progress")
        await expect(page.get_by_role("button", name="although it is held by")).to_have_count(0)
        await operator.keep("service-hangs")
        while await is_running():
            text = await page.locator("#live-part").inner_text()
            assert re.search("(in progress|verifying): restart", text) or not await is_running()
            await page.wait_for_timeout(300)
        await expect(progress).to_have_count(0)
        await expect(page.locator("#live-part")).to_contain_text(re.compile("Last restart: .* ago, outcome unknown"))
        await page.get_by_role("link", name="Incident 1").first.click()
        await expect(page.locator("main")).to_contain_text("restart: outcome unknown")
        await operator.keep("incident-hung")
        operator.expect_faults("409")
    assert loop.restarts() == ["web"]


async def test_a_viewer_is_offered_no_buttons_and_refused(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    async with window(browser, loop) as viewer:
        await viewer.sign_in("viewer")
        for path in ("services/web", "settings", "incidents"):
            await viewer.open(path)
            await expect(viewer.page.locator("main form[method=post]")).to_have_count(0)
        csrf = await viewer.page.locator("input[name=csrf]").first.get_attribute("value")
        forged = await viewer.page.request.post(
            f"{viewer.url}services/web/restart", form={"csrf": csrf or ""}, headers={"Origin": viewer.url[:-1]}
        )
        assert (forged.status, loop.restarts()) == (403, [])


async def test_an_action_is_approved_on_the_page_of_its_service(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop, steps=[{"restart": {"approve": True}}])
    async with window(browser, loop) as operator, window(browser, loop) as other:
        for each in (operator, other):
            await each.sign_in("operator")
            await each.open("services/web")
        await loop.kill("web")
        await loop.fire("web")
        for each in (operator, other):
            await expect(each.page.get_by_role("button", name="Approve: restart")).to_be_visible()
        # Both press, and it is done once.
        await asyncio.gather(
            *(each.page.get_by_role("button", name="Approve: restart").click() for each in (operator, other))
        )
        for each in (operator, other):
            await expect(each.page.locator(".subject .state")).to_have_text("Degraded")
            await expect(each.page.locator(".timeline")).to_have_count(0)  # it is still the page of the service
        assert loop.restarts() == ["web"]
        other.expect_faults("409")  # who was second is told so
        operator.expect_faults("409")


NAMES = {
    "long": "a" * 200, "arabic": "خدمة الترجمة", "emoji": "🚑🫀 service", "chinese": "文档解析服务（生产环境）",
    "markup": HOSTILE[:60],
}  # fmt: skip


async def test_a_display_signs_in_with_a_token_for_as_long_as_it_is_valid(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop, automatic=False)
    wall, other = await create_token(loop, "wall", "viewer"), await create_token(loop, "other", "operator")
    async with window(browser, loop, viewport={"width": 1920, "height": 1080}) as display:
        page = display.page
        await display.open("wall")
        await page.locator("summary", has_text="A display signs in").click()
        for token, problem in (("defib_unknown", "unknown"), (other, "Only a token with the role viewer")):
            await page.fill("input[name=token]", token)
            await page.press("input[name=token]", "Enter")
            await expect(page.get_by_role("alert")).to_contain_text(problem)
        await page.fill("input[name=token]", wall)
        await page.press("input[name=token]", "Enter")
        await expect(page.locator(".all-up")).to_contain_text("All 1 services are up")
        await loop.kill("web")
        await expect(page.locator(".tile.down h2")).to_have_text("web")  # without a reload
        await display.keep("wall")
        assert (await page.request.get(f"{display.url}services/web/logs")).status == 403
        assert (await loop.ask("DELETE", "/api/v1/tokens/wall")).status_code == 200
        await expect(page.locator("#live")).to_contain_text("Your session has ended.")
        display.expect_faults("401", "403")


async def test_settings_show_the_health_of_all_parts_and_create_tokens(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    async with window(browser, loop) as admin:
        await admin.sign_in("admin")
        page = admin.page
        await admin.open("settings")
        await expect(page.locator("tr", has_text="Exporter").locator(".state")).to_have_text("works")
        await expect(page.locator("tr", has_text="Prometheus to Alertmanager")).to_contain_text("not configured")
        await expect(page.locator("tr", has_text="Alertmanager to here").locator(".state")).to_have_text(
            "does not work"
        )
        await page.get_by_role("button", name="Send a test message").click()
        await expect(page.get_by_role("status").nth(1)).to_contain_text("ops has accepted the test message. 0: success")
        await page.locator("summary", has_text="Create an API token").click()
        form = page.locator("form[action$=create-token]")
        await form.locator("input[name=name]").fill("Not A Name")
        await form.get_by_role("button").click()
        await expect(page.get_by_role("alert")).to_contain_text("a name has at most 63 of the characters")
        await form.locator("input[name=name]").fill("ci")
        await form.locator("input[name=for]").fill("90d")
        await form.get_by_role("button").click()
        secret = await page.locator("[data-copy] pre").text_content()
        url = f"{admin.url}api/v1/services/web/explain"
        assert (await loop.stack.client.get(url, headers=bearer(secret or ""))).status_code == 200
        await admin.open("settings")
        await expect(page.locator("tr", has_text="ci").first).to_contain_text("viewer")
        await expect(page.locator("main")).not_to_contain_text(secret or "")
        await admin.keep("settings-admin")
        admin.expect_faults("409")


async def test_names_of_any_kind_and_a_clock_that_is_wrong(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    services = {name: loop.service(name) | {"name": title} for name, title in NAMES.items()}
    configuration = loop.folder / "config" / "defib.yaml"
    written = yaml.safe_load(configuration.read_text())
    configuration.write_text(yaml.safe_dump({**written, "services": services}, allow_unicode=True))
    async with window(browser, loop) as viewer:
        await viewer.page.clock.set_system_time(time.time() + 400 * 86400)
        await viewer.sign_in("viewer")
        await viewer.open("services/web")
        for program in ("exporter", "remediator"):
            reloaded = await loop.stack.client.post(f"{loop.stack.url(program)}/-/reload")
            assert reloaded.is_success, reloaded.text
        await expect(viewer.page.locator("#live")).to_have_text("What this page shows is no longer in the inventory.")
        await viewer.open("")
        for name in NAMES:
            await expect(viewer.page.locator(f"#s-{name} .state")).to_have_text("Up")
            await expect(viewer.page.locator(f"#s-{name} .age")).to_have_text(re.compile(r"^\d+(\.\d)? s|^\d+ min"))
        overflow = await viewer.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0
        await viewer.keep("names")
        await viewer.page.fill("input[name=q]", NAMES["arabic"])  # without a key that sends it
        await expect(viewer.page.locator("#list tbody tr")).to_have_count(1)
        assert "q=" in viewer.page.url
        # Events are found by the name of the service, and by a part of it.
        events = viewer.page.locator("main tbody tr")

        async def are_found() -> bool:
            await viewer.open("events?service=ARABI")  # they are copied from the exporter in rounds
            return await events.count() > 0

        await eventually(are_found)
        await expect(events.first).to_contain_text(NAMES["arabic"])
        viewer.expect_faults("404")


async def test_notes_maintenance_and_test_messages_are_limited(loop: Loop) -> None:
    await start_with_users(loop, automatic=False)
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("wait", "automation-off")
    answers = [await loop.ask("POST", "/api/v1/incidents/1/notes", {"text": f"note {n}"}) for n in range(102)]
    assert [each.status_code for each in answers] == [201] * 100 + [409] * 2
    assert answers[-1].json()["error"]["message"] == "incident 1 has 100 notes, the most it can have"
    body = {"scope": "service", "name": "web", "for": "1h", "reason": "r"}
    begun = [await loop.ask("POST", "/api/v1/maintenance", body) for _ in range(501)]
    assert [each.status_code for each in begun] == [201] * 500 + [409]
    assert begun[-1].json()["error"]["message"] == "500 maintenances are in effect: end some"
    page = (await loop.ask("GET", "/incidents")).text
    assert (page.count("Maintenance: service web"), "and 495 more" in page) == (5, True)
    tests = [(await loop.ask("POST", "/api/v1/channels/ops/test")).status_code for _ in range(3)]
    assert tests == [200, 409, 409]


async def test_errors_are_pages_for_people(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    async with window(browser, loop) as viewer:
        await viewer.sign_in("viewer")
        for path, title in (
            ("services/unknown", "There is no such page"),
            ("unknown", "There is no such page"),
            ("services/web/logs", "Your role does not permit this"),
        ):
            await viewer.open(path)
            await expect(viewer.page.locator("h1")).to_have_text(title)
        await viewer.keep("forbidden")
        viewer.expect_faults("404", "403")
    refused = await loop.stack.client.get(
        f"{loop.stack.url('remediator')}/services/unknown", headers={"Accept": "text/html"}
    )
    assert refused.json()["error"]["code"] == "unknown_service"  # with a token: a script's


async def test_maintenance_and_automation(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    async with window(browser, loop) as admin:
        await admin.sign_in("admin")
        page = admin.page
        await admin.open("settings")
        await page.locator("form[action$=automation-off] input[name=reason]").fill("a network change")
        await page.get_by_role("button", name="Switch automation off").click()
        await expect(page.locator("#banners")).to_contain_text("a network change")
        await page.locator("form[action$=automation-on] input[name=reason]").fill("done")
        await page.get_by_role("button", name="Switch automation on").click()
        await expect(page.locator("#banners")).not_to_contain_text("a network change")
        form = page.locator("form[action$=begin-maintenance]")
        await form.locator("input[name=name]").fill("web")
        await form.locator("input[name=reason]").fill(HOSTILE)
        await form.get_by_label("Pause probing meanwhile").check()
        await page.get_by_role("button", name="Begin maintenance").click()
        await expect(page.locator("#banners")).to_contain_text("<img src=x")
        await expect(page.locator("#banners")).to_contain_text("probing is paused")
        await admin.open("")
        await expect(page.locator("#s-web")).to_contain_text("probing is paused")
        await admin.open("settings")
        await admin.keep("settings")
        await page.get_by_role("button", name="End", exact=True).click()
        await expect(page.locator("#banners")).to_have_text("")
        await admin.open("events")
        await expect(page.locator("main")).to_contain_text("automation off")
        await admin.keep("events")


# What the record and the exporter say in English, and pages in the reader's language.
ENGLISH = r"\b(exit:|wait|refuse|local|unverified|begin maintenance|create token|sign in|service portal|opened|done)\b"
# The cells whose name is not that of their column, or is not shown where the head of the table is not.
NAMELESS_CELLS = """() => [...document.querySelectorAll(".plain td")].filter((cell) => {
  const head = cell.closest("table").tHead;
  const name = head?.rows[0].cells[cell.cellIndex].textContent;
  const shown = getComputedStyle(cell, "::before").content;
  return !head || (name && shown !== (innerWidth > 800 ? "none" : JSON.stringify(name)));
}).map((cell) => cell.outerHTML)"""
MODES: dict[str, dict[str, Any]] = {
    "desktop": {},
    "dark": {"color_scheme": "dark", "locale": "zh-CN"},
    "phone": {"viewport": {"width": 390, "height": 844}, "locale": "zh-CN", "has_touch": True},
    "narrow": {"viewport": {"width": 320, "height": 700}, "color_scheme": "dark"},
}


FLEET: dict[str, dict[str, Any]] = {
    "web": {"name": "PDF OCR (Mineru)", "category": "model", "provider": "mineru"},
    "qwen": {"name": "Qwen 72B", "category": "model", "provider": "vllm"},
    "embeddings": {"name": "Embeddings", "category": "model", "provider": "vllm"},
    "portal": {"name": "门户网站", "category": "web", "on_failure": "notify"},
    "encoder": {
        "name": "Encoder 1, with a rather long name that has to be broken into lines",
        "category": "transcoder",
    },
}


@pytest.mark.parametrize("mode", MODES)
async def test_pages_are_accessible_and_fit(loop: Loop, browser: Browser, mode: str) -> None:
    users = write_users(loop.folder, {"admin": "admin"})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ("exporter", "remediator")}
    services = {name: loop.service(name) | settings for name, settings in FLEET.items()}
    services["backup"] = {"probe": {"heartbeat": {"cron": "0 3 * * *"}}}
    heartbeats = {"listen": f"127.0.0.1:{reserve_ports(1)[0]}", "database": str(loop.folder / "heartbeats.db")}
    await loop.start(services, automatic=False, collect={"system": "1s"}, exporter={"heartbeats": heartbeats})
    for ping in ({"kind": "start"}, {"message": "x" * 300}):
        assert (await loop.ask("POST", "/api/v1/heartbeats/backup/ping", ping)).is_success
    await loop.kill("web")
    await loop.fire("web")
    await loop.fire("qwen", "ServiceSlow")
    await create_token(loop, "ci", "viewer")
    window_of_portal = {"scope": "service", "name": "portal", "reason": "an update", "for": "1h"}
    assert (await loop.ask("POST", "/api/v1/maintenance", window_of_portal)).is_success
    axe = Axe()
    async with window(browser, loop, **MODES[mode]) as admin:
        await admin.open("")
        pages = [
            "sign-in",
            "",
            "services/web",
            "services/web/logs",
            "incidents",
            "incidents/1",
            "hosts",
            "hosts/h",
            "heartbeats",
            "heartbeats/backup",
            "events",
            "settings",
        ]
        for path in pages:
            if path == "":
                await admin.sign_in("admin")
            else:
                await admin.open(path)
            found = await axe.run(admin.page)
            serious = [each for each in found.response["violations"] if each["impact"] in ("serious", "critical")]
            assert serious == [], (path, [(each["id"], each["nodes"][0]["html"]) for each in serious])
            await admin.keep(f"{mode}-{path.replace('/', '-') or 'services'}")
            overflow = await admin.page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0, path
            if path == "settings" and mode == "phone":
                assert await admin.page.locator("tr", has_text="ci").locator(".time").all_inner_texts() == [
                    "永不",
                    "从未",
                ]
            if MODES[mode].get("locale") == "zh-CN":
                assert re.findall(ENGLISH, await admin.page.inner_text("main")) == [], path
            await admin.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            assert await admin.page.evaluate(NAMELESS_CELLS) == [], path


async def test_heartbeats_and_what_they_have_sent(loop: Loop, browser: Browser) -> None:
    await start_with_heartbeats(loop, {"writer": {"probe": {"heartbeat": {"every": "1h"}}}})

    async def ping(name: str, **body: Any) -> None:
        assert (await loop.ask("POST", f"/api/v1/heartbeats/{name}/ping", body)).is_success

    await ping("backup", kind="start")
    await ping("backup", exit_status=3, message=f"disk full {HOSTILE}")
    await ping("sync")
    await ping("writer")
    async with window(browser, loop, viewport={"width": 1280, "height": 800}) as operator:
        await operator.sign_in("operator")
        page = operator.page
        await page.get_by_role("link", name="Heartbeats").click()
        rows = page.locator("main .heartbeats tbody tr")
        await expect(rows.nth(1)).to_contain_text("Late")
        assert [(await row.inner_text()).split()[:2] for row in await rows.all()] == [
            ["Failed", "backup"], ["Late", "sync"], ["No", "ping"], ["Up", "writer"],
        ]  # fmt: skip
        await expect(rows.nth(0)).to_contain_text("exit status 3; its output ends with: disk full")
        await expect(rows.nth(2)).to_contain_text("0 3 * * * (Asia/Shanghai), at most 5m late")
        await operator.keep("heartbeats")
        await ping("backup")  # without a reload
        await expect(page.locator(".heartbeats tr", has_text="backup").locator(".state")).to_have_text("Up")
        await page.get_by_role("link", name="backup").click()
        pings = page.locator(".pings tbody tr")
        await expect(pings).to_have_count(3)
        await expect(pings.nth(1)).to_contain_text(re.compile(r"failure.*3.*\d s", re.DOTALL))
        await expect(page.locator("pre")).to_be_hidden()
        await pings.nth(1).locator("summary").click()
        await expect(page.locator("pre")).to_contain_text("disk full <img")
        await operator.keep("heartbeat")
        await ping("backup", kind="log", message="again")
        await ping("backup")
        await expect(pings).to_have_count(5)
        await page.get_by_role("link", name="Page of the service").click()
        await expect(page.locator("h1")).to_have_text("backup")
        probe = page.locator("dt", has_text="Probe").locator("xpath=following-sibling::dd[1]")
        await expect(probe).to_have_text("heartbeat, every 1h, at most 5m late")
        await page.get_by_role("link", name="Pings of this heartbeat").click()
        await page.get_by_role("link", name="All heartbeats").click()
        await expect(rows).to_have_count(4)
        await operator.open("heartbeats/web")
        await expect(page.locator("h1")).to_have_text("There is no such page")
        operator.expect_faults("404")
    async with window(browser, loop, java_script_enabled=False) as viewer:
        await viewer.sign_in("viewer")
        await viewer.open("heartbeats/backup")
        await expect(viewer.page.locator("main")).to_contain_text("requires the role operator")
        await expect(viewer.page.locator("pre")).to_have_count(0)
        await loop.launcher.kill(loop.stack.pids["exporter"], signal.SIGKILL)
        for path in ("heartbeats", "heartbeats/backup"):
            await viewer.open(path)
            await expect(viewer.page.locator("main")).to_contain_text("This part cannot be shown")


async def test_why_heartbeats_are_late(loop: Loop, browser: Browser) -> None:
    hung = {"probe": {"heartbeat": {"every": "1h", "start_grace": "10ms"}}}
    await start_with_heartbeats(loop, {"hung": hung})
    assert (await loop.ask("POST", "/api/v1/heartbeats/hung/ping", {"kind": "start"})).is_success
    async with window(browser, loop, java_script_enabled=False) as viewer:
        await viewer.sign_in("viewer")
        why = "the job has started, but did not end within 10ms"
        for path in ("heartbeats", "heartbeats/hung"):
            await viewer.open(path)
            await expect(viewer.page.locator("main")).to_contain_text(why)


async def test_starts_and_created_heartbeats_are_shown_without_a_reload(loop: Loop, browser: Browser) -> None:
    pings = await start_with_heartbeats(loop, create={"slugs": "job-.*"})
    async with (
        window(browser, loop) as operator,
        httpx.AsyncClient(verify=NO_TLS, trust_env=False, base_url=f"{pings}/{KEY}") as jobs,
    ):
        await operator.sign_in("operator")
        await operator.open("heartbeats")
        page = operator.page
        rows = page.locator(".heartbeats tbody tr")
        await expect(rows).to_have_count(3)
        await jobs.get("/moved/start")
        await expect(rows.filter(has_text="moved")).to_contain_text("running for")
        await jobs.get("/moved")
        await expect(rows.filter(has_text="moved")).not_to_contain_text("running for")
        assert (await jobs.get("/job-1?create=1")).status_code == 201
        created = rows.filter(has_text="job-1")
        await expect(created).to_contain_text("created by a ping")
        await expect(created.locator(".state")).to_have_text("Up")
        await jobs.get("/job-1/fail")
        await expect(created.locator(".state")).to_have_text("Failed")
        await expect(page.locator(".banner")).to_have_count(0)  # it is no difference between the programs
        await created.get_by_role("link").click()
        await expect(page.locator(".pings tbody tr")).to_have_count(2)
        await expect(page.locator("main")).to_contain_text("defib heartbeat remove job-1")
        await expect(page.get_by_role("link", name="Page of the service")).to_have_count(0)
        await jobs.get("/job-1/start")
        await expect(page.locator(".pings tbody tr")).to_have_count(3)
        await operator.open("heartbeats")
        assert (await loop.ask("DELETE", "/api/v1/heartbeats/job-1")).is_success
        await expect(rows).to_have_count(3)


async def test_agents_and_what_they_report(loop: Loop, browser: Browser) -> None:
    await start_with_heartbeats(loop, {"writer": {"probe": {"heartbeat": {"every": "1h"}}, "agent": {}}})
    report = {"task": "T-17", "pending": 12, "rounds": 25, "waiting_for": "ann", "response_seconds": 1.8}
    sent = {"message": json.dumps({**report, "llm_requests": {"ok": 3, "429": 4}})}
    assert (await loop.ask("POST", "/api/v1/heartbeats/writer/ping", sent)).is_success
    async with window(browser, loop, viewport={"width": 1280, "height": 800}) as operator:
        await operator.sign_in("operator")
        page = operator.page
        await operator.open("heartbeats")
        agent = page.locator(".agents tbody tr")
        await expect(agent).to_contain_text(re.compile(r"writer.*waiting for others.*T-17.*12.*25 of 30.*4", re.DOTALL))
        assert await agent.locator(".state").all_inner_texts() == ["12", "25 of 30"]
        await operator.keep("agents")
        await agent.get_by_role("link").click()
        await expect(page.locator("main")).to_contain_text(re.compile(r"Task\s*T-17.*Waits for\s*ann", re.DOTALL))
        await operator.keep("heartbeat-agent")


async def test_without_heartbeats_the_page_says_where_they_are_described(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    async with window(browser, loop) as viewer:
        await viewer.sign_in("viewer")
        await viewer.open("heartbeats")
        await expect(viewer.page.locator(".empty")).to_contain_text("docs/heartbeats.md")


async def test_filters_are_folded_away_on_a_phone(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    async with window(browser, loop, **MODES["phone"] | {"locale": "en-US"}) as viewer:
        await viewer.sign_in("viewer")
        page = viewer.page
        for path, field, chosen in (("", "sort", "name"), ("events", "kind", "service")):
            await viewer.open(path)
            button, select = page.get_by_role("button", name="Filters"), page.locator(f"select[name={field}]")
            await expect(button).to_have_attribute("aria-expanded", "false")
            await expect(page.get_by_role("searchbox")).to_be_visible()
            await expect(select).to_be_hidden()
            first = await page.locator("main tbody tr").first.bounding_box()
            assert first is not None
            assert first["y"] < 600
            await button.click()
            await expect(button).to_have_attribute("aria-expanded", "true")
            await select.select_option(chosen)  # which applies at once
            await expect(button).to_have_text("Filters (1)")
            await expect(select).to_be_hidden()
            await viewer.keep(f"phone-filtered-{path or 'services'}")
        await page.set_viewport_size({"width": 1280, "height": 800})
        await expect(page.locator("select[name=kind]")).to_be_visible()
        await expect(page.locator(".fold")).to_be_hidden()
    async with window(browser, loop, java_script_enabled=False, **MODES["phone"]) as viewer:
        await viewer.sign_in("viewer")
        await expect(viewer.page.locator("select[name=sort]")).to_be_visible()
        await expect(viewer.page.locator(".fold")).to_be_hidden()


async def test_rows_do_not_jump_while_they_are_sorted_by_latency(loop: Loop, browser: Browser) -> None:
    users = write_users(loop.folder, {"viewer": "viewer"})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ("exporter", "remediator")}
    services = {name: loop.service(name) for name in ("slow", "quick", "web")}
    for name, seconds in (("slow", 0.5), ("quick", 0.2)):
        (loop.folder / name).write_text(str(seconds))
        services[name]["probe"]["command"] = {"run": ["sh", "-c", f"sleep $(cat {loop.folder / name})"]}
    await loop.start(services, automatic=False)
    async with window(browser, loop) as viewer:
        await viewer.sign_in("viewer")
        page, links = viewer.page, viewer.page.locator("#list tbody a")
        await viewer.open("?sort=latency")
        await expect(links).to_have_text(["slow", "quick", "web"])
        (loop.folder / "slow").write_text("0")
        (loop.folder / "quick").write_text("1.1")
        await expect(page.locator("#s-quick .latency")).to_have_text(re.compile(r"^1\d{3} ms"))
        await loop.kill("web")
        await expect(page.locator("#s-web .state")).to_have_text("Down")
        await expect(page.locator(".count.down b")).to_have_text("1")
        await expect(links).to_have_text(["slow", "quick", "web"])
        await expect(page.locator(".order")).to_contain_text("Sorted by the latencies of")
        await viewer.keep("services-by-latency")
        await page.get_by_role("link", name="Sort again").click()
        await expect(links.first).to_have_text("quick")


async def test_an_operator_restarts_a_component(loop: Loop, browser: Browser, transcoder: Transcoder) -> None:
    transcoder.channels |= {"ch1": "stopped", **{f"channel {number}": "running" for number in range(196)}}
    del transcoder.channels["ch2"]  # which the control lists
    users = write_users(loop.folder, {"operator": "operator", "viewer": "viewer"})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ("exporter", "remediator")}
    service = transcoder.service
    service["probe"]["status"]["up_when"] = 0.5
    await loop.start({"tc": service})
    async with window(browser, loop, **MODES["phone"] | {"locale": "en-US"}) as operator:
        await operator.sign_in("operator")
        page = operator.page
        listed = page.locator("#s-tc")
        await expect(listed.locator(".state")).to_have_text("Degraded")
        await expect(listed).to_contain_text("Components down: ch1")
        # What a screen reader says of the strip follows the checks.
        await expect(listed.locator(".strip")).to_have_attribute(
            "aria-label", re.compile(r": \d\d successful, 0 failed")
        )
        await operator.open("services/tc")
        components = page.locator("section", has=page.get_by_role("heading", name="Components"))
        await expect(components.locator("h2")).to_contain_text("198 of 200 up")

        def row(name: str) -> Locator:
            return components.locator("tr", has=page.get_by_text(name, exact=True))

        await expect(row("ch1")).to_contain_text("Down")
        await expect(row("ch1").locator(".value")).to_have_text("3.5")
        await expect(row("ch2")).to_contain_text("Unknown")
        await expect(row("ch4")).to_be_hidden()
        await components.locator("summary").click()
        await expect(row("ch4")).to_be_visible()
        await expect(row("ch4").locator("button")).to_have_count(0)
        found = await Axe().run(page)
        assert [each["id"] for each in found.response["violations"] if each["impact"] in ("serious", "critical")] == []
        assert await page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        await operator.keep("phone-components")
        await page.get_by_role("button", name="Restart ch1").dblclick()
        await expect(components.locator("h2")).to_contain_text("199 of 200 up")  # without a reload
        assert transcoder.restarts == ["ch1"]
        transcoder.channels["线路/3"] = "stopped"
        await loop.ask("POST", "/api/v1/maintenance", {"scope": "service", "name": "tc", "reason": "r", "for": "1h"})
        await page.get_by_role("button", name="Restart 线路/3").click()
        await expect(page.locator("#answer")).to_contain_text("Held by: maintenance")
        transcoder.channels["ch4"] = "stopped"
        await expect(components.locator("h2")).to_contain_text("197 of 200 up")  # live updates leave the answer there
        await page.get_by_role("button", name="Restart 线路/3 although it is held by: maintenance").click()
        await expect(row("线路/3")).to_contain_text("Up")
        assert transcoder.restarts == ["ch1", "线路/3"]
        await page.set_viewport_size({"width": 1280, "height": 800})
        await operator.keep("components")
        operator.expect_faults("409")  # what the gate held
    async with window(browser, loop, java_script_enabled=False) as viewer:
        await viewer.sign_in("viewer")
        await viewer.open("services/tc")
        await expect(viewer.page.locator(".components").first).to_contain_text("ch2")
        await expect(viewer.page.locator("main button")).to_have_count(0)


async def test_without_scripts(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop, automatic=False)
    await loop.kill("web")
    await loop.fire("web")
    async with window(browser, loop, java_script_enabled=False) as operator:
        await operator.sign_in("operator")
        await expect(operator.page.locator("#s-web .state")).to_have_text("Down")
        await operator.page.fill("input[name=q]", "nothing like this")
        await operator.page.get_by_role("button", name="Show").click()
        await expect(operator.page.locator("#list")).to_contain_text("No service matches")
        await operator.open("services/web")
        await operator.page.get_by_role("button", name="Restart web on h").click()
        await expect(operator.page.locator("h1")).to_have_text("web")

        async def is_restarted() -> bool:
            return loop.restarts() == ["web"]

        await eventually(is_restarted)


async def test_a_lost_connection_is_shown_and_comes_back(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    async with window(browser, loop) as viewer:
        await viewer.sign_in("viewer")
        page = viewer.page
        await expect(page.locator("html")).to_have_class("scripts")  # they are loaded
        await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGKILL)
        await expect(page.locator("#live")).to_contain_text("Connection lost")
        await expect(page.locator("#content")).to_have_class(re.compile("stale"))
        await loop.stack.start_program("remediator")
        await expect(page.locator("#live")).to_have_text("")
        await expect(page.locator("#content")).not_to_have_class(re.compile("stale"))
        await loop.kill("web")
        await expect(page.locator("#s-web .state")).to_have_text("Down")
        # The exporter goes: the states are those of before.
        await loop.launcher.kill(loop.stack.pids["exporter"], signal.SIGKILL)
        await expect(page.locator("#banners")).to_contain_text("Cannot connect to the exporter")
        for path in ("services/web", "hosts", "hosts/h"):
            await viewer.open(path)
            await expect(page.locator("main")).to_contain_text("This part cannot be shown")
        viewer.expect_faults("net::ERR_")


async def test_a_session_that_ends_is_shown(loop: Loop, browser: Browser) -> None:
    await start_with_users(loop)
    async with window(browser, loop) as viewer:
        await viewer.sign_in("viewer")
        await expect(viewer.page.locator("html")).to_have_class("scripts")
        sessions = (await loop.ask("GET", "/api/v1/sessions")).json()["sessions"]
        assert (await loop.ask("DELETE", f"/api/v1/sessions/{sessions[0]['id']}")).status_code == 200
        await expect(viewer.page.locator("#live")).to_contain_text("Your session has ended.")
        viewer.expect_faults("401")


WILD: dict[str, Any] = {"metric": {"phase": "connect", "service": "web"}, "values": [[9e99, "0"], [253402300800, "1"]]}


@pytest.mark.parametrize("behaviour", ["slow", "garbage", "500", "away", "wild"])
async def test_prometheus_that_does_not_answer_takes_nothing_else_away(
    loop: Loop, browser: Browser, behaviour: str
) -> None:
    async def answer(_request: web.Request) -> web.Response:
        if behaviour == "slow":
            await asyncio.sleep(30)
        if behaviour == "wild":
            values = [*WILD["values"], *([time.time() - 60, value] for value in ("1e400", "1e308", "-1e308", "NaN"))]
            result = [WILD | {"values": values, "value": values[-1]}]
            return web.json_response({"status": "success", "data": {"result": result}})
        return web.Response(status=500 if behaviour == "500" else 200, text="<html>")

    async with peers.web_server(answer) as port:
        url = f"http://127.0.0.1:{1 if behaviour == 'away' else port}"
        await start_with_users(loop, remediator={"prometheus_url": url})
        async with window(browser, loop) as viewer:
            await viewer.sign_in("viewer")
            began = time.monotonic()
            await viewer.open("services/web")
            if behaviour != "wild":
                await expect(viewer.page.locator("main")).to_contain_text("This part cannot be shown")
            await expect(viewer.page.locator("main")).to_contain_text("Last failures")
            assert time.monotonic() - began < 20


async def test_charts_say_since_when_there_are_values(loop: Loop) -> None:
    first = time.time() - 2 * 3600

    async def answer(request: web.Request) -> web.Response:
        start = float(str((await request.post()).get("start", 0)))
        labels = {"service": "web", "phase": "connect", "mountpoint": "/"}
        values = [[at, "1"] for at in range(int(first), int(time.time()), 60) if at >= start]
        return web.json_response({"status": "success", "data": {"result": [{"metric": labels, "values": values}]}})

    async with peers.web_server(answer) as port:
        await start_with_users(loop, remediator={"prometheus_url": f"http://127.0.0.1:{port}"})
        for path, number in (("services/web", 2), ("hosts/h", 5)):
            for span, times in (("24h", number), ("1h", 0)):
                page = (await loop.ask("GET", f"/{path}?span={span}")).text
                assert page.count("values since") == times, (path, span)


async def test_logs_of_any_content(loop: Loop, browser: Browser) -> None:
    hostile = loop.folder / "hostile.log"
    lines = [
        b"<script>alert(1)</script>",
        b"\x1b[31mred\x1b[0m",
        b"\xff\xfe broken",
        "日志 \u202e".encode(),
        b"x" * 1_000_000,
    ]
    hostile.write_bytes(b"\n".join(lines * 4) + b"\nthe last line\n")
    service = loop.service("web")
    service["control"]["command"]["logs"] = ["cat", str(hostile)]
    users = write_users(loop.folder, {"operator": "operator"})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ("exporter", "remediator")}
    await loop.start({"web": service})
    async with window(browser, loop) as operator:
        await operator.sign_in("operator")
        await operator.open("services/web/logs")
        log = operator.page.locator(".log")
        await expect(log).to_contain_text("the last line")
        text = await log.inner_text()
        assert "\x1b" not in text
        await expect(operator.page.locator(".notice")).to_have_text("Only the end of the log is shown.")
        await operator.page.fill("#log-search", "LAST LINE")
        await expect(operator.page.locator("#log-found")).to_contain_text("match 1 of 1, matching lines: 1")
        assert await operator.page.evaluate(MARKED) == "last line"
        await operator.page.fill("#log-search", "x")  # of which there are a million
        await expect(operator.page.locator("#log-found")).to_contain_text(re.compile(r"match (\d{6,}) of \1,"))


# The marked match, if it is in the visible part of the log.
MARKED = """() => {
  const [range] = CSS.highlights.get("current") ?? [];
  const box = range?.getBoundingClientRect(), frame = document.querySelector(".log").getBoundingClientRect();
  return range && box.top >= frame.top && box.bottom <= frame.bottom ? range.toString() : null;
}"""


async def test_a_log_is_searched(loop: Loop, browser: Browser) -> None:
    file = loop.folder / "web.log"
    lines = [f"line {number}: {'Error' if number % 100 == 0 else 'well'}, so far" for number in range(1000)]
    file.write_text("\n".join([*lines, "errors: error", ""]))
    service = loop.service("web")
    service["control"]["command"]["logs"] = ["tail", "-n", "900", str(file)]
    users = write_users(loop.folder, {"operator": "operator"})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ("exporter", "remediator")}
    await loop.start({"web": service})
    async with window(browser, loop, **MODES["phone"] | {"locale": "en-US"}) as operator:
        await operator.sign_in("operator")
        await operator.open("services/web/logs")
        page = operator.page
        found, search = page.locator("#log-found"), page.locator("#log-search")
        await expect(found).to_be_hidden()
        await search.fill("no such text")
        await expect(found).to_contain_text("No line matches.")
        await search.fill("error")
        await expect(found).to_contain_text("match 10 of 10, matching lines: 9")  # the newest
        assert await page.evaluate(MARKED) == "error"
        await search.press("Enter")
        await expect(found).to_contain_text("match 1 of 10")
        assert await page.evaluate(MARKED) == "Error"
        await search.press("Shift+Enter")
        await expect(found).to_contain_text("match 10 of 10")
        await page.get_by_role("button", name="Previous match").click()
        await page.get_by_role("button", name="Previous match").click()
        await page.get_by_role("button", name="Previous match").click()
        await page.get_by_role("button", name="Next match").click()
        await expect(found).to_contain_text("match 8 of 10")
        await operator.keep("phone-log-search")
        # The log grows, and its beginning is no longer shown: the reader stays at the same match.
        with file.open("a") as log:
            log.writelines(f"another error {number}\n" for number in range(150))
        await page.get_by_role("link", name="Read again").click()
        await expect(found).to_contain_text("match 7 of 159, matching lines: 158")
        assert await page.evaluate(MARKED) == "Error"
        await page.get_by_label("Follow").check()
        await page.locator(".log").evaluate("(log) => { log.scrollTop = log.scrollHeight; }")
        with file.open("a") as log:
            log.write("the newest line\n")
        await expect(page.locator(".log")).to_contain_text("the newest line")
        at_end = "(log) => log.scrollTop + log.clientHeight >= log.scrollHeight - 20"
        assert await page.locator(".log").evaluate(at_end)
