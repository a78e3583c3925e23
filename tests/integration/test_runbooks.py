"""Runbooks: commands that are run on a host while an alert about it fires."""

import asyncio
import signal
from typing import Any

import pytest
import yaml
from aiohttp import web

from defib.demo.feishu_app import APP_ID, APP_SECRET, CHAT, ENCRYPT_KEY
from tests.integration.loop import Loop, delivery, host_alert
from tests.integration.peers import web_server
from tests.integration.test_answers import PEOPLE, card_with, press
from tests.integration.test_safety import NO_PASSWORD, defib, start_with_sudo
from tests.support import eventually

pytestmark = pytest.mark.needs("sshd")
SUBJECT = "HostDiskFull@h"
WITH_LOG = "echo pruned >> {folder}/restarts; echo 'reclaimed 5 GB'"


def runbook(loop: Loop, script: str = WITH_LOG, **more: Any) -> dict[str, Any]:
    run = ["sh", "-c", script.format(folder=loop.folder)]
    return {"alerts": ["HostDiskFull"], "hosts": {"names": "h"}, "run": run, "approve": False, **more}


async def start(loop: Loop, *, script: str = WITH_LOG, others: Any = None, **more: Any) -> None:
    """Start with one runbook, `prune`, and its options, without a service."""
    await loop.start({}, runbooks={"prune": runbook(loop, script, **more), **(others or {})})


async def fire(loop: Loop, status: str = "firing", **labels: str) -> None:
    assert (await loop.post(delivery(host_alert(status=status, **labels)))).status_code == 200


async def actions_of(loop: Loop, number: int = 1) -> list[tuple[str, str]]:
    return [(each["kind"], each["state"]) for each in (await loop.incident(number)).get("actions", [])]


async def until_actions(loop: Loop, *wanted: tuple[str, str]) -> None:
    async def are_there() -> bool:
        return await actions_of(loop) == list(wanted)

    try:
        await eventually(are_there)
    except AssertionError:
        assert await actions_of(loop) == list(wanted)


async def test_a_runbook_is_run_and_the_alert_s_end_is_its_success(loop: Loop) -> None:
    await start(loop)
    await fire(loop)
    await loop.until_event("command_ended", outcome="succeeded")
    assert await actions_of(loop) == [("runbook prune", "running")]  # the alert still fires
    await fire(loop, "resolved")
    incident = await loop.until("recovered")
    assert (incident["service"], incident["recovered_by"]) == (SUBJECT, "defib")
    (action,) = incident["actions"]
    assert (action["state"], action["host"], action["exit_status"]) == ("succeeded", "h", 0)
    assert action["output"] == "reclaimed 5 GB"
    assert next(each["text"] for each in action["evidence"] if each["name"] == "command").startswith("sh -c ")
    assert loop.restarts() == ["pruned"]
    assert "alert_over" in [each["event"] for each in incident["timeline"]]
    await loop.until_cards("Alert: HostDiskFull · h", "Alert resolved: HostDiskFull · h")
    assert "**Resolved by** runbook of Defib" in loop.feishu.received[-1].text
    events = (await loop.ask("GET", "/api/v1/events?host=h&kind=action")).json()["events"]
    assert [(each["state"], each["operation"]) for each in events] == [
        ("succeeded", "runbook prune"), ("started", "runbook prune"),
    ]  # fmt: skip


async def test_a_command_that_succeeds_is_no_recovery_while_the_alert_fires(loop: Loop) -> None:
    await start(loop, resolve_within="1s", attempts=2)
    await fire(loop)
    await until_actions(loop, ("runbook prune", "failed"), ("runbook prune", "failed"))
    incident = await loop.incident()
    assert (incident["state"], incident["actions"][0]["command"]) == ("open", "succeeded")
    assert incident["actions"][0]["why"] == "HostDiskFull was not resolved within 1 s"
    await loop.until_decision("refuse", "attempts-used-up")
    await loop.until_cards(
        "Alert: HostDiskFull · h", "Runbook failed: HostDiskFull · h", "A person is needed: HostDiskFull · h"
    )
    assert "HostDiskFull was not resolved within 1 s" in loop.feishu.received[1].text
    told = await asyncio.to_thread(defib, loop, "explain", SUBJECT)
    assert told.stdout.startswith(f"{SUBJECT} fires; no action: attempts-used-up (runbook prune: 2 of 2)"), told
    reset = await asyncio.to_thread(defib, loop, "reset", SUBJECT)
    assert (reset.returncode, reset.stdout) == (0, f"the attempts of {SUBJECT} are reset\n")
    await eventually(lambda: _has_run(loop, 3))


