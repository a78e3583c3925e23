"""What heartbeats offer to clients of other programs: metrics of healthchecks, badges, the push URL of Uptime Kuma."""

import asyncio
import hashlib
import json
import shutil
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from playwright.async_api import async_playwright
from prometheus_client.parser import text_string_to_metric_families

from defib.demo.launcher import Launcher
from tests.integration.test_heartbeats import CHECK, KEY, Heartbeats
from tests.support import SCREENSHOTS, eventually

HOSTILE = """<b>"'&\\ 备份"""
JOBS = "nightly jobs/备份"
SERVICES: dict[str, Any] = {
    "backup": {"category": JOBS, "probe": {"heartbeat": {"every": "1h"}}},
    "moved": {"name": HOSTILE, "category": JOBS, "probe": {"heartbeat": {"every": "1h", "uuid": CHECK}}},
    "overdue": {"category": "slow", "probe": {"heartbeat": {"every": "1s", "grace": "1h"}}},
    "writer": {"name": "Writer", "probe": {"heartbeat": {"every": "10m"}}, "agent": {}},
    "reader": {"probe": {"heartbeat": {"every": "10m"}}, "agent": {}},
    "web": {"probe": {"tcp": {"address": "127.0.0.1:1", "source": "127.0.0.1"}}},
}
SVG = "{http://www.w3.org/2000/svg}"


