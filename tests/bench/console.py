"""The console with 1,000 services: how soon its list arrives and is usable, how large it is, and what 200 viewers cost.

Every service is probed once per 15 s, and some of them change their state all the time.
"""

import asyncio
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import uvloop
from playwright.async_api import async_playwright

from defib.demo.launcher import Launcher
from defib.demo.stack import Stack
from tests.bench import peers
from tests.support import eventually

SERVICES, REQUESTS, VIEWERS, SECONDS = 1000, 20, 200, 15.0
VISITS = 7
FIRST_BYTE, SIZE, USABLE, CORE, PRESS = 0.150, 300_000, 1.0, 0.15, 0.300


def run() -> bool:
    return uvloop.run(_measure())


async def _measure() -> bool:
    launcher = await Launcher.begin()
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            stack = Stack(launcher, Path(name))
            stack.configuration(
                {"hosts": {"h": {"address": "127.0.0.1", "shell": "local"}}, "services": _services(Path(name))}
            )
            await stack.start_program("exporter")
            await stack.start_program("remediator")
            return all([await _list(stack), await _browser(stack), await _press(stack), await _viewers(stack)])
    finally:
        await launcher.end()


def _services(folder: Path) -> dict[str, Any]:
    (folder / "up").touch()
    services: dict[str, Any] = {}
    for number in range(SERVICES):
        port = 1 if number % 20 == 0 else 0
        probe: dict[str, Any] = {"every": "15s", "fail_after": 1}
        probe |= {"tcp": {"address": f"127.0.0.1:{port or 9}"}}
        services[f"service-{number}"] = {
            "name": f"Service number {number}", "host": "h", "provider": f"provider-{number % 7}", "probe": probe,
            "control": {"command": {"restart": ["true", str(number)]}},
        }  # fmt: skip
    return services


async def _list(stack: Stack) -> bool:
    async with httpx.AsyncClient(trust_env=False, timeout=30, auth=stack.credential) as client:

        async def is_complete() -> bool:
            page = (await client.get(f"{stack.url('remediator')}/")).text
            return page.count(' id="s-') == SERVICES and "No checks yet" not in page

        await eventually(is_complete, 90)
        firsts, sizes = [], []
        for _ in range(REQUESTS):
            began = time.perf_counter()
            async with client.stream("GET", f"{stack.url('remediator')}/") as answer:
                raw = answer.aiter_raw()
                size = len(await anext(raw))
                firsts.append(time.perf_counter() - began)
                async for part in raw:
                    size += len(part)
            sizes.append(size)
            await asyncio.sleep(0.3)
    first, size = statistics.median(firsts), max(sizes)
    good = first <= FIRST_BYTE and size <= SIZE
    print(
        f"the list of {SERVICES} services: first byte after {first * 1000:.0f} ms (at most {FIRST_BYTE * 1000:g}), median of"
        f" {REQUESTS}; {size / 1000:.0f} kB compressed (at most {SIZE / 1000:g}): {'good' if good else 'NOT GOOD ENOUGH'}"
    )
    return good


async def _browser(stack: Stack) -> bool:
    """Seconds until a browser that has nothing in its cache has run the scripts of the list, and shows it."""
    took: list[float] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for _ in range(VISITS):
            context = await browser.new_context(extra_http_headers={"Authorization": f"Bearer {stack.token}"})
            page = await context.new_page()
            await page.goto(f"{stack.url('remediator')}/", wait_until="domcontentloaded")  # scripts are modules
            await page.locator("#list tr a").first.click(trial=True)
            took.append(await page.evaluate("performance.now() / 1000"))
            await context.close()
        await browser.close()
    median = statistics.median(took)
    print(
        f"usable in Chromium after {median * 1000:.0f} ms, median of {VISITS} (at most {USABLE * 1000:g}):"
        f" {'good' if median <= USABLE else 'TOO SLOW'}"
    )
    return median <= USABLE


async def _press(stack: Stack) -> bool:
    """Seconds from an operator's restart to the first change in the stream."""
    took = []
    async with httpx.AsyncClient(trust_env=False, timeout=60, auth=stack.credential) as client:
        for number in range(1, 11):
            url = f"{stack.url('remediator')}/services/service-{number}/restart"
            began = time.perf_counter()
            answer = await client.post(url, headers={"Sec-Fetch-Mode": "cors"})
            took.append(time.perf_counter() - began)
            assert answer.status_code in (200, 409), answer.text
    median = statistics.median(took)
    print(
        f"from a press to the page that shows it: median {median * 1000:.0f} ms of {len(took)} (at most {PRESS * 1000:g}):"
        f" {'good' if median <= PRESS else 'TOO SLOW'}"
    )
    return median <= PRESS


async def _viewers(stack: Stack) -> bool:
    received = [0]
    limits = httpx.Limits(max_connections=VIEWERS + 10)
    async with httpx.AsyncClient(trust_env=False, timeout=60, auth=stack.credential, limits=limits) as client:

        async def watch() -> None:
            async with client.stream("GET", f"{stack.url('remediator')}/stream?version=1") as answer:
                async for part in answer.aiter_raw():
                    received[0] += len(part)

        pid = stack.pids["remediator"]
        await asyncio.sleep(2)
        quiet = await _cpu(pid)
        viewers = [asyncio.create_task(watch()) for _ in range(VIEWERS)]
        await asyncio.sleep(5)
        received[0] = 0
        busy = await _cpu(pid)
        sent = received[0] / SECONDS / VIEWERS
        for task in viewers:
            task.cancel()
        await asyncio.gather(*viewers, return_exceptions=True)
    good = busy - quiet <= CORE
    print(
        f"{VIEWERS} viewers: {100 * (busy - quiet):.1f} % of a core more than without (at most {100 * CORE:g}), {sent / 1000:.1f}"
        f" kB/s each: {'good' if good else 'NOT GOOD ENOUGH'}"
    )
    return good


async def _cpu(pid: int) -> float:
    """Return the cores that a process uses, as an average of some seconds."""
    before = peers.cpu(pid)
    await asyncio.sleep(SECONDS)
    return (peers.cpu(pid) - before) / SECONDS
