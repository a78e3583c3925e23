"""The beginning and end of alerts and incidents, with failures of the exporter, Alertmanager, Prometheus and the record."""

import asyncio
import contextlib
import signal
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
import yaml
from aiohttp import web

from fleet.inventory.endpoints import Endpoint
from remediator.clients.alertmanager import Alertmanager
from tests.integration.loop import Loop, alert, delivery
from tests.integration.peers import web_server
from tests.integration.test_safety import defib, metric
from tests.support import WEBHOOK_TOKEN, eventually

pytestmark = pytest.mark.needs("sshd")


async def test_a_different_configuration_of_the_exporter_holds_actions(loop: Loop) -> None:
    await loop.start({"web": loop.service("web"), "db": loop.service("db")})
    config = loop.folder / "config" / "defib.yaml"
    written = config.read_text()
    config.write_text(written.replace("web.alive\n    control", "web.moved\n    control", 1))
    assert config.read_text() != written
    (loop.folder / "web.moved").touch()  # the service is up where its probe looks now
    assert (await loop.ask("POST", "/-/reload")).status_code == 200

    async def is_counted() -> bool:
        return await metric(loop, "defib_remediator_config_mismatch") == 1

    await eventually(is_counted)
    for name in ("web", "db"):
        await loop.kill(name)
        await loop.fire(name)
    await loop.until_decision("wait", "config-mismatch")

    async def other_restarted() -> bool:
        return loop.restarts() == ["db"]

    await eventually(other_restarted)
    explained = await asyncio.to_thread(defib, loop, "explain", "web")
    assert "closed  config-mismatch: the exporter and the remediator have different configurations" in explained.stdout
    found = await asyncio.to_thread(defib, loop, "doctor")
    assert "exporter: configuration: it has another configuration of web" in found.stdout
    assert "FAIL  remediator: configuration" in found.stdout
    url = f"{loop.stack.url('exporter')}/-/reload"
    assert (await loop.stack.client.post(url)).status_code == 200
    await loop.until_decision("refuse", "already-up")
    assert loop.restarts() == ["db"]


