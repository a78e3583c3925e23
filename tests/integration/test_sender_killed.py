"""A sender that is killed in any phase: nothing is lost, and only a lost response can cause a duplicate."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.feishu_app import APP_ID, APP_SECRET, CHAT
from remediator.notifications import sender
from remediator.record import notifications as notification_rows
from remediator.record.database import Database
from tests import sender_process
from tests.support import eventually, loaded

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start senders that end with the test: an event loop cannot be closed while its processes run."""
    processes = []

    async def start(*arguments: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.sender_process", *arguments)
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def following(config: Path, url: str) -> AsyncIterator[None]:
    """Run a sender that continues after a killed one, in this process."""
    task = asyncio.create_task(sender_process.main(str(config), url))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("phase", sender_process.PHASES)
@pytest.mark.parametrize("channel", ["bot", "app"])
async def test_a_sender_killed_in_any_phase_loses_nothing(
    tmp_path: Path, feishu: FeishuSimulator, start: Start, monkeypatch: pytest.MonkeyPatch, channel: str, phase: str
) -> None:
    options: dict[str, Any] = {
        "bot": {"feishu": {"webhook": feishu.webhook, "secret": SECRET}},
        "app": {"feishu_app": {"app_id": APP_ID, "app_secret": APP_SECRET, "chat_id": CHAT, "url": feishu.url}},
    }
    config = tmp_path / "config"
    config.mkdir()
    notify = {"channels": {"it": options[channel]}, "routes": [{"channels": ["it"]}]}
    await asyncio.to_thread((config / "defib.yaml").write_text, yaml.safe_dump({"notify": notify}))
    url = f"sqlite:///{tmp_path}/record.db"
    await asyncio.to_thread(add_notifications, config, url)

    def received() -> list[str]:
        return [each.text for each in feishu.received] + [each.text for each in feishu.apps.in_chat]

    assert await (await start(str(config), url, phase)).wait() == -signal.SIGKILL
    assert len(received()) == (phase in ("answered", "recorded"))

    async def all_received() -> bool:
        return all(any(f"number {number}" in text for text in received()) for number in range(3))

    # A custom bot cannot recognize a message that it received before.
    may_be_duplicate = channel == "bot" and phase == "answered"

    async def settled() -> bool:
        return len(received()) == 3 + may_be_duplicate

    monkeypatch.setattr(sender, "FIRST_RETRY", 0.05)
    async with following(config, url):
        await eventually(all_received)
        await eventually(settled)
        await asyncio.sleep(0.5)
    assert len(received()) == 3 + may_be_duplicate
    assert not feishu.refused


def add_notifications(config: Path, url: str) -> None:
    """Add three notifications for the channel."""
    database = Database(url, loaded(config).inventory)

    def write(connection: Any) -> None:
        for number in range(3):
            labels = {"alertname": "DiskFull", "severity": "warning"}
            content = {"annotations": {"summary": f"number {number}"}}
            notification_rows.notify(connection, "alert", f"alert {number}", labels, content)

    asyncio.run(database.write_with_priority(write))
    database.close()
