"""People on call: who is mentioned and reminded, and where to see who it is."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from defib import starter
from defib.starter.answers import Answers
from fleet.inventory.model import Inventory
from remediator.incidents import acknowledgement
from remediator.notifications import escalation
from remediator.notifications.messages import render_card
from remediator.notifications.rendering import Templates
from tests.integration.loop import Loop
from tests.integration.test_commands import on_loop
from tests.integration.test_feishu_app import finish, opened
from tests.integration.test_outbox import OutboxHarness
from tests.support import loaded, write

HOUR = 3600.0
# In the starter's example, the calendar's second shift: bob relieves ann.
HANDOVER = datetime(2026, 12, 7, 9, tzinfo=ZoneInfo("Asia/Shanghai")).timestamp()
SERVICE = """
    hosts: {h: {address: h, shell: local}}
    services:
      web: {host: h, probe: {command: {run: ["true"]}}, control: {command: {restart: ["true"]}}, on_failure: restart}
    """


def uncomment(folder: Path) -> Inventory:
    """Write the starter's configuration, with its example of notifications in use."""
    assert starter.init(folder, Answers()) == 0
    for name in ("webhook", "secret"):
        (folder / "secrets" / f"feishu_{name}").write_text(f"http://127.0.0.1:1/{name}")
    path = folder / "notify.yaml"
    text = re.sub(r"(?m)^  #   ", "    ", path.read_text())
    text = re.sub(r"(?m)^  (people|calendars|channels|routes): (\{\}|\[\])", r"  \1:", text)
    path.write_text(re.sub(r"timezone: .*", "timezone: Asia/Shanghai", text))
    return loaded(write(folder, more=SERVICE)).inventory


@pytest.fixture
async def example(tmp_path: Path) -> AsyncIterator[OutboxHarness]:
    """A record with the starter's example, three hours before a handover."""
    harness = await asyncio.to_thread(OutboxHarness, tmp_path)
    harness.inventory = await asyncio.to_thread(uncomment, tmp_path / "config")
    harness.now = HANDOVER - 3 * HOUR
    yield harness
    await asyncio.to_thread(harness.database.close)


async def sent(harness: OutboxHarness, at: float) -> list[tuple[str, list[str]]]:
    """Return the states and mentions of the cards that are sent at a time."""
    harness.now = max(harness.now, at)
    await harness.run(escalation.add_escalations_and_reminders)
    options = harness.inventory.notify.channels["oncall"].settings
    messages = await harness.all_sent("oncall")
    cards = await asyncio.to_thread(
        lambda: [render_card(contents, batch.form, Templates("en"), options) for batch, contents in messages]
    )
    return [(card.state, list(card.mentions)) for card in cards]


async def test_in_the_starter_a_critical_alert_mentions_the_calendar_s_person_every_2_h(example: OutboxHarness) -> None:
    began = example.now
    await example.fire("", "DiskFull")
    assert await sent(example, began) == [("alert", ["ou_ann"])]
    assert await sent(example, began + 1.9 * HOUR) == []
    assert await sent(example, began + 2.1 * HOUR) == [("reminder", ["ou_ann"])]
    assert await sent(example, began + 3.9 * HOUR) == []
    assert await sent(example, began + 4.1 * HOUR) == [("reminder", ["ou_bob"])]  # who has taken over
    await example.run(acknowledgement.acknowledge_alert, 1, "bob")
    assert await sent(example, began + 6.1 * HOUR) == [("reminder", [])]


async def test_in_the_starter_a_warning_mentions_the_route_s_person_every_4_h(example: OutboxHarness) -> None:
    began = example.now
    await example.fire("", "DiskFilling", severity="warning")
    assert await sent(example, began) == [("alert", ["ou_bob"])]
    assert await sent(example, began + 3.9 * HOUR) == []
    assert await sent(example, began + 4.1 * HOUR) == [("reminder", ["ou_bob"])]


async def test_in_the_starter_that_a_person_is_needed_is_repeated_every_2_h(example: OutboxHarness) -> None:
    began = example.now
    await example.fire("web")
    await example.decide(1, "refuse", "attempts-used-up")
    assert await sent(example, began) == [("person_needed", ["ou_ann"])]
    assert await sent(example, began + 1.9 * HOUR) == []
    assert await sent(example, began + 2.1 * HOUR) == [("person_needed", ["ou_ann"])]
    await example.run(acknowledgement.acknowledge_incident, 1, "ann")
    assert await sent(example, began + 4.2 * HOUR) == [("reminder", [])]


def notify_of(*rotation: str) -> dict[str, object]:
    people = {"ann": {"open_id": "ou_a", "name": "Ann"}, "bob": {"open_id": "ou_b", "name": "Bob"}}
    calendar = {"rotation": list(rotation), "starts": "2026-11-30 09:00"}
    return {"people": people, "calendars": {"weekly": calendar}}


async def test_a_card_shows_and_mentions_the_person_on_call(tmp_path: Path) -> None:
    """The simulated Feishu receives the mention; one person is in the rotation, so that the date does not matter."""
    routes = [{"channels": ["app"], "on_call": ["weekly"]}]
    harness = await opened(tmp_path, {**notify_of("bob"), "routes": routes}, mention=["on_call"])
    await harness.fire()
    card = await harness.until_title("Service down: web")
    assert "<at id=ou_b></at>" in card.text
    assert "Bob" in card.text
    assert "ou_a" not in card.text
    await finish(harness)


@pytest.mark.needs("sshd")
async def test_who_is_on_call_now_is_shown(loop: Loop) -> None:
    await loop.start({"web": loop.service("web")}, notify={**notify_of("ann", "bob"), "timezone": "Asia/Shanghai"})
    status = await on_loop(loop, "status")
    shown = re.search(r"(?m)^on call: (Ann|Bob) \(calendar weekly, until (\S+ 09:00:00)\)$", status.stdout)
    assert shown is not None, status
    (listed,) = json.loads((await on_loop(loop, "--json", "status")).stdout)["on_call"]
    assert (listed["calendar"], listed["name"]) == ("weekly", shown[1])
    assert datetime.fromisoformat(listed["until"]).astimezone(ZoneInfo("Asia/Shanghai")).strftime(
        "%Y-%m-%d %H:%M:%S"
    ) == shown[2]  # fmt: skip
    for language, heading in (("en", "On call"), ("zh", "值班")):
        url = f"{loop.stack.url('remediator')}/settings"
        page = (await loop.stack.client.get(url, headers={"Accept-Language": language})).text
        (section,) = re.findall(rf"<h2>{heading}</h2>(.*?)</section>", page, re.DOTALL)
        assert all(text in section for text in ("weekly", shown[1], shown[2])), section