async def test_an_alert_that_fires_again_with_the_same_start_is_acted_on_if_the_service_is_down(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    await loop.fire("web")
    await loop.fire("web", status="resolved")
    await loop.until("recovered")
    await loop.fire("web")  # a late copy: the service is up
    await loop.kill("web")
    assert loop.restarts() == []
    await loop.fire("web")
    await loop.until("open", 2)
    await eventually(loop.begun)


async def test_an_incident_stays_open_while_the_status_of_its_service_is_unknown(loop: Loop) -> None:
    """Its alert is resolved, as also if Prometheus fails, and the exporter does not run."""
    await loop.start({"web": loop.service("web", on_failure="notify")})
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse", "notify-only")
    await loop.launcher.kill(loop.stack.pids["exporter"], signal.SIGKILL)
    await loop.fire("web", status="resolved")
    held = await loop.until_decision("wait", "blind")
    # The remediator may have queried the exporter just before that was killed.
    assert held["detail"]["detail"].startswith("its alerts are resolved, but ")
    await loop.until_cards("Service down: web", "Status unknown: web")
    (loop.folder / "web.alive").touch()
    await loop.stack.start_program("exporter")
    await loop.until("recovered")
    await loop.until_cards("Service down: web", "Status unknown: web", "Recovered: web")


async def test_an_action_that_cannot_be_verified_does_not_count_as_an_attempt(loop: Loop) -> None:
    web = loop.service("web", restart="sleep 3; touch {alive}")
    web["control"]["timeout"] = "30s"
    await loop.start({"web": web}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    await loop.launcher.kill(loop.stack.pids["exporter"], signal.SIGKILL)
    ended = await loop.until_event("action_ended")
    assert ended["detail"]["state"] == "unknown"
    assert "cannot determine whether the service is up; cannot query the exporter" in ended["detail"]["why"]
    (action,) = (await loop.incident())["actions"]
    assert (action["command"], action["counts"]) == ("succeeded", 0)
    await loop.until_cards("Service down: web", "Status unknown: web")


async def test_an_action_on_a_renamed_service_ends_as_unknown(loop: Loop) -> None:
    ends = loop.folder / "ends"
    web = loop.service("web", restart=f"while [ ! -e {ends} ]; do sleep 0.2; done")
    web["control"] |= {"timeout": "10m", "start_within": "10m"}
    await loop.start({"web": web, "db": loop.service("db")})
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    config = loop.folder / "config" / "defib.yaml"
    config.write_text(config.read_text().replace("\n  web:\n", "\n  site:\n"))
    assert (await loop.ask("POST", "/-/reload")).status_code == 200
    (action,) = (await loop.incident())["actions"]
    assert (action["state"], "removed from the inventory, or renamed" in action["why"]) == ("unknown", True)

    async def was_notified() -> bool:
        return any("removed from the inventory" in card.text for card in loop.feishu.received)

    await eventually(was_notified)
    await loop.kill("db")
    await loop.fire("db")  # the host is not busy any more

    async def restarted() -> bool:
        return loop.restarts() == ["web", "db"]

    await eventually(restarted)
    # The command still runs, so that the target is busy under the new name.
    assert (await loop.stack.client.post(f"{loop.stack.url('exporter')}/-/reload")).status_code == 200
    await loop.fire("site")

    async def held() -> bool:
        incidents = (await loop.stack.get("remediator", "/api/v1/incidents"))["incidents"]
        return any(each["service"] == "site" and each["reason"] == "target-busy" for each in incidents)

    await eventually(held)
    assert loop.restarts() == ["web", "db"]
    ends.touch()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
async def test_a_database_that_is_lost_while_the_remediator_runs_is_reported(loop: Loop, how: str) -> None:
    await loop.start({"web": loop.service("web")})
    path = loop.folder / "remediator.db"
    path.rename(loop.folder / "moved.db")
    if how == "replaced":
        path.write_bytes((loop.folder / "moved.db").read_bytes())
    assert (await loop.fire("web")).status_code == 503
    for endpoint in ("/api/v1/incidents", "/api/v1/incidents/1", "/api/v1/maintenance", "/api/v1/automation"):
        unread = await loop.ask("GET", endpoint)
        assert (unread.status_code, unread.json()["error"]["code"]) == (503, "not_stored")
    healthy = await loop.stack.client.get(f"{loop.stack.url('remediator')}/-/healthy")
    assert (healthy.status_code, f"was {how} while the remediator is running" in healthy.text) == (503, True)
    found = await asyncio.to_thread(defib, loop, "doctor")
    assert f"FAIL  remediator: health: the database {path} was {how}" in found.stdout
    (loop.folder / "moved.db").rename(path)
    assert (await loop.fire("web")).status_code == 200


async def test_host_down_that_is_never_resolved_does_not_hold_actions_if_the_host_responds(loop: Loop) -> None:
    """There is no Alertmanager to query, and the resolved webhook was lost."""
    web = loop.service("web")
    await loop.start({"web": web}, collect={"system": {"every": "1s"}})
    await loop.post(delivery(host_down()))

    async def answers() -> bool:
        return (await loop.stack.get("exporter", "/api/v1/services/web"))["host_up"] is True

    await eventually(answers)
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)


def host_down(status: str = "firing") -> dict[str, Any]:
    host_alert = alert("", "HostDown", status)
    del host_alert["labels"]["service"]
    host_alert["labels"]["host"] = "h"
    return host_alert


@pytest.mark.needs("prometheus-alertmanager")
async def test_alerts_that_alertmanager_truncated_are_read_from_its_api(loop: Loop) -> None:
    names = [f"s{number}" for number in range(5)]
    stack = loop.stack
    await start_alertmanager(loop)
    await loop.start(
        {name: loop.service(name) for name in names}, storm={"at_least": 100},
        remediator={"alertmanager_url": stack.url("alertmanager")}, actions_per_host=5,
    )  # fmt: skip
    for name in names:
        await loop.kill(name)
    muted = {"alertname": "ServiceDown", "service": "s4", "severity": "critical", "elsewhere": "yes"}
    labels = [{"alertname": "ServiceDown", "service": name, "severity": "critical"} for name in names[:4]]
    posted = [{"labels": each} for each in [*labels, muted]]
    assert (await stack.client.post(f"{stack.url('alertmanager')}/api/v2/alerts", json=posted)).is_success

    async def restarted() -> bool:
        return sorted(loop.restarts()) == names[:4]

    await eventually(restarted)
    assert await metric(loop, "defib_remediator_alerts_truncated_total") == 2
    listed = (await stack.get("remediator", "/api/v1/alerts"))["alerts"]
    assert (
        sorted(each["labels"]["service"] for each in listed) == names[:4]
    )  # without the alert that is routed elsewhere


async def start_alertmanager(loop: Loop) -> None:
    """Start one that sends at most two alerts of a group, and some to another receiver."""
    stack = loop.stack
    hook = {
        "url": f"{stack.url('remediator')}/webhook/alertmanager", "send_resolved": True, "max_alerts": 2,
        "http_config": {"authorization": {"credentials": WEBHOOK_TOKEN}},
    }  # fmt: skip
    config = {
        "route": {
            "receiver": "our.hook", "group_by": ["alertname"], "group_wait": "0s", "group_interval": "1s",
            "routes": [{"matchers": ['elsewhere = "yes"'], "receiver": "nobody"}],
        },
        "receivers": [{"name": "our.hook", "webhook_configs": [hook]}, {"name": "nobody"}],
    }  # fmt: skip
    path = loop.folder / "am.yml"
    path.write_text(yaml.safe_dump(config))
    argv = [
        "prometheus-alertmanager", f"--config.file={path}", f"--storage.path={loop.folder}/am",
        f"--web.listen-address=127.0.0.1:{stack.ports['alertmanager']}", "--cluster.listen-address=",
    ]  # fmt: skip
    stack.pids["alertmanager"] = await loop.launcher.start(argv, stack.log_path("alertmanager"))

    async def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (await stack.client.get(f"{stack.url('alertmanager')}/-/ready")).is_success
        return False

    await eventually(ready)


@pytest.mark.needs("prometheus-alertmanager")
@pytest.mark.parametrize("skew", [-600.0, 600.0])
async def test_the_clock_of_alertmanager_may_differ(loop: Loop, skew: float, monkeypatch: pytest.MonkeyPatch) -> None:
    await start_alertmanager(loop)
    url = loop.stack.url("alertmanager")
    labels = {"alertname": "Watchdog", "severity": "info"}
    posted = [{"labels": labels}]
    assert (await loop.stack.client.post(f"{url}/api/v2/alerts", json=posted)).is_success
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + skew)
    alertmanager = Alertmanager(Endpoint(url=url))
    try:
        listing = await alertmanager.alerts()
        assert -2 <= listing.uptime < 120  # its list may be incomplete
        assert (await alertmanager.alerts_with({"service": "web"})).uptime < 120
        age = await alertmanager.watchdog_age()
        assert age is not None
        assert -2 <= age < 120
        silence_id = await alertmanager.silence(labels, time.time(), time.time() + 60, "ann", "until it is repaired")
        silence = (await loop.stack.client.get(f"{url}/api/v2/silence/{silence_id}")).json()
        assert silence["status"]["state"] in ("active", "pending")
    finally:
        await alertmanager.close()