async def _has_run(loop: Loop, times: int) -> bool:
    return len(loop.restarts()) >= times


async def test_a_failed_command_is_reported_and_the_next_runbook_follows(loop: Loop) -> None:
    second = {"second": runbook(loop, "echo second >> {folder}/restarts")}
    await start(loop, script="echo no space; exit 3", others=second)
    await fire(loop)
    await until_actions(loop, ("runbook prune", "failed"), ("runbook second", "running"))
    failed = (await loop.incident())["actions"][0]
    assert (failed["exit_status"], failed["why"], failed["output"]) == (3, "runbook prune exited 3", "no space")
    await eventually(lambda: _has_run(loop, 1))
    assert loop.restarts() == ["second"]


async def test_a_runbook_waits_for_approval(loop: Loop) -> None:
    await start(loop, approve=True)
    await fire(loop)
    await loop.until_card("Waiting for approval: HostDiskFull · h")
    card = loop.feishu.received[-1].text
    assert "**Step** runbook prune" in card
    assert "**Command** sh -c 'echo pruned" in card
    assert loop.restarts() == []
    await loop.restart_remediator()
    page = await loop.stack.client.get(f"{loop.stack.url('remediator')}/incidents/1")
    assert "Approve: runbook prune" in page.text
    assert "sh -c &#39;echo pruned" in page.text
    approved = await asyncio.to_thread(defib, loop, "approve", "1")
    assert approved.returncode == 0, approved
    await loop.until_event("command_ended")
    assert loop.restarts() == ["pruned"]
    await fire(loop, "resolved")
    (action,) = (await loop.until("recovered"))["actions"]
    assert (action["state"], bool(action["approved_by"])) == ("succeeded", True)
    audit = (await loop.ask("GET", "/api/v1/audit")).json()["audit"]
    assert [(each["event"], each["target"]) for each in audit] == [("approve", "action 1")]


async def test_nobody_is_asked_about_an_alert_that_alertmanager_does_not_have(loop: Loop) -> None:
    """An approval ends with the alert."""
    listed: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/api/v2/status":
            return web.json_response({"uptime": "2024-01-01T00:00:00Z", "config": {"original": ""}})
        return web.json_response(listed)

    async with web_server(answer) as port:
        remediator = {"alertmanager_url": f"http://127.0.0.1:{port}", "watchdog": "0s"}
        await loop.start({}, runbooks={"prune": runbook(loop, approve=True)}, remediator=remediator)
        await fire(loop)
        await loop.until_decision("wait", "alert-gone")
        assert await actions_of(loop) == []
        labels = host_alert()["labels"]
        status = {"state": "active", "silencedBy": [], "inhibitedBy": []}
        times = {
            "startsAt": "2026-11-22T03:39:01Z",
            "endsAt": "2044-01-01T00:00:00Z",
            "updatedAt": "2026-11-22T03:39:01Z",
        }
        fingerprint = host_alert()["fingerprint"]
        listed.append(
            {
                "labels": labels, "annotations": {}, "fingerprint": fingerprint, "receivers": [{"name": "defib"}],
                "status": status, **times,
            }
        )  # fmt: skip

        async def states(*wanted: str) -> None:
            async def are() -> bool:
                await fire(loop)  # so that the incident is decided about soon
                return [state for _, state in await actions_of(loop)] == list(wanted)

            await eventually(are)

        await states("queued")
        listed.clear()
        await states("cancelled")
        assert (await loop.ask("POST", "/api/v1/actions/1/approve")).status_code == 409
        assert loop.restarts() == []


