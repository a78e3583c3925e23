"""What people are told when automation has ended, when it waits, and when they hold it back; on a real record."""

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
from remediator.policy.situation import Decision, Observation, Past, Present, Situation
from remediator.record import maintenance, stops
from remediator.record.database import MIGRATIONS, Database
from remediator.record.schema import actions as action_rows
from remediator.record.schema import incidents as incident_rows
from tests.integration.loop import Loop
from tests.integration.test_outbox import APP, Desk, written
from tests.support import eventually, inventory_of

LEADS = {"states": ["person_needed"], "channels": ["lead"], "continue": True}
OPS = {"channels": ["ops"]}
DOWN = Observation(up=False, success=False, reason="timeout", message="no answer within 10 s")
EN, ZH = Templates("en"), Templates("zh")


@asynccontextmanager
async def desk_of(folder: Path, *routes: dict[str, Any]) -> AsyncIterator[Desk]:
    desk = await asyncio.to_thread(Desk, folder, *routes)
    yield desk
    await asyncio.to_thread(desk.database.close)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_of(tmp_path, LEADS, OPS) as made:
        yield made


async def attempt(desk: Desk, state: Any, *, by: str = "alert", count: int = 1, **ended: Any) -> None:
    """Make so many attempts on the service of incident 1, all but the last of which have failed."""
    for number in range(count):
        await desk.decide(1, "act", None)
        await desk.act(1, requested_by=by, counts=int(by == "alert"), state="running")
        number_of = len(await desk.run(lambda c: c.execute(action_rows.select()).all()))
        claim = Claim(number_of, 1, "web", "h", "restart", desk.now)
        last = number == count - 1
        await desk.run(
            actions.end_action, claim, state if last else "failed", "exit status 7",
            **(ended if last else {}),
        )  # fmt: skip


async def kinds(desk: Desk, channel: str) -> list[str]:
    return [row.kind for row in await desk.rows(channel)]


MENTIONING = FeishuOptions.model_validate(
    {"webhook": "http://f/", "mention": {"critical": ["all", "ou_bob"], "warning": ["all", "ou_bob"]}}
)


async def read(notification: Notification, templates: Templates = EN) -> str:
    """Return the title, the lines and the mentions of a card."""
    card = await asyncio.to_thread(render_card, [notification], "one", templates, MENTIONING)
    lines = [line.plain for line in card.lines]
    return "\n".join([card.title, *lines, *(f"mentions {name}" for name in card.mentions)])


@pytest.mark.parametrize("state", ["failed", "unknown"])
async def test_the_last_attempt_s_end_says_that_a_person_is_needed(desk: Desk, state: str) -> None:
    await desk.fire("web")
    await attempt(desk, state, count=3)
    assert await kinds(desk, "ops") == ["down", "could_not_restart", "could_not_restart", "person_needed"]
    assert await kinds(desk, "lead") == ["person_needed"]
    await desk.decide(1, "refuse", "attempts-used-up")  # it is no news
    assert await kinds(desk, "lead") == ["person_needed"]
    _, told = await desk.send("lead")
    text = await read(told[0])
    assert text.startswith("A person is needed: web\n")
    assert "Automation ended: all attempts are used up" in text
    assert "exit status 7" in text
    assert "mentions all" in text
    assert "自动处理已停止: 重试次数已用完" in await read(told[0], ZH)
    await desk.close(1)
    assert await kinds(desk, "lead") == ["person_needed", "recovered"]


@pytest.mark.parametrize("reason", ["no-control", "not-restartable", "host-key-changed", "sudo-refused"])
async def test_a_refusal_for_good_says_that_a_person_is_needed(desk: Desk, reason: str) -> None:
    await desk.fire("web")
    await desk.decide(1, "refuse", reason)
    # A probe that could not be made may pass by itself, and so may what sudo says.
    may_pass = reason in ("not-restartable", "sudo-refused")
    assert await kinds(desk, "lead") == ([] if may_pass else ["person_needed"])
    desk.now += 121
    await desk.decide(1, "refuse", reason)
    await desk.decide(1, "wait", "maintenance")
    await desk.decide(1, "refuse", reason)
    assert await kinds(desk, "lead") == ["person_needed"]
    (story,) = (await desk.send("lead"))[1]
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
async def test_what_an_attempt_s_end_says(desk: Desk, ended: dict[str, Any], wanted: str) -> None:
    await desk.fire("web")
    await attempt(desk, "failed", **ended)
    assert await kinds(desk, "ops") == ["down", wanted]