@pytest.mark.needs("prometheus", "prometheus-alertmanager")
async def test_without_prometheus_host_down_is_not_resolved(loop: Loop) -> None:
    """Alertmanager resolves the alerts that Prometheus no longer sends."""
    await start_shipped_alertmanager(loop)
    url = loop.stack.url("alertmanager")
    await loop.start({"web": loop.service("web")}, remediator={"alertmanager_url": url})

    async def post(seconds: float, *alerts: dict[str, str]) -> None:
        ends = datetime.now(UTC) + timedelta(seconds=seconds)
        posted = [{"labels": labels, "endsAt": ends.isoformat()} for labels in alerts]
        assert (await loop.stack.client.post(f"{url}/api/v2/alerts", json=posted)).is_success

    down = {"alertname": "HostDown", "host": "h", "severity": "critical"}
    watchdog = {"alertname": "Watchdog", "severity": "info"}
    await post(6, down, watchdog)

    async def held() -> bool:
        listed = (await loop.stack.get("remediator", "/api/v1/alerts"))["alerts"]
        return any(each["status"] == "firing" and each["held_at"] for each in listed)

    await eventually(held)
    await loop.until_cards("Alert: HostDown · h", "Monitoring failure: no Watchdog alert received")
    await post(600, watchdog)  # Prometheus works again; the host is up, so it does not send HostDown

    async def was_notified() -> bool:
        titles = [card.title for card in loop.feishu.received[2:]]
        return sorted(titles) == ["Alert resolved: HostDown · h", "Monitoring works again"]

    await eventually(was_notified)


