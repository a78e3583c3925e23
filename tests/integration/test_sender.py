"""The sender and a simulated Feishu server that enforces its rules, with errors."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from defib.demo.feishu import PER_MINUTE, PER_SECOND, SECRET, FeishuSimulator
from fleet.inventory.model import Inventory
from remediator.notifications import sender
from remediator.notifications.channels import http
from remediator.notifications.outbox import Batch
from remediator.record.database import Database
from tests.integration.sender_harness import LABELS, SenderHarness
from tests.support import eventually, inventory_of, leaves_the_loop_free


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SenderHarness]:
    monkeypatch.setattr(sender, "FIRST_RETRY", 0.05)
    feishu = FeishuSimulator()
    webhook = await feishu.start()
    written = {
        "notify": {
            "language": "en",
            "digest_over": 1000,
            "channels": {"ops": {"feishu": {"webhook": webhook, "secret": SECRET, "mention": ["ou_ann"]}}},
            "routes": [{"channels": ["ops"]}],
        }
    }
    inventory = (await asyncio.to_thread(inventory_of, tmp_path / "config", written)).inventory
    harness = await asyncio.to_thread(SenderHarness, tmp_path, feishu, inventory)
    await harness.open()
    yield harness
    await harness.close()
    await harness.client.aclose()
    await asyncio.to_thread(harness.database.close)
    await feishu.stop()


async def test_a_burst_respects_the_rate_limits_and_loses_nothing(harness: SenderHarness) -> None:
    for number in range(25):
        await harness.notify(number)
    await eventually(harness.settled)
    assert [f"number {n}" in card.text for n, card in enumerate(harness.feishu.received)] == [True] * 25
    assert not harness.feishu.refused
    times = [card.at for card in harness.feishu.received]
    assert max(sum(1 for at in times if start <= at < start + 1) for start in times) <= PER_SECOND
    assert len(times) <= PER_MINUTE


BUSY: tuple[int, dict[str, str], bytes] = (200, {}, b'{"code":11232,"msg":"frequency limited"}')


@pytest.mark.parametrize(
    ("answers", "state", "sends"),
    [
        ([BUSY], "sent", 2),
        ([(500, {}, b"")], "sent", 2),
        ([(200, {}, b"<html>")], "sent", 2),
        ([(200, {}, b"{}")], "sent", 2),
        ([(429, {"x-ogw-ratelimit-reset": "0.2"}, b"")], "sent", 2),
        ([(200, {"Content-Encoding": "gzip"}, b"not gzip")], "sent", 2),
        ([(200, {}, b'{"code":19021}')], "sent", 1),  # signed again with Feishu's time
        ([(200, {}, b'{"code":19021}')] * 2, "sent", 2),
        ([(200, {}, b'{"code":19021}')] * 3, "dead", 2),
        ([(200, {}, b'{"code":9499,"msg":"too many request","data":{}}')] * 2, "sent", 3),
        ([(200, {}, b'{"code":9499}')], "sent", 2),
        ([(200, {}, b'{"code":9499}')] * 2, "dead", 2),
        ([(200, {}, b'{"code":19024}')], "dead", 1),
        ([(200, {}, b'{"code":19001}')], "dead", 1),
    ],
)
async def test_the_state_after_a_refused_message(
    harness: SenderHarness, answers: list[Any], state: str, sends: int
) -> None:
    harness.feishu.faults.extend(answers)
    await harness.notify(1)
    await eventually(harness.settled)
    (row,) = await harness.rows()
    assert (row.state, row.tries) == (state, sends)
    assert len(harness.feishu.received) == (state == "sent")


async def test_with_a_clock_two_hours_off_messages_are_signed_with_feishu_s_time(harness: SenderHarness) -> None:
    harness.feishu.now = lambda: time.time() + 7200
    await harness.notify(1)
    await eventually(harness.settled)
    assert [(row.state, row.tries) for row in await harness.rows()] == [("sent", 1)]
    assert len(harness.feishu.refused) == 1  # its response contained the time
    assert harness.metrics.clock_offset._value.get() == pytest.approx(-7200, abs=5)
    await harness.notify(2)
    await eventually(harness.settled)
    harness.feishu.now = time.time  # the clock is set right
    await harness.notify(3)
    await eventually(harness.settled)
    assert [row.state for row in await harness.rows()] == ["sent"] * 3
    assert len(harness.feishu.received) == 3
    assert len(harness.feishu.refused) == 2


async def test_a_signature_that_is_wrong_with_feishu_s_time_is_given_up(harness: SenderHarness) -> None:
    harness.feishu.secret = "another"
    harness.feishu.now = lambda: time.time() + 7200
    await harness.notify(1)
    await eventually(harness.settled)
    (row,) = await harness.rows()
    assert (row.state, row.tries, len(harness.feishu.refused)) == ("dead", 2, 3)
    assert re.search(
        r"^19021: the signature or the clock is wrong; this machine's clock is -7\d\d\d s off Feishu's$", row.response
    )


async def test_a_refused_signature_without_a_time_is_retried(harness: SenderHarness) -> None:
    """Without Feishu's time, the clock may be the reason, not the secret."""
    harness.feishu.undated = True
    harness.feishu.faults.extend([(200, {}, b'{"code":19021}')] * 4)
    await harness.notify(1)
    await eventually(harness.settled)
    assert [(row.state, row.tries) for row in await harness.rows()] == [("sent", 5)]


