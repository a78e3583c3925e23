"""What the dashboards show: their queries, answered by a real Prometheus, through Grafana's own code."""

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from grafana.__main__ import CHINESE_FOLDER
from grafana.translation import CHINESE
from tests.dashboard_data import AskedPrometheus, MadeUpFleet, prometheus_in, prometheus_of
from tests.dashboard_queries import DASHBOARD_JSON, Query, panels, queries
from tests.grafana import ShownTable, show_tables
from tests.support import eventually

pytestmark = [pytest.mark.needs("prometheus", "promtool"), pytest.mark.timeout(900)]
MOST_ROWS, MOST_LINES = 100, 100
# The rows of each table with a fleet of 12 services, which are agents, too, and 3 hosts, each with 2 GPUs, 2 containers, units and programs.
ROWS = {
    "fleet: Firing alerts": 6,
    "fleet: Services down": 1,
    "fleet: Services": 12,
    "fleet: Certificates": 12,
    "service: Components on its status page": 2,
    "service: Issuer and protocol": 1,
    "hosts: Hosts": 3,
    "hosts: Services": 12,
    "hosts: Containers": 6,
    "hosts: systemd units": 6,
    "hosts: Supervisor programs": 6,
    "gpus: GPUs": 6,
    "gpus: Current memory by container": 12,
    "gpus: Free cards": 6,
    "gpus: MIG instances": 6,
    "gpus: XIDs in the kernel log": 6,
    "gpus: Recovery that the driver asks for": 6,
    "remediation: Actions by service": 12,
    "monitoring: Processes": 5,
    "monitoring: Configuration": 5,
    "monitoring: Versions": 3,
    "agents: Agents": 12,
}


def fill_in(expression: str) -> str:
    """Return a query as Grafana sends it for the first service, with all other variables set to "All"."""
    return Query("", expression.replace('="$service"', '="s00000"')).with_variables("10m")


async def shown(prometheus: AskedPrometheus, dashboards: dict[str, Any]) -> dict[str, ShownTable]:
    """Return all tables by dashboard and title."""
    tables = [
        (name, panel)
        for name, dashboard in dashboards.items()
        for panel in panels(dashboard)
        if panel["type"] == "table"
    ]
    answers = [
        {each["refId"]: await prometheus.ask(fill_in(each["expr"])) for each in panel["targets"]} for _, panel in tables
    ]
    given = [(panel, answer) for (_, panel), answer in zip(tables, answers, strict=True)]
    return {f"{name}: {table.title}": table for (name, _), table in zip(tables, await show_tables(given), strict=True)}


def test_each_table_is_counted() -> None:
    """The long tests look at the rows of each table."""
    tables = {
        f"{name}: {panel['title']}"
        for name, dashboard in DASHBOARD_JSON.items()
        for panel in panels(dashboard)
        if panel["type"] == "table"
    }
    assert tables == ROWS.keys()


@pytest.mark.long
@pytest.mark.needs("node")
async def test_each_table_has_a_row_for_each_thing(tmp_path: Path) -> None:
    chinese = {path.stem: json.loads(path.read_text()) for path in CHINESE_FOLDER.iterdir()}
    async with prometheus_of(tmp_path, MadeUpFleet()) as prometheus:
        tables = await shown(prometheus, DASHBOARD_JSON)
        translated = await shown(prometheus, chinese)
    assert {name: len(table.rows) for name, table in tables.items()} == ROWS
    for name, table in tables.items():
        assert table.frames == 1, name
        assert not any(column.startswith("Value") for column in table.columns), name
        empty = {column for column in table.columns if not any(table.column(column))}
        assert empty <= ({"Service", "Team"} if table.title == "Firing alerts" else set()), name
    alerts = tables["fleet: Firing alerts"]
    assert alerts.column("Severity") == ["critical"] * 2 + ["warning"] * 2 + ["info"] * 2
    assert {text.strip() for text in alerts.column("Details")} == {"a", "b"}
    assert all(alerts.column("Since"))
    services = tables["fleet: Services"]
    assert services.column("State") == ["down", "unknown", *["up"] * 10]
    assert set(services.column("30 d")) == {"99.950%"}
    days = [float(text) for text in tables["fleet: Certificates"].column("Days left")]
    assert days == sorted(days)
    for name, table in tables.items():
        dashboard, _, title = name.partition(": ")
        other = translated[f"{dashboard}: {CHINESE[title]}"]
        assert list(other.columns) == [CHINESE[column] for column in table.columns], name
        assert len(other.rows) == len(table.rows), name


@pytest.mark.long
async def test_no_query_returns_more_than_a_browser_can_show(tmp_path: Path) -> None:
    """With 1,000 services, 100 hosts and 800 GPUs; each is answered with something."""
    most, empty = {}, []
    async with prometheus_of(tmp_path, MadeUpFleet(1000, 100, 8, 500)) as prometheus:
        for query in queries():
            if query.of_labels or "ServiceDown" in query.text:  # for which there is no alert
                continue
            ask = prometheus.ask if query.instant else prometheus.ask_range
            result = (await ask(fill_in(query.text)))["result"]
            if not result:
                empty.append(f"{query.where}: {query.text}")
            if len(result) > (MOST_ROWS if query.instant else MOST_LINES):
                most[f"{query.where}: {query.text}"] = len(result)
    assert not most
    assert not empty, "\n".join(empty)


class LostScrapes:
    """An exporter whose page fails when a test wants it to."""

    def __init__(self) -> None:
        self.lost, self.asked = False, 0

    async def answer(self, _request: web.Request) -> web.Response:
        self.asked += 1
        return web.Response(status=500 if self.lost else 200, text="" if self.lost else PAGE)


PAGE = """\
host_info{host="h",group="first",address="10.0.0.1"} 1
host_cpu_count{host="h"} 8
host_cpu_usage_ratio{host="h"} 0.25
host_boot_timestamp_seconds{host="h"} 1000
"""


async def test_a_lost_scrape_changes_no_table(tmp_path: Path) -> None:
    """Prometheus ends all series of a target that it could not scrape: the table has their last values."""
    page = LostScrapes()
    server = TestServer(web.Application())
    server.app.router.add_get("/metrics", page.answer)
    async with server:
        job = {"job_name": "defib-exporter", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}
        often = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
        async with prometheus_in(tmp_path, {"scrape_configs": [{**often, **job}]}) as client:
            prometheus = AskedPrometheus(client)
            hosts = next(panel for panel in panels(DASHBOARD_JSON["hosts"]) if panel["title"] == "Hosts")
            scraped = [each["expr"] for each in hosts["targets"] if "host_" in each["expr"].partition("[5m]")[0]]

            async def rows(expected: int) -> bool:
                answers = [await prometheus.ask(fill_in(expression)) for expression in scraped]
                return [len(answer["result"]) for answer in answers] == [expected] * len(scraped)

            async def is_up(expected: str) -> bool:
                result = (await prometheus.ask("up"))["result"]
                return bool(result) and result[0]["value"][1] == expected

            await eventually(lambda: is_up("1"), 60)
            assert await rows(1)
            page.lost = True
            await eventually(lambda: is_up("0"), 60)
            assert (await prometheus.ask("host_cpu_count"))["result"] == []
            assert await rows(1)
