"""Real Prometheus on the shipped files, and an outsider that answers in place of a node_exporter."""

import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from defib.demo.keeper import Keeper
from defib.demo.stack import Stack
from tests.support import eventually

NOWHERE = "http://127.0.0.1:1"
SETTLED = ("service:up:max", "service:info:one", "host:up:max")
HOSTILE = """\
service_up{service="down",host="gone",provider="other",category="other"} 1
service_up{service="well",host="",provider="other",category="other"} 0
service_up{service="well",host="gone",provider="other",category="other"} 1
service_up{job="defib-exporter",instance="e",service="down",host="gone",provider="other",category="other"} 1
service_up{service="down",host="",provider="other",category="other"} 1 {now}
service_info{service="down",severity="info",team="outsider"} 1
service_info{service="outsider",severity="critical",team="outsider"} 1
service_last_probe_timestamp_seconds{service="well"} 1
service_tls_certificate_expiry_timestamp_seconds{service="well"} 1
service:info:one{service="down",severity="info"} 1
service:info:one{service="well"} 1
service:up:max{service="down",host="",provider="other",category="other"} 1
service:up:max{service="outsider"} 0
host:up:max{host="gone",group=""} 1
host:filesystem_usage:ratio{host="gone",mountpoint="/"} 1
host_up{host="gone",group=""} 1
host_up{host="outsider",group=""} 0
host_key_changed{host="gone",group=""} 1
host_container_up{host="gone",container="c"} 0
gpu_healthy{host="gone",gpu="0"} 0
defib_remediator_breaker_open{service="down"} 1
defib_remediator_automation_enabled 0
defib_remediator_outbox_oldest_seconds 9999
defib_config_last_reload_successful{job="defib-exporter"} 0
alertmanager_config_last_reload_successful 0
prometheus_config_last_reload_successful 0
up{job="defib-remediator"} 1
up{job="defib-exporter"} 0
ALERTS{alertname="HostDown",alertstate="firing",host="outsider"} 1
ALERTS_FOR_STATE{alertname="HostDown",host="gone"} 1
node_load1{job="defib-exporter",instance="e",service="down",host="gone"} 1
node_:recorded 1
"""
# Pages of which nothing is taken, and the words of Prometheus' error.
REFUSED = (
    ("".join(f'node_x{{i="{number}"}} 1\n' for number in range(20_000)), "sample limit exceeded"),
    ("node_x{" + ",".join(f'l{number}="1"' for number in range(60)) + "} 1\n", "label_limit"),
    ('node_x{l="' + "x" * 2000 + '"} 1\n', "label_value_length_limit"),
    ("# HELP node_x " + "x" * 11_000_000 + "\n", "body size limit exceeded"),
    ('node_x{__name__="service_up",service="well"} 0\n', "__name__"),
)


class Outsider:
    """Answers as a node_exporter with the page that a test sets, and counts how often it was asked."""

    def __init__(self) -> None:
        self.page, self.asked, self.elsewhere = "", 0, ""
        self._runner = web.AppRunner(web.Application(), access_log=None, shutdown_timeout=0.1)

    async def start(self, port: int) -> None:
        self._runner.app.router.add_get("/metrics", self._answer)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, _request: web.Request) -> web.Response:
        self.asked += 1
        if self.elsewhere:
            raise web.HTTPFound(self.elsewhere)
        page = f"node_asked_total {self.asked}\n{self.page}".replace("{now}", f"{time.time() * 1000:.0f}")
        response = web.Response(text=page, content_type="text/plain")
        response.enable_compression()  # the limit is for what comes out of it
        return response


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
        await self.stack.start_ours("exporter")
        await self.stack.start_prometheus()

    async def ask(self, query: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The values of a query by their labels."""
        answer = await self.stack.client.post(f"{self.stack.url('prometheus')}/api/v1/query", data={"query": query})
        assert answer.is_success, answer.text
        result = answer.json()["data"]["result"]
        return {tuple(sorted(each["metric"].items())): float(each["value"][1]) for each in result}

    async def alerts(self) -> set[tuple[tuple[str, str], ...]]:
        """The alerts, pending or firing, but for those about the exporter itself: a busy machine may raise some."""
        exporter = f"127.0.0.1:{self.stack.ports['exporter']}"
        return set(await self.ask(f'max without (alertstate) (ALERTS{{instance!="{exporter}"}})'))

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
async def watched(keeper: Keeper, tmp_path: Path) -> AsyncIterator[Watched]:
    made = Watched(Stack(keeper, tmp_path))
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

    watched.outsider.page = HOSTILE
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
