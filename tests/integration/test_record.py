"""The record after webhooks, reconciliation and actions, in a real SQLite file with a manual clock."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import Inventory
from remediator.app import Parts
from remediator.clients.alerts import Alert
from remediator.clients.exporter import Exporter
from remediator.execution import executor
from remediator.incidents import actions, decisions, intake, lifecycle, reconciliation
from remediator.metrics import RemediatorMetrics
from remediator.policy.situation import ActionHistory, ActionsInProgress, Decision, Observation, Situation
from remediator.record import situations, stops, timestamps
from remediator.record.notifications import update_cards
from remediator.record.schema import notifications
from remediator.record.transaction import Transaction
from runtime.redaction import Redactor
from runtime.tokens import ConfiguredToken
from runtime.webconfig import WebConfigFile
from tests.support import ClockedHarness, eventually, inventory_of

DOWN = Observation(up=False, success=False, reason="connect")


def configuration_of(*services: str) -> dict[str, Any]:
    probe = {"command": {"run": ["true"]}}
    return {
        "hosts": {"h": {"address": "h", "shell": "local"}},
        "services": {
            name: {
                "host": "h",
                "probe": probe,
                "control": {"command": {"restart": ["true", name]}},
                "on_failure": "restart",
            }
            for name in services
        },
        "notify": {"channels": {"ops": {"feishu": {"webhook": "http://f/"}}}, "routes": [{"channels": ["ops"]}]},
    }


class Record(ClockedHarness):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(folder, inventory_of(folder / "config", configuration_of("web", "db")).inventory, at=1000.0)

    async def deliver(self, *alerts: Alert) -> None:
        self.now += 1
        await self.database.write(intake.receive_alerts, alerts)

    async def reconcile(self, active: set[str], listed: set[str] | None = None) -> int:
        self.now += 100
        return await self.database.write(reconciliation.reconcile, active, active | (listed or set()), self.now - 10)

    async def open(self) -> list[tuple[int, str]]:
        return [(number, service) for service, number in (await self.database.write(lifecycle.open_incidents)).items()]

    async def notified(self) -> list[str]:
        def kinds(tx: Transaction) -> list[str]:
            return list(tx.scalars(select(notifications.c.kind).order_by(notifications.c.id)))

        return await self.database.write(kinds)

    async def close(self, incident: int) -> bool:
        self.now += 1
        closed = await self.database.write(lifecycle.close, incident, "recovered", ["ServiceDown"])
        return closed is not None

    async def claim(self, before: ActionHistory | None = None, **changed: Any) -> actions.Claim | str:
        past = await self.database.write(situations.read_action_history, "web", 1, 3600.0) if before is None else before
        situation = Situation(self.now, frozenset({"ServiceDown"}), past, ActionsInProgress(), DOWN)
        service = self.inventory.services["web"]
        return await self.database.write(
            actions.claim_action, 1, service, replace(situation, **changed),
            probed_at=self.now, evidence=actions.Evidence(),
        )  # fmt: skip

    async def claim_for_operator(self, service: str, *overruled: str, **changed: Any) -> actions.Claim | Decision:
        situation = replace(Situation(self.now, frozenset(), ActionHistory(), ActionsInProgress(), DOWN), **changed)
        return await self.database.write(
            actions.claim_operator_action, self.inventory.services[service], "restart", situation,
            overruled=overruled, by="ann", evidence=actions.Evidence(),
        )  # fmt: skip

    async def end(self, action: actions.Claim) -> None:
        await self.database.write(actions.end_action, action, actions.Ending("failed"))


def alert(name: str = "ServiceDown", service: str = "web", status: Any = "firing", starts: str = "1") -> Alert:
    labels = {"alertname": name, "service": service, "severity": "critical"}
    return Alert(f"{name}-{service}", starts, "", status, labels, {})


@pytest.fixture
async def record(tmp_path: Path) -> AsyncIterator[Record]:
    new = await asyncio.to_thread(Record, tmp_path)
    yield new
    await asyncio.to_thread(new.database.close)


def _store(tx: Transaction, name: timestamps.TimestampName, *, fail: bool = False) -> str:
    timestamps.put(tx, name, tx.now)
    if fail:
        raise ValueError(name)
    return name


async def test_work_that_fails_changes_nothing_and_fails_alone(record: Record) -> None:
    write, read = record.database.write_with_priority, record.database.read
    first, failed, last = await asyncio.gather(
        write(_store, "watchdog"),
        write(_store, "automation", fail=True),
        write(_store, "receivers"),
        return_exceptions=True,
    )
    assert (first, str(failed), last) == ("watchdog", "automation", "receivers")
    stored = [await read(timestamps.get, name) for name in ("watchdog", "automation", "receivers")]
    assert [each is not None for each in stored] == [True, False, True]


async def test_work_that_has_not_begun_is_dropped_with_its_caller(record: Record) -> None:
    calls = [asyncio.create_task(record.database.write(_store, name)) for name in ("watchdog", "automation")]
    await asyncio.sleep(0)  # both have begun to wait
    calls[0].cancel()
    assert await calls[1] == "automation"
    assert await record.database.read(timestamps.get, "watchdog") is None


async def test_an_alert_that_is_not_listed_is_resolved_and_fires_again_when_it_is_listed(record: Record) -> None:
    await record.deliver(alert())
    assert await record.reconcile({"ServiceDown-web"}) == 0
    assert await record.reconcile(set(), {"ServiceDown-web"}) == 0  # silenced, but there
    assert await record.reconcile(set()) == 1
    assert await record.close(1)
    await record.deliver(alert())
    assert await record.open() == [(2, "web")]
    assert await record.notified() == ["down", "recovered", "down"]


async def test_many_alerts_are_reconciled_in_several_transactions(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciliation, "CHANGED_TOGETHER", 2)
    await record.deliver(*(alert(f"Other{number}") for number in range(5)))
    assert [await record.reconcile(set(), set()) for _ in range(4)] == [2, 2, 1, 0]
    firing = {f"Other{number}-web" for number in range(5)}
    record.now += 1000
    assert [await record.reconcile(firing, firing) for _ in range(4)] == [2, 2, 1, 0]


@pytest.mark.parametrize("subject", ["incident", "alert"])
async def test_cards_are_found_by_what_they_are_about(record: Record, subject: str) -> None:
    """Not among all notifications that were ever sent, of which there may be many thousands."""
    seen: list[str] = []

    def explain(tx: Transaction) -> None:
        def execute(statement: Any, values: Any) -> Any:
            compiled = statement.compile(dialect=tx.connection.dialect)
            given = tuple({**compiled.params, **values}[name] for name in compiled.positiontup)
            plan = tx.connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}", given)
            seen.extend(row.detail for row in plan)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Transaction, "execute", lambda _tx, statement, values: execute(statement, values))
            timeline_of: dict[str, Any] = {subject: 1}
            update_cards(tx, **timeline_of)

    await record.database.write(explain)
    assert seen
    assert not [detail for detail in seen if "notifications_to_send" in detail or detail.startswith("SCAN")], seen


async def test_a_resolved_alert_that_is_active_fires_again(record: Record) -> None:
    """If Prometheus could not reach Alertmanager for a while, the alert has the same startsAt afterwards."""
    await record.deliver(alert())
    await record.deliver(alert(status="resolved"))
    assert await record.close(1)
    await record.deliver(alert())
    assert await record.open() == []  # it may be a late copy
    assert await record.reconcile({"ServiceDown-web"}) == 1
    assert await record.open() == [(2, "web")]


async def test_an_alert_that_was_just_received_is_newer_than_the_list(record: Record) -> None:
    await record.deliver(alert())
    changed = await record.database.write(reconciliation.reconcile, set(), set(), record.now - 10)
    assert changed == 0


async def test_a_notify_only_alert_is_notified_again_when_it_fires_again(record: Record) -> None:
    await record.deliver(alert("DiskFull", ""))
    await record.reconcile(set())
    await record.deliver(alert("DiskFull", ""))
    assert await record.notified() == ["alert", "alert_over", "alert"]


async def test_a_service_added_to_the_inventory_gets_an_incident_with_the_next_webhook(record: Record) -> None:
    await record.deliver(alert(service="new"))
    assert await record.open() == []
    record.inventory = (
        await asyncio.to_thread(inventory_of, record.folder / "config", configuration_of("web", "new"))
    ).inventory
    await record.deliver(alert(service="new"))
    assert await record.open() == [(1, "new")]
    assert await record.notified() == ["alert", "down"]


async def test_an_alert_that_keeps_firing_does_not_hide_outages(record: Record) -> None:
    """CertificateExpiring fires for weeks, during two outages."""
    await record.deliver(alert("CertificateExpiring"))
    for starts in ("1", "2"):
        await record.deliver(alert(starts=starts))
        await record.deliver(alert(status="resolved", starts=starts))
        ((incident, _),) = await record.open()
        assert await record.close(incident)
    assert await record.open() == [(3, "web")]
    assert await record.notified() == ["alert", "down", "recovered", "down", "recovered"]


async def test_an_incident_with_a_firing_alert_or_a_running_action_is_not_closed(record: Record) -> None:
    await record.deliver(alert())
    assert not await record.close(1)
    claimed = await record.claim()
    assert isinstance(claimed, actions.Claim)
    await record.deliver(alert(status="resolved"))
    assert not await record.close(1)
    await record.end(claimed)
    assert await record.close(1)


async def test_a_claim_needs_a_failed_probe_newer_than_the_last_action(record: Record) -> None:
    await record.deliver(alert())
    first = await record.claim()
    assert isinstance(first, actions.Claim)
    assert await record.claim() == "target-busy"
    record.now += 5
    await record.end(first)
    record.now += 1000
    assert await record.claim(ActionHistory()) == "another action ran since the probe"
    assert await record.claim(observed=replace(DOWN, success=True, up=True)) == "already-up"
    assert isinstance(await record.claim(), actions.Claim)


async def test_locks_and_gates_that_were_not_overruled_hold_an_operator_s_action(record: Record) -> None:
    held = await record.claim_for_operator("web", storm=(3, 4))
    assert isinstance(held, Decision)
    assert (held.reason, held.detail) == ("storm", "3 of 4 services in its group are failing")
    assert isinstance(await record.claim_for_operator("web", "storm", storm=(3, 4)), actions.Claim)
    for service, lock in (("web", "target-busy"), ("db", "host-busy")):
        held = await record.claim_for_operator(service, "storm", lock)
        assert isinstance(held, Decision)
        assert held.reason == lock


async def test_a_command_ended_when_it_ended_not_when_that_was_stored(record: Record) -> None:
    await record.deliver(alert())
    claimed = await record.claim()
    assert isinstance(claimed, actions.Claim)
    ended_at = record.now
    record.now += 600  # the disk was full
    ended = await record.database.write(actions.record_command_end, claimed, "succeeded", 0, "", "", at=ended_at)
    assert ended.command_ended_at == ended_at
    (running,) = await record.database.write(actions.running_actions)
    assert running.command_ended_at == ended_at


async def test_a_database_that_is_lost_as_the_program_starts_ends_none_of_its_tasks(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the action that was interrupted is resumed once the database is back."""
    monkeypatch.setattr(executor, "READ_AGAIN", 0.1)
    await record.deliver(alert())
    assert isinstance(await record.claim(), actions.Claim)
    record.inventory = Inventory()  # without the service, so that its action has nothing to wait for
    nobody = Exporter(Endpoint(url="http://127.0.0.1:1"), ConfiguredToken("exporter.token"))
    parts = Parts.create((nobody, None), None, record.database, RemediatorMetrics(), Redactor(), WebConfigFile(None))
    path = record.folder / "record.db"
    path.rename(record.folder / "moved.db")
    running = [asyncio.ensure_future(task()) for task in parts.tasks]
    ended, _ = await asyncio.wait(running, timeout=1.0)
    assert [task.exception() for task in ended] == []
    (record.folder / "moved.db").rename(path)

    async def resumed() -> bool:
        return not await record.database.read(actions.running_actions)

    await eventually(resumed)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await parts.http_client.aclose()


