"""Reports from a real Prometheus and a real record: the numbers, the command, the API, and cards that are sent once."""

import asyncio
import json
import signal
import sqlite3
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from aiohttp import web

from defib.demo.launcher import Launcher
from fleet.inventory.endpoints import Endpoint
from remediator.clients.prometheus import Prometheus
from remediator.reports.measurements import measure
from remediator.reports.report import Certificate, Disk
from remediator.reports.reporter import Reporter
from runtime.lifecycle import freeze_garbage_collector
from tests.integration.loop import Loop
from tests.integration.past_samples import start_prometheus
from tests.integration.peers import web_server
from tests.integration.test_commands import on_loop
from tests.support import eventually, inventory_of, leaves_the_loop_free, new_record

HOUR, DAY, GIB = 3600, 86400, 2.0**30
INTERVAL = 120  # seconds between samples
NOTHING = b'{"data": {"result": []}}'
ZONE = ZoneInfo("Asia/Shanghai")
pytestmark = [pytest.mark.needs("prometheus", "promtool"), pytest.mark.timeout(300)]


def series(name: str, labels: str, values: dict[int, float]) -> Iterator[str]:
    yield from (f"{name}{{{labels}}} {value} {at}" for at, value in values.items())


def samples(end: int) -> Iterator[str]:
    """Yield what an exporter and the rules have recorded in the day before a Unix time, as OpenMetrics."""
    within = list(range(end - DAY + INTERVAL, end + 1, INTERVAL))
    yield "# TYPE service:up:max gauge"
    yield from series("service:up:max", 'service="web",host="h"', {at: int(at <= end - DAY / 10) for at in within})
    noon = end - DAY / 2
    yield from series("service:up:max", 'service="moved",host="a"', {at: 1 for at in within if at <= noon})
    yield from series("service:up:max", 'service="moved",host="b"', {at: 0 for at in within if at > noon})
    yield from samples_of_gpus(within, since=end - DAY / 4)
    yield from samples_of_certificates(end, within[-3:])
    yield from samples_of_disks(end, within[-3:])
    yield "# EOF"


def samples_of_gpus(within: list[int], since: float) -> Iterator[str]:
    """Two cards for a container all the time, and one for a job since a time."""
    of_exporter = 'job="defib-exporter",host="g1"'
    yield "# TYPE gpu_utilization_ratio gauge"
    for gpu, ratio in {"0": 1.0, "1": 0.5}.items():
        yield from series("gpu_utilization_ratio", f'{of_exporter},gpu="{gpu}"', dict.fromkeys(within, ratio))
    busy = {at: 0.2 if at > since else 0.0 for at in within}
    yield from series("gpu_utilization_ratio", f'{of_exporter},gpu="2"', busy)
    yield "# TYPE gpu_process_memory_bytes gauge"
    for gpu in ("0", "1"):
        for instance in ("old", "new"):  # two exporters, during a rollout
            labels = f'{of_exporter},gpu="{gpu}",container="vllm",instance="{instance}"'
            yield from series("gpu_process_memory_bytes", labels, dict.fromkeys(within, 10 * GIB))
    labels = f'{of_exporter},gpu="2",container="job"'
    yield from series("gpu_process_memory_bytes", labels, {at: 2 * GIB for at in within if at > since})


def samples_of_certificates(end: int, last: list[int]) -> Iterator[str]:
    days = {"web": (5, 90), "fresh": (25, 60), "expired": (-1, 90), "far": (40, 90), "chain": (2, 0)}
    name = "service:certificate_expiry_timestamp_seconds:min"
    yield f"# TYPE {name} gauge"
    for service, (left, _) in days.items():
        yield from series(name, f'service="{service}"', dict.fromkeys(last, end + left * DAY))
    name = "service:certificate_lifetime_seconds:min"
    yield f"# TYPE {name} gauge"
    for service, (_, lifetime) in days.items():
        if lifetime:
            yield from series(name, f'service="{service}"', dict.fromkeys(last, lifetime * DAY))