async def test_a_service_that_left_the_inventory_needs_nobody(desk: Desk) -> None:
    await desk.fire("web")
    services = {name: each for name, each in desk.inventory.services.items() if name != "web"}
    desk.inventory = desk.inventory.model_copy(update={"services": services})
    await attempt(desk, "unknown")
    assert (await kinds(desk, "ops"), await kinds(desk, "lead")) == (["down", "could_not_restart"], [])


async def test_a_lost_login_calls_a_person_once_though_it_is_tried_again(desk: Desk) -> None:
    await desk.fire("web")
    for _ in range(3):
        await attempt(desk, "failed", reached=False, blocked="shell-refused")
        await desk.decide(1, "wait", "backing-off")
        desk.now += 400
        await desk.decide(1, "wait", "backing-off")
    assert await kinds(desk, "lead") == ["person_needed"]
    assert await kinds(desk, "ops") == ["down", "person_needed", "waiting"]
    _, told = await desk.send("lead")
    assert "the host does not run Defib's commands" in await read(told[0])


async def test_what_a_person_stopped_needs_nobody_until_it_runs_again(desk: Desk) -> None:
    await desk.run(stops.add, ["web"], 1, "ann")
    await desk.fire("web")
    await desk.decide(1, "refuse", "attempts-used-up")
    assert await kinds(desk, "ops") == []
    await desk.run(stops.remove, ["web"])  # its incident is still open, and goes on aloud
    await desk.fire("web", "ServiceSlow")
    assert await kinds(desk, "ops") == ["alert"]


async def test_a_channel_that_was_renamed_is_told_that_a_person_is_needed(desk: Desk, tmp_path: Path) -> None:
    await desk.fire("web")
    renamed = written({"channels": ["boss"]})
    desk.inventory = (await asyncio.to_thread(inventory_of, tmp_path / "renamed", renamed)).inventory
    await attempt(desk, "failed", count=3)
    assert await kinds(desk, "boss") == ["person_needed"]


async def test_an_approval_before_a_stop_is_overtaken_by_it(desk: Desk) -> None:
    await desk.fire("web")
    service = desk.inventory.services["web"]
    step = desk.inventory.remediation.steps[0]
    situation = Situation(desk.now, frozenset({"ServiceDown"}), Past(), Present(), DOWN)
    await desk.run(actions.queue, 1, service, step, situation)
    assert await desk.run(actions.approve, 1, "ann") == "approved"
    await desk.run(
        actions.claim_for_operator, service, "stop", situation,
        overruled=(), by="bob", evidence=Evidence(),
    )  # fmt: skip
    rows = await desk.run(lambda c: c.execute(action_rows.select()).all())
    assert [(row.kind, row.state) for row in rows] == [("restart", "cancelled"), ("stop", "running")]


async def test_that_nobody_can_see_a_service_is_told_again_after_it_was_seen(desk: Desk) -> None:
    await desk.fire("web")

    async def wait(reason: Any) -> None:
        await desk.decide(1, "wait", reason)
        desk.now += 125
        await desk.decide(1, "wait", reason)

    await attempt(desk, "unknown", verified=False)
    await wait("blind")
    assert await kinds(desk, "ops") == ["down", "blind"]  # it is the same
    await wait("backing-off")
    await wait("blind")
    assert await kinds(desk, "ops") == ["down", "blind", "waiting", "blind"]


async def test_a_person_s_own_restart_that_failed_needs_nobody_else(desk: Desk) -> None:
    await desk.fire("web")
    await attempt(desk, "failed", by="person", count=4)
    assert await kinds(desk, "lead") == []
    assert await kinds(desk, "ops") == ["down", *["could_not_restart"] * 4]


async def test_services_that_are_only_told_of_need_no_such_card(desk: Desk) -> None:
    await desk.fire("web")
    for reason in ("notify-only", "not-an-alert-to-act-on", "already-up"):
        await desk.decide(1, "refuse", reason)
    assert await kinds(desk, "lead") == []


async def test_after_a_reset_it_is_said_again(desk: Desk) -> None:
    await desk.fire("web")
    await attempt(desk, "failed", count=3)
    desk.now += 10
    await desk.run(actions.reset_attempts, desk.inventory.services["web"], "ann")
    desk.now += 10
    await attempt(desk, "failed", count=3)
    assert await kinds(desk, "lead") == ["person_needed"] * 2


async def after(desk: Desk, began: float, *minutes: int) -> list[int]:
    """How often the leads were told that a person is needed, after so many minutes."""
    told = []
    for each in minutes:
        desk.now = began + each * 60
        await desk.run(escalation.notify_again)
        told.append(len(await desk.rows("lead")))
    return told