class Compatible(Heartbeats):
    async def samples(self, path: str, **headers: str) -> dict[tuple[str, str], float]:
        """Return the values of a page by metric and by the label that tells its series apart."""
        answer = await self.client.get(path, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = list(text_string_to_metric_families(answer.text))
        assert all(each.documentation for each in families)
        kinds = ("name", "tag", "agent_name", "type")
        return {
            (sample.name, next((sample.labels[kind] for kind in kinds if kind in sample.labels), "")): sample.value
            for family in families
            for sample in family.samples
        }

    async def urls(self, name: str) -> dict[str, str]:
        answer = await self.client.get(f"/api/v1/heartbeats/{name}/urls")
        return {key: url.removeprefix(f"http://127.0.0.1:{self.ping_port}") for key, url in answer.json().items()}

    async def badge(self, path: str) -> dict[str, Any]:
        answer = await self.ping(path)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def push(self, path: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
        answer = await self.ping(path, method)
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
        return answer.status_code, answer.json() if method != "HEAD" else {}


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Compatible]:
    made = Compatible(launcher, tmp_path)
    made.write(SERVICES)
    await made.start()
    yield made
    await made.client.aclose()
    await made.jobs.aclose()


async def test_metrics_of_healthchecks(exporter: Compatible) -> None:
    await exporter.ping(f"/{KEY}/moved/fail")
    await exporter.ping(f"/{KEY}/backup/start")
    await exporter.ping(f"/{KEY}/overdue")

    async def is_overdue() -> dict[tuple[str, str], float] | None:
        found = await exporter.samples("/metrics/healthchecks")
        return found if found["hc_check_grace", "overdue"] else None

    values = await eventually(is_overdue)
    assert values == {
        **{("hc_check_up", name): float(name != HOSTILE) for name in ("backup", HOSTILE, "overdue", "Writer", "reader")},
        **{("hc_check_started", name): float(name == "backup") for name in ("backup", HOSTILE, "overdue", "Writer", "reader")},
        **{("hc_check_grace", name): float(name == "overdue") for name in ("backup", HOSTILE, "overdue", "Writer", "reader")},
        **{("hc_check_paused", name): 0.0 for name in ("backup", HOSTILE, "overdue", "Writer", "reader")},
        ("hc_tag_up", JOBS): 0.0, ("hc_tag_up", "slow"): 1.0, ("hc_tag_up", "other"): 1.0,
        ("hc_checks_total", ""): 5.0, ("hc_checks_down_total", ""): 1.0,
    }  # fmt: skip
    page = (await exporter.client.get("/metrics/healthchecks")).text
    # A check that was moved with its UUID keeps the key that healthchecks gave it.
    key = hashlib.sha1(CHECK.replace("-", "")[:16].encode(), usedforsecurity=False).hexdigest()
    assert f'hc_check_up{{name="<b>\\"\'&\\\\ 备份",tags="{JOBS}",unique_key="{key}"}} 0\n' in page
    assert (
        "# HELP hc_check_up Whether the check is currently up (1 for yes, 0 for no).\n# TYPE hc_check_up gauge\n"
        in page
    )
    pause = {"scopes": [{"scope": "service", "name": "moved"}], "seconds": 60}
    assert (await exporter.client.put("/api/v1/pauses", json=pause)).is_success
    values = await exporter.samples("/metrics/healthchecks")
    assert [values[f"hc_check_{name}", HOSTILE] for name in ("up", "grace", "paused")] == [1, 0, 1]
    assert CHECK not in page


async def test_metrics_of_agents(exporter: Compatible) -> None:
    assert await exporter.samples("/metrics/agents") == {}
    report = {
        "task": "T-17",
        "pending": {"board": 3, "mail": 2},
        "llm_requests": {"ok": 30, "429": 10},
        "response_seconds": 1.5,
    }
    await exporter.ping(f"/{KEY}/writer", "POST", content=json.dumps(report))
    await exporter.ping(f"/{KEY}/reader/fail", "POST", content=json.dumps({"pending": {"board": 4}}))
    values = await exporter.samples("/metrics/agents")
    stagnation = {name: values.pop(("agent_task_stagnation_seconds", name)) for name in ("writer", "reader")}
    assert all(0 <= each < 60 for each in stagnation.values())
    assert values == {
        ("agent_429_error_rate", "writer"): 25.0, ("agent_response_time_seconds", "writer"): 1.5,
        ("agent_heartbeat_status", "writer"): 1.0, ("agent_heartbeat_status", "reader"): 0.0,
        ("agent_workboard_pending", "board"): 7.0, ("agent_workboard_pending", "mail"): 2.0,
    }  # fmt: skip
    page = (await exporter.client.get("/metrics/agents")).text
    assert 'agent_heartbeat_status{agent_name="writer",agent_label="Writer"} 1\n' in page
    await exporter.ping(f"/{KEY}/writer", "POST", content='{"pending": 6}')
    values = await exporter.samples("/metrics/agents")
    assert values["agent_workboard_pending", "tasks"] == 6
    assert values["agent_429_error_rate", "writer"] == 25  # no requests since
    assert ("agent_response_time_seconds", "writer") not in values
    await exporter.stop()
    await exporter.start()
    assert (await exporter.samples("/metrics/agents"))["agent_429_error_rate", "writer"] == 25


async def test_badges(exporter: Compatible) -> None:
    urls = await exporter.urls("backup")
    assert urls["badge_url"].startswith("/badge/")
    assert urls["badge_url"].endswith(".svg")
    assert urls["url"].replace("-", "").rpartition("/")[2] not in urls["badge_url"]
    badge, category = (urls[name].removesuffix(".svg") for name in ("badge_url", "category_badge_url"))
    assert await exporter.badge(f"{badge}.json") == {"status": "unknown", "total": 1, "grace": 0, "down": 0}
    for path, status in (("/backup/fail", "down"), ("/backup", "up"), ("/backup/start", "up")):
        await exporter.ping(f"/{KEY}{path}")
        assert (await exporter.badge(f"{badge}.json"))["status"] == status
    assert await exporter.badge(f"{badge}.shields") == {
        "schemaVersion": 1, "label": "backup", "message": "up", "color": "success",
    }  # fmt: skip
    await exporter.ping(f"/{KEY}/moved/1")

    async def is_category_down() -> bool:
        return await exporter.badge(f"{category}.json") == {"status": "down", "total": 2, "grace": 0, "down": 1}

    await eventually(is_category_down)
    await exporter.ping(f"/{KEY}/overdue")
    overdue = (await exporter.urls("overdue"))["badge_url"].removesuffix(".svg")

    async def is_overdue() -> bool:
        return await exporter.badge(f"{overdue}.json") == {"status": "late", "total": 1, "grace": 1, "down": 0}

    await eventually(is_overdue)
    moved = (await exporter.urls("moved"))["badge_url"]
    answer = await exporter.ping(moved)
    assert answer.headers["Content-Type"] == "image/svg+xml; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache, no-store, max-age=0"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    image = ET.fromstring(answer.text)  # noqa: S314 - our own
    assert image.findtext(f"{SVG}title") == f"{HOSTILE}: down"
    assert [each.text for each in image.iter(f"{SVG}text")] == [HOSTILE, "down"]
    assert (await exporter.ping(moved, "HEAD")).status_code == 200


async def test_a_badge_s_url_cannot_ping_and_a_ping_s_is_no_badge(exporter: Compatible) -> None:
    urls = await exporter.urls("backup")
    signature, _, name = urls["badge_url"].removeprefix("/badge/").removesuffix(".svg").partition("/")
    assert name == "backup"
    badge = f"{signature}/{name}"
    own = urls["url"].rpartition("/")[2]
    dashed = str(uuid.UUID(signature))
    for path in (f"/ping/{dashed}", f"/{badge}", f"/ping/{badge}", f"/api/push/{signature}", f"/api/push/{dashed}"):
        assert (await exporter.ping(path)).status_code == 404, path
    for path in (
        f"/badge/{own}/backup.svg",
        f"/badge/{own.replace('-', '')}/backup.svg",
        f"/badge/{signature}/moved.svg",
        f"/badge/{signature[::-1]}/backup.svg",
        f"/badge/{urls['category_badge_url'].split('/')[2]}/backup.svg",
        f"/badge/{signature}.svg",
        f"/badge/{badge}.png",
        f"/badge/{badge}",
        "/badge/",
    ):
        assert (await exporter.ping(path)).status_code in (400, 404), path
    assert (await exporter.ping(f"/badge/{badge}.svg", "POST")).status_code in (400, 404, 405)
    assert (await exporter.heartbeat("backup"))["pings"] == []
    exporter.write({name: service for name, service in SERVICES.items() if name != "backup"})
    await exporter.reload()
    assert (await exporter.ping(f"/badge/{badge}.svg")).status_code == 404
    exporter.write(SERVICES)
    await exporter.stop()
    await exporter.start()
    assert (await exporter.ping(f"/badge/{badge}.svg")).status_code == 200  # it is stable


@pytest.mark.needs("chromium")
async def test_what_a_badge_looks_like(exporter: Compatible) -> None:
    await exporter.ping(f"/{KEY}/moved/1")
    await exporter.ping(f"/{KEY}/backup")
    badges = [(await exporter.urls(name))["badge_url"] for name in ("backup", "moved", "overdue")]
    base = f"http://127.0.0.1:{exporter.ping_port}"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = await browser.new_page(device_scale_factor=3, viewport={"width": 300, "height": 140})
        await page.set_content("".join(f'<p><img src="{base}{path}"></p>' for path in badges))
        for image in await page.locator("img").all():
            await image.evaluate("image => image.decode()")
            assert await image.evaluate("image => image.naturalHeight") == 20
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=SCREENSHOTS / "badges.png")
        for path in badges:  # no text is longer than its part of the badge
            await page.set_content((await exporter.ping(path)).text)
            texts = await page.locator("text").evaluate_all(
                "all => all.map((each) => [each.getBBox().x, each.getBBox().width])"
            )
            parts = await page.locator("g rect").evaluate_all(
                "all => all.map((each) => [each.x.baseVal.value, each.width.baseVal.value])"
            )
            for (x, width), (begin, size) in zip(texts, parts, strict=True):
                assert begin <= x <= x + width <= begin + size
        await browser.close()


