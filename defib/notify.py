"""`defib notify test`: send a test message to channels, and print the answers."""

import getpass
import time
from collections.abc import Callable
from datetime import datetime
from uuid import uuid4
from zoneinfo import ZoneInfo

import httpx

from defib.lookup import find_channel
from defib.output import print_json, printable
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Inventory
from fleet.inventory.notify import Channel
from remediator.notifications import cards, rendering
from remediator.notifications.channels import CHANNELS
from remediator.notifications.channels.feishu import Answer, Letter, Session
from remediator.notifications.reader import Story
from runtime.errors import DefibError
from runtime.redaction import Redactor

CLOCK_TOLERANCE = 300.0  # seconds; Feishu refuses signatures that are an hour off


async def send_tests(load: Callable[[], LoadedInventory], name: str | None, *, as_json: bool) -> int:
    """Send a test message to one channel, or to each; return 0 if all were accepted. Raises DefibError."""
    loaded = load()
    channels = loaded.inventory.notify.channels
    if name is not None:
        channels = {name: find_channel(loaded.inventory, name)}
    if not channels:
        raise DefibError("no channels are configured: set notify.channels")
    others = [f"notify.channels.{other}" for other in loaded.inventory.notify.channels if other not in channels]
    loaded.require("notify", ignore=others)
    redact, rows = Redactor(loaded.secrets), []
    async with httpx.AsyncClient(trust_env=True) as client:
        for channel_name, channel in channels.items():
            answer = await send_test(Session(client), loaded.inventory, channel)
            text = redact(f"{answer.words}{_clock_hint(answer)}")
            rows.append({"channel": channel_name, "sent": answer.what == "sent", "answer": text})
            if not as_json:
                print(printable(f"{channel_name}: {text}"))
    if as_json:
        print_json({"channels": rows})
    return 0 if all(row["sent"] for row in rows) else 1


async def send_test(session: Session, inventory: Inventory, channel: Channel) -> Answer:
    """Send one test message to a channel."""
    now = datetime.now(ZoneInfo(inventory.notify.timezone))
    story = Story("test", "info", {}, {}, None, now, None, 0.0, [], {"who": getpass.getuser()})
    options = channel.options
    card = cards.card([story], "one", rendering.ours(inventory), options.mention, answers=False)
    return await CHANNELS[channel.kind].send(session, options, Letter(card, uuid=uuid4().hex), time.time())


def _clock_hint(answer: Answer) -> str:
    if answer.offset is None or abs(answer.offset) < CLOCK_TOLERANCE or "clock" in answer.words:
        return ""
    return f" (the clock of this machine differs from Feishu's by {answer.offset:+.0f} s)"