async def test_an_approval_does_not_apply_to_another_command(loop: Loop) -> None:
    await start(loop, approve=True)
    await fire(loop)
    await loop.until_decision("wait", "approval")
    await loop.ask("POST", "/api/v1/maintenance", {"scope": "host", "name": "h", "reason": "r", "for": "1h"})
    await loop.until_decision("wait", "maintenance")
    assert (await loop.ask("POST", "/api/v1/actions/1/approve")).status_code == 200
    config = loop.folder / "config" / "defib.yaml"
    config.write_text(config.read_text().replace("echo pruned", "echo other"))
    assert (await loop.ask("POST", "/-/reload")).status_code == 200
    await loop.ask("DELETE", "/api/v1/maintenance/1")
    await until_actions(loop, ("runbook prune", "cancelled"), ("runbook prune", "queued"))
    assert loop.restarts() == []


@pytest.mark.parametrize("scope", ["host", "group"])
async def test_nothing_is_run_in_maintenance(loop: Loop, scope: str) -> None:
    await start(loop)
    if scope == "group":
        await change(loop, lambda written: written["hosts"]["h"].update(group="gpu"))
    name = "h" if scope == "host" else "gpu"
    body = {"scope": scope, "name": name, "reason": "new disks", "for": "1h"}
    assert (await loop.ask("POST", "/api/v1/maintenance", body)).status_code == 201
    await fire(loop)
    held = await loop.until_decision("wait", "maintenance")
    assert "new disks" in held["detail"]["detail"]
    await loop.until_card("Alert: HostDiskFull · h")
    assert "**Not run** maintenance" in loop.feishu.received[-1].text
    assert loop.restarts() == []
    await loop.ask("DELETE", "/api/v1/maintenance/1")
    await loop.until_event("command_ended")


async def change(loop: Loop, edit: Any) -> None:
    """Change the configuration, and reload the remediator."""
    path = loop.folder / "config" / "defib.yaml"
    written = yaml.safe_load(path.read_text())
    edit(written)
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    answer = await loop.ask("POST", "/-/reload")
    assert answer.status_code == 200, answer.text


async def test_nothing_is_run_while_automation_is_off_or_the_host_is_down(loop: Loop) -> None:
    await start(loop)
    await loop.ask("PUT", "/api/v1/automation", {"enabled": False, "reason": "r"})
    await loop.post(delivery(host_alert("HostDown")))
    await fire(loop)
    await loop.until_decision("wait", "host-down")
    await loop.post(delivery(host_alert("HostDown", "resolved")))
    await loop.until_decision("wait", "automation-off")
    assert loop.restarts() == []
    await loop.ask("PUT", "/api/v1/automation", {"enabled": True, "reason": "r"})
    await loop.until_event("command_ended")


async def test_commands_of_a_service_and_a_runbook_do_not_run_together_on_a_host(loop: Loop) -> None:
    web = loop.service("web", restart="sleep 2; touch {alive}")
    await loop.start({"web": web}, runbooks={"prune": runbook(loop)})
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    await fire(loop)

    async def waits() -> bool:
        timeline = (await loop.incident(2)).get("timeline", [])
        return any(each["detail"].get("reason") == "host-busy" for each in timeline)

    await eventually(waits)
    await eventually(lambda: _has_run(loop, 2))
    assert loop.restarts() == ["web", "pruned"]


@pytest.mark.parametrize("moment", ["received", "commanding", "verifying"])
async def test_it_continues_after_it_was_killed(loop: Loop, moment: str) -> None:
    script = WITH_LOG + "; sleep 1" if moment == "commanding" else WITH_LOG
    await start(loop, script=script)
    await fire(loop)
    if moment == "commanding":
        await eventually(loop.begun)
    elif moment == "verifying":
        await loop.until_event("command_ended")
    await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGKILL)
    await loop.stack.start_program("remediator")
    await loop.until_event("command_ended")
    await fire(loop, "resolved")
    incident = await loop.until("recovered")
    assert loop.restarts() == ["pruned"]
    assert len(incident["actions"]) == 1
    await loop.until_cards("Alert: HostDiskFull · h", "Alert resolved: HostDiskFull · h", killed=True)


