"""The doctor's checks of the notification channels."""

import asyncio
import getpass
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from defib.doctor.findings import CheckResult, Finding
from fleet.inventory.model import Inventory
from fleet.inventory.notify import Channel
from remediator.notifications.channels import ChannelClient
from remediator.notifications.test_message import send_test
from runtime.http_clients import find_cause
from runtime.redaction import Redactor

TIMEOUT = 8.0  # seconds for each channel


async def check_channels(inventory: Inventory, redact: Redactor, *, send: bool) -> Sequence[Finding]:
    """Check that the channels are configured and reachable; with `send`, send a test message to each."""
    settings = inventory.notify
    if not settings.channels:
        fix = "configure one, see docs/feishu.md"
        return [Finding("notify", "channels", "warn", "no channels: nobody is notified", fix)]
    findings = []
    if not settings.routes:
        fix = "add `- {channels: […]}` to notify.routes"
        findings.append(Finding("notify", "routes", "fail", "no routes: nobody is notified", fix))
    async with httpx.AsyncClient(trust_env=True, timeout=TIMEOUT) as client:
        channel_client = ChannelClient(client)
        checks = [
            _send_test(channel_client, inventory, name, channel, redact)
            if send
            else _check_reachable(client, name, channel)
            for name, channel in settings.channels.items()
        ]
        return [*findings, *await asyncio.gather(*checks)]


async def _send_test(
    client: ChannelClient, inventory: Inventory, name: str, channel: Channel, redact: Redactor
) -> Finding:
    sent = await send_test(client, inventory, channel, getpass.getuser())
    result: CheckResult = "pass" if sent.outcome == "sent" else "fail"
    fix = "see docs/configuration.md#notify, and for Feishu docs/feishu.md#when-feishu-refuses"
    return Finding(f"channel {name}", "test message", result, redact(sent.response), fix)


async def _check_reachable(client: httpx.AsyncClient, name: str, channel: Channel) -> Finding:
    url = urlsplit(channel.settings.address)
    try:
        await client.get(f"{url.scheme}://{url.netloc}/")
    except httpx.TransportError as error:
        fix = "check the firewall, the proxy ($HTTPS_PROXY) and the name server of this machine"
        return Finding(f"channel {name}", "reachable", "fail", f"{url.netloc}: {find_cause(error)}", fix)
    detail = f"{url.netloc}; `defib doctor --send` sends a test message"
    return Finding(f"channel {name}", "reachable", "pass", detail)
