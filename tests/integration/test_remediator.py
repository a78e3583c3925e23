"""The remediator process with a real exporter and sshd; the tests post webhooks as Alertmanager does."""

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from typing import Any

import pytest

from tests.integration.loop import TOKEN, Loop, alert, delivery
from tests.support import WEBHOOK_TOKEN, eventually

pytestmark = pytest.mark.needs("sshd")


async def test_a_service_that_is_down_is_restarted_once_and_notified(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    await loop.kill("web")
    answers = await asyncio.gather(*(loop.fire("web") for _ in range(100)))
    assert {answer.status_code for answer in answers} == {200}
    await loop.until_event("service_up")
    await loop.fire("web", status="resolved")
    incident = await loop.until("recovered")
    assert incident["recovered_by"] == "defib"
    assert loop.restarts() == ["web"]
    (action,) = incident["actions"]
    assert (action["state"], action["exit_status"], action["counts"]) == ("succeeded", 0, 1)
    assert len(incident["alerts"]) == 1
    await loop.until_cards("Service down: web", "Restarted, being watched: web", "Recovered: web")
    assert "exit: test exited with status 1, expected 0" in loop.feishu.received[0].text
    assert not loop.feishu.refused


async def test_two_alerts_of_a_service_cause_one_action(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")}, alerts=["ServiceDown", "ServiceSlow"])
    await loop.kill("web")
    await loop.post(delivery(alert("web"), alert("web", "ServiceSlow")))
    await loop.until_event("service_up")
    await loop.post(delivery(alert("web", status="resolved"), alert("web", "ServiceSlow", status="resolved")))
    await loop.until("recovered")
    assert loop.restarts() == ["web"]


@pytest.mark.parametrize(
    ("change", "remediation", "alertname", "verb", "reason"),
    [
        ({"on_failure": "notify"}, {}, "ServiceDown", "refuse", "notify-only"),
        ({}, {}, "SomethingElse", "refuse", "not-an-alert-to-act-on"),
        ({}, {"automatic": False}, "ServiceDown", "wait", "automation-off"),
        ({}, {"never_for": ["exit"]}, "ServiceDown", "refuse", "not-restartable"),
    ],
)
async def test_gates_that_hold_a_restart(
    loop: Loop, change: dict[str, Any], remediation: dict[str, Any], alertname: str, verb: str, reason: str
) -> None:
    await loop.start({"web": loop.service("web", **change)}, **remediation)
    await loop.kill("web")
    await loop.fire("web", alertname)
    await loop.until_decision(verb, reason)
    assert loop.restarts() == []


async def test_a_service_that_is_up_is_not_restarted(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    await loop.fire("web")
    await loop.until_decision("refuse", "already-up")
    await loop.fire("web", status="resolved")
    incident = await loop.until("recovered")
    assert (incident["recovered_by"], loop.restarts()) == ("self", [])


async def test_used_up_attempts_are_notified(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", restart="exit 7")}, attempts=2)
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse", "attempts-used-up")
    assert loop.restarts() == ["web", "web"]
    assert [action["exit_status"] for action in (await loop.incident())["actions"]] == [7, 7]
    await loop.until_cards(
        "Service down: web", "Could not restart: web", "A person is needed: web is down, 2 restarts failed"
    )
    assert "all attempts are used up" in loop.feishu.received[-1].text


async def test_a_successful_command_without_recovery_is_a_failed_action(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", restart="true")}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse", "attempts-used-up")
    (action,) = (await loop.incident())["actions"]
    assert (action["command"], action["state"]) == ("succeeded", "failed")
    assert "not up within 6 s; exit: test exited with status 1" in action["why"]


async def test_a_service_that_is_down_again_within_hold_has_not_recovered(loop: Loop) -> None:
    restart = "touch {alive}; (sleep 1; rm {alive}) >/dev/null 2>&1 &"
    await loop.start({"web": loop.service("web", restart=restart)}, attempts=1, hold="5s")
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse", "attempts-used-up")
    (action,) = (await loop.incident())["actions"]
    assert (action["state"], "down again within 5 s" in action["why"]) == ("failed", True)


async def test_an_unreachable_host_counts_as_no_attempt_and_does_not_delay_others(loop: Loop) -> None:
    # The exporter can reach the host; the connection of the controls is refused.
    await loop.start({"lost": loop.service("lost", host="uncontrolled"), "web": loop.service("web")}, attempts=1)
    for name in ("lost", "web"):
        await loop.kill(name)
    await loop.post(delivery(alert("lost"), alert("web")))

    async def tried_twice() -> bool:
        return len((await loop.incident(1))["actions"]) >= 2

    await eventually(tried_twice)
    tried = (await loop.incident(1))["actions"]
    assert {(action["state"], action["counts"]) for action in tried if action["state"] != "running"} == {("failed", 0)}
    assert "nothing was run" in tried[0]["why"]
    await loop.until_card("Could not restart: lost")
    assert (await loop.until("open", 2))["actions"][0]["command"] == "succeeded"
    assert [card.title for card in loop.feishu.received].count("Could not restart: lost") == 1


async def test_the_outcome_of_a_command_that_hangs_is_unknown_after_its_timeout(loop: Loop) -> None:
    hung = loop.service("web", restart="sleep 60")
    hung["control"] |= {"timeout": "1s", "start_within": "1s"}
    await loop.start({"web": hung}, attempts=1)
    await loop.kill("web")
    started = time.monotonic()
    await loop.fire("web")
    await loop.until_decision("refuse", "attempts-used-up")
    assert time.monotonic() - started < 45
    (action,) = (await loop.incident())["actions"]
    assert (action["command"], action["state"], action["counts"]) == ("unknown", "unknown", 1)


REFUSED: list[tuple[Any, dict[str, str] | None, int, str]] = [
    (b"{}", {}, 401, "unauthorized"),
    (b"{}", {"Authorization": "Bearer wrong"}, 401, "unauthorized"),
    (b"{}", None, 400, "not_a_delivery"),
    (b"[" * 1000, None, 400, "not_a_delivery"),
    (delivery(version="3"), None, 400, "not_a_delivery"),
    (b" " * 11_000_000, None, 413, "too_large"),
    (b" " * 50_000_000, None, 413, "too_large"),
    (b"[%s" % (b'{"labels":{}},' * 400_000), None, 413, "too_large"),
]


async def test_invalid_webhooks_are_refused(loop: Loop) -> None:
    await loop.start({})
    for number, (body, headers, status, code) in enumerate(REFUSED, 1):
        answer = await loop.post(body, headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), body[:20]
        assert WEBHOOK_TOKEN not in answer.text
        assert (await loop.stack.client.get(f"{loop.stack.url('remediator')}/-/healthy")).status_code == 200
        assert loop.stack.log_path("remediator").read_text().count("alertmanager_webhook_refused") == number
    assert (await loop.stack.get("remediator", "/api/v1/incidents"))["incidents"] == []
    assert "Traceback" not in loop.stack.log_path("remediator").read_text()
    metrics = (await loop.stack.client.get(f"{loop.stack.url('remediator')}/metrics", headers=TOKEN)).text
    for status, count in Counter(status for _, _, status, _ in REFUSED).items():
        assert f'defib_remediator_webhook_refusals_total{{code="{status}"}} {count}.0' in metrics


async def test_an_alert_of_an_unknown_service_is_only_notified(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")}, notify={"group_wait": "100ms"})
    services = ["", "unknown", "a;reboot", "$(x)", "-f", "web*", "a\nb", "\0", "x" * 10_000]
    for number, service in enumerate(services, 1):
        assert (await loop.fire(service)).status_code == 200

        async def was_notified(number: int = number) -> bool:
            return len(loop.feishu.received) >= number

        await eventually(was_notified)
    assert (await loop.stack.get("remediator", "/api/v1/incidents"))["incidents"] == []
    assert loop.restarts() == []


async def test_notify_only_alerts_and_their_ends_are_notified(loop: Loop) -> None:
    await loop.start({})
    for status in ("firing", "firing", "resolved", "resolved"):
        await loop.fire("", "DiskFull", status)
    await loop.until_cards("Alert: DiskFull", "Alert resolved: DiskFull")


async def test_a_late_copy_of_a_resolved_alert_is_ignored(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", on_failure="notify")})
    await loop.fire("web", status="resolved")
    await loop.fire("web")
    assert (await loop.stack.get("remediator", "/api/v1/incidents"))["incidents"] == []


@pytest.mark.parametrize("moment", ["received", "commanding", "verifying"])
async def test_it_continues_after_it_was_killed(loop: Loop, moment: str) -> None:
    restart = "sleep 0.5; touch {alive}" if moment == "commanding" else "touch {alive}"
    await loop.start({"web": loop.service("web", restart=restart)}, hold="1s", backoff={"first": "5s"})
    await loop.kill("web")
    assert (await loop.fire("web")).status_code == 200
    if moment == "commanding":
        await eventually(loop.begun)
    elif moment == "verifying":
        await loop.until_event("service_up")
    await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGKILL)
    await loop.stack.start_program("remediator")
    await loop.until_event("service_up")
    await loop.fire("web", status="resolved")
    incident = await loop.until("recovered")
    assert loop.restarts() == ["web"]
    assert len(incident["actions"]) == 1
    await loop.until_cards("Service down: web", "Restarted, being watched: web", "Recovered: web", killed=True)


async def test_on_sigterm_a_running_command_finishes(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", restart="sleep 1; touch {alive}")})
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGTERM)
    log = loop.stack.log_path("remediator").read_text()
    assert '"event": "command_ended"' in log
    assert '"event": "server_stopped"' in log
    assert "Traceback" not in log


async def test_an_operator_s_restart_uses_the_same_locks(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", restart="sleep 1; touch {alive}")})
    url = f"{loop.stack.url('remediator')}/api/v1/services"
    begun = await loop.stack.client.post(f"{url}/web/restart")
    assert begun.status_code == 202
    busy = await loop.stack.client.post(f"{url}/web/restart")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "target-busy")
    assert (await loop.stack.client.post(f"{url}/nothing/restart")).status_code == 404
    assert (await loop.stack.client.get(f"{url}/web/logs")).json()["error"]["code"] == "unknown_verb"

    async def done() -> bool:
        (action,) = (await loop.stack.get("remediator", "/api/v1/actions"))["actions"]
        return bool(action["state"] == "succeeded")

    await eventually(done)
    assert loop.restarts() == ["web"]


async def test_a_second_remediator_cannot_open_the_database(loop: Loop) -> None:
    await loop.start({})
    first = loop.stack.pids["remediator"]
    with pytest.raises(Exception, match="another remediator uses the database"):
        await loop.stack.wait_for("a second", lambda: _start_second(loop), within=60)
    os.kill(first, 0)


async def _start_second(loop: Loop) -> bool:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "defib", "remediator", "--config", str(loop.folder / "config"), "--listen", "127.0.0.1:0",
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await process.communicate()
    assert process.returncode == 1
    raise RuntimeError(stderr.decode())
