"""App bots and a simulated Feishu server that enforces its rules: updates, tokens, threads, errors."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from defib.demo import demo
from defib.demo.feishu import FeishuSimulator
from defib.demo.feishu_app import APP_ID, APP_SECRET, CHAT, Message
from defib.demo.service import DemoService
from defib.demo.sshd import Sshd
from remediator.clients.alerts import Alert
from remediator.incidents import acknowledgement, decisions, intake
from remediator.notifications import deliveries, sender
from remediator.notifications.channels import http
from remediator.notifications.outbox import Batch
from remediator.operations import set_automation
from remediator.policy.situation import Decision
from remediator.record import notifications as notification_rows
from remediator.record.schema import notifications
from remediator.record.transaction import Transaction
from tests.integration.sender_harness import SenderHarness
from tests.support import NO_TLS, eventually, inventory_of


class AppHarness(SenderHarness):
    """A sender whose channel is an app's bot."""

    async def fire(self, name: str = "ServiceDown", **labels: str) -> None:
        labels = {"alertname": name, "service": "web", "severity": "critical", **labels}
        alert = Alert(name + labels["service"], "1", "", "firing", labels, {"summary": "no answer"})
        await self.run(intake.receive_alerts, [alert])

    async def decide(self, verb: Any, reason: Any) -> None:
        await self.run(decisions.record_decision, 1, Decision(verb, reason))

    async def run(self, work: Any, *args: Any) -> None:
        await self.database.write(work, *args)
        self.sender.wake()

    async def card(self, number: int = 0) -> Message:
        async def there() -> Message | None:
            return self.feishu.apps.in_chat[number] if len(self.feishu.apps.in_chat) > number else None

        found = await eventually(there)
        assert found is not None
        return found

    async def until_title(self, title: str) -> Message:
        card = await self.card()

        async def shown() -> bool:
            return card.title.startswith(title)

        await eventually(shown)
        return card


async def opened(folder: Path, notify: Mapping[str, Any] | None = None, **options: Any) -> AppHarness:
    feishu = FeishuSimulator()
    await feishu.start()
    app = {
        "app_id": APP_ID,
        "app_secret": APP_SECRET,
        "chat_id": CHAT,
        "url": feishu.url,
        "mention": ["all", "ou_ann"],
        **options,
    }
    probe, control = {"command": {"run": ["true"]}}, {"command": {"restart": ["true"]}}
    service = {"host": "h", "probe": probe, "control": control, "on_failure": "restart"}
    written = {
        "hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"web": service, "db": service},
        "notify": {
            "language": "en", "channels": {"app": {"feishu_app": app}}, "routes": [{"channels": ["app"]}],
            **(notify or {}),
        },
    }  # fmt: skip
    inventory = (await asyncio.to_thread(inventory_of, folder / "config", written)).inventory
    harness = await asyncio.to_thread(AppHarness, folder, feishu, inventory)
    await harness.open()
    return harness


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AppHarness]:
    monkeypatch.setattr(sender, "FIRST_RETRY", 0.05)
    monkeypatch.setattr(deliveries, "UPDATE_INTERVAL", 0.05)
    monkeypatch.setattr(notification_rows, "UPDATE_INTERVAL", 0.05)
    harness = await opened(tmp_path)
    yield harness
    await finish(harness)


async def finish(harness: AppHarness) -> None:
    await harness.close()
    await harness.client.aclose()
    await asyncio.to_thread(harness.database.close)
    await harness.feishu.stop()


async def test_a_card_is_updated_and_gets_replies_in_its_thread(harness: AppHarness) -> None:
    await harness.fire()
    card = await harness.until_title("Service down: web")
    assert "<at id=ou_ann></at>" in card.text
    assert "<at id=all>" not in card.text
    await harness.decide("wait", "storm")
    await eventually(lambda: _holds(card, "too many services fail at once"))
    await harness.decide("refuse", "attempts-used-up")
    await harness.until_title("A person is needed")
    await eventually(harness.settled)
    assert len(harness.feishu.apps.in_chat) == 1
    assert [each.title for each in card.replies] == ["A person is needed: web"]
    assert "<at id=all></at>" in card.replies[0].text
    assert not harness.feishu.refused


async def _holds(card: Message, text: str) -> bool:
    return text in card.text


INVALID: Any = (400, {}, b'{"code":99991663,"msg":"Invalid access token"}')
BUSY: Any = (400, {"x-ogw-ratelimit-reset": "0.1"}, b'{"code":99991400,"msg":"request trigger frequency limit"}')


@pytest.mark.parametrize(
    ("faults", "state"),
    [
        ([BUSY], "sent"),
        ([(500, {}, b"")], "sent"),
        (["reset"], "sent"),
        ([(400, {}, b'{"code":230020}')], "sent"),
        ([(400, {}, b'{"code":230049}')], "sent"),
        ([(200, {}, b"<html>")], "sent"),
        ([(200, {}, b"{}")], "sent"),
        ([INVALID], "sent"),
        ([(400, {}, b'{"code":230099,"msg":"ErrMsg: bad"}')], "sent"),
        ([(400, {}, b'{"code":230099,"msg":"ErrMsg: bad"}')] * 2, "dead"),
        ([(400, {}, b'{"code":230002}')], "dead"),
    ],
)
async def test_the_state_after_a_refused_card(harness: AppHarness, faults: list[Any], state: str) -> None:
    harness.feishu.faults.append((200, {}, b'{"code":0,"tenant_access_token":"t-old","expire":7200}'))
    harness.feishu.faults.extend(faults)
    harness.feishu.apps._tokens["t-old"] = time.time() + 7200
    await harness.fire()
    await eventually(harness.settled)
    (row,) = await harness.rows()
    assert row.state == state, row.response
    assert len(harness.feishu.apps.in_chat) == (state == "sent")


