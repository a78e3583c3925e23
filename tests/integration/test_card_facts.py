"""Cards say facts: what was tried, when, with which result, and what follows; in both languages, on a real record."""

import ast
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from remediator.incidents import actions, decisions, lifecycle
from remediator.incidents.actions import Claim, Ending
from remediator.notifications.content import Notification
from remediator.notifications.phrases import translate, translate_failure
from remediator.policy.attempts import find_queue_end
from remediator.policy.situation import Decision
from remediator.record.schema import actions as action_rows
from remediator.record.situations import read_queue
from tests.integration.loop import Loop
from tests.integration.test_outbox import OutboxHarness
from tests.integration.test_person_needed import EN, LEADS, OPS, ZH, outbox_of, read
from tests.support import eventually

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[OutboxHarness]:
    async with outbox_of(tmp_path, LEADS, OPS) as made:
        yield made


async def restart(harness: OutboxHarness, incident: int, up_for: float | None, *, held: bool = False) -> None:
    """Record a restart, after which the service was up for some seconds, or was not."""
    await harness.decide(incident, "act", None)
    await harness.act(incident)
    number = len(await harness.run(lambda tx: tx.execute(action_rows.select()).all()))
    claim = Claim(number, incident, "web", "h", "restart", harness.now)
    claim = await harness.run(actions.record_command_end, claim, "succeeded", 0, "", "", at=harness.now)
    harness.now += 3
    if up_for is None:
        await harness.run(actions.end_action, claim, Ending("failed", "not up within 6 s; connect: refused"))
        return
    await harness.run(actions.record_up, claim, at=harness.now)
    harness.now += up_for
    ending = Ending("succeeded", recovered=True) if held else Ending("failed", "down again within 60 s; exit: 1")
    await harness.run(actions.end_action, claim, ending)


async def last(harness: OutboxHarness, channel: str = "ops") -> Notification:
    return (await harness.all_sent(channel))[-1][1][0]


