"""The outbox on a real record with a manual clock: order, combined messages, updates, escalation, reminders."""

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
from fleet.inventory.notify import Notify
from remediator.clients.alerts import Alert
from remediator.incidents import acknowledgement, decisions, intake, lifecycle, reconciliation, timeline
from remediator.notifications import content, deliveries, escalation, outbox
from remediator.notifications.cards import Card
from remediator.notifications.channels import Outcome, SendResult
from remediator.notifications.channels.feishu_cards import render_version_1, shorten_to_fit
from remediator.notifications.content import Notification
from remediator.notifications.deliveries import DeliveryState
from remediator.notifications.messages import render_card
from remediator.notifications.outbox import FOLD_OVER, Batch
from remediator.notifications.rendering import shipped_templates
from remediator.policy.situation import Decision
from remediator.record import notifications as notification_rows
from remediator.record import retention
from remediator.record.schema import actions, metadata, notifications
from remediator.record.schema import deliveries as delivery_rows
from remediator.record.schema import incidents as incident_rows
from remediator.record.transaction import Transaction
from tests.support import ClockedHarness, inventory_of

APP = {"app_id": "cli_x", "app_secret": "s", "chat_id": "oc_x"}
TEMPLATES = shipped_templates("en")
DIGEST_OVER = Notify().digest_over


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
    """Return the inventory with these routes, in JSON; loading many services takes long."""
    with tempfile.TemporaryDirectory() as folder:
        return inventory_of(Path(folder), written(*json.loads(routes))).inventory


