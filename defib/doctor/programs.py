"""The doctor's checks of the exporter and the remediator."""

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from defib.doctor.findings import Finding
from defib.doctor.server import TIMEOUT, Server
from defib.output import format_count
from fleet.inventory.digests import digests_differ
from fleet.inventory.model import Inventory
from runtime.tokens import ApiToken, TokenError

WATCHDOG_AGE, NOTIFICATION_AGE = 120.0, 300.0  # seconds, as in alerts/rules
LISTED = 5  # services in a message
NO_SERVICE = "-"  # no service can have this name
RELOAD = "reload it with SIGHUP or POST /-/reload"


async def check_exporter(inventory: Inventory) -> Sequence[Finding]:
    """Check that the exporter runs with this configuration and accepts the API token."""
    server = Server("exporter", inventory.exporter.url, inventory.exporter.token)
    async with server.client:
        response = await server.get("/api/v1/services") if await server.get("/-/ready") is not None else None
        if response is None:
            return server.findings
        services = response.json()["services"]
        _compare_services(server, inventory, services)
        token = ApiToken("exporter.token", inventory.exporter.token, inventory.remediator.token_file)
        await server.check_token(token, f"/api/v1/services/{NO_SERVICE}/probe")
    return server.findings


def _compare_services(server: Server, inventory: Inventory, services: Sequence[Mapping[str, Any]]) -> None:
    known = inventory.services
    names = {each["id"] for each in services}
    different = sorted(known.keys() ^ names)
    problem = f"it has other services: {', '.join(different[:LISTED])}" if different else ""
    server.add("reachable", problem, RELOAD, detail=format_count(len(names), "service"), severe=False)
    changed = sorted(
        each["id"]
        for each in services
        if each["id"] in known and digests_differ(known[each["id"]].digest, each.get("digest"))
    )
    problem = f"it has another configuration of {', '.join(changed[:LISTED])}" if changed else ""
    server.add("configuration", problem, RELOAD, severe=False)


async def check_remediator(inventory: Inventory) -> Sequence[Finding]:
    """Check that the remediator runs, accepts the API token, and receives and sends."""
    settings = inventory.remediator
    token = ApiToken("remediator.token", settings.token, settings.token_file)
    credential = settings.webhook_token
    if credential is None:
        with contextlib.suppress(TokenError):
            credential = token.get()
    server = Server("remediator", settings.url, credential)
    async with server.client:
        if await server.get("/-/ready") is None or not await _is_healthy(server):
            return server.findings
        await server.check_token(token, f"/api/v1/services/{NO_SERVICE}/reset")
        page = await server.get("/metrics")
        if page is not None:
            server.add("reachable")
            _check_metrics(server, page.text, settings.watchdog)
    return server.findings


async def _is_healthy(server: Server) -> bool:
    response = await server.client.get("/-/healthy", timeout=TIMEOUT)
    problem = "" if response.is_success else response.text.strip()[:500]
    return server.add("health", problem, "do what the message says")


def _check_metrics(server: Server, page: str, watchdog: float) -> None:
    values = _parse_values(page)
    received = values.get("defib_remediator_watchdog_last_timestamp_seconds", 0.0)
    age = time.time() - received
    detail = f"received {age:.0f} s ago" if received else "not received"
    fix = "check that Prometheus has alerts/rules, and that Alertmanager's receiver is this remediator"
    server.add("Watchdog alert", detail if age > max(watchdog, WATCHDOG_AGE) else "", fix, detail=detail)
    off = values.get("defib_remediator_automation_enabled") == 0
    server.add("automation", "it is off" if off else "", "`defib automation` shows why", severe=False)
    count = values.get("defib_remediator_config_mismatch", 0.0)
    services = format_count(round(count), "service")
    problem = f"the exporter has another configuration of {services}: no actions until they match" if count else ""
    server.add("configuration", problem, "reload the program that has the old configuration")
    unsent = values.get("defib_remediator_outbox_oldest_seconds", 0.0)
    problem = f"the oldest has been waiting for {unsent:.0f} s" if unsent > NOTIFICATION_AGE else ""
    server.add("notifications", problem, "see its log, and try `defib notify test`")
    connections = re.findall(r'^defib_remediator_feishu_connected{channel="(.+)"} (\S+)', page, re.MULTILINE)
    for channel, connected in connections:
        problem = "" if float(connected) else "not connected: buttons do not work"
        server.add(f"long connection of {channel}", problem, "see its log", severe=False)


def _parse_values(page: str) -> dict[str, float]:
    """Return the samples without labels of a metrics page."""
    values = {}
    for line in page.splitlines():
        name, _, value = line.partition(" ")
        if not line.startswith("#") and "{" not in name:
            values[name] = float(value)
    return values
