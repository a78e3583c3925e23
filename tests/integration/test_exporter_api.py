"""The exporter's API for consoles: recent results, changes of services, hosts and events."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncssh
import httpx
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from exporter.api.host_report import describe_host, summarize_host
from exporter.api.hosts import HostsApi
from exporter.exposition.collector_samples import SERIES_LIMIT, CollectorSamples
from exporter.metrics import ExporterMetrics
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.redaction import Redactor
from tests.gpu import CARD, write_nvidia_smi
from tests.integration import peers
from tests.integration.exporter_process import Exporter
from tests.support import NO_TLS, eventually, inventory_of, leaves_the_loop_free

LOCAL = {"address": "127.0.0.1", "shell": "local"}
FAST = {"every": "200ms", "retry_every": "200ms"}
HOURLY = {"every": "1h", "retry_every": "1h", "fail_after": 1}
SECRET = "hunter2hunter2"
API_PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Exporter]:
    made = Exporter(launcher, tmp_path)
    yield made
    await made.client.aclose()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def write_tool(path: Path, script: str) -> None:
    """Write a shell script. What reads it meanwhile finds a whole program."""
    new = path.with_suffix(".new")
    new.write_text(f"#!/bin/sh\n{script}\n")
    new.chmod(0o755)
    new.replace(path)


def write_docker(path: Path, **states: str) -> None:
    """Write a docker with containers in these states."""
    lines = "".join(
        f"/{name}\t{state}\t\t{0 if state == 'running' else 137}\t2026-01-01T00:00:00Z\t3\timage:1\talways\n"
        for name, state in states.items()
    )
    path.with_suffix(".table").write_text(lines)
    write_tool(path, f"case $1 in ps) echo listed ;; *) cat {path.with_suffix('.table')} ;; esac")


def write_systemctl(path: Path, *failed: str) -> None:
    """Write a systemctl that knows the active unit `well`, and failed units."""
    listed = "".join(f"{unit} loaded failed failed A unit\\n" for unit in failed)
    show = "LoadState=loaded\\nActiveState=active\\nSubState=running\\nResult=success\\n"
    write_tool(path, f"case \"$*\" in *--failed*|*state=failed*) printf '{listed}' ;; *) printf '{show}' ;; esac")


async def get(exporter: Exporter, path: str, **query: str) -> Any:
    answer = await exporter.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def probe(exporter: Exporter, name: str) -> None:
    assert (await exporter.client.post(f"/api/v1/services/{name}/probe")).status_code == 200


def switched(folder: Path, name: str) -> dict[str, Any]:
    """A service that is up while its file exists."""
    return {"host": "here", "probe": {**HOURLY, "command": {"run": ["test", "-e", f"{folder}/{name}"]}}}


async def test_recent_results_of_a_service(exporter: Exporter, tmp_path: Path) -> None:
    web = {**switched(tmp_path, "web"), "team": "search", "severity": "warning", "on_failure": "restart"}
    web["control"] = {"command": {"start": ["true"], "stop": ["true"], "restart": ["true"]}}
    gone = {"host": "gone", "probe": {**HOURLY, "command": {"run": ["true"]}}}
    ssh = {"user": "u", "port": 1, "known_hosts": str(tmp_path / "none")}
    (tmp_path / "none").write_text("")
    hosts = {"here": {**LOCAL, "group": "gpu"}, "gone": {"address": "127.0.0.1", "ssh": ssh}}
    exporter.configure({"web": web, "gone": gone}, hosts=hosts)
    await exporter.start()
    assert (await exporter.service("web"))["results"] == []
    await probe(exporter, "web")
    (tmp_path / "web").touch()
    await probe(exporter, "web")
    await probe(exporter, "gone")
    service = await exporter.service("web")
    assert service["recent"] == "-+"
    assert [(each["success"], each["reason"]) for each in service["results"]] == [(False, "exit"), (True, None)]
    last = service["results"][-1]
    assert last.keys() == {"started_at", "success", "reason", "duration_seconds"}
    assert last["started_at"] == service["last"]["started_at"]
    assert last["duration_seconds"] == pytest.approx(service["last"]["duration_seconds"], abs=1e-5)
    for key in {*service, *service["last"], *last}:
        assert f"`{key}`" in API_PAGE
    listed = {each["id"]: each for each in (await get(exporter, "/api/v1/services"))["services"]}
    shown = ("recent", "group", "team", "severity", "automatic", "every_seconds")
    assert [listed["web"][key] for key in shown] == ["-+", "gpu", "search", "warning", True, 3600]
    assert [listed["gone"][key] for key in shown] == ["?", "", "", "critical", False, 3600]


async def test_components_of_a_status_page(exporter: Exporter, tmp_path: Path) -> None:
    page = {"channels": [{"name": "ch1", "cpu": 3.5, "on": True}, {"name": "ch2", "on": False}]}

    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(page)

    async with peers.web_server(answer) as port:
        components = {"each": "$.channels[*]", "name": "$.name", "up": {"$.on": True}, "values": {"cpu": "$.cpu"}}
        status = {"url": f"http://127.0.0.1:{port}/", "components": components}
        web_ = {"probe": {**HOURLY, "http": {"url": f"http://127.0.0.1:{port}/"}}}
        exporter.configure({"transcoder": {"probe": {**HOURLY, "status": status}}, "web": web_})
        await exporter.start()
        seen = [{"name": "ch1", "up": True, "values": {"cpu": 3.5}}, {"name": "ch2", "up": False, "values": {}}]
        probe = (await exporter.client.post("/api/v1/services/transcoder/probe")).json()
        assert (probe["components"], probe["reason"]) == (seen, "state")
        assert (await get(exporter, "/api/v1/services/transcoder"))["components"] == seen
        listed = (await get(exporter, "/api/v1/services"))["services"]
        others = [*listed, (await exporter.client.post("/api/v1/services/web/probe")).json()]
        assert not any("components" in each for each in others)
        metrics = (await exporter.client.get("/metrics")).text
        assert ('component="ch1"} 1' in metrics, "3.5" in metrics) == (True, False)
        argv = [sys.executable, "-m", "defib", "probe", "transcoder", "--config", str(exporter.folder / "config")]
        printed = await asyncio.to_thread(
            subprocess.run, argv, capture_output=True, text=True, timeout=200, check=False
        )
        assert "component   ch1: up, cpu 3.5\n  component   ch2: down\n" in printed.stdout, printed
        page.clear()  # the last probe counts
        assert (await exporter.client.post("/api/v1/services/transcoder/probe")).json()["reason"] == "json"
        assert "components" not in await get(exporter, "/api/v1/services/transcoder")


async def test_only_changed_services_are_returned_after_a_cursor(exporter: Exporter, tmp_path: Path) -> None:
    services = {name: switched(tmp_path, name) for name in ("a", "b", "c")}
    exporter.configure(services, hosts={"here": LOCAL})
    await exporter.start()

    async def changed(cursor: str) -> tuple[list[str], bool, str]:
        answer = await get(exporter, "/api/v1/services", after=cursor)
        assert answer.keys() == {"cursor", "complete", "services"}
        return sorted(each["id"] for each in answer["services"]), answer["complete"], answer["cursor"]

    everything = await get(exporter, "/api/v1/services")
    assert everything["complete"] is True
    cursor = everything["cursor"]
    assert await changed(cursor) == ([], False, cursor)
    await probe(exporter, "b")
    names, complete, later = await changed(cursor)
    assert (names, complete) == (["b"], False)
    await probe(exporter, "c")
    assert (await changed(later))[:2] == (["c"], False)
    assert (await changed(cursor))[:2] == (["b", "c"], False)
    assert (await changed("nonsense"))[:2] == (["a", "b", "c"], True)
    del services["a"]
    exporter.configure(services, hosts={"here": LOCAL})
    assert (await exporter.client.post("/-/reload")).status_code == 200
    names, complete, reloaded = await changed(later)
    assert (names, complete) == (["b", "c"], True)
    assert (await changed(reloaded))[:2] == ([], False)


async def test_a_poller_that_follows_the_cursor_sees_what_the_whole_list_shows(
    exporter: Exporter, tmp_path: Path
) -> None:
    """While services are probed, what was read once and then updated equals what is read at once."""
    services = {
        f"s{number}": {"probe": {**FAST, "tcp": {"address": f"127.0.0.1:{exporter.port}"}}} for number in range(30)
    }
    exporter.configure(services)
    await exporter.start()
    known: dict[str, Any] = {}
    cursor = ""
    for _ in range(20):
        answer = await get(exporter, "/api/v1/services", after=cursor)
        known = ({} if answer["complete"] else known) | {each["id"]: each for each in answer["services"]}
        cursor = answer["cursor"]
        await asyncio.sleep(0.05)
    whole = await get(exporter, "/api/v1/services", after="")
    since = await get(exporter, "/api/v1/services", after=cursor)
    known |= {each["id"]: each for each in since["services"]}
    for each in whole["services"]:
        assert known[each["id"]]["recent"].startswith(each["recent"])


async def metrics_of(exporter: Exporter, host: str) -> dict[tuple[str, ...], float]:
    """Values by metric and the labels other than the host's."""
    page = (await exporter.client.get("/metrics")).text
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name not in ("host", "group"))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("host") == host
    }