async def test_a_watchdog_that_alertmanager_does_not_have_does_not_count(loop: Loop) -> None:
    """Who has the webhook's token can post one while Prometheus does not run."""
    listed: list[str] = []
    pings: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/ping":
            pings.append(request.path)
            return web.Response()
        if request.path == "/api/v2/status":
            return web.json_response({"uptime": "2024-01-01T00:00:00Z", "config": {"original": ""}})
        alerts = [
            {
                "labels": {"alertname": name}, "annotations": {}, "fingerprint": "f1", "receivers": [{"name": "defib"}],
                "startsAt": "2024-01-01T00:00:00Z", "endsAt": "2044-01-01T00:00:00Z",
                "updatedAt": "2024-01-01T00:00:00Z", "status": {"state": "active", "silencedBy": [], "inhibitedBy": []},
            }
            for name in listed
        ]  # fmt: skip
        return web.json_response(alerts, headers={"Date": format_datetime(datetime.now(UTC), usegmt=True)})

    def titles() -> list[str]:
        return [card.title for card in loop.feishu.received]

    async with web_server(answer) as port:
        url = f"http://127.0.0.1:{port}"
        dead_man = {"url": f"{url}/ping", "every": "1s"}
        remediator = {"alertmanager_url": url, "watchdog": "10m", "dead_man": dead_man}
        await loop.start({"web": loop.service("web")}, remediator=remediator)
        await loop.fire("", "Watchdog")

        async def missing() -> bool:
            await loop.fire("", "Watchdog", starts="2")
            return "Monitoring failure: no Watchdog alert received" in titles()

        await eventually(missing)
        sent = len(pings)
        await loop.fire("", "Watchdog", starts="3")

        async def withheld() -> bool:
            return (
                "Alertmanager reported it as resolved, or does not have it"
                in loop.stack.log_path("remediator").read_text()
            )

        await eventually(withheld)
        assert len(pings) <= sent + 1  # one may have been on the way
        listed.append("Watchdog")

        async def back() -> bool:
            await loop.fire("", "Watchdog", starts="4")
            return "Monitoring works again" in titles() and len(pings) > sent + 1

        await eventually(back)


async def start_shipped_alertmanager(loop: Loop) -> None:
    await loop.stack.start_alertmanager()


async def test_services_in_maintenance_or_stopped_by_operators_are_no_storm(loop: Loop) -> None:
    """Maintenance does not hold a stop."""
    names = [f"s{number}" for number in range(4)]
    services = {name: loop.service(name) for name in names}
    services["s0"]["control"]["command"]["stop"] = ["rm", str(loop.folder / "s0.alive")]
    services["s0"]["on_failure"] = "notify"
    await loop.start(services)
    for name in names[:2]:
        asked = {"scope": "service", "name": name, "reason": "new disks", "for": "1h"}
        begun = await loop.ask("POST", "/api/v1/maintenance", asked)
        if name == "s0":
            stopped = await asyncio.to_thread(defib, loop, "control", "s0", "stop")
            assert (stopped.returncode, "leaves it stopped" in stopped.stderr) == (0, True), stopped
            assert (await loop.ask("DELETE", f"/api/v1/maintenance/{begun.json()['id']}")).is_success
    for name in names[1:3]:
        await loop.kill(name)
    await loop.fire("s0")
    await loop.until_decision("wait", "stopped")
    await loop.fire("s2")
    await eventually(loop.begun)
    assert loop.restarts() == ["s2"]