async def test_a_token_is_reused_and_a_revoked_one_is_renewed_at_once(harness: AppHarness) -> None:
    await harness.fire()
    await harness.fire(service="db")
    await eventually(harness.settled)
    assert harness.feishu.apps.token_asked == 1
    harness.feishu.apps.revoke()
    await harness.decide("wait", "storm")
    await eventually(lambda: _holds(harness.feishu.apps.in_chat[0], "too many"))
    assert harness.feishu.apps.token_asked == 2
    assert [why.split(":")[0] for _, why in harness.feishu.refused] == ["99991663"]


async def test_a_token_that_expires_soon_is_renewed(harness: AppHarness) -> None:
    harness.feishu.faults.append((200, {}, b'{"code":0,"tenant_access_token":"t-short","expire":500}'))
    harness.feishu.apps._tokens["t-short"] = time.time() + 500
    await harness.fire()
    await eventually(harness.settled)
    await harness.fire(service="db")
    await eventually(harness.settled)
    assert harness.feishu.apps.token_asked == 1
    assert len(harness.feishu.apps.in_chat) == 2


async def test_a_wrong_secret_is_reported_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "FIRST_RETRY", 0.05)
    harness = await opened(tmp_path, app_secret="wrong-app-secret")
    await harness.fire()

    async def tried() -> bool:
        return bool((await harness.rows())[0].tries > 1)

    await eventually(tried)
    (row,) = await harness.rows()
    assert row.state == "pending"
    assert row.response == "no access token for the app: 10014: app secret invalid"
    await finish(harness)


async def test_a_card_whose_response_was_lost_is_not_sent_twice(
    harness: AppHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "TIMEOUT", 0.3)
    harness.feishu.faults.append((200, {}, b'{"code":0,"tenant_access_token":"t-1","expire":7200}'))
    harness.feishu.apps._tokens["t-1"] = time.time() + 7200
    harness.feishu.faults.append("take and hang")
    await harness.fire()
    await eventually(harness.settled)
    assert len(harness.feishu.apps.in_chat) == 1
    (row,) = await harness.rows()
    assert row.message_id == harness.feishu.apps.in_chat[0].id


async def test_a_card_is_sent_without_mentions_where_at_all_is_disabled(harness: AppHarness) -> None:
    harness.feishu.all_disabled = True
    await harness.close()
    await harness.fire()
    await harness.decide("refuse", "attempts-used-up")
    await harness.open()
    await eventually(harness.settled)
    card = await harness.card()
    for each in (card, *card.replies):
        assert "<at" not in each.text
        assert "A person is needed: web" in each.title
    # Mentions that were refused once are not sent with each update.
    await harness.run(acknowledgement.acknowledge_incident, 1, "ann")
    await eventually(lambda: _holds(card, "Acknowledged"))
    assert len(harness.feishu.refused) == 2


async def test_updates_continue_after_a_restart(harness: AppHarness) -> None:
    await harness.fire()
    card = await harness.until_title("Service down")
    await harness.close()
    await harness.decide("wait", "storm")
    await harness.open()
    await eventually(lambda: _holds(card, "too many"))
    assert len(harness.feishu.apps.in_chat) == 1


async def test_a_message_that_is_too_old_to_update_is_replaced(harness: AppHarness) -> None:
    await harness.fire()
    card = await harness.until_title("Service down")
    await eventually(harness.settled)
    long_ago = harness.database.clock.now() - 15 * 86400
    card.at -= 15 * 86400

    def age(tx: Transaction) -> None:
        tx.execute(update(notifications).values(message_at=long_ago))

    await harness.run(age)
    await harness.decide("wait", "storm")
    second = await harness.card(1)
    assert "too many" in second.text


async def test_an_error_in_one_card_does_not_hold_up_others(harness: AppHarness) -> None:
    async def broken(batch: Batch) -> Mapping[str, Any]:
        if batch.first.content["labels"]["service"] == "web":
            raise ValueError("broken")
        return {}

    harness.sender._read_details = broken
    await harness.fire()
    await harness.fire(service="db")
    assert (await harness.card()).title == "Service down: db"


async def test_the_demo_notifies_of_the_automation_switch_once(tmp_path: Path) -> None:
    feishu = FeishuSimulator()
    await feishu.start()
    for name in ("key", "known"):
        await asyncio.to_thread((tmp_path / name).touch)
    host = Sshd(22, "u", tmp_path / "key", tmp_path / "known")
    demo_service = DemoService("a command", {"command": {"restart": ["true"]}}, [])
    written = demo.build_inventory(host, demo_service, 80, feishu)
    inventory = (await asyncio.to_thread(inventory_of, tmp_path / "config", written)).inventory
    harness = await asyncio.to_thread(SenderHarness, tmp_path, feishu, inventory)
    await harness.open()
    for enabled in (False, True, True):
        await harness.database.write(
            set_automation, enabled=enabled, by="ann", reason="",
        )  # fmt: skip
    harness.sender.wake()
    await eventually(harness.settled)
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:
        page = (await client.get(feishu.url)).text
    assert [page.count(f"Automation is {word}</h2>") for word in ("off", "on")] == [1, 1]
    await harness.close()
    await harness.client.aclose()
    await asyncio.to_thread(harness.database.close)
    await feishu.stop()
