"""Storms: what counts, what is repaired in small steps, and how a person lets automation continue."""

import asyncio
import itertools
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet.inventory.model import Remediation, Service
from remediator.incidents import decisions
from remediator.policy.decisions import decide
from remediator.policy.situation import ActionHistory, ActionsInProgress, Decision, Observation, Situation
from remediator.policy.storm import can_step, step_size
from remediator.record import storms
from remediator.record.situations import add_recorded_facts, expected_failures
from tests.integration.loop import Loop
from tests.integration.test_person_needed import OPS, ZH, outbox_of, read
from tests.integration.test_safety import defib
from tests.support import eventually, inventory_of

NOW = 1_000_000.0
REFUSED = Observation(up=False, success=False, reason="connect", message="cannot connect to h:1: Connection refused")
HELD = Situation(NOW, frozenset({"ServiceDown"}), ActionHistory(), ActionsInProgress(), REFUSED, storm=(4, 6))
RULES = Remediation()


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Service:
    control = {"command": {"restart": ["true"]}}
    service = {"host": "h", "probe": {"tcp": {"address": "h:1"}}, "control": control, "on_failure": "restart"}
    written = {"hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"web": service}}
    return inventory_of(tmp_path_factory.mktemp("config"), written).inventory.services["web"]


@pytest.mark.parametrize(
    ("service", "failing", "explained", "steps"),
    [
        ("a", "abcd", "", False),
        ("a", "abcd", "a", True),  # its host says what is wrong
        ("b", "abcd", "a", True),  # the other three of six are no storm
        ("e", "abcde", "a", False),  # the other four are
    ],
)
def test_what_a_host_explains_is_no_fault_of_the_network(
    service: str, failing: str, explained: str, steps: bool
) -> None:
    assert can_step(RULES, service, failing, explained, 6) is steps


def test_a_refused_connection_is_told_from_one_that_finds_no_host() -> None:
    assert REFUSED.is_refused
    assert not replace(REFUSED, message="cannot connect to h:1: No route to host").is_refused
    assert not replace(REFUSED, reason="timeout").is_refused


def test_steps_are_a_tenth_of_the_group_and_one_at_least() -> None:
    assert [step_size(total) for total in (1, 6, 30, 300)] == [1, 1, 3, 30]


def test_a_storm_that_is_no_fault_of_the_network_is_repaired_in_steps(web: Service) -> None:
    assert decide(web, RULES, HELD).reason == "storm"
    stepping = replace(HELD, storm_steps=True)
    assert decide(web, RULES, stepping).verb == "act"
    busy = replace(stepping, in_progress=ActionsInProgress(in_group=1))
    decision = decide(web, RULES, busy)
    assert (decision.reason, "one after the other" in decision.detail) == ("storm", True)


@pytest.mark.parametrize(
    ("up_for", "since", "reason"),
    [(5.0, None, "starting"), (179.0, None, "starting"), (181.0, None, None), (0.0, 181.0, None)],
)
def test_what_is_still_booting_is_not_restarted(
    web: Service, up_for: float, since: float | None, reason: str | None
) -> None:
    history = ActionHistory(starting_since=None if since is None else NOW - since)
    situation = replace(HELD, storm=None, host_up_for=up_for, history=history)
    decision = decide(web, RULES, situation)
    assert (decision.reason, decision.verb) == ((reason, "wait") if reason else (None, "act"))


async def test_silenced_and_given_up_services_are_no_sign_of_a_storm(tmp_path: Path) -> None:
    async with outbox_of(tmp_path, OPS) as harness:
        reasons: list[tuple[Any, Any]] = [
            ("wait", "silenced"), ("refuse", "attempts-used-up"), ("refuse", "host-key-changed"), ("wait", "storm"),
        ]  # fmt: skip
        for number, (verb, reason) in enumerate(reasons):
            await harness.fire(f"s{number}")
            await harness.decide(number + 1, verb, reason)
        names = [f"s{number}" for number in range(4)]
        assert await harness.run(expected_failures, names) == {"s0", "s1", "s2"}


async def test_a_storm_is_notified_at_once_and_once_for_its_group(tmp_path: Path) -> None:
    async with outbox_of(tmp_path, OPS) as harness:
        await harness.fire("web")
        await harness.fire("db")
        why = "4 of 6 services in its group are failing"
        for incident in (1, 2, 1):
            await harness.run(decisions.record_decision, incident, Decision("wait", "storm", detail=why))
            await harness.run(decisions.notify_storm, incident, "gpu", why)
            harness.now += 30
        cards = [contents[0] for _, contents in await harness.all_sent("ops")]
        (card,) = (each for each in cards if each.state == "storm")
        english, chinese = await read(card), await read(card, ZH)
        assert english.startswith("Too many services fail at once: web\n")
        assert f"Reason: {why}" in english
        assert "To restart nevertheless: defib storm continue web" in english
        assert "Host group: gpu" in english
        assert "所在组 6 个服务中有 4 个故障" in chinese
        assert card.buttons["storm"]["incident"] == 1
        harness.now += storms.OVER_AFTER  # the next storm is another one
        assert await harness.run(decisions.notify_storm, 2, "gpu", why)


async def test_a_person_lets_automation_continue_in_the_storm_of_one_group(tmp_path: Path) -> None:
    async with outbox_of(tmp_path, OPS) as harness:
        await harness.fire("web")
        host = harness.inventory.host_of(harness.inventory.services["web"])
        assert host is not None
        await harness.run(storms.overrule, "other", harness.now + 60, "ann", "")
        assert (await harness.run(add_recorded_facts, 1, "web", HELD)).storm == (4, 6)
        await harness.run(storms.overrule, host.group, harness.now + 60, "ann", "a test")
        assert (await harness.run(add_recorded_facts, 1, "web", HELD)).storm is None
        harness.now += 61
        assert (await harness.run(add_recorded_facts, 1, "web", HELD)).storm == (4, 6)


@pytest.mark.needs("sshd")
async def test_a_storm_waits_until_a_person_lets_automation_continue(loop: Loop) -> None:
    names = [f"s{number}" for number in range(4)]
    await loop.start({name: loop.service(name) for name in names})
    for name in names[:3]:
        await loop.kill(name)
    await loop.fire("s0")
    await loop.until_decision("wait", "storm")

    async def told() -> Any:
        return [card for card in loop.feishu.received if card.title == "Too many services fail at once: s0"]

    (card,) = await eventually(told) or []
    assert "3 of 4 services in its group are failing" in card.text
    assert loop.restarts() == []
    done = await asyncio.to_thread(defib, loop, "--json", "storm", "continue", "s0", "--reason", "the network works")
    assert json.loads(done.stdout)["group"] == ""
    await eventually(loop.begun)
    assert loop.restarts() == ["s0"]


@pytest.mark.needs("sshd")
async def test_services_that_refuse_connections_are_restarted_one_after_the_other(loop: Loop) -> None:
    """Four of six services are a storm, but their host responds."""
    services, listeners = {}, []
    for number in range(6):
        listener = socket.create_server(("127.0.0.1", 0))
        probe = {"tcp": {"address": f"127.0.0.1:{listener.getsockname()[1]}"}, "every": "200ms", "retry_every": "200ms"}
        services[f"s{number}"] = loop.service(f"s{number}") | {"probe": probe}
        listeners.append(listener)
    await loop.start(services, attempts=1)
    for listener in listeners[:4]:
        listener.close()

    async def are_down() -> bool:
        found = [await loop.stack.get("exporter", f"/api/v1/services/s{number}") for number in range(4)]
        return all(each is not None and each["up"] is False for each in found)

    await eventually(are_down)
    for number in range(4):
        await loop.fire(f"s{number}")

    async def all_restarted() -> bool:
        return len(loop.restarts()) == 4

    await eventually(all_restarted)
    for listener in listeners[4:]:
        listener.close()
    taken = [(await loop.incident(number))["actions"][0] for number in range(1, 5)]
    spans = sorted((each["claimed_at"], each["ended_at"] or each["claimed_at"]) for each in taken)
    assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(spans))
