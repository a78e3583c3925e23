"""The sender against the stand-in that enforces Feishu's rules, behaving and not."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from defib.demo.feishu import PER_MINUTE, PER_SECOND, SECRET, StandIn
from fleet.inventory.model import Inventory
from remediator.notifications import sender
from remediator.notifications.channels import http
from remediator.notifications.outbox import Batch
from remediator.record.database import Database
from tests.integration.post import LABELS, Post
from tests.support import eventually, inventory_of


@pytest.fixture
async def post(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Post]:
    monkeypatch.setattr(sender, "FIRST_RETRY", 0.05)
    feishu = StandIn()
    webhook = await feishu.start()
    written = {
        "notify": {
            "language": "en",
            "channels": {"ops": {"feishu": {"webhook": webhook, "secret": SECRET, "mention": ["ou_ann"]}}},
            "routes": [{"channels": ["ops"]}],
        }
    }
    inventory = (await asyncio.to_thread(inventory_of, tmp_path / "config", written)).inventory
    made = await asyncio.to_thread(Post, tmp_path, feishu, inventory)
    await made.open()
    yield made
    await made.close()
    await made.client.aclose()
    await asyncio.to_thread(made.database.close)
    await feishu.stop()


async def test_a_burst_keeps_to_the_rate_and_loses_nothing(post: Post) -> None:
    for number in range(25):
        await post.tell(number)
    await eventually(post.settled)
    assert [f"number {n}" in card.text for n, card in enumerate(post.feishu.received)] == [True] * 25
    assert not post.feishu.refused
    times = [card.at for card in post.feishu.received]
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
async def test_what_becomes_of_a_refused_notice(post: Post, answers: list[Any], state: str, sends: int) -> None:
    post.feishu.misbehave.extend(answers)
    await post.tell(1)
    await eventually(post.settled)
    (row,) = await post.rows()
    assert (row.state, row.tries) == (state, sends)
    assert len(post.feishu.received) == (state == "sent")


async def test_with_a_clock_two_hours_off_notices_are_signed_with_feishu_s_time(post: Post) -> None:
    post.feishu.now = lambda: time.time() + 7200
    await post.tell(1)
    await eventually(post.settled)
    assert [(row.state, row.tries) for row in await post.rows()] == [("sent", 1)]
    assert len(post.feishu.refused) == 1  # it told the time
    assert post.metrics.clock_offset._value.get() == pytest.approx(-7200, abs=5)
    await post.tell(2)
    await eventually(post.settled)
    post.feishu.now = time.time  # the clock is set right
    await post.tell(3)
    await eventually(post.settled)
    assert [row.state for row in await post.rows()] == ["sent"] * 3
    assert len(post.feishu.received) == 3
    assert len(post.feishu.refused) == 2


async def test_a_signature_that_is_wrong_with_feishu_s_time_too_is_given_up(post: Post) -> None:
    post.feishu.secret = "another"
    post.feishu.now = lambda: time.time() + 7200
    await post.tell(1)
    await eventually(post.settled)
    (row,) = await post.rows()
    assert (row.state, row.tries, len(post.feishu.refused)) == ("dead", 2, 3)
    assert re.search(
        r"^19021: the signature or the clock is wrong; this machine's clock is -7\d\d\d s off Feishu's$", row.response
    )


async def test_a_refused_signature_without_a_time_keeps_the_notice(post: Post) -> None:
    """Nothing says what Feishu's time is, so nothing says that the secret is wrong."""
    post.feishu.undated = True
    post.feishu.misbehave.extend([(200, {}, b'{"code":19021}')] * 4)
    await post.tell(1)
    await eventually(post.settled)
    assert [(row.state, row.tries) for row in await post.rows()] == [("sent", 5)]


async def test_an_old_bot_answers_without_a_code(post: Post) -> None:
    post.feishu.old = True
    post.feishu._times.extend([time.time() + 10] * PER_SECOND)  # a busy machine is slow to send
    await post.tell(1)
    await eventually(post.settled)
    assert [row.state for row in await post.rows()] == ["sent"]
    assert len(post.feishu.received) == 1
    assert post.feishu.refused[0][1] == "9499: too many request"
    assert post.feishu.received[0].message["msg_type"] == "interactive"


async def test_a_refused_card_is_sent_plain_and_calls_nobody(post: Post) -> None:
    post.feishu.misbehave.append((200, {}, b'{"code":9499}'))
    await post.tell(1, labels={**LABELS, "severity": "critical"})
    await eventually(post.settled)
    (card,) = post.feishu.received
    assert card.message["msg_type"] == "text"
    assert "at id" not in card.text


