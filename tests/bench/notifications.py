"""Notifications: from an alert to its card, a burst of 200 in real time, and of 1,000 at a simulated clock."""

import asyncio
import json
import logging
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import structlog
import uvloop
from sqlalchemy import func, select

from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.launcher import Launcher
from defib.demo.stack import Stack
from fleet.inventory.model import Inventory
from remediator.metrics import RemediatorMetrics
from remediator.notifications import content, deliveries, outbox
from remediator.notifications.channels import ChannelMessage, feishu, feishu_cards
from remediator.notifications.channels.http import HttpReply
from remediator.notifications.messages import render_card
from remediator.notifications.outbox import Batch
from remediator.notifications.rendering import load_templates
from remediator.notifications.sender import Sender
from remediator.record import notifications as notification_rows
from remediator.record.database import Database
from remediator.record.schema import notifications
from remediator.record.transaction import Transaction
from runtime.redaction import Redactor
from tests.support import WEBHOOK_TOKEN, eventually, inventory_of

TO_CARD, PER_SECOND, PER_MINUTE = 0.200, 5, 100
INCIDENTS, BURST, GREAT_BURST = 40, 200, 1000
SEVERITIES = ("info", "warning", "critical")


def run() -> bool:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    return all([uvloop.run(_to_card()), uvloop.run(_simulated()), uvloop.run(_burst())])


async def _to_card() -> bool:
    """From posting an alert to the card's arrival, by a remediator with its exporter."""
    feishu_, launcher = FeishuSimulator(), await Launcher.begin()
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            webhook = await feishu_.start()
            stack = Stack(launcher, Path(name), webhook_token=WEBHOOK_TOKEN)
            probe = {"every": "1h", "http": {"url": "http://127.0.0.1:1/"}}
            stack.configuration({
                "services": {f"s{n}": {"probe": probe} for n in range(INCIDENTS)},
                "notify": {"channels": {"ops": {"feishu": {"webhook": webhook, "secret": SECRET}}}, "routes": [{"channels": ["ops"]}]},
            })  # fmt: skip
            path = Path(name) / "config" / "defib.yaml"
            path.write_text(
                "".join(line for line in path.read_text().splitlines(True) if "alertmanager_url" not in line)
            )
            await stack.start_program("exporter")
            await stack.start_program("remediator")
            took = [await _one_card(stack, feishu_, n) for n in range(INCIDENTS)]
    finally:
        await launcher.end()
        await feishu_.stop()
    median = statistics.median(took)
    good = median <= TO_CARD
    print(
        f"from an alert to its card: median {median * 1000:.0f} ms of {len(took)} (at most {TO_CARD * 1000:g}; {min(took) * 1000:.0f} to"
        f" {max(took) * 1000:.0f}): {'good' if good else 'TOO SLOW'}"
    )
    return good