async def stopped_services(record: Record) -> list[str]:
    return [name for name in ("web", "db") if await record.database.write(stops.describe_stop, name)]


async def test_a_start_removes_the_stops_of_all_services_of_its_target(record: Record, tmp_path: Path) -> None:
    document = configuration_of("web", "db")
    document["services"]["db"]["control"] = document["services"]["web"]["control"]
    record.inventory = (await asyncio.to_thread(inventory_of, tmp_path / "shared", document)).inventory
    await record.database.write(stops.add, ["web", "db"], 1, "ann")
    started = await record.claim_for_operator("web")
    assert isinstance(started, actions.Claim)
    await record.database.write(actions.end_action, started, actions.Ending("succeeded", recovered=True))
    assert await stopped_services(record) == []


async def test_old_stops_of_removed_services_are_deleted(record: Record) -> None:
    await record.database.write(stops.add, ["web", "db"], 1, "ann")
    await record.database.write(stops.delete_removed, {"db"}, record.now)
    assert await stopped_services(record) == ["web", "db"]
    await record.database.write(stops.delete_removed, {"db"}, record.now + 1)
    assert await stopped_services(record) == ["db"]


async def test_an_observed_stop_is_valid_for_the_target_until_it_runs_again(record: Record, tmp_path: Path) -> None:
    document = configuration_of("web", "db")
    document["services"]["db"]["control"] = document["services"]["web"]["control"]
    record.inventory = (await asyncio.to_thread(inventory_of, tmp_path / "shared", document)).inventory
    await record.deliver(alert(), alert(service="db"))
    await record.database.write(decisions.record_observed_stop, 1, "t1", "it was stopped")
    now = Situation(record.now, frozenset(), ActionHistory(), ActionsInProgress(), DOWN)

    async def past(service: str, incident: int) -> ActionHistory:
        completed = await record.database.write(situations.add_recorded_facts, incident, service, now)
        return completed.history

    assert {(each.stopped_run, each.stopped_why) for each in (await past("web", 1), await past("db", 2))} == {
        ("t1", "it was stopped")
    }
    assert await record.database.write(situations.expected_failures, ["web", "db"]) == {"web"}
    await record.database.write(decisions.clear_observed_stop, ["web", "db"])
    assert (await past("db", 2)).stopped_why == ""


async def test_attempts_are_refilled_while_the_service_stays_up(record: Record) -> None:
    """What `explain` shows: no incident is open, and the last one ended long ago."""
    await record.deliver(alert())
    action = await record.claim()
    assert isinstance(action, actions.Claim)
    await record.end(action)
    await record.deliver(alert(status="resolved"))
    assert await record.close(1)
    assert (await record.database.read(situations.read_action_history, "web", 0, 3600.0)).attempts == {"restart": 1}
    record.now += 3600
    assert (await record.database.read(situations.read_action_history, "web", 0, 3600.0)).attempts == {}