async def test_an_old_bot_responds_without_a_code(harness: SenderHarness) -> None:
    harness.feishu.old = True
    harness.feishu._times.extend([time.time() + 10] * PER_SECOND)  # a busy machine is slow to send
    await harness.notify(1)
    await eventually(harness.settled)
    assert [row.state for row in await harness.rows()] == ["sent"]
    assert len(harness.feishu.received) == 1
    assert harness.feishu.refused[0][1] == "9499: too many request"
    assert harness.feishu.received[0].message["msg_type"] == "interactive"


async def test_a_refused_card_is_sent_as_plain_text_without_mentions(harness: SenderHarness) -> None:
    harness.feishu.faults.append((200, {}, b'{"code":9499}'))
    await harness.notify(1, labels={**LABELS, "severity": "critical"})
    await eventually(harness.settled)
    (card,) = harness.feishu.received
    assert card.message["msg_type"] == "text"
    assert "at id" not in card.text


async def test_a_card_with_refused_mentions_is_sent_without_them(harness: SenderHarness) -> None:
    harness.feishu.faults.append((200, {}, b'{"code":11246,"msg":"invalid mention"}'))
    await harness.notify(1, labels={**LABELS, "severity": "critical"})
    await eventually(harness.settled)
    (card,) = harness.feishu.received
    assert (card.message["msg_type"], "at id" in card.text) == ("interactive", False)
    assert (await harness.rows())[0].tries == 2


async def test_a_busy_bot_is_paused_for_all_its_messages(harness: SenderHarness) -> None:
    harness.feishu.faults.append((429, {"x-ogw-ratelimit-reset": "1.5"}, b""))
    began = time.time()
    for number in range(3):
        await harness.notify(number)
    await eventually(harness.settled)
    assert min(card.at for card in harness.feishu.received) - began > 1.4
    assert not harness.feishu.faults


async def test_a_response_that_never_ends_is_a_timeout(harness: SenderHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "DEADLINE", 0.3)
    harness.feishu.faults.append("drip")
    await harness.notify(1)
    await eventually(harness.settled)
    (row,) = await harness.rows()
    assert (row.state, row.tries) == ("sent", 2)


async def test_an_unknown_response_is_retried_a_few_times(harness: SenderHarness) -> None:
    harness.feishu.faults.extend([(400, {}, b'{"code":2200}')] * 9)
    await harness.notify(1)
    await eventually(harness.settled)
    (row,) = await harness.rows()
    assert (row.state, row.tries, row.response) == ("dead", 5, "2200: refused")


async def test_a_server_that_is_down_delays_and_loses_nothing(harness: SenderHarness) -> None:
    port = int(harness.feishu.url.rpartition(":")[2])
    await harness.feishu.stop()
    await harness.notify(1)

    async def tried() -> bool:
        return bool((await harness.rows())[0].tries > 0)

    await eventually(tried)
    await harness.feishu.start(port)
    await eventually(harness.settled)
    assert len(harness.feishu.received) == 1


async def test_sent_messages_are_not_sent_again_after_a_restart(harness: SenderHarness) -> None:
    await harness.notify(1)
    await eventually(harness.settled)
    await harness.close()
    await harness.open()
    await harness.notify(1)
    await harness.notify(2)
    await eventually(harness.settled)
    assert len(harness.feishu.received) == 2


async def test_a_shutdown_during_a_delivery_sends_it_once(harness: SenderHarness) -> None:
    """Feishu responds slowly: the delivery is recorded before the sender ends."""
    judge, begun = harness.feishu.check_message, asyncio.Event()

    def slowly(token: str, body: bytes) -> tuple[int, str]:
        begun.set()
        return judge(token, body)

    harness.feishu.check_message = slowly  # type: ignore[method-assign]
    await harness.notify(1)
    await begun.wait()
    await harness.close()
    await harness.open()
    await eventually(harness.settled)
    assert len(harness.feishu.received) == 1


async def test_secrets_are_masked_in_messages(harness: SenderHarness) -> None:
    await harness.notify(1, text="the password is hunter2-secret")
    await eventually(harness.settled)
    assert "hunter2-secret" not in harness.feishu.received[0].text
    assert "***" in harness.feishu.received[0].text.replace("&#42;", "*")


async def test_an_error_in_one_message_does_not_hold_up_others(harness: SenderHarness) -> None:
    async def broken(batch: Batch) -> Mapping[str, Any]:
        if "number 1" in str(batch.first.content):
            raise ValueError("broken")
        return {}

    harness.sender._read_details = broken
    await harness.notify(1)
    await harness.notify(2)

    async def told() -> bool:
        return len(harness.feishu.received) == 1

    await eventually(told)
    await eventually(lambda: _states(harness, [("pending", 1), ("sent", 1)]))


async def _states(harness: SenderHarness, wanted: list[tuple[str, int]]) -> bool:
    return [(row.state, row.tries) for row in await harness.rows()] == wanted


async def test_notifications_of_a_removed_channel_are_given_up(harness: SenderHarness) -> None:
    await harness.feishu.stop()
    await harness.notify(1)
    notify = harness.inventory.notify.model_copy(update={"channels": {}, "routes": []})
    harness.inventory = harness.inventory.model_copy(update={"notify": notify})
    harness.sender.wake()
    await eventually(harness.settled)
    assert (await harness.rows())[0].response == "the channel was removed"


async def test_a_second_owner_of_the_record_is_refused(harness: SenderHarness) -> None:
    with pytest.raises(Exception, match="another remediator uses"):
        await asyncio.to_thread(Database, f"sqlite:///{harness.folder}/record.db", Inventory())


async def test_alerts_with_much_text_do_not_block_the_event_loop(harness: SenderHarness) -> None:
    await leaves_the_loop_free(harness.send_long_alerts)
    assert {row.state for row in await harness.rows()} == {"sent"}
