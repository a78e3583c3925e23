"""`defib notify test`: one message to a channel, and Feishu's answer in words."""

import getpass
import time
from collections.abc import Callable
from datetime import datetime
from uuid import uuid4
from zoneinfo import ZoneInfo

import httpx

from defib.probe import printable
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Inventory
from fleet.inventory.notify import Channel
from remediator.notifications import cards, rendering
from remediator.notifications.channels import CHANNELS
from remediator.notifications.channels.feishu import Answer, Letter, Session
from remediator.notifications.reader import Story
from runtime.errors import DefibError
from runtime.redaction import Redactor

CLOCKS_APART = 300.0  # seconds; Feishu refuses signatures of an hour


async def test(load: Callable[[], LoadedInventory], channel: str | None) -> int:
    """Send a test to one channel, or to each; 0 where all were taken. Raises DefibError."""
    loaded = load()
    channels = loaded.inventory.notify.channels
    if channel is not None and channel not in channels:
        raise DefibError(f"the inventory has no channel {channel!r} (there are {', '.join(channels) or 'none'})")
    chosen = {channel: channels[channel]} if channel is not None else channels
    if not chosen:
        raise DefibError("the inventory has no channels: see notify.channels")
    redact, good = Redactor(loaded.secrets), True
    async with httpx.AsyncClient(trust_env=True) as client:
        for name, each in chosen.items():
            answer = await sent(Session(client), loaded.inventory, each)
            good = good and answer.what == "sent"
            print(printable(redact(f"{name}: {answer.words}{_clock(answer)}")))
    return 0 if good else 1


async def sent(session: Session, inventory: Inventory, channel: Channel) -> Answer:
    """Send one test to a channel."""
    now = datetime.now(ZoneInfo(inventory.notify.timezone))
    story = Story("test", "info", {}, {}, None, now, None, 0.0, [], {"who": getpass.getuser()})
    options = channel.options
    card = cards.card([story], "one", rendering.ours(inventory), options.mention, answers=False)
    return await CHANNELS[channel.kind].send(session, options, Letter(card, uuid=uuid4().hex), time.time())


def _clock(answer: Answer) -> str:
    if answer.offset is None or abs(answer.offset) < CLOCKS_APART or "clock" in answer.words:
        return ""
    return f" (but this machine's clock is {answer.offset:+.0f} s off Feishu's)"
