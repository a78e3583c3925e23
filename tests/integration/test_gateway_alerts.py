"""The alerts about the gateway, on the shipped rules: a real gateway before a stand-in for a model API."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from defib.demo.launcher import Launcher
from defib.demo.stack import Stack, reserve_ports
from tests.dashboard_queries import queries
from tests.integration.model_api import ModelApi
from tests.support import eventually

pytestmark = [
    pytest.mark.long,
    pytest.mark.needs("prometheus", "prometheus-alertmanager"),
    pytest.mark.timeout(2400),
]
WITHIN = 1500  # GatewayQueueLong waits for a quarter of an hour


@pytest.fixture
async def stack(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Stack]:
    """A gateway with an upstream that has a low limit, one that cannot be reached, and one whose rate is too low."""
    api = ModelApi()
    api.rate = 5
    await api.start()
    other = ModelApi()
    await other.start()
    (closed,) = reserve_ports(1)
    made = Stack(launcher, tmp_path)
    upstreams = {
        "limited": {"url": api.url, "rate": "120/min"},
        "gone": {"url": f"http://127.0.0.1:{closed}/v1"},
        "narrow": {"url": other.url, "rate": "2/min"},
    }
    queue = {"max_wait": "1s"}
    made.configuration({"gateway": {"upstreams": upstreams, "default": "narrow", "queue": queue}})
    await made.start_program("gateway")
    await made.start()
    yield made
    await made.client.aclose()
    await api.stop()
    await other.stop()


async def send(stack: Stack, upstream: str) -> None:
    """Send one request; the client gets whatever comes."""
    with contextlib.suppress(httpx.TransportError):
        await stack.client.post(
            f"{stack.url('gateway')}/v1/chat/completions", json={"model": "m"}, headers={"X-Upstream": upstream}
        )


async def keep_sending(stack: Stack) -> None:
    await asyncio.gather(*(send(stack, "limited") for _ in range(40)))
    while True:
        await asyncio.gather(send(stack, "gone"), send(stack, "narrow"), send(stack, "limited"), asyncio.sleep(0.5))


async def received(stack: Stack) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the alerts about the gateway that fire and have reached the remediator, by name, provider and severity."""
    page = await stack.get("remediator", "/api/v1/alerts") or {"alerts": []}
    return {
        (labels["alertname"], labels.get("provider", ""), labels["severity"]): each
        for each in page["alerts"]
        if (labels := each["labels"])["alertname"].startswith("Gateway") and each["status"] == "firing"
    }


async def muted(stack: Stack) -> set[str]:
    listed = (await stack.client.get(f"{stack.url('alertmanager')}/api/v2/alerts")).json()
    return {each["labels"]["alertname"] for each in listed if each["status"]["state"] == "suppressed"}


async def test_each_problem_of_the_gateway_reaches_the_remediator_once(stack: Stack) -> None:
    wanted = {
        ("GatewayRateLimited", "limited", "warning"),
        ("GatewayUpstreamFailing", "gone", "critical"),
        ("GatewayQueueLong", "narrow", "warning"),
    }
    sending = asyncio.create_task(keep_sending(stack))

    async def have_arrived() -> bool:
        return set(await received(stack)) >= wanted

    try:
        await eventually(have_arrived, WITHIN)
        assert set(await received(stack)) == wanted
        await every_query_is_answered(stack)
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    os.kill(stack.pids["gateway"], signal.SIGKILL)

    async def is_notified() -> bool:
        return ("GatewayDown", "", "critical") in await received(stack)

    await eventually(is_notified, 180)
    assert await muted(stack) >= {"GatewayRateLimited", "GatewayUpstreamFailing"}


async def every_query_is_answered(stack: Stack) -> None:
    """No query of the dashboard is empty."""
    empty = []
    for query in (each for each in queries() if each.where.startswith("gateway:")):
        url = f"{stack.url('prometheus')}/api/v1/query"
        answer = await stack.client.post(url, data={"query": query.expression})
        assert answer.is_success, f"{query.expression}: {answer.text}"
        if not answer.json()["data"]["result"]:
            empty.append(f"{query.where}: {query.text}")
    assert not empty, "\n".join(empty)