async def test_labels_do_not_reach_the_command(loop: Loop) -> None:
    await start(loop)
    await fire(loop, mountpoint="/$(touch /tmp/x); rm -rf /")
    await loop.until_event("command_ended", outcome="succeeded")
    (action,) = (await loop.incident())["actions"]
    assert "mountpoint" not in str(action["evidence"]) + action["asked_by"]
    assert loop.restarts() == ["pruned"]


async def test_an_alert_of_another_disk_belongs_to_the_incident(loop: Loop) -> None:
    await start(loop, resolve_within="2s")
    await fire(loop, mountpoint="/")
    await fire(loop, mountpoint="/data")
    await loop.until_event("command_ended")
    await fire(loop, "resolved", mountpoint="/")
    await until_actions(loop, ("runbook prune", "failed"))  # the other one still fires
    await fire(loop, "resolved", mountpoint="/data")
    assert (await loop.until("recovered"))["recovered_by"] == "self"
    titles = [card.title.split(" (")[0] for card in loop.feishu.received]
    assert titles.count("Alert: HostDiskFull · h") == 2


async def test_an_alert_that_fires_already_is_handled_when_its_runbook_is_added(loop: Loop) -> None:
    await loop.start({})
    await fire(loop)
    await loop.until_card("Alert: HostDiskFull · h")
    added = runbook(loop)
    await change(loop, lambda written: written.update(runbooks={"prune": added}))
    await loop.until_event("command_ended")
    await change(loop, lambda written: written.pop("runbooks"))
    await loop.until("unobserved")
    (action,) = (await loop.incident())["actions"]
    assert (action["state"], action["why"]) == ("unknown", "the runbook was removed from the inventory, or renamed")
    (known,) = (await loop.ask("GET", "/api/v1/alerts")).json()["alerts"]
    assert (known["status"], known["incident_id"]) == ("firing", None)


async def test_a_host_that_cannot_be_reached_costs_no_attempt(loop: Loop) -> None:
    prune = runbook(loop, hosts={"names": "unreachable"})
    await loop.start({}, runbooks={"prune": prune})
    await loop.post(delivery(host_alert(host="unreachable")))

    async def failed() -> bool:
        return ("runbook prune", "failed") in await actions_of(loop)

    await eventually(failed)
    action = (await loop.incident())["actions"][0]
    assert action["why"].startswith("nothing was run: ")
    assert action["counts"] == 0


async def test_one_card_of_an_app_shows_the_whole_incident(loop: Loop) -> None:
    """With a button that approves the runbook."""
    await loop.feishu.start()
    app = {
        "app_id": APP_ID,
        "app_secret": APP_SECRET,
        "chat_id": CHAT,
        "url": loop.feishu.url,
        "encrypt_key": ENCRYPT_KEY,
    }
    notify = {"people": PEOPLE, "channels": {"app": {"feishu_app": app}}, "routes": [{"channels": ["app"]}]}
    prune = runbook(loop, approve=True, attempts=2)
    await loop.start({}, runbooks={"prune": prune}, notify=notify)
    await fire(loop)
    card = await card_with(loop, "approve")
    assert set(card.values) == {"acknowledge", "approve", "automation"}
    assert "**Command** sh -c" in card.text
    assert await press(loop, card, "approve") == "Approved"

    async def shows(title: str) -> bool:
        return card.title.startswith(title)

    await eventually(lambda: shows("Runbook in progress: HostDiskFull · h (attempt 1 of 2)"))
    assert [each["approved_by"] for each in (await loop.incident())["actions"]] == ["ann"]
    await fire(loop, "resolved")
    await eventually(lambda: shows("Alert resolved: HostDiskFull · h (fired for "))
    assert card.colour == "green"
    replies = [each.title for each in loop.feishu.apps.messages.values() if each is not card]
    assert replies == ["Waiting for approval: HostDiskFull · h"]


