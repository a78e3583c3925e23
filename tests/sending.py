"""A sender in a process of its own, killed in the phase of a send that it is told.

Usage: python -m tests.sending CONFIG DATABASE [PHASE]
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
from remediator.notifications import outbox
from remediator.notifications.channels.feishu import Session
from remediator.notifications.outbox import Batch
from remediator.notifications.sender import Sender
from remediator.record.database import Database
from runtime.redaction import Redactor

PHASES = ("chosen", "reserved", "answered", "recorded")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(module: Any, name: str) -> None:
    """Be killed once a function of a transaction has been committed."""
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
    Database.write = write_and_die  # type: ignore[method-assign]


def prepare(phase: str) -> None:
    if phase in ("reserved", "recorded"):
        after(outbox, "reserve" if phase == "reserved" else "record")
    if phase == "answered":
        real = Session.ask

        async def ask(self: Session, method: str, url: str, body: Any, headers: Any = None) -> Any:
            heard = await real(self, method, url, body, headers)
            if "tenant_access_token" not in url:
                die()
            return heard

        Session.ask = ask  # type: ignore[method-assign]


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