async def test_a_host_key_that_is_not_pinned_is_told_as_nothing_tried(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.act(1)
    ending = Ending("failed", "nothing was run: 10.0.0.7: the key", reached=False, blocked="host-key-changed")
    await harness.run(actions.end_action, Claim(1, 1, "web", "h", "restart", harness.now), ending)
    card = await last(harness)
    english, chinese = await read(card), await read(card, ZH)
    assert (
        "Automation ended: nothing was tried: the host key is not the pinned one. "
        "Defib will not act until a person pins it"
    ) in english
    assert "自动处理已停止: 未执行任何操作：主机密钥与固定的不符，需人工核对并固定后才会继续处理" in chinese
    assert "0 of 3" not in english
    assert "restart: not run: nothing was run" in english
    assert "重启: 未执行: 未执行任何操作：“10.0.0.7: the key”" in chinese


async def test_the_last_failure_says_how_many_restarts_failed(harness: OutboxHarness) -> None:
    await harness.fire("web")
    for _ in range(3):
        await restart(harness, 1, None)
    card = await last(harness, "lead")
    english, chinese = await read(card), await read(card, ZH)
    assert english.startswith("A person is needed: web is down, 3 restarts failed\n")
    assert chinese.startswith("需要人工处理: web，3 次重启均失败\n")
    assert re.search(r"Restarts: Restarted at [\d:]{8}, [\d:]{8}, [\d:]{8}; not up after any of them", english)
    assert "6 秒内未恢复；连接失败：“refused”" in chinese
    assert "3 of 3" not in english


async def test_restarts_that_helped_for_a_while_say_for_how_long(harness: OutboxHarness) -> None:
    for number in (1, 2, 3):
        await harness.fire("web", instance=str(number))
        await restart(harness, number, 70, held=True)
        await harness.fire("web", status="resolved", instance=str(number))
        await harness.run(lifecycle.close, number, "recovered", ["ServiceDown"])
        harness.now += 5
    await harness.fire("web", instance="4")
    harness.now += 23
    await harness.decide(4, "refuse", "attempts-used-up")
    card = await last(harness, "lead")
    english, chinese = await read(card), await read(card, ZH)
    assert english.startswith("A person is needed: web is down again after 3 restarts\n")
    assert re.search(r"Restarts: Restarted at [\d:]{8}, [\d:]{8}, [\d:]{8}; each time up for about 1 min 15 s", english)
    assert re.search(r"重启记录: 重启于 .*；每次恢复约 1 分 15 秒后再次故障", chinese)
    assert "Duration" not in english  # 23 s would only be the last outage


async def test_a_failed_attempt_says_when_the_next_one_begins(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.act(1)
    claim = Claim(1, 1, "web", "h", "restart", harness.now)
    why = "docker restart exited 1"
    claim = await harness.run(actions.record_command_end, claim, "failed", 1, "no such image", why, at=harness.now)
    await harness.run(actions.end_action, claim, Ending("failed", why))
    card = await last(harness)
    english, chinese = await read(card), await read(card, ZH)
    assert re.search(r"Reason: docker restart exited 1; next try \d\d:\d\d:\d\d\n", english)
    assert re.search(
        r"操作人: docker 重启命令退出码 1；下次尝试 \d\d:\d\d:\d\d\n|原因: docker 重启命令退出码 1；下次尝试", chinese
    )
    assert "› no such image" in english  # the command's own output


async def test_a_recovery_says_how_long_it_was_down_and_how_long_it_was_watched(harness: OutboxHarness) -> None:
    await harness.fire("web")
    harness.now += 70
    await harness.fire("web", status="resolved")
    await harness.run(lifecycle.close, 1, "recovered", ["ServiceDown"], 60.0)
    card = await last(harness)
    english = await read(card)
    assert english.startswith("Recovered: web (was down 10 s)\n")
    assert "Was down: 10 s; watched for 1 min 0 s" in english
    assert "故障时长: 10 秒；恢复后观察了 1 分 0 秒" in await read(card, ZH)


async def test_a_removed_service_is_told_as_removed(harness: OutboxHarness) -> None:
    await harness.fire("web")
    await harness.fire("web", status="resolved")
    await harness.run(lifecycle.close, 1, "unobserved", ["ServiceDown"])
    card = await last(harness)
    assert (await read(card)).startswith("Removed from the inventory while down: web\n")
    assert (await read(card, ZH)).startswith("故障期间已从清单中删除: web\n")


async def test_a_wait_for_capacity_says_how_many_wait_and_until_when(harness: OutboxHarness) -> None:
    for number in range(5):
        await harness.fire(f"s{number}")
    for _ in range(2):
        for number in range(5):
            decision = Decision("wait", "fleet-busy", detail="5 commands are running")
            await harness.run(decisions.record_decision, number + 1, decision)
        harness.now += 121
    card = await last(harness)
    assert re.search(r"Note: 5 services wait for a restart; the last one can begin at \d\d:\d\d", await read(card))
    assert re.search(r"备注: 5 个服务等待重启名额，预计 \d\d:\d\d 完成", await read(card, ZH))
    assert "正在执行 5 个命令" in await read(card, ZH)
    queue = await harness.run(read_queue)
    assert (queue.waiting, queue.ends >= harness.now) == (5, True)


@pytest.mark.parametrize(
    ("waiting", "claims", "end"),
    [(0, [], 100.0), (3, [], 100.0), (5, [], 700.0), (1, [50.0, 60.0, 70.0, 80.0], 650.0), (45, [], 100 + 11 * 600.0)],
)
def test_the_end_of_the_queue(waiting: int, claims: list[float], end: float) -> None:
    assert find_queue_end(4, 600.0, waiting, claims, 100.0) == end


# What these pass to a decision or to the end of an action is shown to people.
SPEAKING = {"ClosedGate", "Ending", "Decision", "_NotVerifiedError"}
MODULES = ("policy/gates.py", "execution/executor.py", "engine/engine.py")
NOT_SENTENCES = {
    "nothing",
    "wait",
    "act",
    "refuse",
    "failed",
    "unknown",
    "target-busy",
    "maintenance",
    "blind",
    "paused",
}


def find_messages(path: Path) -> Iterator[str]:
    """Return the messages of Defib in a module, with 7 in place of their values."""
    for node in ast.walk(ast.parse(path.read_text())):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SPEAKING:
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, ast.Return | ast.Assign) and node.value is not None:
            values = [node.value]
        for value in values:
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and " " in value.value:
                yield value.value
            elif isinstance(value, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in value.values)


MESSAGES = sorted({message for module in MODULES for message in find_messages(ROOT / "remediator" / module)})


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_of_defib_has_a_chinese_phrase(message: str) -> None:
    sentence = re.sub("^7(?=[a-z])|^7; |; 7$", "", message)  # without the component, and what others said
    shown = translate(ZH.words, sentence)
    if re.search(r"[a-z] [a-z]", sentence):
        assert re.search("[\u4e00-\u9fff]", shown)
        assert "“" not in shown.replace("“7”", "")
    assert translate(EN.words, message) == message


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 15


def test_what_others_said_is_quoted() -> None:
    assert translate(ZH.words, "not up within 60 s; connect: a {0} b") == "60 秒内未恢复；连接失败：“a {0} b”"
    assert translate(ZH.words, "kernel panic") == "“kernel panic”"
    assert translate_failure(ZH.words, "timeout: no answer; really") == "超时：“no answer; really”"
    assert translate_failure(EN.words, "timeout: no answer") == "timeout: no answer"


@pytest.mark.needs("sshd")
async def test_a_command_that_fails_is_told_with_its_exit_status(loop: Loop) -> None:
    await loop.start({"web": loop.service("web", restart="exit 7")}, attempts=2, backoff={"first": "2s", "factor": 1})
    await loop.kill("web")
    await loop.fire("web")

    async def needed() -> Any:
        return [card for card in loop.feishu.received if card.title.startswith("A person is needed")]

    await eventually(needed)
    _, failed, needed_card = loop.feishu.received
    assert re.search(r"Reason\W+command restart exited 7; next try \d\d:\d\d:\d\d", failed.text)
    assert needed_card.title == "A person is needed: web is down, 2 restarts failed"