@pytest.mark.parametrize(("remind", "told"), [({}, [1, 2, 2, 3, 3]), ({"remind": "10m"}, [2, 2, 2, 3, 3])])
async def test_it_is_repeated_until_somebody_acknowledges(
    tmp_path: Path, remind: dict[str, str], told: list[int]
) -> None:
    async with desk_of(tmp_path, {**LEADS, **remind}, OPS) as desk:
        await desk.fire("web")
        await desk.decide(1, "refuse", "attempts-used-up")
        began = desk.now
        assert await after(desk, began, 29, 31, 32, 61) == told[:4]
        assert set(await kinds(desk, "lead")) == {"person_needed"}
        await desk.run(acknowledgement.acknowledge_incident, 1, "ann")
        assert await after(desk, began, 300) == told[4:]


async def test_one_that_answers_is_not_called_for_again(desk: Desk) -> None:
    await desk.fire("web")
    await desk.decide(1, "refuse", "attempts-used-up")
    began = desk.now
    await desk.decide(1, "refuse", "already-up")
    assert await after(desk, began, 31) == [1]
    await desk.decide(1, "refuse", "attempts-used-up")
    assert await after(desk, began, 32) == [2]
    await desk.close(1)
    assert await kinds(desk, "lead") == ["person_needed", "person_needed", "recovered"]
    assert await after(desk, began, 300) == [3]


async def test_an_app_s_card_says_it_and_its_thread_calls(tmp_path: Path) -> None:
    async with desk_of(tmp_path, {"channels": ["app"]}) as desk:
        await desk.fire("web")
        await desk.send("app")
        await attempt(desk, "failed", count=3)
        sent = await desk.all_sent("app")
        assert [told[0].state for _, told in sent if _.message_id == "om_1"][-1] == "person_needed"
        assert [told[0].state for batch, told in sent if batch.message_id is None] == ["person_needed"]


