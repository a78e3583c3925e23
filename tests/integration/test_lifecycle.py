"""How alerts and incidents begin and end: nothing is lost, nothing lasts for ever, nothing ends without evidence."""

import asyncio
import contextlib
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import yaml

from defib.demo.stack import WEBHOOK_TOKEN
from fleet.inventory.endpoints import Endpoint
from remediator.clients.alertmanager import Alertmanager
from tests.integration.loop import Loop, alert, delivery
from tests.integration.test_safety import defib, metric
from tests.support import eventually

pytestmark = pytest.mark.needs("sshd")


async def test_an_exporter_with_another_configuration_holds_actions(loop: Loop) -> None:
    await loop.start({"web": loop.service("web"), "db": loop.service("db")})
    config = loop.folder / "config" / "defib.yaml"
    written = config.read_text()
    config.write_text(written.replace("web.alive\n    control", "web.moved\n    control", 1))
    assert config.read_text() != written
    (loop.folder / "web.moved").touch()  # the service is up where its probe looks now
    assert (await loop.ask("POST", "/-/reload")).status_code == 200

    async def counted() -> bool:
        return await metric(loop, "defib_remediator_config_mismatch") == 1

    await eventually(counted)
    for name in ("web", "db"):
        await loop.kill(name)
        await loop.fire(name)
    await loop.until_decision("wait", "config-mismatch")

    async def other_restarted() -> bool:
        return loop.restarts() == ["db"]

    await eventually(other_restarted)
    explained = await asyncio.to_thread(defib, loop, "explain", "web")
    assert "SHUT   config-mismatch: the exporter and the remediator have different configurations" in explained.stdout
    found = await asyncio.to_thread(defib, loop, "doctor")
    assert "exporter: has this configuration: it has another configuration of web" in found.stdout
    assert "FAIL  remediator: has the exporter's configuration" in found.stdout
    url = f"{loop.stack.url('exporter')}/-/reload"
    assert (await loop.stack.client.post(url)).status_code == 200
    await loop.until_decision("refuse", "already-up")
    assert loop.restarts() == ["db"]


async def test_what_fires_again_with_the_same_start_is_acted_on_if_the_service_is_down(loop: Loop) -> None:
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


async def test_an_incident_is_held_while_nobody_can_see_its_service(loop: Loop) -> None:
    """Its alert is over, as it is also when Prometheus is gone; the exporter is gone, too."""
    await loop.start({"web": loop.service("web", on_failure="notify")})
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse", "notify-only")
    await loop.keeper.kill(loop.stack.pids["exporter"], signal.SIGKILL)
    await loop.fire("web", status="resolved")
    held = await loop.until_decision("wait", "blind")
    # It may have been asked a moment before it was killed.
    assert held["detail"]["detail"].startswith("its alerts are resolved, but ")
    await loop.until_cards("Service down: web", "Status unknown: web")
    (loop.folder / "web.alive").touch()
    await loop.stack.start_ours("exporter")
    await loop.until("recovered")
    await loop.until_cards("Service down: web", "Status unknown: web", "Recovered: web")


