"""Targets that somebody stopped or has just started: detected with real managers, and not restarted by a remediator."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from defib.demo.feishu_app import APP_ID, APP_SECRET, CHAT, ENCRYPT_KEY, VERIFICATION_TOKEN, Message
from defib.demo.launcher import Launcher
from fleet.shells.local import LocalShell
from remediator.execution import evidence
from remediator.execution.controls.runner import TargetState
from tests.integration.conftest import start_supervisord
from tests.integration.loop import Loop
from tests.integration.test_controls import control, read_state
from tests.integration.test_safety import defib
from tests.support import eventually, inventory_of

BIN = Path(sys.executable).parent


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.needs("dockerd", "busybox")
def test_docker_reports_manual_stops_and_the_time_of_the_start(container: str) -> None:
    name = f"{container}-stopped"
    options = {"container": name}
    sleeps = ["run", "-d", "--network", "host", "--name", name, "--stop-timeout", "0", container, "/bin/sleep", "1000"]

    async def check_states() -> None:
        docker(*sleeps)
        state = await read_state("docker", options)
        assert state is not None
        assert (state.stopped, state.age is not None and state.age < 60) == ("", True)
        docker("pause", name)
        state = await read_state("docker", options)
        assert state is not None
        assert (state.state, state.withheld, state.age) == ("paused", "it is paused (docker pause)", None)
        docker("unpause", name)
        docker("kill", name)

        async def find_known_state() -> TargetState | None:
            state = await read_state("docker", options)
            return state if state is not None and not state.unsure else None

        state = await eventually(find_known_state)
        assert state is not None
        assert (state.state, state.stopped) == ("exited", "")  # it may have crashed
        docker("start", name)
        docker("stop", name)

        async def find_stop() -> TargetState | None:  # docker's client leaves out the events of the current second
            state = await read_state("docker", options)
            return state if state is not None and state.stopped else None

        state = await eventually(find_stop)
        assert state is not None
        assert state.stopped == "it was stopped with docker stop, and not started again"
        assert state.stopped_for is not None
        assert state.stopped_for < 60
        docker("start", name)
        docker("kill", name)
        state = await read_state("docker", options)
        assert state is not None
        assert state.stopped == ""  # the stop was before the last start
        docker("rm", name)
        docker(*sleeps)
        docker("kill", name)
        state = await read_state("docker", options)
        assert state is not None
        assert state.stopped == ""  # how an earlier container ended does not matter
        identifier = docker("inspect", "--format", "{{.Id}}", name)
        assert await read_state("docker", {"container": identifier[:12]}) is None

    try:
        asyncio.run(check_states())
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=True)


@pytest.mark.needs("dockerd", "busybox")
def test_docker_s_restart_policy_shows_a_stop_that_is_no_longer_in_its_events(container: str, tmp_path: Path) -> None:
    """Other events, such as three of each health check, displace a stop from the daemon's last 256."""
    always, never = f"{container}-always", f"{container}-never"
    real, folder = shutil.which("docker"), tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(
        f'#!/bin/sh\n[ "$1" != events ] || [ -e {folder}/answers ] || exit 1\n[ "$1" != events ] || exit 0\nexec {real} "$@"\n'
    )
    (folder / "docker").chmod(0o755)
    (folder / "answers").touch()
    path = os.environ["PATH"]

    async def read_existing(name: str) -> TargetState:
        state = await read_state("docker", {"container": name})
        assert state is not None
        return state

    try:
        for name, policy in ((always, "always"), (never, "no")):
            docker(
                "run", "-d", "--network", "host", "--name", name, "--restart", policy, "--stop-timeout", "0",
                container, "/bin/sleep", "1000",
            )  # fmt: skip
            docker("stop", name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{folder}:{path}")
            state = asyncio.run(read_existing(always))
            assert state.stopped.startswith("docker has not restarted it, although its restart policy is always: ")
            assert state.stopped_for is not None
            assert state.stopped_for < 60
            state = asyncio.run(read_existing(never))
            assert (state.stopped, state.unsure) == (
                "", "unknown whether somebody stopped it: docker keeps only its last 256 events"
            )  # fmt: skip
            (folder / "answers").unlink()
            assert "unknown whether somebody stopped it: docker events" in asyncio.run(read_existing(never)).unsure
        docker("start", always)
        docker("kill", always)  # docker does not restart it, although nobody stopped it

        async def find_no_stop() -> TargetState | None:
            state = await read_existing(always)
            return state if not state.stopped else None

        assert asyncio.run(eventually(find_no_stop)) is not None
    finally:
        subprocess.run(["docker", "rm", "--force", always, never], capture_output=True, check=True)


async def test_supervisor_reports_manual_stops_and_the_time_of_the_start(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    programs = (
        "[program:web]\ncommand=sleep 1000\nstartsecs=0\n"
        "[program:once]\ncommand=true\nautorestart=false\nstartsecs=0\n"
        "[program:never]\ncommand=sleep 1000\nautostart=false\n"
    )
    config = str(await start_supervisord(launcher, tmp_path, programs))

    async def state_of(program: str) -> str:
        state = await read_state("supervisor", {"program": program, "config": config})
        return state.state if state is not None else ""

    async def is_in(program: str, expected: str) -> bool:
        return await state_of(program) == expected

    await eventually(lambda: is_in("web", "RUNNING"))
    await eventually(lambda: is_in("once", "EXITED"))
    running = await read_state("supervisor", {"program": "web", "config": config})
    assert running is not None
    assert (running.stopped, running.age is not None and running.age < 60) == ("", True)
    assert (await control("supervisor", "stop", {"program": "web", "config": config})).status == 0
    stopped = await read_state("supervisor", {"program": "web", "config": config})
    assert stopped is not None
    assert stopped.stopped == "it was stopped with supervisorctl (STOPPED)"
    assert stopped.stopped_for is not None
    assert stopped.stopped_for < 120
    for program, expected in (("once", "EXITED"), ("never", "STOPPED")):
        state = await read_state("supervisor", {"program": program, "config": config})
        assert state is not None
        assert (state.state, state.stopped) == (expected, ""), state


@pytest.mark.needs("systemd")
async def test_systemd_reports_manual_stops_and_the_time_of_the_start(
    systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{systemd}:{os.environ['PATH']}")
    units = systemd.parent / "units"
    unit = "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart={}\nRestart={}\n"
    for name, restart in (("kept", "always"), ("rests", "no")):
        (units / f"{name}.service").write_text(unit.format("/bin/sleep infinity", restart))
    # A unit that another one wants is not unloaded.
    (units / "all.target").write_text("[Unit]\nDefaultDependencies=no\nWants=kept.service\n")
    systemctl("daemon-reload")
    systemctl("start", "kept", "rests", "all.target")
    running = await read_state("systemd", {"unit": "kept"})
    assert running is not None
    assert (running.stopped, running.age is not None and running.age < 60) == ("", True)
    systemctl("stop", "kept", "rests")
    stopped = await read_state("systemd", {"unit": "kept"})
    assert stopped is not None
    assert stopped.stopped.startswith("it was stopped (systemctl stop)")
    assert stopped.stopped_for is not None
    assert stopped.stopped_for < 60
    ended = await read_state("systemd", {"unit": "rests"})
    assert ended is not None
    assert (ended.state, ended.stopped) == ("inactive (dead), result success", "")  # its process may have ended
    (units / "hidden.service").symlink_to("/dev/null")
    systemctl("daemon-reload")
    masked = await read_state("systemd", {"unit": "hidden"})
    assert masked is not None
    assert (masked.withheld, masked.stopped) == ("it is masked (systemctl mask)", "")
    (units / "new.service").write_text(unit.format("/bin/sleep infinity", "always"))
    systemctl("daemon-reload")
    new = await read_state("systemd", {"unit": "new"})
    assert new is not None
    assert new.stopped.startswith("it was stopped, or never started: no unit wants it")
    (units / "all.target.wants").mkdir()
    (units / "all.target.wants" / "new.service").symlink_to(units / "new.service")
    systemctl("daemon-reload")
    new = await read_state("systemd", {"unit": "new"})
    assert new is not None
    assert (new.state, new.stopped) == ("inactive (dead), result success", "")  # something else prevented its start


@pytest.mark.parametrize(
    ("program", "control"),
    [
        ("docker", {"docker": {"container": "web"}}),
        ("docker", {"compose": {"directory": "/srv/web", "service": "web"}}),
        ("systemctl", {"systemd": {"unit": "web"}}),
        ("supervisorctl", {"supervisor": {"program": "web"}}),
    ],
)
async def test_the_state_is_unknown_if_the_manager_does_not_respond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, control: dict[str, Any]
) -> None:
    """The control `command` has no state in any case."""
    executable = tmp_path / "bin" / program
    executable.parent.mkdir()
    executable.write_text("#!/bin/sh\necho 'Cannot connect to it' >&2\nexit 1\n")
    executable.chmod(0o755)
    monkeypatch.setenv("PATH", f"{executable.parent}:{os.environ['PATH']}")
    host = {"h": {"address": "127.0.0.1", "shell": "local"}}
    probe = {"tcp": {"address": "127.0.0.1:1"}}
    written = {"it": {"host": "h", "probe": probe, "control": control}}
    command = {"restart": ["true"], "status": ["false"]}
    written["other"] = {"host": "h", "probe": probe, "control": {"command": command}}
    inventory = (
        await asyncio.to_thread(inventory_of, tmp_path / "config", {"hosts": host, "services": written})
    ).inventory
    unseen = await evidence.read_target_state(inventory.services["it"], inventory.hosts["h"], LocalShell(), str)
    assert unseen is not None
    assert (unseen.state, unseen.unseen.startswith("cannot read the target's state")) == ("", True)
    other = await evidence.read_target_state(inventory.services["other"], inventory.hosts["h"], LocalShell(), str)
    assert other is None or not (other.unseen or other.refused)


def systemctl(*arguments: str) -> None:
    subprocess.run(["systemctl", *arguments], capture_output=True, check=True)


def supervisor_service(config: Path, **more: Any) -> dict[str, Any]:
    """Return a service that is up while supervisor runs its program."""
    running = ["sh", "-c", f"supervisorctl -c {config} status web | grep -q RUNNING"]
    return {
        "host": "h",
        "probe": {"every": "200ms", "retry_every": "200ms", "timeout": "5s", "command": {"run": running}},
        "control": {"supervisor": {"program": "web", "config": str(config)}, "timeout": "10s", "start_within": "2s"},
        "on_failure": "restart",
        **more,
    }


PROGRAM = "[program:web]\ncommand=sleep 1000\nstartsecs=0\n"


async def is_up(loop: Loop, name: str, expected: bool) -> bool:
    return bool((await loop.stack.get("exporter", f"/api/v1/services/{name}"))["up"] is expected)


@pytest.mark.needs("sshd")
async def test_a_manual_stop_is_notified_once_and_a_button_starts_the_service(
    loop: Loop, launcher: Launcher, tmp_path: Path
) -> None:
    config = await start_supervisord(launcher, tmp_path, PROGRAM)
    await loop.feishu.start()
    app = {
        "app_id": APP_ID, "app_secret": APP_SECRET, "chat_id": CHAT, "url": loop.feishu.url,
        "encrypt_key": ENCRYPT_KEY, "verification_token": VERIFICATION_TOKEN,
    }  # fmt: skip
    notify = {
        "people": {"ann": {"open_id": "ou_ann"}}, "channels": {"app": {"feishu_app": app}},
        "routes": [{"channels": ["app"]}],
    }  # fmt: skip
    await loop.start({"web": supervisor_service(config)}, notify=notify)
    await eventually(lambda: is_up(loop, "web", True))
    stop = await asyncio.create_subprocess_exec(BIN / "supervisorctl", "-c", config, "stop", "web")
    await stop.wait()
    await eventually(lambda: is_up(loop, "web", False))
    await loop.fire("web")
    held = await loop.until_decision("wait", "stopped-by-hand")
    assert held["detail"]["detail"] == "it was stopped with supervisorctl (STOPPED)"

    async def find_card() -> Message | None:
        cards = loop.feishu.apps.in_chat
        return cards[0] if cards and cards[0].replies and "Start it" in str(cards[0].card) else None

    card = await eventually(find_card)
    assert card is not None
    assert "it was stopped manually: it was stopped with supervisorctl (STOPPED)" in card.text
    await loop.fire("web", "ServiceSlow")  # another alert causes a new decision
    explained = await asyncio.to_thread(defib, loop, "explain", "web")
    assert "closed  stopped-by-hand: it was stopped with supervisorctl (STOPPED)" in explained.stdout
    assert (await loop.incident())["actions"] == []
    body, headers = loop.feishu.apps.callback(loop.feishu.apps.event(card, "restart", "ou_ann"), ENCRYPT_KEY)
    url = f"{loop.stack.url('remediator')}/webhook/feishu/app"
    assert (await loop.stack.client.post(url, content=body, headers=headers)).status_code == 200
    await eventually(lambda: is_up(loop, "web", True))
    await loop.until_event("action_ended")
    replies = [each.title for each in card.replies]
    assert replies.count("Stopped manually, not restarted: web") == 1
    (action,) = (await loop.incident())["actions"]
    assert (action["requested_by"], action["counts"], action["state"]) == ("person", 0, "succeeded")


@pytest.mark.needs("sshd")
async def test_a_manual_stop_is_ignored_with_respect_stop_false(loop: Loop, launcher: Launcher, tmp_path: Path) -> None:
    config = await start_supervisord(launcher, tmp_path, PROGRAM)
    await loop.start({"web": supervisor_service(config, remediation={"respect_stop": False})})
    stop = await asyncio.create_subprocess_exec(BIN / "supervisorctl", "-c", config, "stop", "web")
    await stop.wait()
    await eventually(lambda: is_up(loop, "web", False))
    await loop.fire("web")
    await loop.until_event("service_up")


@pytest.mark.needs("sshd")
async def test_a_target_that_was_just_started_is_not_restarted(loop: Loop, launcher: Launcher, tmp_path: Path) -> None:
    config = await start_supervisord(launcher, tmp_path, PROGRAM)
    web = loop.service("web")
    web["control"] = {"supervisor": {"program": "web", "config": str(config)}, "timeout": "10s", "start_within": "5m"}
    await loop.start({"web": web})
    await loop.kill("web")
    await loop.fire("web")
    held = await loop.until_decision("wait", "starting")
    assert "has 300 s to come up" in held["detail"]["detail"]
    assert (await loop.incident())["actions"] == []


@pytest.mark.needs("sshd")
async def test_a_service_stopped_through_defib_is_not_restarted_or_notified_until_it_is_up_again(loop: Loop) -> None:
    web = loop.service("web")
    web["control"]["command"]["stop"] = ["rm", str(loop.folder / "web.alive")]
    await loop.start({"web": web})
    await eventually(lambda: is_up(loop, "web", True))
    stopped = await asyncio.to_thread(defib, loop, "control", "web", "stop")
    assert stopped.returncode == 0, stopped
    await eventually(lambda: is_up(loop, "web", False))
    await loop.fire("web")
    await loop.fire("web", "ServiceFlapping")
    held = await loop.until_decision("wait", "stopped")
    assert held["detail"]["detail"].startswith("by ")
    await loop.restart_remediator()
    explained = await asyncio.to_thread(defib, loop, "explain", "web")
    assert "closed  stopped: by " in explained.stdout
    assert "wait stopped" in (await asyncio.to_thread(defib, loop, "incidents")).stdout
    assert loop.restarts() == []
    (loop.folder / "web.alive").touch()  # somebody starts it on the host

    async def is_gate_open() -> bool:
        gates = (await loop.ask("GET", "/api/v1/services/web/explain")).json()["gates"]
        return next(bool(each["open"]) for each in gates if each["gate"] == "stopped")

    await eventually(is_gate_open)
    await loop.fire("web", status="resolved")
    await loop.fire("web", "ServiceFlapping", "resolved")
    await loop.until("recovered")
    assert loop.feishu.received == []
    await loop.kill("web")
    await loop.fire("web", starts="2")
    await loop.until_cards("Service down: web", "Restarted, being watched: web")
    assert loop.restarts() == ["web"]


@pytest.mark.needs("sshd")
async def test_dependencies_are_probed_before_a_restart(loop: Loop) -> None:
    db, web = loop.service("db"), loop.service("web", depends_on=["db"])
    db["probe"] |= {"every": "1h", "retry_every": "1h"}
    await loop.start({"db": db, "web": web})
    await eventually(lambda: is_up(loop, "db", True))
    (loop.folder / "db.alive").unlink()  # the exporter has not seen it yet
    await loop.kill("web")
    await loop.fire("web")
    held = await loop.until_decision("wait", "dependency-down")
    assert (held["detail"]["detail"], await is_up(loop, "db", True), loop.restarts()) == ("db", True, [])
    (loop.folder / "db.alive").touch()
    await loop.fire("web", "ServiceSlow")  # another alert causes a new decision
    await loop.until_event("service_up")
    assert loop.restarts() == ["web"]


@pytest.mark.needs("sshd")
async def test_services_that_share_a_target_are_restarted_one_after_the_other(loop: Loop) -> None:
    names = ("a", "b")
    spans, alive = loop.folder / "spans", " ".join(str(loop.folder / f"{name}.alive") for name in names)
    script = f"echo begin >> {spans}; sleep 1; touch {alive}; echo end >> {spans}"
    services = {name: loop.service(name) for name in names}
    for service in services.values():
        service["control"]["command"] = {"restart": ["sh", "-c", script]}
    await loop.start(services, actions_per_host=5)
    for name in names:
        await loop.kill(name)
    await asyncio.gather(*(loop.fire(name) for name in names))

    async def both_decided() -> bool:
        timelines = [(await loop.incident(number)).get("timeline", []) for number in (1, 2)]
        seen = {(entry["event"], entry["detail"].get("reason")) for entries in timelines for entry in entries}
        return {("decision", "target-busy"), ("command_ended", None)} <= seen

    await eventually(both_decided)
    assert spans.read_text().split() == ["begin", "end"]
    actions = (await loop.stack.get("remediator", "/api/v1/actions"))["actions"]
    assert {action["target"] for action in actions} == {f"command:sh -c '{script}'"}
    checked = await asyncio.to_thread(defib, loop, "check")
    assert (checked.returncode, checked.stderr.count("same target as")) == (0, 1)