@pytest.mark.needs("sshd")
async def test_killed_before_it_could_be_sent_it_is_sent_by_the_next(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", restart="exit 7")}, attempts=1)
    await loop.kill("web")
    await loop.fire("web")

    async def told() -> bool:
        return bool(loop.feishu.received)

    await eventually(told)
    loop.feishu.misbehave.extend(["reset"] * 3)
    await loop.until_event("person_needed")
    await loop.restart_remediator()
    loop.feishu.misbehave.clear()

    async def called() -> bool:
        return [card.title for card in loop.feishu.received] == ["Service down: web", "A person is needed: web"]

    await eventually(called)
    assert [row["kind"] for row in (await loop.incident())["notifications"]] == ["down", "person_needed"]


async def test_a_long_wait_is_told_once_and_calls_nobody(desk: Desk) -> None:
    await desk.fire("web")

    async def wait(reason: Any, seconds: float, ends: float | None = None) -> None:
        decision = Decision("wait", reason, detail="3 of 4", ends=ends)
        for _ in range(2):
            await desk.run(decisions.record_decision, 1, decision)
            desk.now += seconds

    await wait("storm", 115)
    assert await kinds(desk, "ops") == ["down"]
    ends = desk.now + 600
    await wait("storm", 10, ends)
    await wait("storm", 500, ends)
    assert await kinds(desk, "ops") == ["down", "waiting"]
    ((batch, told),) = await desk.all_sent("ops")
    text = await read(told[0])
    assert (batch.first.kind, "mentions" in text) == ("waiting", False)
    assert text.startswith("Not restarted yet: web\n")
    assert "Not restarted: too many services fail at once: check the network and the exporter: 3 of 4 (until 20" in text
    assert "未重启: 同时故障的服务过多：请检查网络和 exporter: 3 of 4（至 20" in await read(told[0], ZH)
    await wait("approval", 500)  # asked for by a notice of its own
    await wait("target-busy", 500)  # its own action
    assert await kinds(desk, "ops") == ["down", "waiting"]
    await desk.act(1, state="failed")
    await wait("storm", 125)
    await wait("storm", 1)
    assert await kinds(desk, "ops") == ["down", "waiting", "waiting"]
    await wait("blind", 125)
    await wait("blind", 1)
    assert await kinds(desk, "ops") == ["down", "waiting", "waiting", "blind"]


WINDOW = {"service": "web", "reason": "disks"}


@pytest.mark.parametrize("notify", [False, True])
@pytest.mark.parametrize("by", ["person", "window"])
async def test_in_maintenance_cards_say_so_and_call_nobody_unless_it_notifies(
    desk: Desk, tmp_path: Path, by: str, notify: bool
) -> None:
    if by == "person":
        await desk.run(
            maintenance.begin, "host", "h", until=desk.now + 3600, reason="disks", by="ann",
            notify=notify,
        )  # fmt: skip
    else:
        windows = await asyncio.to_thread(_windows, tmp_path / "other", notify=notify)
        rules = desk.inventory.remediation.model_copy(update={"maintenance": windows})
        desk.inventory = desk.inventory.model_copy(update={"remediation": rules})
    await desk.fire("web")
    await desk.fire("web", "ServiceSlow")
    await desk.fire("", "HostDiskFull", host="h" if by == "person" else "")
    desk.now += 5
    told = [told[0] for _, told in await desk.all_sent("ops")]
    assert [story.state for story in told] == ["down", "alert", "alert"]
    for story in told[: 3 if by == "person" else 2]:
        text = await read(story)
        assert ("mentions ou_bob" in text) is notify
        assert "maintenance" in text
        assert "disks (until 20" in text
    assert "维护中: " in await read(told[0], ZH)


def _windows(folder: Path, *, notify: bool) -> Any:
    """Two windows that are always open, one of them."""
    half, other = {**WINDOW, "from": "00:00", "to": "12:00"}, {**WINDOW, "from": "12:00", "to": "00:00"}
    windows = [{**each, "notify": notify} for each in (half, other)]
    service = {"probe": {"tcp": {"address": "127.0.0.1:1"}}}
    written = {"services": {"web": service}, "remediation": {"maintenance": windows}}
    return inventory_of(folder, written).inventory.remediation.maintenance


async def test_while_automation_is_off_cards_say_so_and_only_a_needed_person_is_called(desk: Desk) -> None:
    await desk.run(set_automation, enabled=False, by="ann", reason="a change")
    await desk.fire("web")
    _, (down,) = await desk.send("ops")
    text = await read(down)
    assert down.state == "down"
    assert "Not restarted: automation is off: ann: a change" in text
    assert "mentions" not in text
    await desk.decide(1, "refuse", "attempts-used-up")
    needed = next(told[0] for _, told in await desk.all_sent("ops") if told[0].state == "person_needed")
    assert "mentions all" in await read(needed)


async def test_an_outage_of_an_incident_that_another_alert_kept_open_has_its_own_times_and_reasons(
    tmp_path: Path,
) -> None:
    async with desk_of(tmp_path, {"channels": ["ops", "app"]}) as desk:
        await desk.fire("web", "ServiceFlapping", severity="warning")
        await desk.decide(1, "refuse", "not-an-alert-to-act-on")
        began = desk.now = desk.now + 81
        for channel in ("ops", "app"):
            await desk.all_sent(channel)
        await desk.fire("web")
        batches = [(await desk.send(channel))[1][0] for channel in ("ops", "app")]
        for story in batches:
            assert story.since.timestamp() == pytest.approx(desk.database.clock.unix(began), abs=5)
            assert "remediation.alerts" not in await read(story)
        await desk.decide(1, "wait", "backing-off")
        desk.now += 45
        await desk.close(1)
        found = {told[0].state: told[0] for _, told in await desk.all_sent("ops")}
        assert found["recovered"].lasted == pytest.approx(45, abs=5)
        assert "Recovered: web (after 4" in await read(found["recovered"])


async def test_a_card_that_is_late_shows_what_was_decided_then(desk: Desk) -> None:
    await desk.fire("web")
    desk.now += 1
    await desk.decide(1, "wait", "host-down")
    desk.now += 600
    await desk.decide(1, "wait", "storm")
    (row,) = await desk.rows("ops")
    assert row.kind == "down"
    _, (story,) = await desk.send("ops")
    assert "Not restarted: the host is down" in await read(story)


async def test_the_failed_probe_is_kept_and_shown(desk: Desk) -> None:
    await desk.fire("web")
    decision = Decision("wait", "storm")
    await desk.run(decisions.record_decision, 1, decision, DOWN)
    await desk.run(decisions.record_decision, 1, decision, Observation(None, None, None))
    _, (story,) = await desk.send("ops")
    assert "Probe: timeout: no answer within 10 s" in await read(story)
    await desk.close(1)
    _, (story,) = await desk.send("ops")
    assert "Probe" not in await read(story)


async def test_what_was_told_before_the_upgrade_is_told_by_its_new_name(tmp_path: Path) -> None:
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
    """A record of the version before, with an incident that was given up."""
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