async def collected(exporter: Exporter, host: str, **expected: bool | None) -> dict[str, Any]:
    """Wait until the host's collectors have run with these outcomes."""

    async def found() -> dict[str, Any] | None:
        described = await get(exporter, f"/api/v1/hosts/{host}")
        outcomes = {each["name"]: each["success"] for each in described["collectors"]}
        return described if outcomes == expected else None

    described = await eventually(found)
    assert described is not None
    return described


async def test_hosts_show_what_the_metrics_show(exporter: Exporter, tmp_path: Path, tools: Path) -> None:
    other = {**CARD, "index": "1", "uuid": "GPU-2", "pci.bus_id": "00000000:0B:00.0", "memory.used": "[Unknown Error]"}
    write_nvidia_smi(tools / "nvidia-smi", (CARD, other), apps=f"GPU-1, {os.getpid()}, 1000, /usr/bin/x, y\n")
    write_docker(tools / "docker", web="running", db="exited")
    write_systemctl(tools / "systemctl", "broken.service")
    collect = {"system": "2s", "gpu": "2s", "docker": "2s", "systemd": {"every": "2s", "units": ["well"]}}
    hosts = {
        "gpu-01": {**LOCAL, "group": "gpu", "labels": {"rack": "a3"}, "collect": collect},
        "plain": {"address": "10.0.0.9"},
    }
    exporter.configure({"web": {**switched(tmp_path, "web"), "host": "gpu-01"}}, hosts=hosts)
    await exporter.start()
    host = await collected(exporter, "gpu-01", system=True, gpu=True, docker=True, systemd=True)
    assert (host["up"], host["key_changed"], host["services"]) == (True, False, ["web"])
    assert (host["address"], host["group"], host["labels"]) == ("127.0.0.1", "gpu", {"rack": "a3"})
    assert {each["every_seconds"] for each in host["collectors"]} == {2}
    assert {each["error"] for each in host["collectors"]} == {None}
    metrics = await metrics_of(exporter, "gpu-01")
    assert host["cpu_count"] == metrics["host_cpu_count",] == os.cpu_count()
    assert host["memory"]["total_bytes"] == metrics["host_memory_total_bytes",]
    sizes = {each["mountpoint"]: each["size_bytes"] for each in host["filesystems"]}
    assert sizes == {key[1]: value for key, value in metrics.items() if key[0] == "host_filesystem_size_bytes"}
    assert (host["filesystems_fullest"] is None) == (sizes == {})
    assert host["containers"] == [
        {"name": name, "up": up, "restarts": 3, "started_at": "2026-01-01T00:00:00Z", "image": "image:1"}
        for name, up in (("db", False), ("web", True))
    ]
    assert host["units"] == [{"name": "broken.service", "active": False}, {"name": "well.service", "active": True}]
    first, second = host["gpus"]
    assert first == {
        "gpu": "0", "name": "NVIDIA A100-SXM4-80GB", "uuid": "GPU-1", "healthy": True, "utilization_ratio": 0.93,
        "memory_used_bytes": 70000 * 2**20, "memory_total_bytes": 81920 * 2**20, "temperature_celsius": 66,
        "power_watts": 388.12, "faults": [], "memory_holders": [{"container": "host", "memory_bytes": 1000 * 2**20}],
    }  # fmt: skip
    assert (second["healthy"], second["memory_used_bytes"]) == (False, None)
    problems = {(problem["kind"], problem["name"]) for problem in host["problems"]}
    assert {("gpu_unhealthy", "1"), ("container_down", "db"), ("unit_inactive", "broken.service")} <= problems
    assert host["problem_count"] == len(host["problems"])

    listed = {each["name"]: each for each in (await get(exporter, "/api/v1/hosts"))["hosts"]}
    assert listed.keys() == {"gpu-01", "plain"}
    assert host.keys() - listed["gpu-01"].keys() == {
        "filesystems", "containers", "units", "programs", "load5", "load15", "booted_at", "clock_offset_seconds",
    }  # fmt: skip
    assert listed["gpu-01"]["gpus"][0].items() <= first.items()
    assert (listed["plain"]["up"], listed["plain"]["collectors"], listed["plain"]["memory"]) == (None, [], None)
    for key in {
        *host,
        *host["collectors"][0],
        *host["gpus"][0],
        *host["containers"][0],
        *host["units"][0],
        *listed["gpu-01"],
    }:
        assert f"`{key}`" in API_PAGE
    missing = await exporter.client.get("/api/v1/hosts/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_host")


