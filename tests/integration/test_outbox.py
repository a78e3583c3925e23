"""The outbox on a real record at a made-up clock: order, folding, cards that change, escalation, reminders."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, insert, select, update

from fleet.inventory.model import Inventory
from remediator.clients.alerts import Alert
from remediator.incidents import acknowledgement, decisions, intake, lifecycle, reconciliation, timeline
from remediator.notifications import content, deliveries, escalation, outbox
from remediator.notifications.content import Notification
from remediator.notifications.outbox import FOLD_OVER, Batch
from remediator.policy.situation import Decision
from remediator.record import notifications as notification_rows
from remediator.record import retention
from remediator.record.schema import actions, metadata, notifications
from remediator.record.schema import deliveries as delivery_rows
from remediator.record.schema import incidents as incident_rows
from remediator.record.transaction import Transaction
from tests.support import ManualClock, inventory_of, new_record

APP = {"app_id": "cli_x", "app_secret": "s", "chat_id": "oc_x"}


def written(*routes: dict[str, Any]) -> dict[str, Any]:
    probe = {"command": {"run": ["true"]}}
    control = {"command": {"restart": ["true"]}}
    services = {
        name: {"host": "h", "probe": probe, "control": control, "on_failure": "restart"}
        for name in ("web", "db", *(f"s{n}" for n in range(60)))
    }
    channels = {
        "ops": {"feishu": {"webhook": "http://f/ops"}}, "lead": {"feishu": {"webhook": "http://f/lead"}},
        "boss": {"feishu": {"webhook": "http://f/boss"}}, "app": {"feishu_app": APP},
    }  # fmt: skip
    return {
        "hosts": {"h": {"address": "h", "shell": "local"}},
        "services": services,
        "notify": {"language": "en", "channels": channels, "routes": list(routes or [{"channels": ["ops", "app"]}])},
    }


@cache
def inventory(routes: str) -> Inventory:
    """With these routes, in JSON; many services take long to load."""
    with tempfile.TemporaryDirectory() as folder:
        return inventory_of(Path(folder), written(*json.loads(routes))).inventory


class Desk:
    """A record, an inventory and a clock that stands where it is put."""

    def __init__(self, folder: Path, *routes: dict[str, Any]) -> None:
        self.database = new_record(folder, inventory(json.dumps(routes)))
        self.database.clock = self.clock = ManualClock(self.database.clock.now())
        self.messages = 0

    @property
    def inventory(self) -> Inventory:
        return self.database.inventory

    @inventory.setter
    def inventory(self, inventory: Inventory) -> None:
        self.database.inventory = inventory

    @property
    def now(self) -> float:
        return self.clock.at

    @now.setter
    def now(self, at: float) -> None:
        self.clock.at = at

    async def run(self, work: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return await self.database.write(work, *args, **more)

    async def fire(
        self, service: str, name: str = "ServiceDown", status: Literal["firing", "resolved"] = "firing", **labels: str
    ) -> None:
        labels = {"alertname": name, "service": service, "severity": "critical", **labels}
        fingerprint = f"{name}-{service}-{labels.get('instance', '')}"
        alert = Alert(fingerprint, "1", "", status, labels, {"summary": "x"})
        await self.run(intake.receive, [alert])

    async def reconciled(self, active: set[str]) -> None:
        await self.run(reconciliation.reconcile, active, active, self.now - 10)

    async def choose(self, channel: str) -> Batch | float:
        return await self.run(outbox.choose, channel)  # type: ignore[no-any-return]  # `run` returns Any

    async def read(self, batch: Batch) -> list[Notification]:
        return await self.run(content.read_notifications, batch)  # type: ignore[no-any-return]  # `run` returns Any

    async def send(
        self, channel: str, outcome: str = "sent", state: str = "sent", after: float = 0.0
    ) -> tuple[Batch, list[Notification]]:
        """Send what is to be told next in a channel, once it may be."""
        while not isinstance(batch := await self.choose(channel), Batch):
            assert batch < self.now + 3600, "there is nothing to be told"
            self.now = batch
        told = await self.read(batch)
        number = await self.run(deliveries.reserve, batch)
        assert number is not None
        self.messages += 1
        message = f"om_{self.messages}" if channel == "app" and batch.message_id is None else None
        await self.run(
            deliveries.record, batch, number, outcome, outcome,
            state=state, not_before=self.now + after, message_id=message if state == "sent" else None,
        )  # fmt: skip
        return batch, told

    async def all_sent(self, channel: str) -> list[tuple[Batch, list[Notification]]]:
        sent = []
        while isinstance(chosen := await self.choose(channel), Batch) or chosen < self.now + 3600:
            sent.append(await self.send(channel))
        return sent

    async def rows(self, channel: str) -> list[Any]:
        query = select(notifications).where(notifications.c.channel == channel).order_by(notifications.c.id)
        return list(await self.run(lambda c: c.execute(query).all()))

    async def decide(self, incident: int, verb: Any, reason: Any) -> None:
        await self.run(decisions.record_decision, incident, Decision(verb, reason))

    async def act(self, incident: int, **row: Any) -> None:
        def begin(tx: Transaction) -> None:
            values = {
                "incident_id": incident, "service": "web", "host": "h", "kind": "restart", "requested_by": "alert", "asked_by": "ServiceDown",
                "overruled": [], "state": "running", "counts": 1, "claimed_at": self.now, **row,
            }  # fmt: skip
            tx.execute(insert(actions).values(**values))
            timeline.add_event(tx, incident, "action_started")

        await self.run(begin)

    async def close(self, incident: int, service: str = "web") -> None:
        await self.fire(service, status="resolved")
        rules = self.inventory.remediation.alerts
        await self.run(lifecycle.close, incident, "recovered", rules)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    made = await asyncio.to_thread(Desk, tmp_path)
    yield made
    await asyncio.to_thread(made.database.close)


def titles(sent: list[tuple[Batch, list[Notification]]]) -> list[str]:
    return [f"{batch.form} {told[0].state} {len(told)}" for batch, told in sent]


async def test_the_gravest_goes_first_then_the_oldest(desk: Desk) -> None:
    for number, severity in enumerate(["info", "warning", "critical", "warning", "critical"]):
        await desk.fire(f"s{number}", severity=severity)
        desk.now += 1
    told = [(await desk.send("ops"))[1][0] for _ in range(5)]
    assert [(each.severity, each.service.id if each.service else "") for each in told] == [
        ("critical", "s2"), ("critical", "s4"), ("warning", "s1"), ("warning", "s3"), ("info", "s0"),
    ]  # fmt: skip


async def test_what_fails_waits_and_lets_others_go(desk: Desk) -> None:
    await desk.fire("web")
    await desk.fire("db")
    first, _ = await desk.send("ops", "retry", "pending", after=30)
    second, _ = await desk.send("ops")
    assert first.first.id != second.first.id
    later = await desk.choose("ops")
    assert later == desk.now + 30
    again, _ = await desk.send("ops")
    assert (again.first.id, again.first.tries) == (first.first.id, 1)


async def test_many_of_a_kind_are_folded_and_none_is_lost(desk: Desk) -> None:
    for number in range(60):
        await desk.fire(f"s{number}")
    await desk.fire("web", "Other", severity="info")
    sent = await desk.all_sent("ops")
    assert titles(sent) == ["summary down 60", "one alert 1"]
    assert {each.service.id for each in sent[0][1] if each.service} == {f"s{n}" for n in range(60)}
    rows = await desk.rows("ops")
    assert {row.state for row in rows} == {"sent"}
    assert [row.sent_with for row in rows[:2]] == [None, rows[0].id]


async def test_what_can_be_said_in_time_is_said_one_by_one(desk: Desk) -> None:
    for number in range(FOLD_OVER):
        await desk.fire(f"s{number}")
    assert titles(await desk.all_sent("ops")) == ["one down 1"] * FOLD_OVER


async def test_the_last_of_a_story_tells_for_those_before_it(desk: Desk) -> None:
    await desk.fire("web")
    await desk.act(1, state="succeeded", up_at=desk.now + 3)
    await desk.close(1)
    ((batch, told),) = await desk.all_sent("ops")
    assert told[0].state == "recovered"
    assert len(batch.superseded) == 1
    assert [(row.kind, row.state) for row in await desk.rows("ops")] == [("down", "sent"), ("recovered", "sent")]


async def test_a_story_that_failed_is_told_again_as_one(desk: Desk) -> None:
    await desk.fire("web")
    await desk.act(1, state="succeeded", up_at=desk.now + 3)
    await desk.close(1)
    first, _ = await desk.send("ops", "retry", "pending", after=2)
    second, told = await desk.send("ops")
    assert (second.form, told[0].state, second.ids, len(second.superseded)) == ("one", "recovered", first.ids, 1)
    assert [row.state for row in await desk.rows("ops")] == ["sent", "sent"]


async def test_strangers_of_one_name_are_told_together(desk: Desk) -> None:
    for number in range(3):
        await desk.fire("", "DiskFull", instance=f"n{number}")
        desk.now += 0.5
    await desk.fire("", "Other")
    assert await desk.choose("ops") == pytest.approx(desk.now - 1.5 + desk.inventory.notify.group_wait)
    assert titles(await desk.all_sent("ops")) == ["group alert 3", "one alert 1"]
    await desk.fire("", "DiskFull", "resolved", instance="n1")
    sent = await desk.all_sent("ops")
    assert titles(sent) == ["one alert_over 1"]
    assert sent[0][1][0].labels["instance"] == "n1"


async def test_one_card_for_an_incident_that_stays_true(desk: Desk) -> None:
    await desk.fire("web")
    batch, told = await desk.send("app")
    assert (told[0].state, batch.message_id, batch.reply_to) == ("down", None, None)
    await desk.decide(1, "wait", "storm")
    batch, told = await desk.send("app")
    assert (told[0].state, told[0].decision[1], batch.message_id) == ("down", "storm", "om_1")
    await desk.act(1)
    assert [told[0].state for _, told in await desk.all_sent("app")] == ["acting"]
    await desk.run(lambda c: c.execute(update(actions).values(up_at=actions.c.claimed_at + 3, state="succeeded")))
    await desk.close(1)
    ((batch, told),) = await desk.all_sent("app")
    assert (told[0].state, told[0].details["seconds"], batch.message_id) == ("recovered", pytest.approx(3.0), "om_1")
    assert len(await desk.rows("app")) == 1
    attempts = await desk.run(lambda c: c.execute(select(delivery_rows.c.outcome)).all())
    assert len(attempts) == 4


async def test_what_calls_for_people_is_told_in_the_card_s_thread(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    await desk.decide(1, "refuse", "attempts-used-up")
    sent = await desk.all_sent("app")
    assert [(told[0].state, batch.message_id, batch.reply_to) for batch, told in sent] == [
        ("person_needed", None, "om_1"), ("person_needed", "om_1", None),
    ]  # fmt: skip
    await desk.fire("web", "ServiceSlow", severity="warning")
    sent = await desk.all_sent("app")
    assert [(told[0].state, batch.reply_to) for batch, told in sent if batch.message_id is None] == [("alert", "om_1")]


async def test_what_changes_while_it_is_sent_is_sent_after(desk: Desk) -> None:
    await desk.fire("web")
    batch = await desk.choose("app")
    assert isinstance(batch, Batch)
    number = await desk.run(deliveries.reserve, batch)
    await desk.act(1)
    await desk.run(deliveries.record, batch, number, "sent", "", state="sent", not_before=0, message_id="om_9")
    ((again, told),) = await desk.all_sent("app")
    assert (told[0].state, again.message_id) == ("acting", "om_9")


async def test_a_card_that_may_have_been_sent_before_is_put_right(desk: Desk) -> None:
    """The first try was taken, its answer lost: the second is held for the same, and shows what was so before."""
    await desk.fire("web")
    first, _ = await desk.send("app", "retry", "pending", after=2)
    await desk.act(1)
    second, _ = await desk.send("app")
    assert first.key == second.key
    ((third, told),) = await desk.all_sent("app")
    assert (third.message_id is not None, told[0].state) == (True, "acting")


async def test_killed_after_a_card_was_taken_it_is_put_right_too(desk: Desk) -> None:
    await desk.fire("web")
    first = await desk.choose("app")
    assert isinstance(first, Batch)
    assert await desk.run(deliveries.reserve, first)  # sent, and then we are no more
    await desk.close(1)
    second, _ = await desk.send("app")
    assert second.key == first.key  # so that Feishu holds it for the first, which shows a service that is down
    ((third, told),) = await desk.all_sent("app")
    assert (third.message_id, told[0].state) == ("om_1", "recovered")


async def test_what_may_have_been_told_together_is_tried_just_so_again(desk: Desk) -> None:
    for number in range(FOLD_OVER + 5):
        await desk.fire(f"s{number}")
    tried, _ = await desk.send("ops", "retry", "pending", after=2)
    await desk.fire("web")
    sent = await desk.all_sent("ops")
    assert sorted(titles(sent)) == ["one down 1", f"summary down {FOLD_OVER + 5}"]
    assert tried.key in {batch.key for batch, _ in sent}


async def test_a_card_that_cannot_be_changed_is_sent_anew_and_not_for_ever(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    seen = []
    for reason in ("storm", "maintenance", "storm", "maintenance"):
        await desk.decide(1, "wait", reason)
        while isinstance(chosen := await desk.choose("app"), Batch) or chosen < desk.now + 3600:
            if isinstance(chosen, float):
                desk.now = chosen
            else:
                batch, _ = await desk.send("app", *(("reject", "dead") if chosen.message_id is not None else ()))
                seen.append(batch.message_id)
    assert seen == ["om_1", None, "om_3", None]  # and then no more
    await desk.close(1)
    ((batch, told),) = await desk.all_sent("app")
    assert (told[0].state, batch.message_id) == ("recovered", None)


async def test_a_reply_to_a_message_that_is_gone_is_told_by_itself(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    await desk.decide(1, "refuse", "attempts-used-up")
    batch, _ = await desk.send("app", "reject", "dead")
    assert batch.reply_to == "om_1"
    sent = await desk.all_sent("app")
    assert ("person_needed", None, None) in [(told[0].state, batch.message_id, batch.reply_to) for batch, told in sent]


async def test_what_calls_for_people_does_not_wait_for_a_card_to_change(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    await desk.decide(1, "wait", "storm")
    await desk.send("app", "retry", "pending", after=300)
    await desk.decide(1, "refuse", "attempts-used-up")
    batch = await desk.choose("app")
    assert isinstance(batch, Batch)
    assert (batch.first.kind, batch.reply_to) == ("person_needed", "om_1")


async def test_what_is_over_before_it_could_be_told_is_told_by_its_card_alone(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    await desk.decide(1, "refuse", "attempts-used-up")
    await desk.close(1)
    ((batch, told),) = await desk.all_sent("app")
    assert (told[0].state, batch.message_id) == ("recovered", "om_1")


async def test_states_may_be_told_to_an_app_that_has_no_card_of_it(tmp_path: Path) -> None:
    desk = await asyncio.to_thread(
        Desk, tmp_path, {"states": ["recovered"], "channels": ["app"], "continue": True}, {"channels": ["ops"]}
    )
    await desk.fire("web")
    await desk.close(1)
    assert titles(await desk.all_sent("app")) == ["one recovered 1"]
    await asyncio.to_thread(desk.database.close)


async def test_an_alert_in_a_thread_is_told_to_be_over_there(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    await desk.fire("web", "ServiceSlow")
    await desk.all_sent("app")
    await desk.fire("web", "ServiceSlow", "resolved")
    assert ("alert_over", "om_1") in [(told[0].state, batch.reply_to) for batch, told in await desk.all_sent("app")]


async def test_alerts_of_many_names_are_folded_too(desk: Desk) -> None:
    for number in range(100):
        await desk.fire("", f"Alert{number}")
    desk.now += 5
    ((batch, _),) = await desk.all_sent("ops")
    assert (batch.form, len(batch.notifications)) == ("summary", 100)


async def test_new_notices_go_before_cards_that_change(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    await desk.decide(1, "wait", "storm")
    desk.now += 5
    await desk.fire("db", severity="info")
    assert [batch.message_id for batch, _ in await desk.all_sent("app")] == [None, "om_1"]


@pytest.mark.parametrize(
    ("verb", "reason", "last", "state"),
    [
        ("refuse", "already-up", {"state": "succeeded", "up_at": 1.0}, "watched"),
        ("nothing", None, {"state": "succeeded", "up_at": 1.0}, "watched"),
        ("wait", "backing-off", {"state": "succeeded", "up_at": 1.0}, "down"),
        ("wait", "target-busy", {"state": "running", "kind": "stop"}, "down"),
        ("wait", "target-busy", {"state": "running"}, "acting"),
        ("wait", "target-busy", {"state": "running", "up_at": 1.0}, "restarted"),
        ("wait", "approval", {"state": "queued"}, "approval"),
        ("refuse", "host-key-changed", {"state": "failed"}, "person_needed"),
    ],
)
async def test_what_a_card_shows_an_incident_to_be(
    desk: Desk, verb: str, reason: Any, last: dict[str, Any], state: str
) -> None:
    await desk.fire("web")
    await desk.act(1, **last)
    await desk.decide(1, verb, reason)
    _, told = await desk.send("app")
    assert told[0].state == state


async def test_many_are_acknowledged_by_one_press(desk: Desk) -> None:
    for number in range(3):
        await desk.fire("", "DiskFull", instance=f"n{number}")
    ((batch, told),) = await desk.all_sent("app")
    assert all("acknowledge" in each.buttons for each in told)
    assert await desk.run(acknowledgement.acknowledge_message, batch.first.id, "ann") == 3
    ((_, told),) = await desk.all_sent("app")
    assert [each.acknowledged[0] for each in told if each.acknowledged] == ["ann"] * 3
    assert await desk.run(acknowledgement.acknowledge_message, 10**6, "ann") == 0


async def test_who_acknowledged_a_mild_alert_is_still_called_when_the_service_goes_down(desk: Desk) -> None:
    await desk.fire("web", "ServiceSlow", severity="warning")
    await desk.run(acknowledgement.acknowledge_incident, 1, "ann")
    await desk.fire("web")
    sent = await desk.all_sent("app")
    assert [each.acknowledged for _, told in sent for each in told if each.state == "down"] == [None]


async def test_many_told_in_a_thread_are_acknowledged_by_one_press_too(desk: Desk) -> None:
    for number in range(40):
        await desk.fire(f"s{number}")
    await desk.all_sent("app")
    for number in range(40):
        await desk.decide(number + 1, "refuse", "attempts-used-up")
    batch = next(
        batch
        for batch, told in await desk.all_sent("app")
        if told[0].state == "person_needed" and batch.message_id is None
    )
    assert await desk.run(acknowledgement.acknowledge_message, batch.first.id, "ann") == 40


async def test_an_alert_is_not_told_to_be_over_before_it_was_told(desk: Desk) -> None:
    await desk.fire("", "DiskFull")
    await desk.send("ops", "retry", "pending", after=300)
    await desk.fire("", "DiskFull", "resolved")
    assert [told[0].state for _, told in await desk.all_sent("ops")] == ["alert", "alert_over"]


async def test_what_was_put_off_does_not_hide_what_may_go(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "ROW_LIMIT", 20)
    for number in range(30):
        await desk.fire("", f"Alert{number}")
    desk.now += 5
    while isinstance(chosen := await desk.choose("ops"), Batch):
        await desk.send("ops", "retry", "pending", after=300)
    assert isinstance(chosen, float)
    await desk.fire("web", severity="info")
    batch = await desk.choose("ops")
    assert isinstance(batch, Batch) or batch < desk.now + 60


async def test_each_change_of_a_card_of_many_has_its_own_tries(desk: Desk) -> None:
    for number in range(5):
        await desk.fire("", "DiskFull", instance=f"n{number}")
    await desk.all_sent("app")
    for number in range(4):
        await desk.fire("", "DiskFull", "resolved", instance=f"n{number}")
        ((batch, _),) = await desk.all_sent("app")
        assert batch.tries == 0


async def test_a_card_that_is_given_up_while_it_is_over_is_told_once_more(desk: Desk) -> None:
    await desk.fire("web")
    await desk.run(
        lambda c: c.execute(update(notifications).where(notifications.c.channel == "app").values(replacements=2))
    )
    batch = await desk.choose("app")
    assert isinstance(batch, Batch)
    number = await desk.run(deliveries.reserve, batch)
    await desk.close(1)  # its card is thought to show it
    await desk.run(deliveries.record, batch, number, "sent", "", state="sent", not_before=0, message_id="om_9")
    ((again, told),) = await desk.all_sent("app")
    assert (told[0].state, again.message_id) == ("recovered", "om_9")


async def test_a_card_shows_every_change_of_what_is_decided(desk: Desk) -> None:
    await desk.fire("web")
    await desk.fire("web", status="resolved")
    assert [told[0].state for _, told in await desk.all_sent("app")] == ["down"]
    await desk.decide(1, "nothing", None)
    assert [told[0].state for _, told in await desk.all_sent("app")] == ["watched"]


async def test_an_alert_that_fires_again_has_a_card_of_its_own(desk: Desk) -> None:
    await desk.fire("", "DiskFull")
    await desk.all_sent("app")
    desk.now += 100
    await desk.reconciled(set())
    assert [told[0].state for _, told in await desk.all_sent("app")] == ["alert_over"]
    desk.now += 100
    await desk.reconciled({"DiskFull--"})
    ((batch, told),) = await desk.all_sent("app")
    assert (told[0].state, batch.message_id) == ("alert", None)
    await desk.run(acknowledgement.acknowledge_alert, 1, "ann")
    ((batch, _),) = await desk.all_sent("app")
    assert batch.message_id == "om_3"


async def test_what_lasts_is_not_forgotten(desk: Desk) -> None:
    await desk.fire("web")
    await desk.fire("", "DiskFull")
    await desk.all_sent("app")
    await desk.all_sent("ops")
    desk.now += 86400
    assert await desk.run(retention.delete_before, desk.now) == 0
    await desk.close(1)
    await desk.fire("", "DiskFull", "resolved")
    await desk.all_sent("app")
    await desk.all_sent("ops")
    desk.now += 86400
    await desk.run(retention.delete_before, desk.now)
    assert [*await desk.rows("app"), *await desk.rows("ops")] == []


async def test_a_card_of_many_is_changed_as_one(desk: Desk) -> None:
    for number in range(3):
        await desk.fire("", "DiskFull", instance=f"n{number}")
    assert titles(await desk.all_sent("app")) == ["group alert 3"]
    await desk.fire("", "DiskFull", "resolved", instance="n1")
    ((batch, told),) = await desk.all_sent("app")
    assert [each.state for each in told] == ["alert", "alert_over", "alert"]
    assert batch.message_id == "om_1"


async def test_an_old_card_is_begun_anew(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    desk.now += 13.5 * 86400
    await desk.decide(1, "wait", "storm")
    batch, _ = await desk.send("app")
    assert batch.message_id is None
    assert {row.message_id for row in await desk.rows("app")} == {"om_2"}


async def test_a_dead_card_stays_dead_and_its_story_is_told_without_it(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app", "reject", "dead")
    await desk.decide(1, "refuse", "attempts-used-up")
    ((batch, told),) = await desk.all_sent("app")
    assert (told[0].state, batch.reply_to) == ("person_needed", None)
    await desk.close(1)
    ((batch, told),) = await desk.all_sent("app")
    assert (told[0].state, batch.message_id) == ("recovered", None)


async def test_a_channel_that_becomes_a_custom_bot_s_lets_its_cards_be(desk: Desk) -> None:
    await desk.fire("web")
    await desk.fire("db")
    await desk.send("app")
    await desk.decide(1, "wait", "storm")
    await desk.run(deliveries.retire_cards, ["app"])
    assert [(row.state, row.card, row.message_id) for row in await desk.rows("app")] == [
        ("sent", 0, None),
        ("pending", 0, None),
    ]
    await desk.decide(1, "wait", "maintenance")
    assert [told[0].service.id for _, told in await desk.all_sent("app") if told[0].service] == ["db"]


async def test_a_channel_that_becomes_an_app_s_hears_the_end_of_what_it_was_told(desk: Desk) -> None:
    await desk.fire("web")
    await desk.send("app")
    await desk.run(deliveries.retire_cards, ["app"])
    await desk.close(1)
    ((batch, told),) = await desk.all_sent("app")
    assert (told[0].state, batch.message_id) == ("recovered", None)


ESCALATED = {"channels": ["ops"], "escalate": {"after": "10m", "channels": ["lead", "boss"]}, "remind": "1h"}


async def test_escalation_until_somebody_acknowledges(tmp_path: Path) -> None:
    desk = await asyncio.to_thread(Desk, tmp_path, ESCALATED)
    await desk.fire("web")
    await desk.fire("", "DiskFull")
    began = desk.now
    told = []
    for minutes in (9, 11, 21, 50):
        desk.now = began + minutes * 60
        await desk.run(escalation.notify_again)
        told.append([len(await desk.rows(name)) for name in ("lead", "boss")])
        if minutes == 11:
            assert (await desk.run(acknowledgement.acknowledge_incident, 1, "ann")).acknowledged_by == "ann"
            assert (await desk.run(acknowledgement.acknowledge_incident, 1, "bob")).acknowledged_by == "ann"
    assert told == [[0, 0], [2, 0], [2, 1], [2, 1]]  # the stranger goes on, the incident does not
    _, told_lead = await desk.send("lead")
    assert told_lead[0].details["unacknowledged"] == 600.0
    desk.now = began + 3700
    await desk.close(1)
    assert sorted(row.kind for row in await desk.rows("lead")) == ["alert", "down", "recovered"]  # they hear the end
    await asyncio.to_thread(desk.database.close)


async def test_reminders_while_it_lasts(tmp_path: Path) -> None:
    desk = await asyncio.to_thread(Desk, tmp_path, ESCALATED)
    await desk.fire("web")
    began = desk.now
    for minutes in (59, 61, 62, 121, 250):
        desk.now = began + minutes * 60
        await desk.run(escalation.notify_again)
    await desk.close(1)
    desk.now += 7200
    assert await desk.run(escalation.notify_again) is False
    assert [row.kind for row in await desk.rows("ops")] == ["down", "reminder", "reminder", "reminder", "recovered"]
    await asyncio.to_thread(desk.database.close)


async def test_alerts_that_are_not_acted_on_are_escalated_and_acknowledged(tmp_path: Path) -> None:
    desk = await asyncio.to_thread(Desk, tmp_path, ESCALATED)
    await desk.fire("web", "ServiceSlow")
    desk.now += 660
    await desk.run(escalation.notify_again)
    _, told = await desk.send("lead")
    assert (told[0].state, told[0].buttons["acknowledge"]["incident"]) == ("alert", 1)
    await desk.run(acknowledgement.acknowledge_incident, 1, "ann")
    desk.now += 3600
    await desk.run(escalation.notify_again)
    assert [len(await desk.rows(name)) for name in ("lead", "boss")] == [1, 0]
    assert [row.kind for row in await desk.rows("ops")] == ["alert", "reminder"]
    await asyncio.to_thread(desk.database.close)


async def test_nothing_is_escalated_that_was_told_to_nobody(tmp_path: Path) -> None:
    desk = await asyncio.to_thread(Desk, tmp_path, {"channels": [], "escalate": ESCALATED["escalate"]})
    await desk.fire("web")
    desk.now += 3600
    assert await desk.run(escalation.notify_again) is False
    await asyncio.to_thread(desk.database.close)


KINDS = ["fire", "close", "act", "decide", "send ops", "send app", "fail ops", "fail app", "wait"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3)), max_size=40)


class Course:
    """Things that happen in any order, and what the app's cards show last."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.shown: dict[str, str] = {}

    async def step(self, what: str, number: int) -> None:
        service = f"s{number}"
        found = await self.desk.run(lifecycle.find_open, service)
        if what == "fire":
            await self.desk.fire(service)
        elif found and what == "close":
            await self.desk.close(found, service)
        elif found and what == "act":
            await self.desk.run(lambda c: c.execute(update(actions).values(state="failed")))
            await self.desk.act(found, service=service)
        elif found and what == "decide":
            await self.desk.decide(found, "wait", "storm" if number % 2 else "maintenance")
        elif what.startswith("send"):
            await self.send(what.split()[1])
        elif what.startswith("fail"):
            await self.send(what.split()[1], outcome="retry", state="pending", after=2.0)
        self.desk.now += number

    async def send(self, channel: str, **more: Any) -> None:
        if not isinstance(await self.desk.choose(channel), Batch):
            return
        batch, told = await self.desk.send(channel, **more)
        if more:
            return
        keys = {row.id: row.key for row in await self.desk.rows("app")}
        for queued, notification in zip(batch.notifications, told, strict=True):
            if queued.card:
                self.shown[keys[queued.id]] = notification.state

    async def to_its_end(self, channel: str) -> None:
        while isinstance(chosen := await self.desk.choose(channel), Batch) or chosen < self.desk.now + 3600:
            if isinstance(chosen, float):
                self.desk.now = chosen
            await self.send(channel)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_whatever_happens_in_the_end_all_is_told_and_true(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    desk = await asyncio.to_thread(Desk, tmp_path_factory.mktemp("desk"))
    course = Course(desk)
    for what, number in steps:
        await course.step(what, number)
    for channel in ("ops", "app"):
        await course.to_its_end(channel)
        assert {row.state for row in await desk.rows(channel)} <= {"sent"}
    for row in await desk.run(lambda c: c.execute(select(incident_rows)).all()):
        wanted = {"recovered"} if row.state == "recovered" else {"down", "acting"}
        assert course.shown[notification_rows.incident_key(row.id)] in wanted
    await asyncio.to_thread(desk.database.close)


async def test_migrations_make_the_tables_that_the_code_knows(desk: Desk, tmp_path: Path) -> None:
    def shape(url: str) -> Mapping[str, Any]:
        engine = create_engine(url)
        with engine.connect() as connection:
            tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
            found = {
                name: sorted(
                    (row[1], row[2], row[3]) for row in connection.exec_driver_sql(f"PRAGMA table_info({name})")
                )
                for name in tables
                if name != "alembic_version"
            }
            indexes = connection.exec_driver_sql(
                "SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
            )
            found["indexes"] = sorted(indexes.scalars().all())
        engine.dispose()
        return found

    other = f"sqlite:///{tmp_path}/other.db"
    engine = create_engine(other)
    metadata.create_all(engine)
    engine.dispose()
    assert await asyncio.to_thread(shape, f"sqlite:///{tmp_path}/record.db") == await asyncio.to_thread(shape, other)