class OutboxHarness(ClockedHarness):
    """A record with an inventory and a manual clock; messages are sent to no server."""

    def __init__(self, folder: Path, *routes: dict[str, Any]) -> None:
        super().__init__(folder, inventory(json.dumps(routes)))
        self.messages = 0

    async def run(self, work: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return await self.database.write(work, *args, **more)

    async def fire(
        self, service: str, name: str = "ServiceDown", status: Literal["firing", "resolved"] = "firing", **labels: str
    ) -> None:
        labels = {"alertname": name, "service": service, "severity": "critical", **labels}
        fingerprint = f"{name}-{service}-{labels.get('instance', '')}"
        alert = Alert(fingerprint, "1", "", status, labels, {"summary": "x"})
        await self.run(intake.receive_alerts, [alert])

    async def reconciled(self, active: set[str]) -> None:
        await self.run(reconciliation.reconcile, active, active, self.now - 10)

    async def choose(self, channel: str) -> Batch | float:
        return await self.run(outbox.choose_batch, channel)  # type: ignore[no-any-return]  # `run` returns Any

    async def read(self, batch: Batch) -> list[Notification]:
        return await self.run(content.read_notifications, batch)  # type: ignore[no-any-return]  # `run` returns Any

    async def send(
        self, channel: str, outcome: Outcome = "sent", state: DeliveryState = "sent", after: float = 0.0
    ) -> tuple[Batch, list[Notification]]:
        """Send the next message of a channel, as soon as the limits permit it."""
        while not isinstance(batch := await self.choose(channel), Batch):
            assert batch < self.now + 3600, "there is nothing to send"
            self.now = batch
        contents = await self.read(batch)
        number = await self.run(deliveries.reserve_delivery, batch)
        assert number is not None
        self.messages += 1
        message = f"om_{self.messages}" if channel == "app" and batch.message_id is None else None
        result = SendResult(outcome, outcome, message_id=message if state == "sent" else None)
        await self.run(deliveries.record_result, batch, number, result, state=state, not_before=self.now + after)
        return batch, contents

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
async def harness(tmp_path: Path) -> AsyncIterator[OutboxHarness]:
    made = await asyncio.to_thread(OutboxHarness, tmp_path)
    yield made
    await asyncio.to_thread(made.database.close)


def titles(sent: list[tuple[Batch, list[Notification]]]) -> list[str]:
    return [f"{batch.form} {contents[0].state} {len(contents)}" for batch, contents in sent]


async def test_the_most_severe_is_sent_first_then_the_oldest(harness: OutboxHarness) -> None:
    for number, severity in enumerate(["info", "warning", "critical", "warning", "critical"]):
        await harness.fire(f"s{number}", severity=severity)
        harness.now += 1
    contents = [(await harness.send("ops"))[1][0] for _ in range(5)]
    assert [(each.severity, each.service.id if each.service else "") for each in contents] == [
        ("critical", "s2"), ("critical", "s4"), ("warning", "s1"), ("warning", "s3"), ("info", "s0"),
    ]  # fmt: skip


async def test_a_failed_notification_waits_and_others_are_sent(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.fire("db")
    first, _ = await harness.send("ops", "retry", "pending", after=30)
    second, _ = await harness.send("ops")
    assert first.first.id != second.first.id
    later = await harness.choose("ops")
    assert later == harness.now + 30
    again, _ = await harness.send("ops")
    assert (again.first.id, again.first.tries) == (first.first.id, 1)


async def test_many_of_a_kind_are_combined_and_none_is_lost(harness: OutboxHarness) -> None:
    for number in range(60):
        await harness.fire(f"s{number}")
    await harness.fire("web", "Other", severity="info")
    sent = await harness.all_sent("ops")
    assert titles(sent) == ["summary down 61"]  # a digest
    assert {each.service.id for each in sent[0][1] if each.service} == {f"s{n}" for n in range(60)} | {"web"}
    rows = await harness.rows("ops")
    assert {row.state for row in rows} == {"sent"}
    assert [row.sent_with for row in rows[:2]] == [None, rows[0].id]


async def flood(harness: OutboxHarness, number: int, severity: str) -> None:
    """Deliver foreign alerts, each with a name of its own."""
    labels = [{"alertname": f"A{n}", "severity": severity, "x": "y" * 300} for n in range(number)]
    flood = [Alert(each["alertname"], "1", "", "firing", each, {}) for each in labels]
    await harness.run(intake.receive_alerts, flood)
    harness.now += harness.inventory.notify.group_wait


def card_of(sent: tuple[Batch, list[Notification]]) -> tuple[Card, str]:
    """Return the card of a message, and the text that Feishu shows of it."""
    batch, contents = sent
    card = render_card(contents, batch.form, TEMPLATES)
    shown = json.dumps(shorten_to_fit(card, render_version_1), ensure_ascii=False)
    return card, shown


@pytest.mark.parametrize("severity", ["info", "critical"])
@pytest.mark.parametrize("is_before", [False, True])
async def test_foreign_alerts_delay_no_service(harness: OutboxHarness, severity: str, *, is_before: bool) -> None:
    """Whoever has the webhook token may send any number of them."""
    await flood(harness, 1500, severity)
    if is_before:
        assert titles([await harness.send("ops")]) == ["summary alert 1000"]
    began = harness.now
    await harness.fire("web")
    await harness.fire("db", severity="warning")
    sent = [await harness.send("ops") for _ in range(2)]
    assert [contents[0].name for _, contents in sent] == ["web", "db"]
    assert harness.now == began


async def test_a_digest_of_foreign_alerts_counts_them(harness: OutboxHarness) -> None:
    await flood(harness, 60, "info")
    await harness.fire("", "ExporterDown", severity="warning")
    for number in range(3):
        await harness.fire("", "DiskFull", instance=f"n{number}", severity="info")
    harness.now += harness.inventory.notify.group_wait
    sent = await harness.send("ops")
    card, shown = await asyncio.to_thread(card_of, sent)
    assert (card.title, card.colour, card.severity) == ("Alert × 64", "orange", "warning")
    rows = [line.plain for line in card.lines if line.plain.startswith("▪")]
    assert rows[:2] == ["▪ ExporterDown warning", "▪ DiskFull × 3 info"]
    assert rows[-1] == "▪ 52 alerts with other names"
    assert rows[0] in shown


async def test_a_storm_of_minor_problems_hides_and_delays_no_critical_one(harness: OutboxHarness) -> None:
    for number in range(60):
        await harness.fire(f"s{number}", severity="info")
    assert titles([await harness.send("ops")]) == ["summary down 60"]
    began = harness.now
    await harness.fire("db", severity="warning")
    await harness.fire("web")
    (_, contents) = await harness.send("ops")
    assert (contents[0].name, harness.now) == ("web", began)
    assert titles([await harness.send("ops")]) == ["one down 1"]  # db, with the next digest
    assert harness.now > began


async def test_a_digest_begins_with_the_worst_and_has_its_colour(harness: OutboxHarness) -> None:
    for number in range(50):
        await harness.fire(f"s{number}", severity="info")
        await harness.fire(f"s{number}", "Other" + "x" * 400, severity="info")  # so that not all lines fit
    for number in range(50, 60):
        await harness.fire(f"s{number}")
    await harness.fire("web", severity="warning")
    await harness.fire("web", "ServiceSlow", severity="info")
    card, shown = await asyncio.to_thread(card_of, await harness.send("ops"))
    assert (card.title, card.colour, card.severity) == ("61 services are down", "red", "critical")
    rows = [line.plain.split()[1] for line in card.lines if line.plain.startswith("▪")]
    assert rows[:11] == [*(f"s{n}" for n in range(50, 60)), "web"]
    assert all(f"▪ {name} @ h" in shown for name in rows[:11])


async def test_a_digest_names_the_only_service_that_is_down(harness: OutboxHarness) -> None:
    for number in range(20):
        await harness.fire("web", f"Slow{number}", severity="info", host="h")
        await harness.fire(f"s{number}", "Slow", severity="info")
    await harness.fire("web", severity="warning")
    card, _ = await asyncio.to_thread(card_of, await harness.send("ops"))
    assert (card.title, card.colour) == ("1 service is down: web", "orange")
    assert next(line.plain for line in card.lines if line.plain.startswith("▪")).startswith("▪ web @ h")


async def test_a_few_are_sent_one_by_one(harness: OutboxHarness) -> None:
    for number in range(DIGEST_OVER):
        await harness.fire(f"s{number}")
    assert titles(await harness.all_sent("ops")) == ["one down 1"] * DIGEST_OVER


async def test_the_last_pending_notification_of_an_incident_supersedes_the_others(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.act(1, state="succeeded", up_at=harness.now + 3)
    await harness.close(1)
    ((batch, contents),) = await harness.all_sent("ops")
    assert contents[0].state == "recovered"
    assert len(batch.superseded) == 1
    assert [(row.kind, row.state) for row in await harness.rows("ops")] == [("down", "sent"), ("recovered", "sent")]


async def test_a_failed_notification_is_sent_again_with_those_it_supersedes(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.act(1, state="succeeded", up_at=harness.now + 3)
    await harness.close(1)
    first, _ = await harness.send("ops", "retry", "pending", after=2)
    second, contents = await harness.send("ops")
    assert (second.form, contents[0].state, second.ids, len(second.superseded)) == ("one", "recovered", first.ids, 1)
    assert [row.state for row in await harness.rows("ops")] == ["sent", "sent"]


async def test_alerts_of_one_name_without_a_service_are_sent_together(harness: OutboxHarness) -> None:
    for number in range(3):
        await harness.fire("", "DiskFull", instance=f"n{number}")
        harness.now += 0.5
    await harness.fire("", "Other")
    assert await harness.choose("ops") == pytest.approx(harness.now - 1.5 + harness.inventory.notify.group_wait)
    assert titles(await harness.all_sent("ops")) == ["group alert 3", "one alert 1"]
    await harness.fire("", "DiskFull", "resolved", instance="n1")
    sent = await harness.all_sent("ops")
    assert titles(sent) == ["one alert_over 1"]
    assert sent[0][1][0].labels["instance"] == "n1"


async def test_an_incident_has_one_card_that_is_updated(harness: OutboxHarness) -> None:
    await harness.fire("web")
    batch, contents = await harness.send("app")
    assert (contents[0].state, batch.message_id, batch.reply_to) == ("down", None, None)
    await harness.decide(1, "wait", "storm")
    batch, contents = await harness.send("app")
    assert (contents[0].state, contents[0].decision[1], batch.message_id) == ("down", "storm", "om_1")
    await harness.act(1)
    assert [contents[0].state for _, contents in await harness.all_sent("app")] == ["acting"]
    await harness.run(lambda c: c.execute(update(actions).values(up_at=actions.c.claimed_at + 3, state="succeeded")))
    await harness.close(1)
    ((batch, contents),) = await harness.all_sent("app")
    assert (contents[0].state, contents[0].details["seconds"], batch.message_id) == (
        "recovered",
        pytest.approx(3.0),
        "om_1",
    )
    assert len(await harness.rows("app")) == 1
    attempts = await harness.run(lambda c: c.execute(select(delivery_rows.c.outcome)).all())
    assert len(attempts) == 4


async def test_notifications_that_need_a_person_are_replies_to_the_card(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    await harness.decide(1, "refuse", "attempts-used-up")
    sent = await harness.all_sent("app")
    assert [(contents[0].state, batch.message_id, batch.reply_to) for batch, contents in sent] == [
        ("person_needed", None, "om_1"), ("person_needed", "om_1", None),
    ]  # fmt: skip
    await harness.fire("web", "ServiceSlow", severity="warning")
    sent = await harness.all_sent("app")
    assert [(contents[0].state, batch.reply_to) for batch, contents in sent if batch.message_id is None] == [
        ("alert", "om_1")
    ]


async def test_a_change_during_a_delivery_is_sent_after_it(harness: OutboxHarness) -> None:
    await harness.fire("web")
    batch = await harness.choose("app")
    assert isinstance(batch, Batch)
    number = await harness.run(deliveries.reserve_delivery, batch)
    await harness.act(1)
    await harness.run(
        deliveries.record_result, batch, number, SendResult("sent", "", message_id="om_9"), state="sent", not_before=0
    )
    ((again, contents),) = await harness.all_sent("app")
    assert (contents[0].state, again.message_id) == ("acting", "om_9")


async def test_a_card_that_may_have_been_sent_before_is_updated(harness: OutboxHarness) -> None:
    """The first response was lost: Feishu ignores the second attempt, so the card shows the earlier state."""
    await harness.fire("web")
    first, _ = await harness.send("app", "retry", "pending", after=2)
    await harness.act(1)
    second, _ = await harness.send("app")
    assert first.key == second.key
    ((third, contents),) = await harness.all_sent("app")
    assert (third.message_id is not None, contents[0].state) == (True, "acting")


async def test_a_card_that_was_accepted_before_a_kill_is_updated(harness: OutboxHarness) -> None:
    await harness.fire("web")
    first = await harness.choose("app")
    assert isinstance(first, Batch)
    assert await harness.run(deliveries.reserve_delivery, first)  # sent, and then the process was killed
    await harness.close(1)
    second, _ = await harness.send("app")
    assert second.key == first.key  # so that Feishu ignores it; the card shows a service that is down
    ((third, contents),) = await harness.all_sent("app")
    assert (third.message_id, contents[0].state) == ("om_1", "recovered")


async def test_notifications_that_may_have_been_sent_together_stay_together(harness: OutboxHarness) -> None:
    for number in range(FOLD_OVER + 5):
        await harness.fire(f"s{number}")
    tried, _ = await harness.send("ops", "retry", "pending", after=2)
    await harness.fire("web")
    sent = await harness.all_sent("ops")
    assert sorted(titles(sent)) == ["one down 1", f"summary down {FOLD_OVER + 5}"]
    assert tried.key in {batch.key for batch, _ in sent}


async def test_a_card_that_cannot_be_updated_is_replaced_twice_at_most(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    seen = []
    for reason in ("storm", "maintenance", "storm", "maintenance"):
        await harness.decide(1, "wait", reason)
        while isinstance(chosen := await harness.choose("app"), Batch) or chosen < harness.now + 3600:
            if isinstance(chosen, float):
                harness.now = chosen
            else:
                batch, _ = await harness.send("app", *(("reject", "dead") if chosen.message_id is not None else ()))
                seen.append(batch.message_id)
    assert seen == ["om_1", None, "om_3", None]  # and then no more
    await harness.close(1)
    ((batch, contents),) = await harness.all_sent("app")
    assert (contents[0].state, batch.message_id) == ("recovered", None)


async def test_a_reply_to_a_deleted_message_is_sent_as_a_new_message(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    await harness.decide(1, "refuse", "attempts-used-up")
    batch, _ = await harness.send("app", "reject", "dead")
    assert batch.reply_to == "om_1"
    sent = await harness.all_sent("app")
    assert ("person_needed", None, None) in [
        (contents[0].state, batch.message_id, batch.reply_to) for batch, contents in sent
    ]


async def test_a_reply_does_not_wait_for_an_update_of_the_card(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    await harness.decide(1, "wait", "storm")
    await harness.send("app", "retry", "pending", after=300)
    await harness.decide(1, "refuse", "attempts-used-up")
    batch = await harness.choose("app")
    assert isinstance(batch, Batch)
    assert (batch.first.kind, batch.reply_to) == ("person_needed", "om_1")


async def test_follow_ups_of_a_closed_incident_are_shown_by_its_card_alone(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    await harness.decide(1, "refuse", "attempts-used-up")
    await harness.close(1)
    ((batch, contents),) = await harness.all_sent("app")
    assert (contents[0].state, batch.message_id) == ("recovered", "om_1")


async def test_a_channel_without_a_card_of_the_incident_gets_routed_states(tmp_path: Path) -> None:
    harness = await asyncio.to_thread(
        OutboxHarness, tmp_path, {"states": ["recovered"], "channels": ["app"], "continue": True}, {"channels": ["ops"]}
    )
    await harness.fire("web")
    await harness.close(1)
    assert titles(await harness.all_sent("app")) == ["one recovered 1"]
    await asyncio.to_thread(harness.database.close)


async def test_the_end_of_an_alert_in_a_thread_is_a_reply_too(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    await harness.fire("web", "ServiceSlow")
    await harness.all_sent("app")
    await harness.fire("web", "ServiceSlow", "resolved")
    assert ("alert_over", "om_1") in [
        (contents[0].state, batch.reply_to) for batch, contents in await harness.all_sent("app")
    ]


async def test_alerts_of_many_names_are_combined(harness: OutboxHarness) -> None:
    for number in range(100):
        await harness.fire("", f"Alert{number}")
    harness.now += 5
    ((batch, _),) = await harness.all_sent("ops")
    assert (batch.form, len(batch.notifications)) == ("summary", 100)


async def test_new_messages_are_sent_before_updates(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    await harness.decide(1, "wait", "storm")
    harness.now += 5
    await harness.fire("db", severity="info")
    assert [batch.message_id for batch, _ in await harness.all_sent("app")] == [None, "om_1"]


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
async def test_the_state_that_a_card_shows(
    harness: OutboxHarness, verb: str, reason: Any, last: dict[str, Any], state: str
) -> None:
    await harness.fire("web")
    await harness.act(1, **last)
    await harness.decide(1, verb, reason)
    _, contents = await harness.send("app")
    assert contents[0].state == state


async def test_one_button_acknowledges_everything_in_a_message(harness: OutboxHarness) -> None:
    for number in range(3):
        await harness.fire("", "DiskFull", instance=f"n{number}")
    ((batch, contents),) = await harness.all_sent("app")
    assert all("acknowledge" in each.buttons for each in contents)
    assert await harness.run(acknowledgement.acknowledge_message, batch.first.id, "ann") == 3
    ((_, contents),) = await harness.all_sent("app")
    assert [each.acknowledged[0] for each in contents if each.acknowledged] == ["ann"] * 3
    assert await harness.run(acknowledgement.acknowledge_message, 10**6, "ann") == 0


async def test_an_acknowledgement_of_a_less_severe_alert_ends_when_the_service_goes_down(
    harness: OutboxHarness,
) -> None:
    await harness.fire("web", "ServiceSlow", severity="warning")
    await harness.run(acknowledgement.acknowledge_incident, 1, "ann")
    await harness.fire("web")
    sent = await harness.all_sent("app")
    assert [each.acknowledged for _, contents in sent for each in contents if each.state == "down"] == [None]


async def test_one_button_acknowledges_a_summary_too(harness: OutboxHarness) -> None:
    for number in range(40):
        await harness.fire(f"s{number}")
    await harness.all_sent("app")
    for number in range(40):
        await harness.decide(number + 1, "refuse", "attempts-used-up")
    batch = next(
        batch
        for batch, contents in await harness.all_sent("app")
        if contents[0].state == "person_needed" and batch.message_id is None
    )
    assert await harness.run(acknowledgement.acknowledge_message, batch.first.id, "ann") == 40


async def test_the_end_of_an_alert_is_not_sent_before_its_start(harness: OutboxHarness) -> None:
    await harness.fire("", "DiskFull")
    await harness.send("ops", "retry", "pending", after=300)
    await harness.fire("", "DiskFull", "resolved")
    assert [contents[0].state for _, contents in await harness.all_sent("ops")] == ["alert", "alert_over"]


async def test_postponed_notifications_do_not_hide_others(
    harness: OutboxHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "ROW_LIMIT", 20)
    for number in range(30):
        await harness.fire("", f"Alert{number}")
    harness.now += 5
    while isinstance(chosen := await harness.choose("ops"), Batch):
        await harness.send("ops", "retry", "pending", after=300)
    assert isinstance(chosen, float)
    await harness.fire("web", severity="info")
    batch = await harness.choose("ops")
    assert isinstance(batch, Batch) or batch < harness.now + 60


async def test_tries_are_counted_for_each_update(harness: OutboxHarness) -> None:
    for number in range(5):
        await harness.fire("", "DiskFull", instance=f"n{number}")
    await harness.all_sent("app")
    for number in range(4):
        await harness.fire("", "DiskFull", "resolved", instance=f"n{number}")
        ((batch, _),) = await harness.all_sent("app")
        assert batch.tries == 0


async def test_a_card_that_is_given_up_shows_the_end_first(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.run(
        lambda c: c.execute(update(notifications).where(notifications.c.channel == "app").values(replacements=2))
    )
    batch = await harness.choose("app")
    assert isinstance(batch, Batch)
    number = await harness.run(deliveries.reserve_delivery, batch)
    await harness.close(1)  # the card seems to show it
    await harness.run(
        deliveries.record_result, batch, number, SendResult("sent", "", message_id="om_9"), state="sent", not_before=0
    )
    ((again, contents),) = await harness.all_sent("app")
    assert (contents[0].state, again.message_id) == ("recovered", "om_9")


async def test_a_card_shows_every_change_of_the_decision(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.fire("web", status="resolved")
    assert [contents[0].state for _, contents in await harness.all_sent("app")] == ["down"]
    await harness.decide(1, "nothing", None)
    assert [contents[0].state for _, contents in await harness.all_sent("app")] == ["watched"]


async def test_an_alert_that_fires_again_has_a_new_card(harness: OutboxHarness) -> None:
    await harness.fire("", "DiskFull")
    await harness.all_sent("app")
    harness.now += 100
    await harness.reconciled(set())
    assert [contents[0].state for _, contents in await harness.all_sent("app")] == ["alert_over"]
    harness.now += 100
    await harness.reconciled({"DiskFull--"})
    ((batch, contents),) = await harness.all_sent("app")
    assert (contents[0].state, batch.message_id) == ("alert", None)
    await harness.run(acknowledgement.acknowledge_alert, 1, "ann")
    ((batch, _),) = await harness.all_sent("app")
    assert batch.message_id == "om_3"


async def test_open_problems_are_not_deleted_by_retention(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.fire("", "DiskFull")
    await harness.all_sent("app")
    await harness.all_sent("ops")
    harness.now += 86400
    assert await harness.run(retention.delete_before, harness.now) == 0
    await harness.close(1)
    await harness.fire("", "DiskFull", "resolved")
    await harness.all_sent("app")
    await harness.all_sent("ops")
    harness.now += 86400
    await harness.run(retention.delete_before, harness.now)
    assert [*await harness.rows("app"), *await harness.rows("ops")] == []


async def test_notifications_of_too_many_old_alerts_are_deleted_with_them(
    harness: OutboxHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_ALERTS", 1)
    for name in ("DiskFull", "Other"):
        harness.now += 100
        await harness.fire("", name)
        await harness.fire("", name, "resolved")
        await harness.all_sent("app")
        await harness.all_sent("ops")
    await harness.run(retention.delete_before, 0.0)
    kept = {row.alert_id for row in [*await harness.rows("app"), *await harness.rows("ops")]}
    assert kept == {2}


async def test_a_group_is_updated_as_one_message(harness: OutboxHarness) -> None:
    for number in range(3):
        await harness.fire("", "DiskFull", instance=f"n{number}")
    assert titles(await harness.all_sent("app")) == ["group alert 3"]
    await harness.fire("", "DiskFull", "resolved", instance="n1")
    ((batch, contents),) = await harness.all_sent("app")
    assert [each.state for each in contents] == ["alert", "alert_over", "alert"]
    assert batch.message_id == "om_1"


async def test_an_old_card_is_replaced(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    harness.now += 13.5 * 86400
    await harness.decide(1, "wait", "storm")
    batch, _ = await harness.send("app")
    assert batch.message_id is None
    assert {row.message_id for row in await harness.rows("app")} == {"om_2"}


async def test_after_a_rejected_card_further_notifications_are_sent_without_it(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app", "reject", "dead")
    await harness.decide(1, "refuse", "attempts-used-up")
    ((batch, contents),) = await harness.all_sent("app")
    assert (contents[0].state, batch.reply_to) == ("person_needed", None)
    await harness.close(1)
    ((batch, contents),) = await harness.all_sent("app")
    assert (contents[0].state, batch.message_id) == ("recovered", None)


async def test_cards_are_retired_when_a_channel_can_no_longer_update_them(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.fire("db")
    await harness.send("app")
    await harness.decide(1, "wait", "storm")
    await harness.run(deliveries.stop_updating_cards, ["app"])
    assert [(row.state, row.card, row.message_id) for row in await harness.rows("app")] == [
        ("sent", 0, None),
        ("pending", 0, None),
    ]
    await harness.decide(1, "wait", "maintenance")
    assert [contents[0].service.id for _, contents in await harness.all_sent("app") if contents[0].service] == ["db"]


async def test_a_channel_that_can_update_from_now_on_gets_the_end_of_earlier_incidents(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.send("app")
    await harness.run(deliveries.stop_updating_cards, ["app"])
    await harness.close(1)
    ((batch, contents),) = await harness.all_sent("app")
    assert (contents[0].state, batch.message_id) == ("recovered", None)


ESCALATED = {"channels": ["ops"], "escalate": {"after": "10m", "channels": ["lead", "boss"]}, "remind": "1h"}


async def test_escalation_until_acknowledged(tmp_path: Path) -> None:
    harness = await asyncio.to_thread(OutboxHarness, tmp_path, ESCALATED)
    await harness.fire("web")
    await harness.fire("", "DiskFull")
    began = harness.now
    counts = []
    for minutes in (9, 11, 21, 50):
        harness.now = began + minutes * 60
        await harness.run(escalation.add_escalations_and_reminders)
        counts.append([len(await harness.rows(name)) for name in ("lead", "boss")])
        if minutes == 11:
            assert (await harness.run(acknowledgement.acknowledge_incident, 1, "ann")).acknowledged_by == "ann"
            assert (await harness.run(acknowledgement.acknowledge_incident, 1, "bob")).acknowledged_by == "ann"
    assert counts == [[0, 0], [2, 0], [2, 1], [2, 1]]  # the alert is not acknowledged, the incident is
    _, contents = await harness.send("lead")
    assert contents[0].details["unacknowledged"] == 600.0
    harness.now = began + 3700
    await harness.close(1)
    assert sorted(row.kind for row in await harness.rows("lead")) == [
        "alert",
        "down",
        "recovered",
    ]  # escalated channels get the end, too
    await asyncio.to_thread(harness.database.close)


async def test_reminders_while_an_incident_lasts(tmp_path: Path) -> None:
    harness = await asyncio.to_thread(OutboxHarness, tmp_path, ESCALATED)
    await harness.fire("web")
    began = harness.now
    for minutes in (59, 61, 62, 121, 250):
        harness.now = began + minutes * 60
        await harness.run(escalation.add_escalations_and_reminders)
    await harness.close(1)
    harness.now += 7200
    assert await harness.run(escalation.add_escalations_and_reminders) is False
    assert [row.kind for row in await harness.rows("ops")] == ["down", "reminder", "reminder", "reminder", "recovered"]
    await asyncio.to_thread(harness.database.close)


async def test_alerts_without_actions_are_escalated_and_acknowledged(tmp_path: Path) -> None:
    harness = await asyncio.to_thread(OutboxHarness, tmp_path, ESCALATED)
    await harness.fire("web", "ServiceSlow")
    harness.now += 660
    await harness.run(escalation.add_escalations_and_reminders)
    _, contents = await harness.send("lead")
    assert (contents[0].state, contents[0].buttons["acknowledge"]["incident"]) == ("alert", 1)
    await harness.run(acknowledgement.acknowledge_incident, 1, "ann")
    harness.now += 3600
    await harness.run(escalation.add_escalations_and_reminders)
    assert [len(await harness.rows(name)) for name in ("lead", "boss")] == [1, 0]
    assert [row.kind for row in await harness.rows("ops")] == ["alert", "reminder"]
    await asyncio.to_thread(harness.database.close)


async def test_nothing_is_escalated_without_a_first_notification(tmp_path: Path) -> None:
    harness = await asyncio.to_thread(OutboxHarness, tmp_path, {"channels": [], "escalate": ESCALATED["escalate"]})
    await harness.fire("web")
    harness.now += 3600
    assert await harness.run(escalation.add_escalations_and_reminders) is False
    await asyncio.to_thread(harness.database.close)


KINDS = ["fire", "close", "act", "decide", "send ops", "send app", "fail ops", "fail app", "wait"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3)), max_size=40)


class Course:
    """Events in any order, and the state that each card of the app shows last."""

    def __init__(self, harness: OutboxHarness) -> None:
        self.harness = harness
        self.shown: dict[str, str] = {}

    async def step(self, what: str, number: int) -> None:
        service = f"s{number}"
        found = await self.harness.run(lifecycle.find_open, service)
        if what == "fire":
            await self.harness.fire(service)
        elif found and what == "close":
            await self.harness.close(found, service)
        elif found and what == "act":
            await self.harness.run(lambda c: c.execute(update(actions).values(state="failed")))
            await self.harness.act(found, service=service)
        elif found and what == "decide":
            await self.harness.decide(found, "wait", "storm" if number % 2 else "maintenance")
        elif what.startswith("send"):
            await self.send(what.split()[1])
        elif what.startswith("fail"):
            await self.send(what.split()[1], outcome="retry", state="pending", after=2.0)
        self.harness.now += number

    async def send(self, channel: str, **more: Any) -> None:
        if not isinstance(await self.harness.choose(channel), Batch):
            return
        batch, contents = await self.harness.send(channel, **more)
        if more:
            return
        keys = {row.id: row.key for row in await self.harness.rows("app")}
        for queued, notification in zip(batch.notifications, contents, strict=True):
            if queued.card:
                self.shown[keys[queued.id]] = notification.state

    async def to_its_end(self, channel: str) -> None:
        while isinstance(chosen := await self.harness.choose(channel), Batch) or chosen < self.harness.now + 3600:
            if isinstance(chosen, float):
                self.harness.now = chosen
            await self.send(channel)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_whatever_happens_every_card_shows_the_final_state(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    harness = await asyncio.to_thread(OutboxHarness, tmp_path_factory.mktemp("harness"))
    course = Course(harness)
    for what, number in steps:
        await course.step(what, number)
    for channel in ("ops", "app"):
        await course.to_its_end(channel)
        assert {row.state for row in await harness.rows(channel)} <= {"sent"}
    for row in await harness.run(lambda c: c.execute(select(incident_rows)).all()):
        wanted = {"recovered"} if row.state == "recovered" else {"down", "acting"}
        assert course.shown[notification_rows.incident_key(row.id)] in wanted
    await asyncio.to_thread(harness.database.close)


async def test_migrations_create_the_tables_of_the_schema(harness: OutboxHarness, tmp_path: Path) -> None:
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
