"""A target that cannot come up is recognised from its host, and does not hold the others of its host."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from remediator.execution.controls import CONTROLS
from remediator.incidents import actions, decisions
from remediator.incidents.actions import Claim
from remediator.policy.crash_loop import is_crash_loop
from remediator.policy.decisions import find_closed_gate
from remediator.policy.gates import GATES
from remediator.policy.situation import ActionHistory, ActionsInProgress, Decision, Observation, Situation
from remediator.record.situations import read_actions_in_progress
from tests.integration.conftest import start_supervisord
from tests.integration.loop import Loop
from tests.integration.test_outbox import OutboxHarness
from tests.integration.test_person_needed import OPS, outbox_of
from tests.support import eventually, inventory_of

NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("kind", "output", "exited"),
    [
        ("supervisor", "web: ERROR (not running)\nweb: ERROR (spawn error)", True),
        ("supervisor", "web: ERROR (abnormal termination)", True),
        ("supervisor", "web: ERROR (no such process)", False),
        ("systemd", "Job for web.service failed because the control process exited with error code.\nSee …", True),
        ("systemd", "Job for web.service failed because a timeout was exceeded.", False),
    ],
)
def test_a_restart_whose_target_exits_while_it_starts_is_a_crash(kind: str, output: str, exited: bool) -> None:
    assert (re.search(CONTROLS[kind].exited_at_start, output, re.MULTILINE) is not None) == exited


def test_a_target_is_in_a_crash_loop_if_its_host_restarted_it_again_meanwhile() -> None:
    assert not is_crash_loop(7, 7)  # these may be of a year
    assert not is_crash_loop(0, 2)
    assert is_crash_loop(5, 6)


@pytest.mark.parametrize(
    ("in_progress", "gate"),
    [
        (ActionsInProgress(on_host=1), "host-busy"),
        (ActionsInProgress(on_host=0, ahead_on_host=1), "host-busy"),
        (ActionsInProgress(in_flight=4, ahead_in_fleet=1), "fleet-busy"),
        (ActionsInProgress(in_flight=3, ahead_in_fleet=1), None),
        (ActionsInProgress(in_budget_window=(NOW,) * 18, ahead_in_fleet=2), "fleet-busy"),
        (ActionsInProgress(in_budget_window=(NOW,) * 17, ahead_in_fleet=2), None),
    ],
)
def test_services_with_fewer_tries_go_first(tmp_path: Path, in_progress: ActionsInProgress, gate: str | None) -> None:
    control = {"command": {"restart": ["true"]}}
    written = {
        "hosts": {"h": {"address": "h", "shell": "local"}},
        "services": {"web": {"host": "h", "probe": {"tcp": {"address": "h:1"}}, "control": control}},
    }
    inventory = inventory_of(tmp_path, written).inventory
    service, rules = inventory.services["web"], inventory.remediation
    observed = Observation(up=False, success=False, reason="timeout")
    situation = Situation(NOW, frozenset({"ServiceDown"}), ActionHistory(), in_progress, observed)
    closed = [name for name, check in GATES.items() if name.endswith("-busy") and check(service, rules, situation)]
    assert closed == ([] if gate is None else [gate])
    # A person does not queue behind automatic actions.
    by_person = find_closed_gate(service, rules, situation, ())
    assert (by_person is None) is (in_progress.on_host == 0)


async def test_only_those_with_fewer_tries_that_wait_for_the_same_limit_are_ahead(tmp_path: Path) -> None:
    async with outbox_of(tmp_path, OPS) as harness:
        for service in ("web", "db", "s0"):
            await harness.fire(service)
        await harness.run(decisions.record_decision, 2, Decision("wait", "host-busy"))
        await harness.run(decisions.record_decision, 3, Decision("wait", "fleet-busy"))
        host = harness.inventory.services["db"].host

        async def ahead(tries: int, service: str = "web") -> tuple[int, int]:
            found = await harness.run(read_actions_in_progress, service, host, "", tries)
            return found.ahead_on_host, found.ahead_in_fleet

        assert await ahead(0) == (0, 0)
        assert await ahead(2) == (1, 1)
        assert await ahead(2, "db") == (0, 1)
        await end_attempt(harness, 2)
        await harness.run(decisions.record_decision, 2, Decision("wait", "host-busy"))
        assert await ahead(1) == (0, 1)


async def end_attempt(harness: OutboxHarness, incident: int) -> None:
    await harness.act(incident, service="db", state="failed", ended_at=harness.now)


async def test_an_action_that_is_verified_does_not_hold_its_host(tmp_path: Path) -> None:
    async with outbox_of(tmp_path, OPS) as harness:
        await harness.fire("web")
        host = harness.inventory.services["web"].host
        await harness.act(1, host=host)
        assert (await harness.run(read_actions_in_progress, "db", host)).on_host == 1
        claim = Claim(1, 1, "web", host, "restart", harness.now)
        await harness.run(actions.record_command_end, claim, "succeeded", 0, "", "", at=harness.now)
        assert (await harness.run(read_actions_in_progress, "db", host)).on_host == 0
        assert (await harness.run(read_actions_in_progress, "web", host)).target_busy


@pytest.mark.needs("sshd")
async def test_a_hopeless_neighbour_does_not_block_its_host(loop: Loop) -> None:
    hopeless = loop.service("hopeless", restart="true")
    hopeless["control"]["start_within"] = "10m"
    await loop.start({"hopeless": hopeless, "web": loop.service("web")})
    for service in ("hopeless", "web"):
        await loop.kill(service)
    await loop.fire("hopeless")
    await loop.until_event("command_ended")
    await loop.fire("web")
    await resolve(loop, "web")
    await loop.until("recovered", 2)
    assert (await loop.incident(1))["actions"][0]["state"] == "running"


async def resolve(loop: Loop, service: str) -> None:
    """Resolve the alert of a service after its restart has succeeded."""

    async def ended() -> Any:
        actions_of = (await loop.incident(2)).get("actions", [])
        return [each for each in actions_of if each["state"] == "succeeded"]

    await eventually(ended)
    await loop.fire(service, status="resolved")


async def start_with_program(loop: Loop, launcher: Launcher, folder: Path, program: str) -> Path:
    """Start with a service that is down and has this program of supervisor; returns supervisor's configuration."""
    config = await start_supervisord(launcher, folder, program)
    control = {"supervisor": {"program": "web", "config": str(config)}, "timeout": "10s", "start_within": "10m"}
    await loop.start({"web": loop.service("web") | {"control": control}})
    await loop.kill("web")
    return config


