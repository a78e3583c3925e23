"""A message that tests a channel."""

import time
from datetime import datetime
from uuid import uuid4
from zoneinfo import ZoneInfo

from fleet.inventory.model import Inventory
from fleet.inventory.notify import Channel
from remediator.notifications.channels import ChannelClient, ChannelMessage, SendResult
from remediator.notifications.messages import render_card
from remediator.notifications.rendering import shipped_templates
from remediator.notifications.samples import build_test_notification


async def send_test(client: ChannelClient, inventory: Inventory, channel: Channel, by: str) -> SendResult:
    """Send a test message, which mentions nobody, to a channel."""
    now = datetime.now(ZoneInfo(inventory.notify.timezone))
    notifications = [build_test_notification(now, by)]
    card = render_card(notifications, "one", shipped_templates(inventory.notify.language))
    return await client.send(channel, ChannelMessage(card, notifications, key=uuid4().hex), time.time())