def samples_of_disks(end: int, last: list[int]) -> Iterator[str]:
    """One with an alert; of those that are being filled, one is almost empty, and one is known since an hour."""
    yield "# TYPE ALERTS gauge"
    for severity in ("warning", "critical"):
        labels = f'alertname="HostDiskFull",alertstate="firing",host="g1",mountpoint="/data",severity="{severity}"'
        yield from series("ALERTS", labels, dict.fromkeys(last, 1))
    yield "# TYPE host:filesystem_usage:ratio gauge"
    for mountpoint, ratio in {"/data": 0.93, "/var": 0.6, "/srv": 0.2, "/new": 0.6}.items():
        labels = f'host="g1",mountpoint="{mountpoint}"'
        yield from series("host:filesystem_usage:ratio", labels, dict.fromkeys(last, ratio))
    yield "# TYPE host:filesystem_available_bytes:max gauge"
    long, short = range(end - 3 * DAY + INTERVAL, end + 1, INTERVAL), range(end - HOUR, end + 1, INTERVAL)
    for mountpoint, known in {"/data": long, "/var": long, "/srv": long, "/new": short}.items():
        left = {at: 20 * GIB if mountpoint == "/data" else (48 + (end - at) / HOUR) * GIB for at in known}
        yield from series("host:filesystem_available_bytes:max", f'host="g1",mountpoint="{mountpoint}"', left)


async def test_what_prometheus_knows(launcher: Launcher, tmp_path: Path) -> None:
    end = int(time.time()) // INTERVAL * INTERVAL - HOUR  # as of a report that is sent late
    url = await start_prometheus(launcher, tmp_path, samples(end), "5m")
    client = Prometheus(Endpoint(url=url))
    found = await measure(client, end - DAY, end, services=3)
    await client.close()
    assert found.missing == {}
    assert {name: round(each.ratio, 2) for name, each in found.availability.items()} == {"web": 0.9, "moved": 0.5}
    assert found.availability["web"].observed == pytest.approx(DAY, rel=0.01)
    gpus = {each.container: each for each in found.gpus}
    assert {name: (each.host, each.gpus, each.memory) for name, each in gpus.items()} == {
        "vllm": ("g1", 2, 20 * GIB), "job": ("g1", 1, 2 * GIB),
    }  # fmt: skip
    assert (gpus["vllm"].hours, gpus["job"].hours) == pytest.approx((48, 6), rel=0.03)
    assert (gpus["vllm"].utilization, gpus["job"].utilization) == pytest.approx((0.75, 0.2))
    assert found.gpu_count == 3
    assert found.gpu_utilization == pytest.approx((1 + 0.5 + 0.05) / 3, rel=0.01)
    assert sorted(found.certificates, key=lambda each: each.expires) == [
        Certificate("expired", "expired", end - DAY),
        Certificate("chain", "chain", end + 2 * DAY),
        Certificate("web", "web", end + 5 * DAY),
    ]
    disks = {each.mountpoint: each for each in found.disks}
    full_in = disks["/var"].full_in
    assert disks == {
        "/data": Disk("g1", "/data", 0.93, 20 * GIB, None, ["HostDiskFull"], "critical"),
        "/var": Disk("g1", "/var", 0.6, 48 * GIB, full_in, [], ""),
    }
    assert full_in == pytest.approx(48 * HOUR, rel=0.01)


