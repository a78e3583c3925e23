"""`defib doctor`, where nothing works and where everything does."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from defib.demo import sshd
from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.launcher import Launcher
from defib.demo.stack import Stack, reserve_ports
from defib.doctor import monitoring
from defib.doctor.monitoring import JOBS, check_alertmanager, check_prometheus
from tests.forked_defib import run_defib
from tests.integration.peers import web_server
from tests.support import NO_TLS, eventually, inventory_of

NOWHERE = "http://127.0.0.1:1"


async def run_doctor(config: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    done = await asyncio.to_thread(run_defib, "doctor", "--json", "--config", str(config), *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)["findings"]


def result_of(findings: list[dict[str, str]], subject: str, check: str) -> str:
    (result,) = {each["result"] for each in findings if (each["subject"], each["check"]) == (subject, check)}
    return result


@pytest.mark.usefixtures("docker")
@pytest.mark.needs("dockerd", "busybox")
async def test_the_targets_of_controls_are_checked(tmp_path: Path, container: str) -> None:
    def service(name: str) -> dict[str, Any]:
        return {"host": "h", "probe": {"command": {"run": ["true"]}}, "control": {"docker": {"container": name}}}

    host = {"address": "127.0.0.1", "shell": "local"}
    written = {"hosts": {"h": host}, "services": {"there": service(container), "gone": service("no-such-container")}}
    await asyncio.to_thread(inventory_of, tmp_path, written)
    status, findings = await run_doctor(tmp_path, "h")
    assert status == 1
    assert result_of(findings, "h", "control of there") == "pass"
    (gone,) = (each for each in findings if each["check"] == "control of gone")
    assert (gone["result"], "no-such-container" in gone["detail"].lower()) == ("fail", True), gone


def alertmanager_with(fallback: dict[str, Any]) -> dict[str, Any]:
    """What Alertmanager says of itself, with this receiver `fallback`."""
    defib = {"name": "defib", "webhook_configs": [{"url": "http://remediator:9095/webhook/alertmanager"}]}
    config = yaml.safe_dump({"receivers": [defib, {"name": "fallback", **fallback}]})
    return {"versionInfo": {"version": "0.28.1"}, "config": {"original": config}}


@pytest.mark.parametrize("hidden", [False, True])
async def test_the_watcher_must_answer_where_it_is_the_fallback_receiver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, hidden: bool
) -> None:
    ready = 200

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=ready)

    async with web_server(answer) as port:
        base = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(monitoring, "WATCHERS", (NOWHERE, base))
        hook: dict[str, Any] = {"url": "<secret>" if hidden else f"{base}/alerts"}
        hook["http_config"] = {"authorization": {"credentials_file": "/etc/alertmanager/secrets/webhook_token"}}

        async def look(fallback: dict[str, Any]) -> tuple[str, str]:
            async def status(_request: web.Request) -> web.Response:
                return web.json_response(alertmanager_with(fallback))

            async with web_server(status) as alertmanager:
                written = {"remediator": {"alertmanager_url": f"http://127.0.0.1:{alertmanager}"}}
                inventory = (await asyncio.to_thread(inventory_of, tmp_path, written)).inventory
                findings = await check_alertmanager(inventory)
            (found,) = (each for each in findings if each.check == "receiver fallback")
            return found.result, found.detail

        assert await look({"webhook_configs": [hook]}) == ("pass", "the watcher answers")
        ready = 503
        result, detail = await look({"webhook_configs": [hook]})
        assert (result, f"the watcher at {base} has no channel" in detail) == ("warn", True)
    result, detail = await look({"webhook_configs": [hook]})
    assert (result, f"does not answer at {base}" in detail) == ("warn", True)
    assert await look({"webhook_configs": []}) == ("warn", "it has no destination")
    assert (await look({"email_configs": [{"to": "ops@example.org"}]}))[0] == "pass"


async def test_all_targets_and_rules_with_the_same_name_are_checked(tmp_path: Path) -> None:
    """One of two exporters is down, and one of two rules fails."""
    targets = [
        {"labels": {"job": job}, "health": health, "lastError": "refused", "scrapeUrl": f"http://{health}/metrics"}
        for job, health in (("defib-exporter", "down"), ("defib-exporter", "up"), ("defib-remediator", "up"))
    ]
    targets.append({**targets[-1], "health": "unknown", "lastError": ""})
    rules = [
        {"name": name, "health": health, "lastError": "many-to-many"}
        for name, health in (("ServiceDown", "err"), ("ServiceDown", "ok"), ("Watchdog", "ok"))
    ]
    answers = {
        "targets": {"activeTargets": targets}, "rules": {"groups": [{"rules": rules}]},
        "alertmanagers": {"activeAlertmanagers": [{}]}, "labels": [], "status/config": {"yaml": "{}"},
    }  # fmt: skip

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"data": answers[request.match_info["what"]]})

    app = web.Application()
    app.router.add_get("/api/v1/{what:.+}", answer)
    async with TestServer(app) as server:
        written = {"remediator": {"prometheus_url": str(server.make_url("")).rstrip("/")}}
        made = await asyncio.to_thread(inventory_of, tmp_path, written)
        found = {each.check: each for each in await check_prometheus(made.inventory)}
    assert found["scrapes defib-exporter"].result == "fail"
    assert "http://down/metrics: refused" in found["scrapes defib-exporter"].detail
    assert found["scrapes defib-remediator"].detail.startswith("http://up/metrics: not scraped yet")
    assert "many-to-many" in found["rule evaluation"].detail
    outdated = found["version of the rules"]
    assert (outdated.result, "HostDown" in outdated.detail, "host:threshold:max" in outdated.detail) == (
        "warn",
        True,
        True,
    )


async def test_servers_with_targets_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))

    async def answer(_request: web.Request) -> web.Response:
        return web.json_response([{"targets": ["127.0.0.1:1", "127.0.0.1:2"]}])

    app = web.Application()
    app.router.add_get("/targets", answer)
    async with TestServer(app) as server:
        sources = {"good": str(server.make_url("/targets")), "gone": f"{NOWHERE}/targets"}
        written = {
            "templates": {"port": {"id": "{target}", "service": {"probe": {"tcp": {"address": "{target}"}}}}},
            "services_from": {name: {"http": url, "template": "port"} for name, url in sources.items()},
        }
        await asyncio.to_thread(inventory_of, tmp_path / "config", written)
        _, findings = await run_doctor(tmp_path / "config")
    assert result_of(findings, "services_from", "good") == "pass"
    assert result_of(findings, "services_from", "gone") == "fail"


async def test_a_missing_or_invalid_configuration(tmp_path: Path) -> None:
    status, findings = await run_doctor(tmp_path / "none")
    assert (status, findings[0]["result"]) == (1, "fail")
    assert "defib init" in findings[0]["fix"]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.yaml").write_text("services: {web: {probes: {}}}\nnotify: {langauge: en}\n")
    status, findings = await run_doctor(tmp_path / "bad")
    assert status == 1
    assert {"fail"} == {each["result"] for each in findings}
    assert any("langauge" in each["detail"] for each in findings)


async def test_if_nothing_works_it_ends_in_time_and_says_how_to_fix_it(tmp_path: Path) -> None:
    """A server that accepts connections and never answers, and hosts that do not exist."""
    waiting: set[asyncio.StreamWriter] = set()

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting.add(writer)
        await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        waiting.discard(writer)

    async def all_closed() -> bool:
        return not waiting

    silent = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    ssh = {"user": "nobody", "port": port, "key_file": str(tmp_path / "none"), "known_hosts": str(tmp_path / "none")}
    written: dict[str, Any] = {
        "exporter": {"url": NOWHERE},
        "remediator": {
            "url": f"http://127.0.0.1:{port}", "prometheus_url": f"http://127.0.0.1:{port}",
            "alertmanager_url": NOWHERE, "database": f"sqlite:///{tmp_path}/none/record.db",
        },
        "hosts": {f"h{index}": {"address": "127.0.0.1", "ssh": ssh, "collect": {"system": "30s"}} for index in range(40)},
        "notify": {"channels": {"ops": {"feishu": {"webhook": f"{NOWHERE}/open-apis/bot/v2/hook/secret-token"}}}},
    }  # fmt: skip
    await asyncio.to_thread(inventory_of, tmp_path / "config", written)
    began = time.monotonic()
    status, findings = await run_doctor(tmp_path / "config", "--send")
    ended = time.monotonic()
    silent.close()
    assert ended - began < 200  # one by one, 40 hosts take longer
    await eventually(all_closed)
    assert status == 1
    assert all(each["fix"] for each in findings if each["result"] != "pass")
    for subject in ("exporter", "remediator", "prometheus", "alertmanager"):
        assert result_of(findings, subject, "reachable") == "fail"
    for subject, check in (("h7", "shell for reading"), ("notify", "routes"), ("channel ops", "test message")):
        assert result_of(findings, subject, check) == "fail"
    assert result_of(findings, "grafana", "configured") == "warn"
    assert "secret-token" not in json.dumps(findings)


@pytest.fixture
async def stack(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Stack]:
    made = Stack(launcher, tmp_path)
    yield made
    await made.client.aclose()


@pytest.mark.needs("prometheus")
@pytest.mark.timeout(180)
async def test_target_labels_that_replace_labels_of_defib(launcher: Launcher, tmp_path: Path, stack: Stack) -> None:
    """With the shipped file they replace no label; without `honor_labels` they do, and the doctor warns.

    It also warns of jobs that can serve recorded series.
    """
    config = stack.configuration({"services": {"web": {"probe": {"every": "1s", "http": {"url": NOWHERE}}}}})
    await stack.start_program("exporter")
    await stack.start_prometheus()
    path = tmp_path / "prometheus.yml"
    written = yaml.safe_load(path.read_text())
    (job,) = (job for job in written["scrape_configs"] if job["job_name"] == "defib-exporter")
    (target,) = job["static_configs"]

    async def take(service: str, ours: str) -> None:
        """Give Prometheus a target with a label `service`, and wait until it is scraped."""
        target["labels"] = {"service": service}
        path.write_text(yaml.safe_dump(written))
        await launcher.kill(stack.pids["prometheus"], signal.SIGHUP)
        await eventually(lambda: answered(f'up{{job="defib-exporter", service="{service}"}} == 1'))
        await eventually(lambda: answered(f'service_up{{{ours}="web"}} == 0'))

    async def answered(query: str) -> bool:
        answer = await stack.client.get(f"{stack.url('prometheus')}/api/v1/query", params={"query": query})
        return bool(answer.json()["data"]["result"])

    await take("platform", "service")
    _, findings = await run_doctor(config)
    for check in ("labels", "recorded names"):
        assert result_of(findings, "prometheus", check) == "pass"
    del job["honor_labels"]
    del job["metric_relabel_configs"]
    await take("billing", "exported_service")
    # The previous target may be scraped once more with the new configuration.
    await eventually(lambda: answered('absent({job="defib-exporter", service="platform"})'))
    _, findings = await run_doctor(config)
    (label,) = (each for each in findings if each["check"] == "labels")
    assert label["result"] == "warn"
    assert 'service="billing"' in label["detail"]
    assert "exported_service" in label["detail"]
    assert "platform" not in label["detail"]
    assert "honor_labels: true" in label["fix"]
    (names,) = (each for each in findings if each["check"] == "recorded names")
    assert names["result"] == "warn"
    assert names["detail"] == "defib-exporter can serve service:up:max, host:up:max, ALERTS"


@pytest.mark.needs("prometheus", "prometheus-alertmanager", "sshd")
@pytest.mark.timeout(120)
async def test_a_complete_installation_passes(
    launcher: Launcher, tmp_path: Path, stack: Stack, feishu: FeishuSimulator
) -> None:
    (port,) = reserve_ports(1)
    host = await sshd.start(launcher, tmp_path / "sshd", port, {"PATH": "/usr/bin:/bin"})
    ssh = {"user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    config = stack.configuration(
        {
            "hosts": {"h": {"address": "127.0.0.1", "ssh": ssh, "collect": {"system": "30s"}}},
            "services": {"web": {"probe": {"every": "1s", "http": {"url": feishu.url}}}},
            "notify": {
                "channels": {"ops": {"feishu": {"webhook": feishu.webhook, "secret": SECRET}}}, "routes": [{"channels": ["ops"]}],
            },
        }
    )  # fmt: skip
    await stack.start()

    async def scraped() -> bool:
        targets = await stack.get("prometheus", "/api/v1/targets?state=active")
        health = {each["labels"]["job"]: each["health"] for each in targets["data"]["activeTargets"]}
        return all(health.get(job) == "up" for job in JOBS)

    await eventually(scraped)
    status, findings = await run_doctor(config, "--send")
    wrong = [each for each in findings if each["result"] != "pass"]
    assert status == 0, wrong
    # The demo has no watcher, and no Grafana.
    assert {(each["subject"], each["check"]) for each in wrong} == {
        ("grafana", "configured"),
        ("alertmanager", "receiver fallback"),
        ("console", "public URL"),  # loopback
    }
    assert len(feishu.received) == 1
    quiet, _ = await run_doctor(config)
    assert (quiet, len(feishu.received)) == (0, 1)
    await _check_wrong_settings(stack, config)


async def _check_wrong_settings(stack: Stack, config: Path) -> None:
    """Check that swapped addresses and a wrong token are found."""
    said = (config / "defib.yaml").read_text()
    swapped = said.replace(stack.url("prometheus"), "x").replace(stack.url("alertmanager"), stack.url("prometheus"))
    (config / "defib.yaml").write_text(
        swapped.replace("prometheus_url: x", f"prometheus_url: {stack.url('alertmanager')}").replace(
            stack.webhook_token, "another"
        )
    )
    another = config / "another"
    another.touch(mode=0o600)
    another.write_text("another")
    status, findings = await run_doctor(config, "--token-file", str(another))
    assert status == 1
    seen: Mapping[str, str] = {each["subject"]: each["detail"] for each in findings if each["result"] == "fail"}
    assert {"prometheus", "alertmanager", "remediator"} <= set(seen), seen
    assert "401" in seen["remediator"]
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:
        assert (await client.get(f"{stack.url('exporter')}/-/ready")).is_success
