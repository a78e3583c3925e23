"""A power cut of 30 hosts with 10 services each, simulated on a real record: messages, restarts and time to recover."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from remediator.clients.alerts import Alert
from remediator.incidents import actions, decisions, intake, lifecycle
from remediator.incidents.actions import Claim, Ending, Evidence
from remediator.notifications.outbox import Batch
from remediator.policy.decisions import decide
from remediator.policy.situation import ActionHistory, ActionsInProgress, Observation, Situation
from remediator.policy.storm import can_step, is_storm
from remediator.record.events import StateChange, store_copied
from remediator.record.situations import add_recorded_facts, expected_failures
from remediator.record.transaction import Transaction
from tests.integration.test_outbox import OutboxHarness
from tests.integration.test_person_needed import EN
from tests.support import ClockedHarness, inventory_of

HOSTS, SERVICES = 30, 10
TICK = 15.0  # seconds
DECIDE_EVERY = 2  # ticks
BACK_FROM, BACK_FOR = 300.0, 300.0  # seconds after the cut in which the hosts return, one after the other
BOOTS_FOR = 75.0  # seconds from a host's return until its services are up
BROKEN = 3  # every so many hosts have one service that does not come up without a restart
PROBED_AFTER, FIRES_AFTER, HOST_DOWN_AFTER = 10.0, 30.0, 120.0
RESTART_TAKES, HOLD = 15.0, 60.0


def written() -> dict[str, object]:
    probe, control = {"command": {"run": ["true"]}}, {"command": {"restart": ["true"]}}
    names = [(f"h{h:02}", f"h{h:02}-s{s}") for h in range(HOSTS) for s in range(SERVICES)]
    return {
        "hosts": {f"h{h:02}": {"address": "h", "shell": "local", "group": "rack"} for h in range(HOSTS)},
        "services": {
            name: {"host": host, "probe": probe, "control": control, "on_failure": "restart"} for host, name in names
        },
        "notify": {
            "language": "en",
            "channels": {"ops": {"feishu": {"webhook": "http://f/ops"}}},
            "routes": [{"channels": ["ops"]}],
        },
    }


@dataclass
class SimulatedService:
    """A service of the fleet; times are seconds since the cut."""

    host: str
    starts_at: float | None  # None: only a restart brings it up
    up_at: float | None = None
    incident: int = 0
    firing: bool = False
    action: Claim | None = None
    command_ends: float = 0.0


class PowerCut(OutboxHarness):
    """The fleet, its alerts, and an engine that decides every 30 s; messages are read as they are sent."""

    def __init__(self, folder: Path) -> None:
        ClockedHarness.__init__(self, folder, inventory_of(folder, written()).inventory)
        self.messages = 0
        self.began = self.now
        self.titles: list[tuple[float, str]] = []
        self.restarts: list[tuple[float, str]] = []
        self.back_at = {f"h{h:02}": BACK_FROM + BACK_FOR * h / (HOSTS - 1) for h in range(HOSTS)}
        self.fleet: dict[str, SimulatedService] = {}
        for number, (name, service) in enumerate(self.inventory.services.items()):
            is_broken = number % (SERVICES * BROKEN) == 0
            starts_at = None if is_broken else self.back_at[service.host] + BOOTS_FOR
            self.fleet[name] = SimulatedService(service.host, starts_at)

    @property
    def passed(self) -> float:
        return self.now - self.began

    def observe(self, each: SimulatedService) -> Observation:
        if each.up_at is not None:
            return Observation(up=True, success=True, reason=None, unchanged_for=self.passed - each.up_at, host_up=True)
        if self.passed < self.back_at[each.host]:
            return Observation(up=False, success=False, reason="timeout", message="no answer", host_up=False)
        return Observation(up=False, success=False, reason="connect", message="x: Connection refused", host_up=True)

    def tick(self, tx: Transaction, *, decides: bool) -> None:
        """Let everything happen that happens within a tick, in one transaction."""
        for name, each in self.fleet.items():
            if each.up_at is None and each.starts_at is not None and self.passed >= each.starts_at:
                each.up_at = each.starts_at
            self.send_alert(tx, name, each)
            self.continue_action(tx, each)
        for host, back in self.back_at.items():
            self.send_host_alert(tx, host, back)
        if decides:
            self.decide_all(tx)

    def send_alert(self, tx: Transaction, name: str, each: SimulatedService) -> None:
        is_down = each.up_at is None and self.passed >= FIRES_AFTER
        if is_down is not each.firing and (is_down or self.passed >= (each.up_at or 0.0) + PROBED_AFTER):
            each.firing = is_down
            intake.receive_alerts(tx, [alert_of("ServiceDown", is_firing=is_down, service=name, host=each.host)])
            each.incident = lifecycle.find_open(tx, name) or each.incident

    def send_host_alert(self, tx: Transaction, host: str, back: float) -> None:
        for at, is_firing in ((HOST_DOWN_AFTER, True), (back + PROBED_AFTER, False)):
            if at <= self.passed < at + TICK:
                change = StateChange(tx.now, "host", host, host, "down" if is_firing else "up", "")
                store_copied(tx, [change], cursor="c", asked_at=tx.now, gap=False)
                intake.receive_alerts(tx, [alert_of("HostDown", is_firing=is_firing, host=host)])

    def continue_action(self, tx: Transaction, each: SimulatedService) -> None:
        action = each.action
        if action is None:
            return
        if action.command is None:
            each.action = actions.record_command_end(tx, action, "succeeded", 0, "", "", at=tx.now)
        elif each.up_at is None and self.passed >= each.command_ends + RESTART_TAKES:
            each.up_at = self.passed
            actions.record_up(tx, action, at=tx.now)
        elif each.up_at is not None and self.passed >= each.up_at + HOLD:
            actions.end_action(tx, action, Ending("succeeded", recovered=True))
            each.action = None

    def decide_all(self, tx: Transaction) -> None:
        rules = self.inventory.remediation
        observed = {name: self.observe(each) for name, each in self.fleet.items()}
        down = [name for name, each in observed.items() if not each.up]
        expected = expected_failures(tx, down)
        failing = [name for name in down if name not in expected]
        explained = {name for name in failing if observed[name].is_refused}
        total = len(self.fleet)
        for name, each in self.fleet.items():
            if not each.incident or each.action is not None:
                continue
            is_in_storm = is_storm(rules, len(failing), total)
            situation = Situation(
                tx.now, frozenset(), ActionHistory(), ActionsInProgress(), observed[name],
                storm=(len(failing), total) if is_in_storm else None,
                storm_steps=is_in_storm and can_step(rules, name, failing, explained, total),
            )  # fmt: skip
            self.decide_about(tx, name, each, add_recorded_facts(tx, each.incident, name, situation))

    def decide_about(self, tx: Transaction, name: str, each: SimulatedService, situation: Situation) -> None:
        service, rules = self.inventory.services[name], self.inventory.remediation
        decision = decide(service, rules, situation)
        if decision.verb == "act":
            claimed = actions.claim_action(tx, each.incident, service, situation, probed_at=tx.now, evidence=Evidence())
            if isinstance(claimed, Claim):
                self.restarts.append((self.passed, name))
                each.action, each.command_ends = claimed, self.passed
                each.starts_at = None
        elif decision.verb != "nothing":
            decisions.record_decision(tx, each.incident, decision, situation.observed)
        elif each.up_at is not None and self.passed >= each.up_at + HOLD:
            up_for = self.passed - each.up_at
            lifecycle.close(tx, each.incident, "recovered", rules.alerts, up_for)
            each.incident = 0

    async def send_due(self) -> None:
        while isinstance(batch := await self.choose("ops"), Batch):
            _, contents = await self.send("ops")
            title = await asyncio.to_thread(EN.render_title, contents, batch.form)
            self.titles.append((self.passed, title))


def alert_of(name: str, *, is_firing: bool, **labels: str) -> Alert:
    fingerprint = "-".join([name, *labels.values()])
    labels = {"alertname": name, "severity": "critical", **labels}
    return Alert(fingerprint, "1", "", "firing" if is_firing else "resolved", labels, {"summary": "x"})


@pytest.fixture
async def cut(tmp_path: Path) -> AsyncIterator[PowerCut]:
    made = await asyncio.to_thread(PowerCut, tmp_path)
    yield made
    await asyncio.to_thread(made.database.close)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_a_power_cut_is_told_in_ten_messages_and_repaired_in_small_steps(cut: PowerCut) -> None:
    last_host_back = BACK_FROM + BACK_FOR
    number = 0
    while cut.passed < last_host_back + 1500 and (cut.passed < 60 or any(each.incident for each in cut.fleet.values())):
        await cut.database.write(cut.tick, decides=number % DECIDE_EVERY == 0)
        await cut.send_due()
        cut.now += TICK
        number += 1
    up_at = [each.up_at for each in cut.fleet.values()]
    assert None not in up_at
    assert max(at for at in up_at if at is not None) <= last_host_back + 600
    broken = {name for number, name in enumerate(cut.fleet) if number % (SERVICES * BROKEN) == 0}
    assert {name for _, name in cut.restarts} == broken  # nothing that was still booting
    assert len(cut.restarts) == len(broken)
    await cut.send_due()
    for _ in range(40):  # the last digest is due within its interval
        cut.now += TICK
        await cut.send_due()
    assert len(cut.titles) <= 10, cut.titles
    assert cut.titles[0][0] <= FIRES_AFTER + TICK
    assert cut.titles[0][1] == "300 services are down"
    assert any(re.fullmatch(r"\d+ of 300 recovered, still down: \d+", title) for _, title in cut.titles)
    assert cut.titles[-1][1] == "300 of 300 recovered, still down: 0"