async def test_a_part_that_cannot_be_read_is_missing_and_the_others_are_not() -> None:
    async def answer(request: web.Request) -> web.Response:
        query = str((await request.post())["query"])
        if "service:up:max" in query:
            await asyncio.sleep(60)
        if "gpu_process" in query:
            return web.Response(status=422, text='{"status": "error"}')
        if "certificate" in query:
            return web.json_response({"data": {"result": [{"metric": {}, "value": ["x"]}]}})
        if "filesystem" in query:
            return web.json_response({"data": {"result": [{"metric": 7, "value": [1, "1"]}]}})
        return web.json_response({"data": {"result": [{"metric": {"alertname": "HostDiskFull"}, "value": [1, "1"]}]}})

    async with web_server(answer) as port:
        client = Prometheus(Endpoint(url=f"http://127.0.0.1:{port}"))
        found = await measure(client, 0.0, float(DAY), services=1, within=2.0)
        await client.close()
    assert {part: problem.partition(": ")[2] for part, problem in found.missing.items()} == {
        "gpus": "HTTP 422",
        "certificates": "the response does not have the expected fields: not enough values to unpack (expected 2, got 1)",
        "disks": "the response does not have the expected fields: 'int' object has no attribute 'get'",
        "availability": "no response within 2 s",
    }


@pytest.mark.needs("sshd")
async def test_the_command_and_the_api(loop: Loop, launcher: Launcher, tmp_path: Path) -> None:
    (past := tmp_path / "past").mkdir()
    end = int(time.time())
    url = await start_prometheus(launcher, past, samples(end), "5m")
    web_page = loop.service("web", team="docs") | {"name": "Web & <page>"}
    services = {"web": web_page, "moved": loop.service("moved")}
    await loop.start(services, remediator={"prometheus_url": url}, hold="300ms")
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    await loop.fire("web", status="resolved")
    await loop.until("recovered")

    report = json.loads((await on_loop(loop, "--json", "report", "--since", "1d")).stdout)
    assert report == {**report, "missing": [], "omitted": {}}
    total = report["total"]
    assert (total["services"], total["observed"], total["incidents"], total["open"]) == (2, 2, 1, 0)
    assert (total["recovered_by"]["defib"], total["restarts"], total["restarts_helped"]) == (1, 1, 1)
    assert total["availability"] == pytest.approx(0.7, abs=0.02)
    assert [(each["id"], round(each["availability"], 1)) for each in report["services"]] == [
        ("moved", 0.5),
        ("web", 0.9),
    ]
    assert [each["team"] for each in report["teams"]] == ["", "docs"]
    assert [each["service"] for each in report["certificates"]] == ["web"]  # the others are not in the inventory
    lasted = datetime.fromisoformat(report["to"]) - datetime.fromisoformat(report["from"])
    assert lasted == timedelta(days=1)

    text = (await on_loop(loop, "report", "--since", "1d")).stdout
    assert "Incidents        1\n" in text
    assert "Restarts         1 of 1 helped\n" in text
    assert max(map(len, text.splitlines())) <= 100
    page = (await on_loop(loop, "report", "--since", "1d", "--html")).stdout
    assert page.startswith("<!DOCTYPE html>")
    assert "Web &amp; &lt;page&gt;" in page

    for since, problem in {
        "x": "`since`: 'x' is not a duration", "91d": "`since` must be from 1m to 90d (remediator.retention)",
        "1s": "`since` must be", "1d&since=2d": "the only parameter is `since`, once", "1d&x=": "the only parameter",
    }.items():  # fmt: skip
        answer = await loop.ask("GET", f"/api/v1/report?since={since}")
        assert (answer.status_code, problem in answer.json()["error"]["message"]) == (400, True), answer.text
    both = await on_loop(loop, "report", "--html", "--json")
    assert (both.returncode, both.stderr) == (1, "defib: argument --html: not allowed with --json\n")


