"""Run a sender that kills its own process in a given phase of a delivery.

Usage: python -m tests.sender_process CONFIG DATABASE [PHASE]
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import uvloop

from defib.kinds import KINDS
from fleet.inventory.loading import load
from remediator.metrics import RemediatorMetrics
from remediator.notifications import deliveries
from remediator.notifications.channels.feishu import FeishuSession
from remediator.notifications.outbox import Batch
from remediator.notifications.sender import Sender
from remediator.record.database import Database
from runtime.redaction import Redactor

PHASES = ("chosen", "reserved", "answered", "recorded")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(module: Any, name: str) -> None:
    """Kill the process once a function's transaction is committed."""
    real: Callable[..., Any] = getattr(module, name)
    write = Database.write

    def marked(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs)

    async def write_and_die(self: Database, work: Any, *args: Any, **kwargs: Any) -> Any:
        done = await write(self, work, *args, **kwargs)
        if work is marked:
            die()
        return done

    setattr(module, name, marked)
    Database.write = write_and_die  # type: ignore[method-assign]  # to end the process after the commit


def prepare(phase: str) -> None:
    if phase in ("reserved", "recorded"):
        after(deliveries, "reserve_delivery" if phase == "reserved" else "record_result")
    if phase == "answered":
        real = FeishuSession.request

        async def request(self: FeishuSession, method: str, url: str, body: Any, headers: Any = None) -> Any:
            reply = await real(self, method, url, body, headers)
            if "tenant_access_token" not in url:
                die()
            return reply

        FeishuSession.request = request  # type: ignore[method-assign]  # to end the process after the response


async def main(config: str, url: str, phase: str = "") -> None:
    inventory = (await asyncio.to_thread(load, Path(config), KINDS)).inventory
    prepare(phase)

    async def details(_batch: Batch) -> Mapping[str, Any]:
        if phase == "chosen":
            die()
        return {}

    database = await asyncio.to_thread(Database, url, inventory)
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            await Sender(database, client, RemediatorMetrics(), Redactor(), details).run()
    finally:
        await asyncio.to_thread(database.close)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
