"""`defib notify test`: send a test message to channels, and print the responses."""

import getpass
from collections.abc import Callable

import httpx

from defib.lookup import find_channel
from defib.output import print_json, print_lines
from fleet.inventory.loading import LoadedInventory
from remediator.notifications.channels import ChannelClient, SendResult
from remediator.notifications.test_message import send_test
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
    loaded.require_resolved("notify", ignore=others)
    redact, rows = Redactor(loaded.secrets), []
    async with httpx.AsyncClient(trust_env=True) as client:
        channel_client = ChannelClient(client)
        for channel_name, channel in channels.items():
            result = await send_test(channel_client, loaded.inventory, channel, getpass.getuser())
            text = redact(f"{result.response}{_clock_hint(result)}")
            rows.append({"channel": channel_name, "sent": result.outcome == "sent", "response": text})
            if not as_json:
                print_lines([f"{channel_name}: {text}"])
    if as_json:
        print_json({"channels": rows})
    return 0 if all(row["sent"] for row in rows) else 1


def _clock_hint(result: SendResult) -> str:
    offset = result.clock_offset
    if offset is None or abs(offset) < CLOCK_TOLERANCE or "clock" in result.response:
        return ""
    return f" (the clock of this machine differs from the server's by {offset:+.0f} s)"
