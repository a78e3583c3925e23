"""Safety of the remediator: switches, approval, evidence, refusals, a database that is not lost."""

import asyncio
import os
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import yaml

from runtime.errors import StartError
from tests.forked_defib import run_defib
from tests.integration.loop import TOKEN, Loop, alert, delivery, fill_disk
from tests.support import WEBHOOK_TOKEN, eventually

pytestmark = pytest.mark.needs("sshd")


async def metric(loop: Loop, name: str) -> float | None:
    page = (await loop.stack.client.get(f"{loop.stack.url('remediator')}/metrics", headers=TOKEN)).text
    return next((float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} ")), None)


def defib(loop: Loop, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the configuration of the loop."""
    return run_defib(*arguments, "--config", str(loop.folder / "config"))


async def until_restarted(loop: Loop, times: int = 1) -> None:
    async def enough() -> bool:
        return len(loop.restarts()) >= times

    await eventually(enough)


async def test_automation_off_survives_a_restart_and_is_notified(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    off = await asyncio.to_thread(defib, loop, "automation", "off", "--reason", "moving racks")
    assert (off.returncode, off.stdout.startswith("automation is off since")) == (0, True), off

    async def is_recorded_as_sent() -> bool:
        rows = (await loop.ask("GET", "/api/v1/notifications")).json()["notifications"]
        return [row["state"] for row in rows] == ["sent"]

    await eventually(is_recorded_as_sent)  # else the next run sends it again
    await loop.restart_remediator()
    assert await metric(loop, "defib_remediator_automation_enabled") == 0
    assert await metric(loop, "defib_remediator_automation_configured") == 1
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("wait", "automation-off")
    assert loop.restarts() == []
    on = await loop.ask("PUT", "/api/v1/automation", {"enabled": True, "reason": "done"})
    assert (on.json()["enabled"], on.json()["by"]) == (True, "local (ann, unverified)")
    await until_restarted(loop)
    await loop.until_card("Service down: web")
    assert [card.title for card in loop.feishu.received][:2] == ["Automation is off", "Service down: web"]
    assert "moving racks" in loop.feishu.received[0].text
    assert await metric(loop, "defib_remediator_automation_enabled") == 1


async def test_maintenance_of_a_host_prevents_restarts_until_it_ends(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    begun = await asyncio.to_thread(
        defib, loop, "maintenance", "begin", "host", "h", "--for", "2h", "--reason", "new disks"
    )
    assert begun.returncode == 0, begun
    await loop.kill("web")
    await loop.fire("web")
    held = await loop.until_decision("wait", "maintenance")
    assert "new disks" in held["detail"]["detail"]
    told = await asyncio.to_thread(defib, loop, "explain", "web")
    assert "closed  maintenance: host h, by " in told.stdout
    by_hand = await loop.ask("POST", "/api/v1/services/web/restart")
    assert (by_hand.status_code, by_hand.json()["error"]["code"]) == (409, "maintenance")
    assert "new disks" in (await asyncio.to_thread(defib, loop, "maintenance")).stdout
    assert loop.restarts() == []
    ended = await asyncio.to_thread(defib, loop, "maintenance", "end", "1")
    assert ended.returncode == 0, ended
    await until_restarted(loop)


async def test_maintenance_can_pause_probing(loop: Loop) -> None:
    """Until it ends, also if the exporter is restarted; a service that was down is not taken for recovered."""
    await loop.start({"web": loop.service("web"), "other": loop.service("other")})

    async def seen(name: str = "web") -> tuple[bool, bool | None]:
        service = await loop.stack.get("exporter", f"/api/v1/services/{name}") or {}
        return service.get("paused", False), service.get("up")

    async def is_paused() -> bool:
        return await seen() == (True, None)

    async def is_down() -> bool:
        return await seen() == (False, False)

    await loop.kill("web")
    arguments = ("--for", "2h", "--reason", "new model", "--pause-probing")
    begun = await asyncio.to_thread(defib, loop, "maintenance", "begin", "service", "web", *arguments)
    assert begun.stdout.endswith(": no automatic actions, and no probes\n"), begun
    await eventually(is_paused)
    assert await seen("other") == (False, True)
    assert ", probing is paused, by " in (await asyncio.to_thread(defib, loop, "maintenance")).stdout
    assert "probing is paused" in (await asyncio.to_thread(defib, loop, "list", "services", "web")).stdout
    entries = (await loop.ask("GET", "/api/v1/audit")).json()["audit"]
    assert entries[0]["detail"] == "new model; probing is paused"
    await loop.fire("web")
    await loop.until_decision("wait", "maintenance")
    await loop.fire("web", status="resolved")
    await loop.launcher.kill(loop.stack.pids["exporter"], signal.SIGKILL)
    await loop.stack.start_program("exporter")
    await eventually(is_paused)
    assert (await loop.incident())["state"] == "open"
    assert (await loop.ask("DELETE", "/api/v1/maintenance/1")).status_code == 200
    await eventually(is_down)
    await loop.fire("web", starts="2")
    await until_restarted(loop)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "scopes: is missing"),
        ({"scopes": [], "seconds": 0}, "seconds: must be greater than 0"),
        ({"scopes": [], "seconds": "NaN"}, "seconds: must be a finite number"),
        ({"scopes": [{"scope": "rack", "name": "r"}], "seconds": 1}, "scopes.0.scope: "),
        ({"scopes": [{"scope": "host", "name": ""}], "seconds": 1}, "scopes.0.name: "),
    ],
)
async def test_invalid_pauses_are_refused(loop: Loop, body: Any, message: str) -> None:
    await loop.start({"web": loop.service("web")})
    url = f"{loop.stack.url('exporter')}/api/v1/pauses"
    answer = await loop.stack.client.put(url, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
    assert answer.json()["error"]["message"].startswith(message)


async def test_a_person_can_overrule_a_gate_and_this_is_recorded(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    await loop.ask("POST", "/api/v1/maintenance", {"scope": "service", "name": "web", "reason": "r", "for": "1h"})
    done = await asyncio.to_thread(defib, loop, "control", "web", "restart", "--overrule", "maintenance")
    assert done.returncode == 0, done
    (action,) = (await loop.stack.get("remediator", "/api/v1/actions"))["actions"]
    assert (action["requested_by"], action["overruled"]) == ("person", ["maintenance"])
    assert action["asked_by"]
    wrong = await loop.ask("POST", "/api/v1/services/web/restart", {"overrule": ["host-busy"]})
    assert (wrong.status_code, "cannot overrule" in wrong.json()["error"]["message"]) == (400, True)


NONSENSE: list[tuple[str, Any, int]] = [
    ("/api/v1/maintenance", {"scope": "service", "name": "nothing", "reason": "r", "for": "1h"}, 404),
    ("/api/v1/maintenance", {"scope": "service", "name": "web", "reason": "r"}, 400),
    (
        "/api/v1/maintenance",
        {"scope": "service", "name": "web", "reason": "r", "until": "9999-12-31T23:59:59-14:00"},
        400,
    ),
    (
        "/api/v1/maintenance",
        {"scope": "service", "name": "web", "reason": "r", "until": "2020-01-01T00:00:00Z"},
        400,
    ),
    (
        "/api/v1/maintenance",
        {"scope": "service", "name": "web", "reason": "r", "until": "2090-01-01T00:00:00"},
        400,
    ),
    ("/api/v1/maintenance", {"scope": "fleet", "name": "web", "reason": "r", "for": "1h"}, 400),
    ("/api/v1/maintenance", {"scope": "service", "name": "web", "reason": "", "for": "1h"}, 400),
    ("/api/v1/services/web/restart", [], 400),
    ("/api/v1/services/web/restart", {"force": True}, 400),
    ("/api/v1/actions/7/approve", None, 404),
    ("/api/v1/services/nothing/reset", None, 404),
]


async def test_invalid_requests_are_refused(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    for path, body, status in NONSENSE:
        answer = await loop.ask("POST", path, body)
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"code", "message"}), (path, body)
    assert loop.restarts() == []


async def test_recreate_waits_for_approval(loop: Loop) -> None:
    remake = ["sh", "-c", f"echo remade >> {loop.folder}/restarts; touch {loop.folder}/web.alive"]
    web = loop.service("web", restart="exit 1", remediation={"steps": ["restart", {"recreate": {"command": remake}}]})
    await loop.start({"web": web}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("wait", "approval")
    await asyncio.sleep(1)
    assert loop.restarts() == ["web"]
    assert (await metric(loop, "defib_remediator_queue_oldest_seconds") or 0) > 0
    await loop.restart_remediator()
    queued = next(each for each in (await loop.incident())["actions"] if each["state"] == "queued")
    approved = await asyncio.to_thread(defib, loop, "approve", str(queued["id"]))
    assert approved.returncode == 0, approved
    await loop.until_event("service_up")
    assert loop.restarts() == ["web", "remade"]
    await loop.fire("web", status="resolved")
    incident = await loop.until("recovered")
    done = next(each for each in incident["actions"] if each["kind"] == "recreate")
    assert (done["id"], done["state"], bool(done["approved_by"])) == (queued["id"], "succeeded", True)
    assert (await loop.ask("POST", f"/api/v1/actions/{done['id']}/approve")).status_code == 409
    await loop.until_card("Waiting for approval: web")


async def test_a_queued_action_is_cancelled_when_the_service_recovers(loop: Loop) -> None:
    web = loop.service("web", remediation={"steps": [{"restart": {"approve": True}}]})
    await loop.start({"web": web})
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("wait", "approval")
    (loop.folder / "web.alive").touch()

    async def up() -> bool:
        return bool((await loop.stack.get("exporter", "/api/v1/services/web"))["up"])

    await eventually(up)
    await loop.fire("web", status="resolved")
    incident = await loop.until("recovered")
    assert [action["state"] for action in incident["actions"]] == ["cancelled"]
    assert loop.restarts() == []


@pytest.mark.parametrize("step", ["recreate", "restart"])
async def test_an_action_that_was_changed_after_approval_needs_approval_again(loop: Loop, step: str) -> None:
    if step == "recreate":
        command = ["sh", "-c", f"echo first >> {loop.folder}/restarts"]
        web = loop.service("web", remediation={"steps": [{"recreate": {"command": command}}]})
    else:
        web = loop.service("web", restart="echo first", remediation={"steps": [{"restart": {"approve": True}}]})
    await loop.start({"web": web})
    await loop.kill("web")
    await loop.ask("POST", "/api/v1/maintenance", {"scope": "service", "name": "web", "reason": "r", "for": "1h"})
    await loop.ask("DELETE", "/api/v1/maintenance/1")
    await loop.fire("web")
    await loop.until_decision("wait", "approval")
    await loop.ask("POST", "/api/v1/maintenance", {"scope": "service", "name": "web", "reason": "r", "for": "1h"})
    await loop.until_decision("wait", "maintenance")
    assert (await loop.ask("POST", "/api/v1/actions/1/approve")).status_code == 200
    config = loop.folder / "config" / "defib.yaml"
    config.write_text(config.read_text().replace("echo first", "echo second"))
    assert (await loop.ask("POST", "/-/reload")).status_code == 200
    await loop.ask("DELETE", "/api/v1/maintenance/2")

    async def asked_again() -> bool:
        return [each["state"] for each in (await loop.incident())["actions"]] == ["cancelled", "queued"]

    await eventually(asked_again)
    assert loop.restarts() == []


async def test_a_command_that_may_still_run_is_not_started_again(loop: Loop) -> None:
    """The service has less time to start than the command has to end."""
    restart = f"echo begin >> {loop.folder}/spans; sleep 6; echo end >> {loop.folder}/spans"
    web = loop.service("web", restart=restart)
    web["control"] |= {"timeout": "8s", "start_within": "500ms"}
    await loop.start({"web": web})
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    await loop.restart_remediator()
    await until_restarted(loop, 2)
    assert (loop.folder / "spans").read_text().split()[:3] == ["begin", "end", "begin"]


async def test_reset_allows_new_attempts(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", restart="exit 1")}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse", "attempts-used-up")
    assert await metric(loop, 'defib_remediator_breaker_open{service="web"}') == 1
    assert (
        "attempts used: restart 1; next step: none" in (await asyncio.to_thread(defib, loop, "explain", "web")).stdout
    )
    assert (await asyncio.to_thread(defib, loop, "reset", "web")).returncode == 0
    await until_restarted(loop, 2)


async def test_evidence_is_collected_before_a_restart(loop: Loop) -> None:
    web = loop.service("web")
    web["control"]["command"] |= {
        "status": ["echo", "dead since noon"],
        "logs": ["echo", f"token {WEBHOOK_TOKEN} lost"],
    }
    await loop.start({"web": web})
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_event("service_up")
    await loop.fire("web", status="resolved")
    (action,) = (await loop.until("recovered"))["actions"]
    kept = {each["name"]: each["text"] for each in action["evidence"]}
    assert action["before"] == {"state": "dead since noon", "exit_status": 0}
    assert kept["logs"] == "token *** lost"
    assert kept["probe before"] == "exit: test exited with status 1, expected 0"
    assert kept["probe after"] == "success"
    assert kept["processes"].split()[0] == "PID"
    assert "--config" not in kept["processes"]  # arguments of other processes may be secret
    assert action["asked_by"] == "ServiceDown"
    assert await metric(loop, 'defib_remediator_recovery_seconds_count{by="defib"}') == 1
    told = await asyncio.to_thread(defib, loop, "incidents", "1")
    assert "token *** lost" in told.stdout
    assert WEBHOOK_TOKEN not in told.stdout


async def start_with_sudo(loop: Loop, script: str, *, runbooks: dict[str, Any] | None = None, **web: Any) -> None:
    """Start with a service on this machine whose commands use a fake sudo, as do those of runbooks for it."""
    folder = loop.folder / "bin"
    folder.mkdir()
    (folder / "sudo").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "sudo").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        await loop.start({"web": loop.service("web", host="here") | web}, runbooks=runbooks)
    config = loop.folder / "config" / "defib.yaml"
    config.write_text(config.read_text().replace("shell: local", "shell: local\n    sudo: passwordless"))
    await loop.ask("POST", "/-/reload")


NO_PASSWORD = "echo 'sudo: a password is required' >&2; exit 1"


async def test_a_refusal_by_sudo_is_notified_and_not_retried(loop: Loop) -> None:
    await start_with_sudo(loop, NO_PASSWORD)
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse", "sudo-refused")
    (action,) = (await loop.incident())["actions"]
    assert (action["blocked"], action["counts"], loop.restarts()) == ("sudo-refused", 0, [])
    await loop.until_cards("Service down: web", "A person is needed: web")
    assert "a password is required" in loop.feishu.received[1].text


async def test_without_permission_to_see_the_status_nothing_is_restarted(loop: Loop) -> None:
    """It may have been stopped on purpose; after an upgrade, a host still has the sudo rules of the previous version."""
    restarts = loop.folder / "restarts"
    control = {"supervisor": {"program": "web"}, "timeout": "60s", "start_within": "6s"}
    script = f'case "$*" in *" restart "*) echo web >> {restarts}; exit ;; esac\n{NO_PASSWORD}'
    await start_with_sudo(loop, script, control=control)
    await loop.kill("web")
    await loop.fire("web")
    refused = await loop.until_decision("refuse", "sudo-refused")
    assert "a password is required" in refused["detail"]["detail"]
    assert ((await loop.incident())["actions"], loop.restarts()) == ([], [])


async def test_no_command_runs_on_a_host_with_a_changed_key(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")})
    kept = loop.host.known_hosts.read_text()
    another = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    pinned = loop.folder / "pinned"
    pinned.write_text(f"{kept.split()[0]} {another}\n")
    config = loop.folder / "config" / "defib.yaml"
    written = yaml.safe_load(config.read_text())
    written["hosts"]["h"]["control_ssh"] = {"known_hosts": str(pinned)}  # what the exporter reads stays as it is
    config.write_text(yaml.safe_dump(written))
    await loop.ask("POST", "/-/reload")
    await loop.kill("web")
    await loop.fire("web")
    await loop.until_decision("refuse", "host-key-changed")
    assert loop.restarts() == []
    await loop.until_cards("Service down: web", "A person is needed: web")
    assert "HOST KEY CHANGED" in loop.feishu.received[1].text


async def test_a_missing_and_a_returning_watchdog_are_notified(loop: Loop) -> None:
    await loop.start({}, remediator={"watchdog": "1s"})
    await loop.until_cards("Monitoring failure: no Watchdog alert received")
    await loop.fire("", "Watchdog")

    async def back() -> bool:
        await loop.fire("", "Watchdog", starts="2")
        return "Monitoring works again" in [card.title for card in loop.feishu.received]

    await eventually(back)
    assert (await metric(loop, "defib_remediator_watchdog_last_timestamp_seconds") or 0) > 1.7e9


async def test_on_sigterm_an_unfinished_action_is_recorded_as_unknown(loop: Loop) -> None:
    web = loop.service("web", restart="sleep 600")
    web["control"]["timeout"] = "10m"
    await loop.start({"web": web}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")
    await eventually(loop.begun)
    started = asyncio.get_running_loop().time()
    os.kill(loop.stack.pids["remediator"], signal.SIGTERM)

    async def stopped() -> bool:
        return '"event": "server_stopped"' in loop.stack.log_path("remediator").read_text()

    await eventually(stopped)
    assert asyncio.get_running_loop().time() - started < 60
    with sqlite3.connect(loop.folder / "remediator.db") as record:
        (row,) = record.execute("SELECT command, why FROM actions").fetchall()
    assert row == ("unknown", "the remediator was stopped while the command ran")


@pytest.mark.parametrize("damage", ["zeroes", "text", "gone", "empty"])
async def test_a_damaged_or_missing_database_is_never_replaced_by_an_empty_one(loop: Loop, damage: str) -> None:
    await loop.start({"web": loop.service("web")})
    await loop.fire("web")
    await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGTERM)
    path = loop.folder / "remediator.db"
    for rest in ("-wal", "-shm"):
        Path(f"{path}{rest}").unlink(missing_ok=True)
    if damage == "zeroes":
        whole = path.read_bytes()
        path.write_bytes(whole[:4096] + bytes(8192) + whole[12288:])
    elif damage == "text":
        path.write_text("this is no database, whatever its name says\n" * 100)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(StartError, match=r"backup"):
        await loop.stack.wait_for("the remediator to refuse", lambda: _refused(loop), within=60)
    assert (path.read_bytes() if path.exists() else None) == before


async def _refused(loop: Loop) -> bool:
    done = await asyncio.to_thread(defib, loop, "remediator", "--listen", "127.0.0.1:0")
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    raise StartError(done.stderr)


@pytest.mark.needs("root", "mount")
async def test_a_full_disk_gives_503_and_needs_no_repair(loop: Loop, small_disk: Path) -> None:
    await loop.start({"web": loop.service("web")}, remediator={"database": f"sqlite:///{small_disk}/r.db"})
    await loop.kill("web")
    await fill_disk(loop, small_disk)
    assert (await loop.fire("web")).status_code == 503
    await asyncio.sleep(1)
    assert loop.restarts() == []
    (small_disk / "filler").unlink()
    assert (await loop.fire("web")).status_code == 200
    await until_restarted(loop)


async def test_a_truncated_resolved_delivery_closes_nothing(loop: Loop) -> None:
    """Alertmanager truncates the list before it computes the status."""
    await loop.start({"web": loop.service("web", on_failure="notify")})
    await loop.kill("web")
    await loop.fire("web")
    other = delivery(alert("other", status="resolved"), status="resolved", truncatedAlerts=5)
    assert (await loop.post(other)).status_code == 200
    assert (await loop.incident())["state"] == "open"
    assert await metric(loop, "defib_remediator_alerts_truncated_total") == 5
    listed = (await loop.stack.get("remediator", "/api/v1/alerts"))["alerts"]
    assert [each["decided"] for each in listed] == [
        "notification only: it has no service of the inventory", "incident 1",
    ]  # fmt: skip


async def test_a_frozen_sshd_delays_no_longer_than_its_timeout(loop: Loop) -> None:
    web = loop.service("web")
    web["control"] |= {"timeout": "1s", "start_within": "1s"}
    await loop.start({"web": web}, attempts=1)
    await loop.kill("web")
    pid = loop.host.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        await loop.fire("web")

        async def tried() -> bool:
            acted = (await loop.incident()).get("actions", [])
            return bool(acted) and acted[0]["state"] != "running"

        await eventually(tried)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await loop.stack.client.get(f"{loop.stack.url('remediator')}/-/healthy")).status_code == 200
    assert loop.restarts() == []
