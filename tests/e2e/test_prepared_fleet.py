"""A person who knows only that the site is slow finds and repairs three faults in a browser."""

import shutil
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright, expect

from defib.demo.launcher import Launcher
from tests.prepared_fleet import PreparedFleet
from tests.support import SCREENSHOTS, eventually

pytestmark = [pytest.mark.needs("sshd", "chromium", "prometheus", "prometheus-alertmanager"), pytest.mark.long]
TIMEOUT = 200_000  # milliseconds: the machine may be busy


async def test_three_faults_are_found_and_repaired_in_the_browser(launcher: Launcher, tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    fleet = PreparedFleet(launcher, tmp_path)
    try:
        await fleet.start()
        await fleet.break_it()
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            page = await browser.new_page(locale="en-US", viewport={"width": 1280, "height": 860})
            page.set_default_timeout(TIMEOUT)
            expect.set_options(timeout=TIMEOUT)
            await _repair(page, fleet.stack.url("remediator"))
            await browser.close()
        for name in ("search", "mineru-2", "live-3", "portal"):
            await eventually(lambda name=name: fleet.is_up(name))  # type: ignore[misc] # mypy cannot infer the lambda
    finally:
        await fleet.stop()


async def _repair(page: Page, url: str) -> None:
    await page.goto(f"{url}/")
    await page.fill("input[name=user]", "operator")
    await page.fill("input[name=password]", "operator")
    await page.press("input[name=password]", "Enter")
    # The list begins with what is broken.
    await expect(page.locator("#s-search .state")).to_have_text("Down")
    await expect(page.locator("#s-mineru-2 .state")).to_have_text("Down")
    await expect(page.locator("#s-live-3 .state")).to_have_text("Stopped")
    await expect(page.locator("#s-live-3")).to_contain_text("new encoder settings, back at 7:00")
    await expect(page.locator("#s-portal")).to_contain_text("needs Search, which is down")
    await _keep(page, "fleet-services")
    # The page of the slow site names what it depends on.
    await page.locator("#s-portal a").click()
    related = page.locator("dd", has_text="Search")
    await expect(related.locator(".state").first).to_have_text("Down")
    await _keep(page, "fleet-service")
    await related.get_by_role("link", name="Search").click()
    await page.get_by_role("button", name="Restart program search on app-01").click()
    await expect(page.locator(".subject .state")).to_have_text("Up")
    await _keep_phone(page, f"{url}/services/mineru-2")
    await page.goto(f"{url}/services/mineru-2")
    await page.get_by_role("button", name="Approve: restart").click()
    await expect(page.locator(".subject .state")).to_have_text("Up")
    await page.goto(f"{url}/services/live-3")
    await expect(page.get_by_role("button", name="Restart program live-3")).to_have_count(0)
    await page.get_by_role("button", name="Start program live-3 on media-01").click()
    await expect(page.locator(".subject .state")).to_have_text("Up")
    # The host's page has charts of what Prometheus knows.
    await page.goto(f"{url}/hosts/gpu-01?span=1h")
    await expect(page.locator("figure", has_text="GPU memory").locator(".line").first).to_be_attached()
    program = page.locator("tr", has=page.get_by_role("cell", name="chat-1", exact=True))
    await expect(program.get_by_role("link")).to_have_text("Chat model 1")
    await _keep(page, "fleet-host")


async def _keep(page: Page, name: str) -> None:
    """Keep a picture of what fits into the window, for the documentation."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    await page.screenshot(path=SCREENSHOTS / f"{name}.png")


async def _keep_phone(page: Page, url: str) -> None:
    """Keep a picture of a page on a phone, in Chinese."""
    assert page.context.browser is not None
    context = await page.context.browser.new_context(
        locale="zh-CN", viewport={"width": 390, "height": 844}, storage_state=await page.context.storage_state()
    )
    phone = await context.new_page()
    await phone.goto(url)
    await expect(phone.locator(".subject .state")).to_be_visible()
    await _keep(phone, "fleet-phone")
    await context.close()