PROGRAM = "[program:web]\ncommand=sh -c 'exit 3'\nautostart=false\nautorestart=false\nstartsecs=0\n"


@pytest.mark.needs("sshd")
async def test_a_target_that_exits_at_once_fails_at_once_and_a_person_is_needed(
    loop: Loop, launcher: Launcher, tmp_path: Path
) -> None:
    await start_with_program(loop, launcher, tmp_path, PROGRAM)
    await loop.fire("web")
    needed = await loop.until_event("person_needed")  # long before `start_within`
    assert needed["detail"]["reason"] == "crash-loop"
    ended = await loop.until_event("action_ended", state="failed")
    # supervisorctl itself reports the exit if it comes before the program counts as started.
    assert re.match(r"it exited within|supervisor restart exited 7$", ended["detail"]["why"])

    async def told() -> Any:
        return [card for card in loop.feishu.received if card.title.startswith("A person is needed: web")]

    (card, *_) = await eventually(told) or [None]
    assert card is not None
    assert "it exits within seconds after each start" in card.text


SLOW_START = "[program:web]\ncommand=sh -c 'sleep 20; exit 3'\nautostart=false\nautorestart=false\nstartsecs=60\nstartretries=0\n"


@pytest.mark.needs("sshd")
async def test_a_target_whose_start_has_failed_is_restarted_without_further_waiting(
    loop: Loop, launcher: Launcher, tmp_path: Path
) -> None:
    config = await start_with_program(loop, launcher, tmp_path, SLOW_START)
    supervisorctl = str(Path(sys.executable).with_name("supervisorctl"))
    await launcher.start([supervisorctl, "-c", str(config), "start", "web"], tmp_path / "ctl.log")  # waits for it

    async def is_starting() -> bool:
        argv = [supervisorctl, "-c", str(config), "status", "web"]
        return "STARTING" in (await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True)).stdout

    await eventually(is_starting)
    await loop.fire("web")
    await loop.until_decision("wait", "healing-itself")
    await loop.until_event("action_started")
