"""What the doctor looks at on this machine: the record, its disk, the channels."""

import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from defib import notify
from defib.doctor.findings import Finding, Result
from fleet.inventory.model import Inventory
from fleet.inventory.notify import Channel
from remediator.notifications.channels import ChannelClient
from remediator.record.backup import BackupError, RecordBusyError, check
from runtime.redaction import Redactor

WITHIN = 8.0  # seconds for each channel
ROOM, SHARE = 2**30, 0.1  # of a disk, free


def record(inventory: Inventory) -> list[Finding]:
    """Whether the record's place is there, may be written, has room, and is whole."""
    path = Path(inventory.remediator.database.removeprefix("sqlite:///"))
    try:
        return _record(path)
    except PermissionError as error:
        mend = "run this as the remediator's user"
        return [Finding("database", "may be written", "warn", f"{error.filename}: {error.strerror}", mend)]


def _record(path: Path) -> list[Finding]:
    folder = path.parent
    if not folder.is_dir():
        mend = f"install -d -o defib -m 700 {folder}, or set remediator.database"
        return [
            Finding("database", "its folder", "warn", f"{folder} is not there: the remediator makes it if it may", mend)
        ]
    findings = []
    writable = os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    seen = "" if writable else f"{path} may not be written by who runs this"
    mend = "run this as the remediator's user, or chown it"
    findings.append(Finding("database", "may be written", "pass" if writable else "warn", seen, mend))
    disk = shutil.disk_usage(folder)
    low = disk.free < min(ROOM, SHARE * disk.total)
    seen = f"{disk.free / 2**30:.1f} GiB free at {folder}"
    findings.append(Finding("disk", "has room for the record", "fail" if low else "pass", seen, "make room"))
    if path.is_file() and os.access(path, os.R_OK):
        findings.append(_whole(path))
    return findings


def _whole(path: Path) -> Finding:
    mend = "stop the remediator and put a backup in its place: defib restore"
    try:
        check(path)
    except RecordBusyError as error:
        return Finding("database", "is whole", "warn", str(error), "try again; if it stays so, see who holds it")
    except BackupError as error:
        return Finding("database", "is whole", "fail", str(error), mend)
    return Finding("database", "is whole", "pass")


async def channels(inventory: Inventory, redact: Redactor, *, send: bool) -> Sequence[Finding]:
    """Whether Feishu is reached from here; and where a test is sent, what it answers."""
    told = inventory.notify
    if not told.channels:
        return [Finding("notify", "channels", "warn", "there are none: nobody is told", "docs/feishu.md says how")]
    findings = []
    if not told.routes:
        findings.append(
            Finding("notify", "routes", "fail", "there are none: nobody is told", "add `- {channels: […]}`")
        )
    async with httpx.AsyncClient(trust_env=True, timeout=WITHIN) as client:
        asked = [_channel(ChannelClient(client), inventory, *each, redact, send=send) for each in told.channels.items()]
        return [*findings, *await asyncio.gather(*asked)]


async def _channel(
    client: ChannelClient, inventory: Inventory, name: str, channel: Channel, redact: Redactor, *, send: bool
) -> Finding:
    subject = f"channel {name}"
    if send:
        sent = await notify.send_test(client, inventory, channel)
        result: Result = "pass" if sent.outcome == "sent" else "fail"
        mend = "docs/feishu.md#when-feishu-refuses says what it means"
        return Finding(subject, "takes a test", result, redact(sent.response), mend)
    url = urlsplit(channel.settings.address)
    try:
        await client.http_client.get(f"{url.scheme}://{url.netloc}/")
    except httpx.HTTPError as error:
        mend = "see that this machine may connect there: a firewall, a proxy ($HTTPS_PROXY), a name server"
        return Finding(subject, "is reached", "fail", f"{url.netloc}: {type(error).__name__}", mend)
    return Finding(subject, "is reached", "pass", f"{url.netloc}; `defib doctor --send` sends it a test")