async def test_a_verification_that_cannot_be_made_is_unknown_and_costs_no_attempt(loop: Loop) -> None:
    web = loop.service("web", restart="sleep 3; touch {alive}")
    web["control"]["timeout"] = "30s"
    await loop.start({"web": web}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    await loop.keeper.kill(loop.stack.pids["exporter"], signal.SIGKILL)
    ended = await loop.until_event("action_ended")
    assert ended["detail"]["state"] == "unknown"
    assert "cannot determine whether the service is up; cannot query the exporter" in ended["detail"]["why"]
    (action,) = (await loop.incident())["actions"]
    assert (action["command"], action["counts"]) == ("succeeded", 0)
    await loop.until_cards("Service down: web", "Status unknown: web")


async def test_an_action_on_a_service_that_is_renamed_is_unknown_immediately(loop: Loop) -> None:
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

    async def told() -> bool:
        return any("removed from the inventory" in card.text for card in loop.feishu.received)

    await eventually(told)
    await loop.kill("db")
    await loop.fire("db")  # the host's place is free

    async def restarted() -> bool:
        return loop.restarts() == ["web", "db"]

    await eventually(restarted)
    # The command runs on under the new name, and nothing is begun beside it.
    assert (await loop.stack.client.post(f"{loop.stack.url('exporter')}/-/reload")).status_code == 200
    await loop.fire("site")

    async def held() -> bool:
        incidents = (await loop.stack.get("remediator", "/api/v1/incidents"))["incidents"]
        return any(each["service"] == "site" and each["reason"] == "target-busy" for each in incidents)

    await eventually(held)
    assert loop.restarts() == ["web", "db"]
    ends.touch()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
async def test_a_record_that_is_lost_under_the_running_program_is_noticed(loop: Loop, how: str) -> None:
    await loop.start({"web": loop.service("web")})
    path = loop.folder / "remediator.db"
    path.rename(loop.folder / "moved.db")
    if how == "replaced":
        path.write_bytes((loop.folder / "moved.db").read_bytes())
    assert (await loop.fire("web")).status_code == 503
    healthy = await loop.stack.client.get(f"{loop.stack.url('remediator')}/-/healthy")
    assert (healthy.status_code, f"was {how} while the remediator is running" in healthy.text) == (503, True)
    found = await asyncio.to_thread(defib, loop, "doctor")
    assert f"FAIL  remediator: is healthy: the database {path} was {how}" in found.stdout
    (loop.folder / "moved.db").rename(path)
    assert (await loop.fire("web")).status_code == 200


async def test_host_down_that_never_ends_does_not_hold_a_host_that_answers(loop: Loop) -> None:
    """There is no Alertmanager to ask, and its `resolved` was lost."""
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
    made = alert("", "HostDown", status)
    del made["labels"]["service"]
    made["labels"]["host"] = "h"
    return made


@pytest.mark.needs("prometheus-alertmanager")
async def test_what_alertmanager_cut_off_is_taken_up_from_its_list(loop: Loop) -> None:
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
    assert sorted(each["labels"]["service"] for each in listed) == names[:4]  # what is routed elsewhere is not ours


async def start_alertmanager(loop: Loop) -> None:
    """One that sends two alerts of a group at most, and some elsewhere."""
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
    stack.pids["alertmanager"] = await loop.keeper.start(argv, stack.log("alertmanager"))

    async def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (await stack.client.get(f"{stack.url('alertmanager')}/-/ready")).is_success
        return False

    await eventually(ready)


@pytest.mark.needs("prometheus-alertmanager")
@pytest.mark.parametrize("skew", [-600.0, 600.0])
async def test_the_clock_of_alertmanager_need_not_agree_with_ours(
    loop: Loop, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start_alertmanager(loop)
    url = loop.stack.url("alertmanager")
    labels = {"alertname": "Watchdog", "severity": "info"}
    posted = [{"labels": labels}]
    assert (await loop.stack.client.post(f"{url}/api/v2/alerts", json=posted)).is_success
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + skew)
    asked = Alertmanager(Endpoint(url=url))
    try:
        listing = await asked.alerts()
        assert -2 <= listing.uptime < 120  # not old enough for its list to be whole
        assert (await asked.alerts_of("web")).uptime < 120
        ago = await asked.watchdog_age()
        assert ago is not None
        assert -2 <= ago < 120
        made = await asked.silence(labels, time.time(), time.time() + 60, "ann", "until it is mended")
        silence = (await loop.stack.client.get(f"{url}/api/v2/silence/{made}")).json()
        assert silence["status"]["state"] in ("active", "pending")
    finally:
        await asked.close()


@pytest.mark.needs("prometheus", "prometheus-alertmanager")
async def test_with_prometheus_gone_host_down_is_not_called_over(loop: Loop) -> None:
    """Alertmanager ends what Prometheus does not send any more."""
    await start_alertmanager_of_shipped(loop)
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
    await post(600, watchdog)  # Prometheus is back; the host is up, so that it sends HostDown no more

    async def told() -> bool:
        titles = [card.title for card in loop.feishu.received[2:]]
        return sorted(titles) == ["Alert resolved: HostDown · h", "Monitoring works again"]

    await eventually(told)


async def start_alertmanager_of_shipped(loop: Loop) -> None:
    (loop.folder / "webhook_token").write_text(WEBHOOK_TOKEN)
    await loop.stack.start_alertmanager()


async def test_services_in_maintenance_or_stopped_on_purpose_are_no_storm(loop: Loop) -> None:
    """A stop is not held back by a maintenance, in which one stops things."""
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
            assert (stopped.returncode, "it stays stopped" in stopped.stderr) == (0, True), stopped
            assert (await loop.ask("DELETE", f"/api/v1/maintenance/{begun.json()['id']}")).is_success
    for name in names[1:3]:
        await loop.kill(name)
    await loop.fire("s0")
    await loop.until_decision("wait", "stopped")
    await loop.fire("s2")
    await eventually(loop.begun)
    assert loop.restarts() == ["s2"]
