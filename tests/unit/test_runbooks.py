"""Runbooks: which hosts and alerts they are for, the gates of their actions, and what is stored of their commands."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from defib.host_setup.recorded import commands_of
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import HostAlert, Inventory, Remediation
from fleet.inventory.runbooks import HOST_ALERTS, OTHER_ALERTS, UNREACHABLE_ALERTS
from remediator.policy.approvals import describe_request
from remediator.policy.attempts import next_step
from remediator.policy.decisions import decide, explain
from remediator.policy.gates import GATES
from remediator.policy.situation import ActionHistory, ActionsInProgress, Observation, Situation
from tests.support import inventory_of, loaded, write

ROOT = Path(__file__).parents[2]
NOW = 1_000_000.0
SITUATION = Situation(NOW, frozenset({"HostDiskFull"}), ActionHistory(), ActionsInProgress(), None)
HOSTS = {
    "gpu-1": {"address": "10.0.0.1", "group": "gpu", "ssh": {"user": "u"}, "labels": {"disk": "nvme"}},
    "gpu-2": {"address": "10.0.0.2", "group": "gpu", "ssh": {"user": "u"}},
    "web-1": {"address": "10.0.0.3", "group": "web", "shell": "local"},
    "router": {"address": "10.0.0.4", "group": "net"},
}
RUNBOOKS: dict[str, Any] = {
    "prune": {"alerts": ["HostDiskFull", "HostInodesFull"], "hosts": {"group": "gpu"}, "run": ["prune"], "approve": False},
    "restart-nginx": {"alerts": ["HostDiskFull"], "own_alerts": ["NginxLeaks"], "run": ["restart", "nginx"], "attempts": 2},
}  # fmt: skip


def load(folder: Path, **runbooks: Any) -> LoadedInventory:
    return inventory_of(folder, {"hosts": HOSTS, "runbooks": runbooks or RUNBOOKS})


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    return load(tmp_path_factory.mktemp("config")).inventory


@pytest.fixture(scope="module")
def full(inventory: Inventory) -> HostAlert:
    return inventory.host_alerts["HostDiskFull@gpu-1"]


def test_each_alert_of_a_host_has_the_runbooks_that_name_both(inventory: Inventory) -> None:
    found = {name: [step.kind for step in each.remediation.steps or ()] for name, each in inventory.host_alerts.items()}
    assert found == {
        "HostDiskFull@gpu-1": ["runbook prune", "runbook restart-nginx"],
        "HostDiskFull@gpu-2": ["runbook prune", "runbook restart-nginx"],
        "HostDiskFull@web-1": ["runbook restart-nginx"],  # a host without a shell has none
        "HostInodesFull@gpu-1": ["runbook prune"],
        "HostInodesFull@gpu-2": ["runbook prune"],
        **{f"NginxLeaks@{host}": ["runbook restart-nginx"] for host in ("gpu-1", "gpu-2", "web-1")},
    }


@pytest.mark.parametrize(
    ("labels", "subject"),
    [
        ({"host": "gpu-1"}, "HostDiskFull@gpu-1"),
        ({"host": "gpu-1", "mountpoint": "/"}, "HostDiskFull@gpu-1"),
        ({"host": "router"}, None),
        ({"host": "gpu-1@x"}, None),
        ({}, None),
        ({"host": "gpu-1", "service": "gone"}, None),  # it is about a service
    ],
)
def test_an_alert_belongs_to_its_host(inventory: Inventory, labels: dict[str, str], subject: str | None) -> None:
    found = inventory.find_subject_of_alert("HostDiskFull", labels)
    assert (found.id if found is not None else None) == subject


@pytest.mark.parametrize(
    ("rules", "change", "verb", "reason"),
    [
        ({}, {}, "act", None),
        ({}, {"firing": frozenset()}, "nothing", None),
        ({}, {"in_progress": ActionsInProgress(target_busy=True)}, "wait", "target-busy"),
        ({}, {"host_down": True}, "wait", "host-down"),
        ({}, {"history": ActionHistory(blocked="host-key-changed")}, "refuse", "host-key-changed"),
        ({}, {"history": ActionHistory(blocked="sudo-refused")}, "refuse", "sudo-refused"),
        ({}, {"history": ActionHistory({"runbook prune": 1, "runbook restart-nginx": 2})}, "refuse", "attempts-used-up"),
        ({"automatic": False}, {}, "wait", "automation-off"),
        ({}, {"automation": False}, "wait", "automation-off"),
        ({}, {"maintenance": "host gpu-1, by ann: disks"}, "wait", "maintenance"),
        ({}, {"scheduled": "group gpu, 02:00 to 04:00"}, "wait", "maintenance"),
        ({}, {"silenced": "silenced by 1"}, "wait", "silenced"),
        ({}, {"gone": True}, "wait", "alert-gone"),
        ({}, {"history": ActionHistory(tries=1, last_ended=NOW - 59)}, "wait", "backing-off"),
        ({}, {"history": ActionHistory(tries=1, last_ended=NOW - 60)}, "act", None),
        ({}, {"storm": (6, 10)}, "wait", "storm"),
        ({}, {"history": ActionHistory({"runbook prune": 1})}, "wait", "approval"),
        ({}, {"history": ActionHistory({"runbook prune": 1}), "approved": True}, "act", None),
        ({}, {"in_progress": ActionsInProgress(on_host=1)}, "wait", "host-busy"),
        ({"actions_per_host": 2}, {"in_progress": ActionsInProgress(on_host=1)}, "act", None),
        ({}, {"in_progress": ActionsInProgress(in_flight=5)}, "wait", "fleet-busy"),
        ({}, {"in_progress": ActionsInProgress(in_budget_window=(NOW - 1,) * 20)}, "wait", "fleet-busy"),
        # What is about probes and targets does not hold a runbook.
        ({}, {"observed": Observation(up=True, success=True, reason=None, digest="other")}, "act", None),
        ({}, {"stopped": "by ann", "stopped_by_hand": "s", "healing": "h", "age": 1.0, "host_up_for": 1.0}, "act", None),
    ],
)  # fmt: skip
def test_the_gates_of_a_runbook(
    full: HostAlert, rules: dict[str, Any], change: dict[str, Any], verb: str, reason: str | None
) -> None:
    settings = Remediation.model_validate(rules).for_service(full)
    situation = replace(SITUATION, **change)
    decision = decide(full, settings, situation)
    assert (decision.verb, decision.reason) == (verb, reason)
    if verb in ("wait", "refuse"):
        closed = [each.name for each in explain(full, settings, situation) if each.closed is not None]
        assert closed[0] == reason


def test_runbooks_are_run_in_the_order_of_the_inventory(full: HostAlert) -> None:
    rules = Remediation().for_service(full)
    chosen = []
    attempts: dict[str, int] = {}
    while (step := next_step(full, rules, ActionHistory(attempts))) is not None:
        chosen.append((step.kind, step.needs_approval))
        attempts[step.kind] = attempts.get(step.kind, 0) + 1
    assert chosen == [("runbook prune", False), *[("runbook restart-nginx", True)] * 2]


def test_every_gate_of_a_runbook_is_one_of_a_service(full: HostAlert) -> None:
    names = [each.name for each in explain(full, Remediation().for_service(full), SITUATION)]
    assert names == [name for name in GATES if name in names]


def test_an_approval_is_of_one_command_on_one_host(inventory: Inventory, tmp_path: Path) -> None:
    other = load(tmp_path, prune=RUNBOOKS["prune"] | {"run": ["prune", "--all"]}).inventory

    def request(of: Inventory, subject: str) -> dict[str, Any]:
        alert = of.host_alerts[subject]
        return describe_request(alert, (alert.remediation.steps or [])[0])

    asked = request(inventory, "HostDiskFull@gpu-1")
    assert (asked["runbook"], asked["command"]) == ("prune", "prune")
    assert asked["digest"] != request(other, "HostDiskFull@gpu-1")["digest"]
    assert asked["digest"] != request(inventory, "HostDiskFull@gpu-2")["digest"]
    assert asked == request(inventory, "HostInodesFull@gpu-1")


def test_secrets_of_a_command_are_masked(tmp_path: Path) -> None:
    run = ["wipe", "--token=${WIPE_TOKEN}", "it's"]
    written = {"hosts": HOSTS, "runbooks": {"wipe": {"alerts": ["HostDiskFull"], "run": run}}}
    write(tmp_path, a=yaml.safe_dump(written))
    found = loaded(tmp_path, environ={"WIPE_TOKEN": "s3cr3t-of-the-command"}).inventory
    assert found.runbooks["wipe"].run[1] == "--token=s3cr3t-of-the-command"
    alert = found.host_alerts["HostDiskFull@gpu-1"]
    assert "s3cr3t" not in str(describe_request(alert, (alert.remediation.steps or [])[0]))
    assert found.runbooks["wipe"].command.endswith("""'it'"'"'s'""")


def test_a_host_s_setup_permits_its_runbooks(inventory: Inventory) -> None:
    def of(host: str) -> list[tuple[str, ...]]:
        return [argv for argv, _ in commands_of(inventory, inventory.hosts[host])]

    assert of("gpu-1") == [("prune",), ("restart", "nginx")]
    assert of("web-1") == [("restart", "nginx")]


def test_the_known_alerts_are_those_of_the_rules() -> None:
    def names(*files: str) -> set[str]:
        groups = [
            group for file in files for group in yaml.safe_load(Path(ROOT, "alerts/rules", file).read_text())["groups"]
        ]
        return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}

    of_hosts = ("hosts.yml", "gpus.yml")
    others = [path.name for path in (ROOT / "alerts" / "rules").iterdir() if path.name not in of_hosts]
    assert names(*of_hosts) == HOST_ALERTS | UNREACHABLE_ALERTS
    assert names(*others) == OTHER_ALERTS