async def test_the_list_of_hosts_follows_the_collectors_and_reloads(exporter: Exporter, tools: Path) -> None:
    write_docker(tools / "docker", web="running")
    host: dict[str, Any] = {**LOCAL, "collect": {"docker": "300ms"}}
    exporter.configure({}, hosts={"h": host})
    await exporter.start()

    async def problems() -> list[tuple[str, str]]:
        (entry,) = (await get(exporter, "/api/v1/hosts"))["hosts"]
        return [(problem["kind"], problem["name"]) for problem in entry["problems"]]

    await collected(exporter, "h", docker=True)
    assert await problems() == []
    write_docker(tools / "docker", web="exited")

    async def is_down() -> bool:
        return await problems() == [("container_down", "web")]

    await eventually(is_down)
    exporter.configure({}, hosts={"h": {**host, "group": "new"}})
    assert (await exporter.client.post("/-/reload")).status_code == 200
    (entry,) = (await get(exporter, "/api/v1/hosts"))["hosts"]
    assert entry["group"] == "new"


async def test_thresholds_are_published_and_decide_what_is_a_problem_and_a_reload_changes_both(
    exporter: Exporter, tmp_path: Path
) -> None:
    host: dict[str, Any] = {**LOCAL, "collect": {"system": "2s"}}
    service: dict[str, Any] = {**switched(tmp_path, "web"), "host": "h"}

    async def configure(thresholds: Any, certificate: Any) -> None:
        hosts = {"h": {**host, "thresholds": {"filesystem": "off", "inodes": "off", "load": "off", **thresholds}}}
        exporter.configure({"web": {**service, "thresholds": {"certificate": certificate}}}, hosts=hosts)

    async def problems() -> list[tuple[str, str]]:
        (entry,) = (await get(exporter, "/api/v1/hosts"))["hosts"]
        return [(problem["kind"], problem["severity"]) for problem in entry["problems"]]

    async def published() -> dict[tuple[str, ...], float]:
        of_host, labels = await metrics_of(exporter, "h"), ("web", "other", "other")
        names: list[tuple[str, ...]] = [("host_threshold", "memory", each) for each in ("warning", "critical")]
        names += [("service_threshold", *labels, "certificate", each) for each in ("warning", "critical")]
        return {name: of_host[name] for name in names if name in of_host}

    await configure({"memory": {"warning": "0.01%", "critical": "off"}}, {"warning": "15d"})
    await exporter.start()
    await collected(exporter, "h", system=True)
    assert await problems() == [("memory_low", "warning")]
    certificate = ("service_threshold", "web", "other", "other", "certificate")
    assert await published() == {
        ("host_threshold", "memory", "warning"): 0.0001,
        ("host_threshold", "memory", "critical"): float("inf"),
        (*certificate, "warning"): 15 * 86400,
    }
    await configure({"memory": {"warning": "0.01%", "critical": "0.02%"}}, {"critical": "off"})
    assert (await exporter.client.post("/-/reload")).status_code == 200
    assert await problems() == [("memory_low", "critical")]
    assert await published() == {
        ("host_threshold", "memory", "warning"): 0.0001,
        ("host_threshold", "memory", "critical"): 0.0002,
        (*certificate, "critical"): float("-inf"),
    }
    await configure({"memory": "off"}, {})
    assert (await exporter.client.post("/-/reload")).status_code == 200
    assert await problems() == []