@pytest.mark.needs("prometheus-alertmanager")
async def test_nothing_is_run_while_the_alert_is_silenced(loop: Loop) -> None:
    """Alertmanager delivers the alert, holds the silence that an operator creates, and forgets the alert."""
    loop.stack._folder.mkdir(exist_ok=True)
    await loop.stack.start_alertmanager()
    url = loop.stack.url("alertmanager")
    await loop.start({}, runbooks={"prune": runbook(loop, approve=True)}, remediator={"alertmanager_url": url})
    made = host_alert(mountpoint="/")
    posted = [{"labels": made["labels"], "annotations": made["annotations"]}]
    assert (await loop.stack.client.post(f"{url}/api/v2/alerts", json=posted)).is_success
    await loop.until_decision("wait", "approval")
    silenced = await loop.ask("POST", "/api/v1/incidents/1/silence", {"for": "1h", "comment": "r"})
    assert silenced.status_code == 200, silenced.text
    (silence,) = await loop.stack.get("alertmanager", "/api/v2/silences")
    assert sorted((each["name"], each["value"]) for each in silence["matchers"]) == [
        ("alertname", "HostDiskFull"),
        ("host", "h"),
    ]
    assert (await loop.ask("POST", "/api/v1/actions/1/approve")).status_code == 200
    await loop.until_decision("wait", "silenced")
    assert loop.restarts() == []
    assert (await loop.stack.client.delete(f"{url}/api/v2/silence/{silence['id']}")).is_success
    await loop.ask("PUT", "/api/v1/automation", {"enabled": True, "reason": "r"})  # it decides again at once
    await loop.until_event("command_ended", outcome="succeeded")


async def test_the_console_shows_a_host_s_incident(loop: Loop) -> None:
    await start(loop, script="echo no space; exit 3")
    await fire(loop)
    await loop.until_decision("refuse", "attempts-used-up")

    async def page(path: str, language: str) -> str:
        headers = {"Accept-Language": language, "X-Defib-User": "ann"}
        got = await loop.stack.client.get(f"{loop.stack.url('remediator')}{path}", headers=headers)
        assert got.status_code == 200, got.text
        return got.text

    english, chinese = await page("/incidents/1", "en"), await page("/incidents/1", "zh")
    for text in (
        "HostDiskFull · h", "<strong>Alert</strong>", "<h2>Runbooks</h2>", "1 · runbook prune: failed", "runbook prune exited 3",
        "<pre>no space</pre>", "its runbooks were run as often as configured", '<a href="./../hosts/h">h</a>',
    ):  # fmt: skip
        assert text in english
    assert "services/HostDiskFull" not in english
    for text in ("<h2>预案执行记录</h2>", "预案 prune: 失败", "预案 prune 的命令退出码 3", "预案执行次数已用完"):
        assert text in chinese
    assert "HostDiskFull · h" in await page("/incidents?q=hostdisk", "en")
    of_host = await page("/hosts/h", "en")
    assert (
        '<a href="./../incidents/1">HostDiskFull · h</a><small>: its runbooks were run as often as configured'
        in of_host
    )
    assert "runbook prune" in await page("/events?host=h", "en")
    assert "预案 prune" in await page("/events?host=h", "zh")
    await fire(loop, "resolved")
    await loop.until("recovered")
    assert "without a runbook" in await page("/incidents", "en")


async def test_a_refusal_by_sudo_needs_a_person(loop: Loop) -> None:
    await start_with_sudo(loop, NO_PASSWORD, runbooks={"prune": runbook(loop, hosts={"names": "here"}, attempts=3)})
    await loop.post(delivery(host_alert(host="here")))
    await loop.until_decision("refuse", "sudo-refused")
    (action,) = (await loop.incident())["actions"]
    assert (action["blocked"], action["counts"], loop.restarts()) == ("sudo-refused", 0, [])
    await loop.until_cards("Alert: HostDiskFull · here", "A person is needed: HostDiskFull · here")
    assert "a password is required" in loop.feishu.received[1].text


async def test_an_interrupted_command_holds_its_host_only_until_its_timeout(loop: Loop) -> None:
    prune = runbook(loop, WITH_LOG + "; sleep 2", timeout="5s", resolve_within="1h")
    await loop.start({"web": loop.service("web")}, runbooks={"prune": prune})
    await fire(loop)
    await eventually(loop.begun)
    await loop.restart_remediator()
    await loop.until_event("command_ended", outcome="unknown")
    await loop.kill("web")
    await loop.fire("web")
    await eventually(lambda: _has_run(loop, 2))
    assert loop.restarts() == ["pruned", "web"]
    assert await actions_of(loop) == [("runbook prune", "running")]  # until the alert is resolved