async def test_where_mentions_are_refused_the_card_is_sent_without(post: Post) -> None:
    post.feishu.misbehave.append((200, {}, b'{"code":11246,"msg":"invalid mention"}'))
    await post.tell(1, labels={**LABELS, "severity": "critical"})
    await eventually(post.settled)
    (card,) = post.feishu.received
    assert (card.message["msg_type"], "at id" in card.text) == ("interactive", False)
    assert (await post.rows())[0].tries == 2


async def test_a_busy_bot_is_left_alone_for_all_that_it_is_to_tell(post: Post) -> None:
    post.feishu.misbehave.append((429, {"x-ogw-ratelimit-reset": "1.5"}, b""))
    began = time.time()
    for number in range(3):
        await post.tell(number)
    await eventually(post.settled)
    assert min(card.at for card in post.feishu.received) - began > 1.4
    assert not post.feishu.misbehave


async def test_a_dripping_answer_is_no_answer(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "DEADLINE", 0.3)
    post.feishu.misbehave.append("drip")
    await post.tell(1)
    await eventually(post.settled)
    (row,) = await post.rows()
    assert (row.state, row.tries) == ("sent", 2)


async def test_what_nobody_knows_is_tried_a_few_times(post: Post) -> None:
    post.feishu.misbehave.extend([(400, {}, b'{"code":2200}')] * 9)
    await post.tell(1)
    await eventually(post.settled)
    (row,) = await post.rows()
    assert (row.state, row.tries, row.response) == ("dead", 5, "2200: refused")


async def test_a_bot_that_is_not_there_delays_and_loses_nothing(post: Post) -> None:
    port = int(post.feishu.url.rpartition(":")[2])
    await post.feishu.stop()
    await post.tell(1)

    async def tried() -> bool:
        return bool((await post.rows())[0].tries > 0)

    await eventually(tried)
    await post.feishu.start(port)
    await eventually(post.settled)
    assert len(post.feishu.received) == 1


async def test_what_was_told_is_not_told_again_after_a_restart(post: Post) -> None:
    await post.tell(1)
    await eventually(post.settled)
    await post.close()
    await post.open()
    await post.tell(1)
    await post.tell(2)
    await eventually(post.settled)
    assert len(post.feishu.received) == 2


async def test_stopping_in_the_middle_of_a_send_sends_it_once(post: Post) -> None:
    """Feishu is slow to answer; what it took is on the record before the sender has ended."""
    judge, begun = post.feishu._judge, asyncio.Event()

    def slowly(token: str, body: bytes) -> tuple[int, str]:
        begun.set()
        return judge(token, body)

    post.feishu._judge = slowly  # type: ignore[method-assign]
    await post.tell(1)
    await begun.wait()
    await post.close()
    await post.open()
    await eventually(post.settled)
    assert len(post.feishu.received) == 1


async def test_secrets_are_masked_in_what_people_read(post: Post) -> None:
    await post.tell(1, text="the password is hunter2-secret")
    await eventually(post.settled)
    assert "hunter2-secret" not in post.feishu.received[0].text
    assert "***" in post.feishu.received[0].text.replace("&#42;", "*")


async def test_a_notice_that_breaks_does_not_hold_the_others_back(post: Post) -> None:
    async def broken(batch: Batch) -> Mapping[str, Any]:
        if "number 1" in str(batch.first.content):
            raise ValueError("broken")
        return {}

    post.sender._read_details = broken
    await post.tell(1)
    await post.tell(2)

    async def told() -> bool:
        return len(post.feishu.received) == 1

    await eventually(told)
    await eventually(lambda: _states(post, [("pending", 1), ("sent", 1)]))


async def _states(post: Post, wanted: list[tuple[str, int]]) -> bool:
    return [(row.state, row.tries) for row in await post.rows()] == wanted


async def test_notices_of_a_removed_channel_are_given_up(post: Post) -> None:
    await post.feishu.stop()
    await post.tell(1)
    notify = post.inventory.notify.model_copy(update={"channels": {}, "routes": []})
    post.inventory = post.inventory.model_copy(update={"notify": notify})
    post.sender.wake()
    await eventually(post.settled)
    assert (await post.rows())[0].response == "the channel was removed"


async def test_a_second_owner_of_the_record_is_refused(post: Post) -> None:
    with pytest.raises(Exception, match="another remediator uses"):
        await asyncio.to_thread(Database, f"sqlite:///{post.folder}/record.db", Inventory())
