"""A sender with its record and a simulated Feishu server."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from defib.demo.feishu import FeishuSimulator
from fleet.inventory.model import Inventory
from remediator.clients.alerts import Alert, cut_texts
from remediator.incidents import intake
from remediator.metrics import RemediatorMetrics
from remediator.notifications.outbox import Batch
from remediator.notifications.sender import Sender
from remediator.record import notifications as notification_rows
from remediator.record.schema import notifications
from runtime.redaction import Redactor
from tests.support import NO_TLS, RecordHarness, eventually

LABELS = {"alertname": "DiskFull", "severity": "warning"}


async def no_details(_batch: Batch) -> Mapping[str, Any]:
    return {}


class SenderHarness(RecordHarness):
    """A sender with its database; `feishu` receives its messages."""

    def __init__(self, folder: Path, feishu: FeishuSimulator, inventory: Inventory) -> None:
        self.folder, self.feishu = folder, feishu
        self.client = httpx.AsyncClient(verify=NO_TLS, trust_env=False)
        super().__init__(folder, inventory)

    async def open(self) -> None:
        redact = Redactor(["hunter2-secret"])
        self.metrics = RemediatorMetrics()
        self.sender = Sender(self.database, self.client, self.metrics, redact, no_details)
        self.task = asyncio.create_task(self.sender.run())

    async def notify(self, number: int, text: str = "", labels: Mapping[str, str] = LABELS) -> None:
        content = {"annotations": {"summary": text or f"number {number}"}}
        await self.database.write(notification_rows.notify, "alert", f"alert {number}", labels, content)
        self.sender.wake()

    async def rows(self) -> list[Any]:
        return list(
            await self.database.write(lambda c: c.execute(select(notifications).order_by(notifications.c.id)).all())
        )

    async def settled(self) -> bool:
        return all(row.state != "pending" for row in await self.rows())

    async def send_long_alerts(self) -> None:
        """Receive alerts with as much text as an alert may have, most of it to be escaped, and send them."""
        text = "<&*_[" * 800
        labels = {f"label{number}": text for number in range(8)}
        received = [
            cut_texts(Alert(f"{number} {time.monotonic()}", "1", "", "firing", {"alertname": "Long", **labels}, {}))
            for number in range(100)
        ]
        await self.database.write(intake.receive_alerts, received)
        self.sender.wake()
        await eventually(self.settled)

    async def close(self) -> None:
        await self.sender.drain()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