async def _one_card(stack: Stack, feishu_: FeishuSimulator, number: int) -> float:
    alert = {
        "status": "firing", "labels": {"alertname": "ServiceDown", "service": f"s{number}", "severity": "critical"},
        "annotations": {}, "startsAt": "2026-11-24T00:00:00Z", "endsAt": "", "fingerprint": f"f{number}",
    }  # fmt: skip
    await asyncio.sleep(0.7)  # so that the limits of the bot are far
    feishu_.arrived.clear()
    began = time.perf_counter()
    answer = await stack.client.post(
        f"{stack.url('remediator')}/webhook/alertmanager", json={"version": "4", "alerts": [alert]},
        headers={"Authorization": f"Bearer {WEBHOOK_TOKEN}"},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    async with asyncio.timeout(10):
        await feishu_.arrived.wait()
    return time.perf_counter() - began


def _written(webhook: str, digest_over: int = 10**9) -> dict[str, Any]:
    channels = {"ops": {"feishu": {"webhook": webhook, "secret": SECRET}}}
    return {
        "notify": {
            "language": "en",
            "digest_over": digest_over,
            "channels": channels,
            "routes": [{"channels": ["ops"]}],
        }
    }


def _tell(tx: Transaction, numbers: range) -> None:
    for number in numbers:
        labels = {"alertname": f"alert {number}", "severity": SEVERITIES[number % 3]}
        notification_rows.notify(tx, "alert", f"about {number}", labels, {})


def _worst(times: list[float]) -> tuple[int, int]:
    """The most sends in any window of a second, and of a minute."""
    ends = sorted(times)
    return tuple(
        max((sum(1 for at in ends if end - span < at <= end) for end in ends), default=0) for span in (1.0, 60.0)
    )  # type: ignore[return-value]  # a generator of two


async def _burst() -> bool:
    """Real time, one by one: nothing is folded, so that the rate is what counts."""
    limit, outbox.FOLD_OVER = outbox.FOLD_OVER, 10**9
    feishu_ = FeishuSimulator()
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            inventory = inventory_of(Path(name) / "config", _written(await feishu_.start())).inventory
            database = await asyncio.to_thread(Database, f"sqlite:///{name}/record.db", inventory)

            async def details(_batch: Batch) -> dict[str, Any]:
                return {}

            async with httpx.AsyncClient(trust_env=False) as client:
                sender = Sender(database, client, RemediatorMetrics(), Redactor(), details)
                task = asyncio.create_task(sender.run())
                await database.write(_tell, range(BURST))
                sender.wake()
                await eventually(lambda: _all_sent(database, BURST), 300)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(database.close)
    finally:
        outbox.FOLD_OVER = limit
        await feishu_.stop()
    times = [each.at for each in feishu_.received]
    colours = [each.colour for each in feishu_.received]
    ordered = colours == sorted(colours, key=["red", "orange", "blue"].index)
    second, minute = _worst(times)
    good = len(times) == BURST and ordered and second <= PER_SECOND and minute <= PER_MINUTE and not feishu_.refused
    print(
        f"a burst of {BURST} in real time: {len(times)} cards in {times[-1] - times[0]:.0f} s, at most {second} in a second (5) and"
        f" {minute} in a minute (100), {len(feishu_.refused)} refused, critical first: {'good' if good else 'NOT GOOD'}"
    )
    return good


async def _all_sent(database: Database, count: int) -> bool:
    query = select(func.count()).where(notifications.c.state == "sent")
    return bool(await database.write(lambda c: c.scalar(query)) == count)


async def _simulated() -> bool:
    """A clock that jumps to when the outbox says: with folding as it is, and without."""
    return all([await _simulate(outbox.FOLD_OVER), await _simulate(10**9)])


async def _simulate(fold_over: int) -> bool:
    limit, outbox.FOLD_OVER = outbox.FOLD_OVER, fold_over
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            inventory = inventory_of(Path(name) / "config", _written("http://127.0.0.1:1/hook", fold_over)).inventory
            database = await asyncio.to_thread(Database, f"sqlite:///{name}/record.db", inventory)
            return await _simulation(database, inventory, folds=fold_over < GREAT_BURST)
    finally:
        outbox.FOLD_OVER = limit


async def _simulation(database: Database, inventory: Inventory, *, folds: bool) -> bool:
    options = inventory.notify.channels["ops"].options
    templates, now, began = load_templates(inventory), database.clock.now(), time.perf_counter()
    clock = [now]
    bot = FeishuSimulator(now=lambda: clock[0])
    await database.write(_tell, range(GREAT_BURST))
    tracemalloc.start()
    at_first = most = 0
    refused: list[str] = []
    told_of = bytes_sent = 0
    times: list[float] = []
    while True:
        chosen = await database.write(outbox.choose_batch, "ops")
        if isinstance(chosen, float):
            if chosen > clock[0] + 3600:
                break
            clock[0] = max(chosen, clock[0] + 0.001)
            continue
        notifications_ = await database.write(content.read_notifications, chosen)
        delivery = await database.write(deliveries.reserve_delivery, chosen)
        assert delivery is not None
        body = feishu.format_message(ChannelMessage(render_card(notifications_, chosen.form, templates, options)))
        body |= {"timestamp": str(int(clock[0])), "sign": feishu.compute_signature(SECRET, int(clock[0]))}
        code, why = bot.check_message("demo-token", json.dumps(body, ensure_ascii=False).encode())
        result = feishu.parse_reply(HttpReply(200, {}, json.dumps({"code": code, "msg": why}).encode()))
        refused += [why] if code else []
        times.append(clock[0])
        told_of += len(chosen.ids)
        bytes_sent = max(bytes_sent, feishu_cards.message_size(body))
        await database.write(deliveries.record_result, chosen, delivery, result, state="sent", not_before=clock[0])
        clock[0] += 0.02  # the time that a send takes
        size = tracemalloc.get_traced_memory()[0]
        at_first, most = at_first or size, max(most, size)
    tracemalloc.stop()
    left = await database.write(lambda c: c.scalar(select(func.count()).where(notifications.c.state != "sent")))
    await asyncio.to_thread(database.close)
    second, minute = _worst(times)
    good = (
        not refused
        and left == 0
        and second <= PER_SECOND
        and minute <= PER_MINUTE
        and told_of == GREAT_BURST
        and most - at_first < 4e6
    )
    print(
        f"{GREAT_BURST} at a simulated clock, {'folded as they are' if folds else 'one by one'}: {len(times)} messages in"
        f" {times[-1] - times[0]:.0f} s of it, at most {second} in a second and {minute} in a minute, {len(refused)} refused, {left} left, {told_of}"
        f" told of, none over {bytes_sent} bytes, {(most - at_first) / 1e6:+.1f} MB meanwhile, {time.perf_counter() - began:.0f} s: {'good' if good else 'NOT GOOD'}"
    )
    return good
