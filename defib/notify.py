"""`defib notify test`: send a test message to channels and print the responses."""

import getpass
import time
from collections.abc import Callable
from datetime import datetime
from uuid import uuid4
from zoneinfo import ZoneInfo

import httpx

from defib.probe import printable
from fleet.inventory.loading import Loaded
from fleet.inventory.model import Inventory
from fleet.inventory.notify import Channel
from remediator.notifications.channels import ChannelClient, ChannelMessage, SendResult
from remediator.notifications.messages import render_card
from remediator.notifications.rendering import shipped_templates
from remediator.notifications.samples import build_test_notification
from runtime.errors import DefibError
from runtime.redaction import Redactor

MAX_CLOCK_OFFSET = 300.0  # seconds; Feishu refuses signatures that are an hour off


async def test(load: Callable[[], Loaded], channel: str | None) -> int:
    """Send a test message to one channel or to all; returns 0 if all accepted it. Raises DefibError."""
    loaded = load()
    channels = loaded.inventory.notify.channels
    if channel is not None and channel not in channels:
        raise DefibError(f"the inventory has no channel {channel!r} (it has {', '.join(channels) or 'none'})")
    selected = {channel: channels[channel]} if channel is not None else channels
    if not selected:
        raise DefibError("the inventory has no channels: see notify.channels")
    redact, all_sent = Redactor(loaded.secrets), True
    async with httpx.AsyncClient(trust_env=True) as client:
        channel_client = ChannelClient(client)
        for name, each in selected.items():
            result = await send_test(channel_client, loaded.inventory, each)
            all_sent = all_sent and result.outcome == "sent"
            print(printable(redact(f"{name}: {result.response}{_describe_clock(result)}")))
    return 0 if all_sent else 1


async def send_test(client: ChannelClient, inventory: Inventory, channel: Channel) -> SendResult:
    """Send a test message, which mentions nobody, to a channel."""
    now = datetime.now(ZoneInfo(inventory.notify.timezone))
    notifications = [build_test_notification(now, getpass.getuser())]
    card = render_card(notifications, "one", shipped_templates(inventory))
    return await client.send(channel, ChannelMessage(card, notifications, key=uuid4().hex), time.time())


def _describe_clock(result: SendResult) -> str:
    offset = result.clock_offset
    if offset is None or abs(offset) < MAX_CLOCK_OFFSET or "clock" in result.response:
        return ""
    return f" (but the clock of this machine is {offset:+.0f} s off the server's)"