async def test_push_urls_of_uptime_kuma(exporter: Compatible) -> None:
    path = (await exporter.urls("backup"))["push_url"]
    token = path.removeprefix("/api/push/")
    assert token == (await exporter.urls("backup"))["url"].rpartition("/")[2]
    for method in ("GET", "POST", "PUT", "HEAD"):
        status, answer = await exporter.push(f"{path}?status=up&msg=OK&ping=", method)
        assert (status, answer) == (200, {} if method == "HEAD" else {"ok": True}), method
    await exporter.until("backup", up=True)
    assert await exporter.push(f"{path}?status=down&msg=disk%20full%20{KEY}&ping=1500") == (200, {"ok": True})
    failed = await exporter.until("backup", up=False, reason="failed")
    assert failed["last"]["message"] == "the job reported a failure; its output ends with: disk full ***"
    heartbeat = await exporter.heartbeat("backup")
    assert heartbeat["duration_seconds"] == 1.5
    assert await exporter.value('service_heartbeat_duration_seconds{service="backup"') == 1.5
    assert [each["body"] for each in heartbeat["pings"]] == ["disk full ***", "", "", "", ""]
    assert heartbeat["pings"][-1]["client"].startswith("GET 127.0.0.1 python-httpx/")
    assert await exporter.push(path.replace(token, token.upper())) == (200, {"ok": True})
    await exporter.until("backup", up=True)
    unknown = {"ok": False, "msg": "Monitor not found or not active."}
    for wrong in ("0" * 32, "x", token[:-1], f"{token}0", "writer", KEY):
        assert await exporter.push(f"/api/push/{wrong}?status=up") == (404, unknown), wrong
    for number in ("-1", "fast", "nan", "86400001", "inf"):
        status, answer = await exporter.push(f"{path}?ping={number}")
        assert (status, answer["ok"]) == (400, False), number
        assert answer["msg"].startswith("Invalid ping value")
    assert len((await exporter.heartbeat("backup"))["pings"]) == 6
    answers = await asyncio.gather(*(exporter.ping(path) for _ in range(100)))
    refused = next(each for each in answers if each.status_code != 200)
    assert (refused.status_code, refused.json()) == (429, {"ok": False, "msg": "rate limit exceeded"})
    assert int(refused.headers["Retry-After"]) >= 1
    (exporter.folder / "heartbeats.db").rename(exporter.folder / "moved.db")
    status, answer = await exporter.push((await exporter.urls("moved"))["push_url"])
    assert (status, answer) == (503, {"ok": False, "msg": "cannot store the ping"})
    assert token not in (exporter.folder / "log").read_text()
