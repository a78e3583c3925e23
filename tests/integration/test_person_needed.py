"""Notifications when automation ends, waits or is held; on a real record."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, select

from remediator.incidents import acknowledgement, actions, decisions
from remediator.incidents.actions import Claim, Evidence
from remediator.notifications import escalation
from remediator.notifications.channels.feishu import FeishuOptions
from remediator.notifications.content import Notification
from remediator.notifications.messages import render_card
from remediator.notifications.rendering import Templates
from remediator.operations import set_automation
from remediator.policy.situation import ActionHistory, ActionsInProgress, Decision, Observation, Situation
from remediator.record import maintenance, stops
from remediator.record.database import MIGRATIONS, Database
from remediator.record.schema import actions as action_rows
from remediator.record.schema import incidents as incident_rows
from tests.integration.loop import Loop
from tests.integration.test_outbox import APP, OutboxHarness, written
from tests.support import eventually, inventory_of

LEADS = {"states": ["person_needed"], "channels": ["lead"], "continue": True}
OPS = {"channels": ["ops"]}
DOWN = Observation(up=False, success=False, reason="timeout", message="no answer within 10 s")
EN, ZH = Templates("en"), Templates("zh")


@asynccontextmanager
async def outbox_of(folder: Path, *routes: dict[str, Any]) -> AsyncIterator[OutboxHarness]:
    harness = await asyncio.to_thread(OutboxHarness, folder, *routes)
    yield harness
    await asyncio.to_thread(harness.database.close)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[OutboxHarness]:
    async with outbox_of(tmp_path, LEADS, OPS) as made:
        yield made


async def attempt(harness: OutboxHarness, state: Any, *, by: str = "alert", count: int = 1, **ended: Any) -> None:
    """Record `count` attempts on the service of incident 1; all but the last failed."""
    for number in range(count):
        await harness.decide(1, "act", None)
        await harness.act(1, requested_by=by, counts=int(by == "alert"), state="running")
        number_of = len(await harness.run(lambda c: c.execute(action_rows.select()).all()))
        claim = Claim(number_of, 1, "web", "h", "restart", harness.now)
        last = number == count - 1
        ending = actions.Ending(state, "exit status 7", **ended) if last else actions.Ending("failed", "exit status 7")
        await harness.run(actions.end_action, claim, ending)


async def kinds(harness: OutboxHarness, channel: str) -> list[str]:
    return [row.kind for row in await harness.rows(channel)]


MENTIONING = FeishuOptions.model_validate(
    {"webhook": "http://f/", "mention": {"critical": ["all", "ou_bob"], "warning": ["all", "ou_bob"]}}
)


async def read(notification: Notification, templates: Templates = EN) -> str:
    """Return the title, the lines and the mentions of a card."""
    card = await asyncio.to_thread(render_card, [notification], "one", templates, MENTIONING)
    lines = [line.plain for line in card.lines]
    return "\n".join([card.title, *lines, *(f"mentions {name}" for name in card.mentions)])


@pytest.mark.parametrize("state", ["failed", "unknown"])
async def test_the_end_of_the_last_attempt_notifies_that_a_person_is_needed(harness: OutboxHarness, state: str) -> None:
    await harness.fire("web")
    await attempt(harness, state, count=3)
    assert await kinds(harness, "ops") == ["down", "could_not_restart", "could_not_restart", "person_needed"]
    assert await kinds(harness, "lead") == ["person_needed"]
    await harness.decide(1, "refuse", "attempts-used-up")  # unchanged
    assert await kinds(harness, "lead") == ["person_needed"]
    _, contents = await harness.send("lead")
    text = await read(contents[0])
    assert text.startswith("A person is needed: web is down, 3 restarts failed\n")
    assert "Automation ended: all attempts are used up" in text
    assert "exit status 7" in text
    assert "mentions all" in text
    assert "自动处理已停止: 重启次数已用完" in await read(contents[0], ZH)
    await harness.close(1)
    assert await kinds(harness, "lead") == ["person_needed", "recovered"]


@pytest.mark.parametrize("reason", ["no-control", "not-restartable", "host-key-changed", "sudo-refused"])
async def test_a_permanent_refusal_notifies_that_a_person_is_needed(harness: OutboxHarness, reason: str) -> None:
    await harness.fire("web")
    await harness.decide(1, "refuse", reason)
    # These two refusals may be temporary.
    may_pass = reason in ("not-restartable", "sudo-refused")
    assert await kinds(harness, "lead") == ([] if may_pass else ["person_needed"])
    harness.now += 121
    await harness.decide(1, "refuse", reason)
    await harness.decide(1, "wait", "maintenance")
    await harness.decide(1, "refuse", reason)
    assert await kinds(harness, "lead") == ["person_needed"]
    (story,) = (await harness.send("lead"))[1]
    assert EN.words["reasons"][reason] in await read(story)


@pytest.mark.parametrize(
    ("ended", "wanted"),
    [
        ({"reached": False, "blocked": "sudo-refused"}, "person_needed"),
        ({"reached": False, "blocked": "host-key-changed"}, "person_needed"),
        ({"reached": False, "blocked": "shell-refused"}, "person_needed"),
        ({"reached": False}, "could_not_restart"),
        ({}, "could_not_restart"),
    ],
)
async def test_the_notification_at_the_end_of_an_attempt(
    harness: OutboxHarness, ended: dict[str, Any], wanted: str
) -> None:
    await harness.fire("web")
    await attempt(harness, "failed", **ended)
    assert await kinds(harness, "ops") == ["down", wanted]


async def test_a_removed_service_needs_nobody(harness: OutboxHarness) -> None:
    await harness.fire("web")
    services = {name: each for name, each in harness.inventory.services.items() if name != "web"}
    harness.inventory = harness.inventory.model_copy(update={"services": services})
    await attempt(harness, "unknown")
    assert (await kinds(harness, "ops"), await kinds(harness, "lead")) == (["down", "could_not_restart"], [])


async def test_a_lost_login_notifies_once_although_it_is_tried_again(harness: OutboxHarness) -> None:
    await harness.fire("web")
    for _ in range(3):
        await attempt(harness, "failed", reached=False, blocked="shell-refused")
        await harness.decide(1, "wait", "backing-off")
        harness.now += 400
        await harness.decide(1, "wait", "backing-off")
    assert await kinds(harness, "lead") == ["person_needed"]
    assert await kinds(harness, "ops") == ["down", "person_needed", "waiting"]
    _, contents = await harness.send("lead")
    assert "the host does not run Defib's commands" in await read(contents[0])


async def test_a_service_that_an_operator_stopped_needs_nobody_until_it_runs_again(harness: OutboxHarness) -> None:
    await harness.run(stops.add, ["web"], 1, "ann")
    await harness.fire("web")
    await harness.decide(1, "refuse", "attempts-used-up")
    assert await kinds(harness, "ops") == []
    await harness.run(stops.remove, ["web"])  # its incident is still open, and goes on aloud
    await harness.fire("web", "ServiceSlow")
    assert await kinds(harness, "ops") == ["alert"]


async def test_a_renamed_channel_is_notified_that_a_person_is_needed(harness: OutboxHarness, tmp_path: Path) -> None:
    await harness.fire("web")
    renamed = written({"channels": ["boss"]})
    harness.inventory = (await asyncio.to_thread(inventory_of, tmp_path / "renamed", renamed)).inventory
    await attempt(harness, "failed", count=3)
    assert await kinds(harness, "boss") == ["person_needed"]


async def test_a_stop_cancels_an_earlier_approval(harness: OutboxHarness) -> None:
    await harness.fire("web")
    service = harness.inventory.services["web"]
    step = harness.inventory.remediation.steps[0]
    situation = Situation(harness.now, frozenset({"ServiceDown"}), ActionHistory(), ActionsInProgress(), DOWN)
    await harness.run(actions.queue_action, 1, service, step, situation)
    assert await harness.run(actions.approve_action, 1, "ann") == "approved"
    await harness.run(
        actions.claim_operator_action, service, "stop", situation,
        overruled=(), by="bob", evidence=Evidence(),
    )  # fmt: skip
    rows = await harness.run(lambda c: c.execute(action_rows.select()).all())
    assert [(row.kind, row.state) for row in rows] == [("restart", "cancelled"), ("stop", "running")]


async def test_an_unknown_status_is_notified_again_after_it_was_known(harness: OutboxHarness) -> None:
    await harness.fire("web")

    async def wait(reason: Any) -> None:
        await harness.decide(1, "wait", reason)
        harness.now += 125
        await harness.decide(1, "wait", reason)

    await attempt(harness, "unknown", verified=False)
    await wait("blind")
    assert await kinds(harness, "ops") == ["down", "blind"]  # it is the same
    await wait("backing-off")
    await wait("blind")
    assert await kinds(harness, "ops") == ["down", "blind", "waiting", "blind"]


async def test_a_failed_restart_by_an_operator_needs_nobody_else(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await attempt(harness, "failed", by="person", count=4)
    assert await kinds(harness, "lead") == []
    assert await kinds(harness, "ops") == ["down", *["could_not_restart"] * 4]


async def test_notify_only_services_get_no_person_needed(harness: OutboxHarness) -> None:
    await harness.fire("web")
    for reason in ("notify-only", "not-an-alert-to-act-on", "already-up"):
        await harness.decide(1, "refuse", reason)
    assert await kinds(harness, "lead") == []


async def test_person_needed_is_notified_again_after_a_reset(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await attempt(harness, "failed", count=3)
    harness.now += 10
    await harness.run(actions.reset_attempts, harness.inventory.services["web"], "ann")
    harness.now += 10
    await attempt(harness, "failed", count=3)
    assert await kinds(harness, "lead") == ["person_needed"] * 2


async def after(harness: OutboxHarness, began: float, *minutes: int) -> list[int]:
    """Return how often the leads were notified that a person is needed, after so many minutes."""
    counts = []
    for each in minutes:
        harness.now = began + each * 60
        await harness.run(escalation.add_escalations_and_reminders)
        counts.append(len(await harness.rows("lead")))
    return counts


@pytest.mark.parametrize(("remind", "counts"), [({}, [1, 2, 2, 3, 3]), ({"remind": "10m"}, [2, 2, 2, 3, 3])])
async def test_person_needed_is_repeated_until_acknowledged(
    tmp_path: Path, remind: dict[str, str], counts: list[int]
) -> None:
    async with outbox_of(tmp_path, {**LEADS, **remind}, OPS) as harness:
        await harness.fire("web")
        await harness.decide(1, "refuse", "attempts-used-up")
        began = harness.now
        assert await after(harness, began, 29, 31, 32, 61) == counts[:4]
        assert set(await kinds(harness, "lead")) == {"person_needed"}
        await harness.run(acknowledgement.acknowledge_incident, 1, "ann")
        assert await after(harness, began, 300) == counts[4:]


async def test_person_needed_is_not_repeated_while_the_service_responds(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.decide(1, "refuse", "attempts-used-up")
    began = harness.now
    await harness.decide(1, "refuse", "already-up")
    assert await after(harness, began, 31) == [1]
    await harness.decide(1, "refuse", "attempts-used-up")
    assert await after(harness, began, 32) == [2]
    await harness.close(1)
    assert await kinds(harness, "lead") == ["person_needed", "person_needed", "recovered"]
    assert await after(harness, began, 300) == [3]


async def test_a_card_shows_person_needed_and_a_reply_mentions(tmp_path: Path) -> None:
    async with outbox_of(tmp_path, {"channels": ["app"]}) as harness:
        await harness.fire("web")
        await harness.send("app")
        await attempt(harness, "failed", count=3)
        sent = await harness.all_sent("app")
        assert [contents[0].state for _, contents in sent if _.message_id == "om_1"][-1] == "person_needed"
        assert [contents[0].state for batch, contents in sent if batch.message_id is None] == ["person_needed"]


@pytest.mark.needs("sshd")
async def test_person_needed_is_sent_after_a_kill(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", restart="exit 7")}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")

    async def contents() -> bool:
        return bool(loop.feishu.received)

    await eventually(contents)
    loop.feishu.faults.extend(["reset"] * 3)
    await loop.until_event("person_needed")
    await loop.restart_remediator()
    loop.feishu.faults.clear()

    async def called() -> bool:
        return [card.title for card in loop.feishu.received] == [
            "Service down: web",
            "A person is needed: web is down, the restart failed",
        ]

    await eventually(called)
    assert [row["kind"] for row in (await loop.incident())["notifications"]] == ["down", "person_needed"]


async def test_a_long_wait_is_notified_once_and_mentions_nobody(harness: OutboxHarness) -> None:
    await harness.fire("web")

    async def wait(reason: Any, seconds: float, ends: float | None = None) -> None:
        decision = Decision("wait", reason, detail="3 of 4", ends=ends)
        for _ in range(2):
            await harness.run(decisions.record_decision, 1, decision)
            harness.now += seconds

    await wait("storm", 115)
    assert await kinds(harness, "ops") == ["down"]
    ends = harness.now + 600
    await wait("storm", 10, ends)
    await wait("storm", 500, ends)
    assert await kinds(harness, "ops") == ["down", "waiting"]
    ((batch, contents),) = await harness.all_sent("ops")
    text = await read(contents[0])
    assert (batch.first.kind, "mentions" in text) == ("waiting", False)
    assert text.startswith("Not restarted yet: web\n")
    assert "Not restarted: too many services fail at once: check the network and the exporter: 3 of 4 (until 20" in text
    assert "未重启: 同时故障的服务过多：请检查网络和 exporter: “3 of 4”（至 20" in await read(contents[0], ZH)
    await wait("approval", 500)  # notified as `approval`
    await wait("target-busy", 500)  # its own action
    assert await kinds(harness, "ops") == ["down", "waiting"]
    await harness.act(1, state="failed")
    await wait("storm", 125)
    await wait("storm", 1)
    assert await kinds(harness, "ops") == ["down", "waiting", "waiting"]
    await wait("blind", 125)
    await wait("blind", 1)
    assert await kinds(harness, "ops") == ["down", "waiting", "waiting", "blind"]


WINDOW = {"service": "web", "reason": "disks"}


@pytest.mark.parametrize("notify", [False, True])
@pytest.mark.parametrize("by", ["person", "window"])
async def test_in_maintenance_cards_say_so_and_mention_nobody_unless_it_notifies(
    harness: OutboxHarness, tmp_path: Path, by: str, notify: bool
) -> None:
    if by == "person":
        await harness.run(
            maintenance.begin, "host", "h", until=harness.now + 3600, reason="disks", by="ann",
            notify=notify,
        )  # fmt: skip
    else:
        windows = await asyncio.to_thread(_windows, tmp_path / "other", notify=notify)
        rules = harness.inventory.remediation.model_copy(update={"maintenance": windows})
        harness.inventory = harness.inventory.model_copy(update={"remediation": rules})
    await harness.fire("web")
    await harness.fire("web", "ServiceSlow")
    await harness.fire("", "HostDiskFull", host="h" if by == "person" else "")
    harness.now += 5
    contents = [contents[0] for _, contents in await harness.all_sent("ops")]
    assert [story.state for story in contents] == ["down", "alert", "alert"]
    for story in contents[: 3 if by == "person" else 2]:
        text = await read(story)
        assert ("mentions ou_bob" in text) is notify
        assert "maintenance" in text
        assert "disks (until 20" in text
    assert "维护中: " in await read(contents[0], ZH)


def _windows(folder: Path, *, notify: bool) -> Any:
    """Return two weekly windows, one of which is open at any time."""
    half, other = {**WINDOW, "from": "00:00", "to": "12:00"}, {**WINDOW, "from": "12:00", "to": "00:00"}
    windows = [{**each, "notify": notify} for each in (half, other)]
    service = {"probe": {"tcp": {"address": "127.0.0.1:1"}}}
    written = {"services": {"web": service}, "remediation": {"maintenance": windows}}
    return inventory_of(folder, written).inventory.remediation.maintenance


async def test_while_automation_is_off_cards_say_so_and_only_person_needed_mentions(harness: OutboxHarness) -> None:
    await harness.run(set_automation, enabled=False, by="ann", reason="a change")
    await harness.fire("web")
    _, (down,) = await harness.send("ops")
    text = await read(down)
    assert down.state == "down"
    assert "Not restarted: automation is off: ann: a change" in text
    assert "mentions" not in text
    await harness.decide(1, "refuse", "attempts-used-up")
    needed = next(contents[0] for _, contents in await harness.all_sent("ops") if contents[0].state == "person_needed")
    assert "mentions all" in await read(needed)


async def test_an_outage_in_an_older_incident_has_its_own_times_and_reasons(
    tmp_path: Path,
) -> None:
    async with outbox_of(tmp_path, {"channels": ["ops", "app"]}) as harness:
        await harness.fire("web", "ServiceFlapping", severity="warning")
        await harness.decide(1, "refuse", "not-an-alert-to-act-on")
        began = harness.now = harness.now + 81
        for channel in ("ops", "app"):
            await harness.all_sent(channel)
        await harness.fire("web")
        batches = [(await harness.send(channel))[1][0] for channel in ("ops", "app")]
        for story in batches:
            assert story.since.timestamp() == pytest.approx(harness.database.clock.unix(began), abs=5)
            assert "remediation.alerts" not in await read(story)
        await harness.decide(1, "wait", "backing-off")
        harness.now += 45
        await harness.close(1)
        found = {contents[0].state: contents[0] for _, contents in await harness.all_sent("ops")}
        assert found["recovered"].duration == pytest.approx(45, abs=5)
        assert "Recovered: web (was down 4" in await read(found["recovered"])


async def test_a_late_notification_shows_the_decision_of_its_time(harness: OutboxHarness) -> None:
    await harness.fire("web")
    harness.now += 1
    await harness.decide(1, "wait", "host-down")
    harness.now += 600
    await harness.decide(1, "wait", "storm")
    (row,) = await harness.rows("ops")
    assert row.kind == "down"
    _, (story,) = await harness.send("ops")
    assert "Not restarted: the host is down" in await read(story)


async def test_the_failed_probe_is_stored_and_shown(harness: OutboxHarness) -> None:
    await harness.fire("web")
    decision = Decision("wait", "storm")
    await harness.run(decisions.record_decision, 1, decision, DOWN)
    await harness.run(decisions.record_decision, 1, decision, Observation(None, None, None))
    _, (story,) = await harness.send("ops")
    assert "Probe: timeout: no answer within 10 s" in await read(story)
    await harness.close(1)
    _, (story,) = await harness.send("ops")
    assert "Probe" not in await read(story)


async def test_an_incident_that_was_given_up_before_an_upgrade_needs_a_person(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/record.db"
    await asyncio.to_thread(_before, url)
    inventory = (await asyncio.to_thread(inventory_of, tmp_path / "c", _written())).inventory
    database = await asyncio.to_thread(Database, url, inventory)
    await database.write(decisions.record_decision, 1, Decision("refuse", "attempts-used-up"))
    rows = await database.write(lambda c: c.execute(select(incident_rows)).all())
    assert rows[0].person_needed_at is not None
    assert rows[0].down_at == rows[0].opened_at
    await asyncio.to_thread(database.close)


def _written() -> dict[str, Any]:
    return {"notify": {"channels": {"app": {"feishu_app": APP}}, "routes": [{"channels": ["app"]}]}}


def _before(url: str) -> None:
    """Create a record of an earlier version, with an incident that was given up."""
    engine = create_engine(url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        connection.exec_driver_sql(
            "INSERT INTO incidents (id, service, state, opened_at, labels, verb, reason)"
            " VALUES (1, 'web', 'open', 5.0, '{}', 'refuse', 'attempts-used-up')"
        )
        connection.exec_driver_sql(
            "INSERT INTO notices (channel, about, kind, severity, incident_id, content, created_at, state, tries,"
            " not_before) VALUES ('app', 'gave_up incident 1', 'gave_up', 'critical', 1, '{}', 5.0, 'sent', 1, 5.0)"
        )
    engine.dispose()