@pytest.mark.needs("sshd")
async def test_without_prometheus_the_rest_is_reported(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")}, remediator={"prometheus_url": "http://127.0.0.1:1"})
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    done = await on_loop(loop, "report")
    assert done.returncode == 0
    assert "\nNot known: availability  cannot query Prometheus: cannot connect: " in done.stdout
    assert "\nIncidents                1: 1 still open\n" in done.stdout


@pytest.mark.needs("sshd")
async def test_a_report_that_was_missed_while_defib_was_away_is_sent_once(loop: Loop) -> None:
    """Its time has just passed when the remediator is configured, so only what it has recorded is changed."""
    at = datetime.now(ZONE) - timedelta(minutes=2)
    reports = {"daily": f"{at:%H:%M}", "weekly": f"{at:%a %H:%M}", "channels": ["ops"]}
    await loop.start({"web": loop.service("web")}, notify={"reports": reports})
    path = loop.folder / "remediator.db"

    def recorded() -> dict[str, Any]:
        with sqlite3.connect(path) as connection:
            row = connection.execute("SELECT detail FROM timestamps WHERE name = 'reports'").fetchone()
        return dict(json.loads(row[0])) if row is not None else {}

    async def are_recorded() -> bool:
        return set(await asyncio.to_thread(recorded)) == {"daily", "weekly"}

    def set_back() -> None:
        """Make the record one of a remediator that was stopped before the reports were due."""
        earlier = {name: {**each, "end": each["end"] - 30} for name, each in recorded().items()}
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE timestamps SET detail = ? WHERE name = 'reports'", [json.dumps(earlier)])

    await eventually(are_recorded)
    assert loop.feishu.received == []
    await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGKILL)
    await asyncio.to_thread(set_back)
    await loop.stack.start_program("remediator")
    await loop.until_cards("Daily report: 0 incidents", "Weekly report: 0 incidents")

    async def are_sent() -> bool:
        rows = (await loop.ask("GET", "/api/v1/notifications")).json()["notifications"]
        return [row["state"] for row in rows] == ["sent", "sent"]

    await eventually(are_sent)
    # Also if the record does not say that they are sent: a channel gets a report once.
    await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGKILL)
    await asyncio.to_thread(set_back)
    await loop.stack.start_program("remediator")

    async def are_recorded_again() -> bool:
        return all(each["end"] % 60 == 0 for each in (await asyncio.to_thread(recorded)).values())

    await eventually(are_recorded_again)
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_card("Service down: web")
    titles = [card.title for card in loop.feishu.received]
    assert [title for title in titles if "report" in title] == titles[:2]
    assert "Not known" in loop.feishu.received[0].text


async def test_ten_thousand_services_leave_the_event_loop_free(tmp_path: Path) -> None:
    names = [f"service-{number}" for number in range(10_000)]
    written: dict[str, Any] = {
        "services": {name: {"team": f"team-{name[-1]}", "probe": {"tcp": {"address": "a:1"}}} for name in names}
    }

    async def answer(request: web.Request) -> web.Response:
        is_of_services = "service:" in str((await request.post())["query"])
        return web.Response(body=body if is_of_services else NOTHING, content_type="application/json")

    labels = {"host": "a-host", "provider": "other", "category": "other"}
    result: list[dict[str, Any]] = [{"metric": {"service": name, **labels}, "value": [1, "0.5"]} for name in names]
    body = json.dumps({"data": {"result": result}}).encode()
    async with web_server(answer) as port:
        written["remediator"] = {"prometheus_url": f"http://127.0.0.1:{port}"}
        inventory = (await asyncio.to_thread(inventory_of, tmp_path / "config", written)).inventory
        database = await asyncio.to_thread(new_record, tmp_path, inventory)
        await asyncio.to_thread(add_incidents, tmp_path / "record.db", names)
        reporter = Reporter(database)
        freeze_garbage_collector()  # as the program does

        async def report() -> None:
            now = time.time()
            made = await reporter.report(now - 7 * DAY, now)
            assert (made.total.services, made.total.observed, made.total.counts.incidents) == (10_000, 10_000, 10_000)
            assert made.omitted["services"] == 9000

        await leaves_the_loop_free(report)
        await asyncio.to_thread(database.close)


def add_incidents(path: Path, services: list[str]) -> None:
    closed = time.time() - HOUR
    with sqlite3.connect(path) as connection:
        connection.executemany(
            "INSERT INTO incidents (service, state, opened_at, down_at, closed_at, recovered_by, labels)"
            """ VALUES (?, 'recovered', ?, ?, ?, 'self', '{"team": "t"}')""",
            [(service, closed - 60, closed - 60, closed) for service in services],
        )