async def test_an_error_of_a_collector_is_redacted(exporter: Exporter, tools: Path) -> None:
    write_tool(tools / "docker", f"echo 'cannot connect as {SECRET}' >&2; exit 1")
    services = {"s": {"probe": {**HOURLY, "http": {"url": "http://127.0.0.1:1/", "auth": {"bearer": SECRET}}}}}
    exporter.configure(services, hosts={"h": {**LOCAL, "collect": {"docker": "500ms"}}})
    await exporter.start()
    host = await collected(exporter, "h", docker=False)
    (collector,) = host["collectors"]
    assert "cannot connect as ***" in collector["error"]
    assert [problem["kind"] for problem in host["problems"]] == ["collector_failed"]
    for path in ("/api/v1/hosts", "/api/v1/hosts/h", "/api/v1/events"):
        assert SECRET not in (await exporter.client.get(path)).text
    assert SECRET not in (exporter.folder / "log").read_text()


def brief(events: Sequence[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(event[key] for key in keys) for event in events]


async def test_events_of_a_service(exporter: Exporter, tmp_path: Path) -> None:
    exporter.configure({"web": switched(tmp_path, "web")}, hosts={"here": LOCAL})
    await exporter.start()
    assert (await get(exporter, "/api/v1/events"))["events"] == []
    (tmp_path / "web").touch()
    for change in (None, None, (tmp_path / "web").unlink, None, (tmp_path / "web").touch):
        if change is not None:
            change()
        await probe(exporter, "web")
    answer = await get(exporter, "/api/v1/events")
    assert answer["gap"] is False
    assert answer["events"][0].keys() == {"id", "at", "kind", "host", "name", "state", "first", "detail"}
    assert brief(answer["events"], "id", "kind", "host", "name", "state", "first") == [
        (1, "service", "here", "web", "up", True),
        (2, "service", "here", "web", "down", False),
        (3, "service", "here", "web", "up", False),
    ]
    assert answer["events"][1]["detail"].startswith("exit: ")
    assert answer["events"][2]["at"] == (await exporter.service("web"))["since"]
    page = await get(exporter, "/api/v1/events", limit="2")
    assert brief(page["events"], "id") == [(1,), (2,)]
    rest = await get(exporter, "/api/v1/events", after=page["cursor"])
    assert (brief(rest["events"], "id"), rest["gap"]) == ([(3,)], False)
    other = await get(exporter, "/api/v1/events", after="0123456789abcdef-2")
    assert (len(other["events"]), other["gap"]) == (3, True)
    for limit in ("0", "1001", "x", "-1"):
        refused = await exporter.client.get("/api/v1/events", params={"limit": limit})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_request")


async def test_events_of_what_runs_on_a_host(exporter: Exporter, tools: Path) -> None:
    """The first run records none. Names are shown without control characters."""
    write_nvidia_smi(
        tools / "nvidia-smi", (CARD, {**CARD, "index": "1", "uuid": "GPU-2", "pci.bus_id": "00000000:0B:00.0"})
    )
    write_docker(tools / "docker", **{"web": "running", "old": "running", "e\x1b[31m": "running"})
    write_systemctl(tools / "systemctl")
    collect = {"gpu": "1s", "docker": "1s", "systemd": {"every": "1s", "units": ["well"]}}
    exporter.configure({}, hosts={"h": {**LOCAL, "collect": collect}})
    await exporter.start()
    await collected(exporter, "h", gpu=True, docker=True, systemd=True)
    assert (await get(exporter, "/api/v1/events"))["events"] == []
    write_docker(tools / "docker", **{"web": "exited", "e\x1b[31m": "exited"})
    write_systemctl(tools / "systemctl", "broken.service")
    write_nvidia_smi(tools / "nvidia-smi", ({**CARD, "memory.used": "[Unknown Error]"},))
    expected = {
        ("container", "web", "down", ""), ("container", "e\\x1b[31m", "down", ""), ("container", "old", "gone", ""),
        ("unit", "broken.service", "down", ""), ("gpu", "0", "unhealthy", ""), ("gpu", "1", "gone", ""),
        ("gpu", "", "count_changed", "1, before: 2"),
    }  # fmt: skip

    async def recorded() -> bool:
        events = (await get(exporter, "/api/v1/events"))["events"]
        return set(brief(events, "kind", "name", "state", "detail")) == expected

    await eventually(recorded)
    assert {event["host"] for event in (await get(exporter, "/api/v1/events"))["events"]} == {"h"}


async def test_a_collector_that_fails_records_nothing_as_gone(exporter: Exporter, tools: Path) -> None:
    write_docker(tools / "docker", web="running", db="running")
    exporter.configure({}, hosts={"h": {**LOCAL, "collect": {"docker": "300ms"}}})
    await exporter.start()
    await collected(exporter, "h", docker=True)
    write_tool(tools / "docker", "exit 1")
    await collected(exporter, "h", docker=False)
    write_docker(tools / "docker", web="running", db="exited")
    await collected(exporter, "h", docker=True)
    events = (await get(exporter, "/api/v1/events"))["events"]
    assert brief(events, "kind", "name", "state", "first") == [("container", "db", "down", False)]


@pytest.mark.needs("sshd")
async def test_events_of_a_host(exporter: Exporter, launcher: Launcher, tmp_path: Path) -> None:
    """A change of the host is also a change of its services, whose JSON has `host_up`."""
    (port,) = reserve_ports(1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    host = await sshd.start(launcher, tmp_path / "sshd", port, {"PATH": path})
    ssh = {"user": host.user, "port": port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    services = {"on-h": {**switched(tmp_path, "web"), "host": "h"}, "elsewhere": switched(tmp_path, "web")}

    async def load(address: str) -> None:
        hosts = {"h": {"address": address, "ssh": ssh, "collect": {"system": "1s"}}, "here": LOCAL}
        exporter.configure(services, hosts=hosts)
        assert (await exporter.client.post("/-/reload")).status_code == 200

    async def becomes(*, up: bool, key_changed: bool) -> None:
        async def shown() -> bool:
            entry = await get(exporter, "/api/v1/hosts/h")
            return (entry["up"], entry["key_changed"]) == (up, key_changed)

        await eventually(shown)

    exporter.configure({})
    await exporter.start()
    await load("127.0.0.1")
    await becomes(up=True, key_changed=False)
    another = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    pinned = host.known_hosts.read_text()
    host.known_hosts.write_text(f"[localhost]:{port} {another}\n")
    await load("localhost")
    await becomes(up=False, key_changed=True)
    cursor = (await get(exporter, "/api/v1/services"))["cursor"]
    host.known_hosts.write_text(pinned.replace("[127.0.0.1]", "[localhost]"))
    await becomes(up=True, key_changed=False)
    events = (await get(exporter, "/api/v1/events"))["events"]
    states = [("host", "h", "h", "key_changed"), ("host", "h", "h", "up")]
    assert brief(events, "kind", "host", "name", "state") == states
    assert "key" in events[0]["detail"]
    changed = await get(exporter, "/api/v1/services", after=cursor)
    assert [(each["id"], each["host_up"]) for each in changed["services"]] == [("on-h", True)]


async def test_a_host_with_long_output_does_not_delay_others(tmp_path: Path) -> None:
    written = {"hosts": {"h": {**LOCAL, "collect": {"docker": "1h"}}}}
    known = await asyncio.to_thread(inventory_of, tmp_path, written)
    scheduler = ProbeScheduler(ExporterMetrics(), Redactor())
    await scheduler.apply(known.inventory)
    samples = CollectorSamples("h")
    for number in range(SERIES_LIMIT):
        samples.add("host_container_up", 0, container=f"{number}" + "\x1b" * 800)
    scheduler.page.put("docker h", samples.lines)
    monitored = scheduler.find_host("h")
    assert monitored is not None
    api = HostsApi(scheduler)
    try:
        for report in (summarize_host, describe_host):
            await leaves_the_loop_free(lambda report=report: api._report(report, monitored))  # type: ignore[misc]
    finally:
        await scheduler.close()


async def test_the_new_endpoints_are_for_viewers(exporter: Exporter) -> None:
    exporter.configure({}, access={"metrics_token": "metrics-only-token"})
    await exporter.start()
    headers = {"Authorization": "Bearer metrics-only-token"}
    for path in ("/api/v1/hosts", "/api/v1/events", "/api/v1/services"):
        assert (await exporter.client.get(path, headers=headers)).status_code == 403
        async with httpx.AsyncClient(verify=NO_TLS, base_url=exporter.client.base_url, trust_env=False) as anyone:
            assert (await anyone.get(path)).status_code == 401
