"""Real Prometheus on the shipped files: an outsider that answers in place of a node_exporter, and a pause."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from defib.demo.stack import Stack
from tests.hostile import TOO_MANY, Outsider, forged
from tests.support import eventually

NOWHERE = "http://127.0.0.1:1"
SETTLED = ("service:up:max", "service:info:one", "host:up:max")
# Pages of which nothing is taken, and the words of Prometheus' error.
REFUSED = (
    (TOO_MANY, "sample limit exceeded"),
    ("node_x{" + ",".join(f'l{number}="1"' for number in range(60)) + "} 1\n", "label_limit"),
    ('node_x{l="' + "x" * 2000 + '"} 1\n', "label_value_length_limit"),
    ("# HELP node_x " + "x" * 11_000_000 + "\n", "body size limit exceeded"),
    ('node_x{__name__="service_up",service="well"} 0\n', "__name__"),
)


class Watched:
    """An exporter that watches two services and a host, the Prometheus that scrapes it, and an outsider."""

    def __init__(self, stack: Stack) -> None:
        self.stack, self.outsider = stack, Outsider()

    async def start(self) -> None:
        often = {"every": "1s", "retry_every": "1s"}
        login = {"port": 1, "user": "u", "known_hosts": "/dev/null"}
        self.stack.configuration(
            {
                "hosts": {"gone": {"address": "127.0.0.1", "ssh": login, "collect": {"system": "5s"}}},
                "services": {
                    "well": {"probe": {**often, "tcp": {"address": f"127.0.0.1:{self.stack.ports['node']}"}}},
                    "down": {"probe": {**often, "http": {"url": NOWHERE}}},
                },
            }
        )
        await self.outsider.start(self.stack.ports["node"])
        await self.stack.start_program("exporter")
        await self.stack.start_prometheus()

    async def ask(self, query: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The values of a query by their labels."""
        answer = await self.stack.client.post(f"{self.stack.url('prometheus')}/api/v1/query", data={"query": query})
        assert answer.is_success, answer.text
        result = answer.json()["data"]["result"]
        return {tuple(sorted(each["metric"].items())): float(each["value"][1]) for each in result}

    async def alerts(self) -> set[tuple[tuple[str, str], ...]]:
        """The alerts, pending or firing, but for two kinds that come and go by the time that things take here.

        Those are about the exporter itself, of a busy machine, and that alerts cannot be sent: there is no Alertmanager,
        and Prometheus tries again after a minute.
        """
        exporter = f"127.0.0.1:{self.stack.ports['exporter']}"
        others = f'ALERTS{{instance!="{exporter}", fault!="notifications"}}'
        return set(await self.ask(f"max without (alertstate) ({others})"))

    async def recorded(self) -> list[dict[tuple[tuple[str, str], ...], float]]:
        return [await self.ask(name) for name in SETTLED]

    async def rules(self) -> list[dict[str, Any]]:
        answer = await self.stack.get("prometheus", "/api/v1/rules")
        return [rule for group in answer["data"]["groups"] if group["interval"] == 1 for rule in group["rules"]]

    async def evaluated(self) -> None:
        """Wait until Prometheus has scraped the present page, and then evaluated all rules of each scrape twice."""
        asked = self.outsider.asked + 2

        async def scraped() -> bool:
            return any(value >= asked for value in (await self.ask("node_asked_total")).values())

        await eventually(scraped)
        for _ in range(2):
            now = time.time()

            async def done(since: float = now) -> bool:
                rules = await self.rules()
                return all(datetime.fromisoformat(each["lastEvaluation"]).timestamp() > since for each in rules)

            await eventually(done)

    async def refuses(self, said: str) -> bool:
        """Whether Prometheus refuses the outsider's page with an error that holds these words."""
        targets = await self.stack.get("prometheus", "/api/v1/targets?state=active")
        instance = f"127.0.0.1:{self.stack.ports['node']}"
        (found,) = (each for each in targets["data"]["activeTargets"] if each["labels"]["instance"] == instance)
        return found["health"] == "down" and said in found["lastError"]


@pytest.fixture
async def watched(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Watched]:
    made = Watched(Stack(launcher, tmp_path))
    yield made
    await made.outsider.stop()
    await made.stack.client.aclose()


@pytest.mark.needs("prometheus")
@pytest.mark.timeout(900)
async def test_what_answers_in_place_of_a_node_exporter_changes_no_alert(watched: Watched) -> None:
    await watched.start()
    expected = {
        ("ServiceDown", "down"),
        ("HostDown", "gone"),
        ("RemediatorDown", ""),
        ("AlertmanagerDown", ""),
        ("Watchdog", ""),
    }

    async def settled() -> bool:
        labels = [dict(each) for each in await watched.alerts()]
        there = {(each["alertname"], each.get("service", each.get("host", ""))) for each in labels}
        return there == expected and all(await watched.recorded())

    await eventually(settled, 300)  # what a slow start has raised looks back over minutes
    await watched.evaluated()
    alerts, recorded = await watched.alerts(), await watched.recorded()

    watched.outsider.page = forged(well="well", down="down", host="gone")
    await watched.evaluated()
    assert await watched.alerts() == alerts
    assert await watched.recorded() == recorded
    assert {
        (each["name"], each.get("lastError", "")) for each in await watched.rules() if each["health"] != "ok"
    } == set()
    assert await watched.ask('{job="node", __name__!~"node_[a-z0-9_]+|up|scrape_.*"}') == {}
    assert await watched.ask('{job!="node", __name__=~"node_.*"}') == {}

    for page, refusal in REFUSED:
        watched.outsider.page = page
        await eventually(lambda said=refusal: watched.refuses(said))  # type: ignore[misc]
    watched.outsider.elsewhere = f"{watched.stack.url('exporter')}/metrics"
    await eventually(lambda: watched.refuses("302"))
    assert await watched.ask('{__name__=~"node_x|service_up", job="node"}') == {}
    assert await watched.alerts() == alerts
    assert await watched.recorded() == recorded


@pytest.mark.long
@pytest.mark.needs("prometheus", "prometheus-alertmanager")
@pytest.mark.timeout(600)
async def test_a_pause_of_prometheus_resolves_no_alert(launcher: Launcher, tmp_path: Path) -> None:
    """For 100 s, as shipped: with a shorter --rules.alert.resend-delay Alertmanager would have resolved all alerts."""
    stack = Stack(launcher, tmp_path, hurried=False)
    probe = {"every": "1s", "retry_every": "1s", "http": {"url": NOWHERE}}
    stack.configuration({"services": {"down": {"probe": probe}}})
    await stack.start_alertmanager()
    await stack.start_program("exporter")
    await stack.start_prometheus()

    async def active() -> dict[str, str]:
        listed = (await stack.client.get(f"{stack.url('alertmanager')}/api/v2/alerts")).json()
        found = {each["labels"]["alertname"]: each["startsAt"] for each in listed}
        return {name: found[name] for name in ("ServiceDown", "Watchdog") if name in found}

    async def both_fire() -> bool:
        return len(await active()) == 2

    await eventually(both_fire, 150)
    before = await active()
    os.kill(stack.pids["prometheus"], signal.SIGSTOP)
    try:
        paused_until = time.monotonic() + 100
        while time.monotonic() < paused_until:
            assert await active() == before
            await asyncio.sleep(1)
    finally:
        os.kill(stack.pids["prometheus"], signal.SIGCONT)
    evaluated_until = time.monotonic() + 40
    while time.monotonic() < evaluated_until:
        assert await active() == before
        await asyncio.sleep(1)
    await stack.client.aclose()
