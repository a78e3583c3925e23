"""The doctor's checks of the exporter and the remediator."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from defib.doctor.findings import Finding
from defib.doctor.server import TIMEOUT, Server
from defib.output import format_count
from fleet.inventory.digests import digests_differ
from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import Inventory
from runtime.access.roles import LOCAL, UNNAMED, Identity, Role
from runtime.tokens import ConfiguredToken, TokenError

WATCHDOG_AGE, NOTIFICATION_AGE = 120.0, 300.0  # seconds, as in alerts/rules
LISTED = 5  # services in a message
UNNAMED_CALLER = Identity(LOCAL, Role.ADMIN, "cli", claimed_user=UNNAMED).label  # in the audit log
RELOAD = "reload it with SIGHUP or POST /-/reload"


async def check_exporter(inventory: Inventory) -> Sequence[Finding]:
    """Check that the exporter runs with this configuration and accepts the local token."""
    token = inventory.local_token("exporter")
    server = Server("exporter", inventory.exporter.url, read_token(token))
    async with server.client:
        response = await server.get("/api/v1/services") if await server.get("/-/ready") is not None else None
        if response is None:
            return server.findings
        services = response.json()["services"]
        _compare_services(server, inventory, services)
        await check_access(server, token)
    return server.findings


async def check_access(server: Server, token: ConfiguredToken) -> None:
    """Check that the local token is accepted, and who else has access."""
    if not await server.check_token(token):
        return
    response = await server.get("/api/v1/access")
    if response is None:
        return
    access = response.json()
    without = ", ".join(access["users_without_role"][:LISTED])
    problem = f"without a role, and therefore viewers: {without}" if without else ""
    fix = "add them to `roles` in its --web.config.file, as `viewer` if that is intended"
    server.add("users", problem, fix, severe=False)
    server.add("permissions of --web.config.file", access["web_config_exposed"], "run the command")
    is_open = not access["metrics_token"] and not access["users"]
    problem = "whoever reaches its port can read its metrics" if is_open else ""
    fix = "set access.metrics_token, and use it in Prometheus' scrape_configs: docs/access.md"
    server.add("metrics", problem, fix, severe=False)


async def _check_callers(server: Server) -> None:
    """Check that only `defib` uses the local token, which names no one."""
    response = await server.get("/api/v1/audit?limit=1000")
    if response is None:
        return
    unnamed = [each for each in response.json()["audit"] if each["name"] == UNNAMED_CALLER]
    problem = f"used by other programs than defib, last from {unnamed[0]['address']}" if unnamed else ""
    server.add("use of the local token", problem, "give each script an API token: `defib token create`", severe=False)


def read_token(token: ConfiguredToken) -> SecretStr | None:
    try:
        return token.read()
    except TokenError:
        return None  # `check_token` reports it


def _compare_services(server: Server, inventory: Inventory, services: Sequence[Mapping[str, Any]]) -> None:
    known = inventory.services
    names = {each["id"] for each in services if not each.get("created")}
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
    """Check that the remediator runs, accepts the local token, and receives and sends."""
    settings = inventory.remediator
    token = inventory.local_token("remediator")
    server = Server("remediator", settings.url, read_token(token))
    async with server.client:
        if await server.get("/-/ready") is None or not await _is_healthy(server):
            return server.findings
        await check_access(server, token)
        await _check_callers(server)
        page = await server.get("/metrics")
        if page is not None:
            server.add("reachable")
            _check_metrics(server, page.text, settings.watchdog)
    return server.findings


async def check_console(inventory: Inventory) -> Sequence[Finding]:
    """Check the console's address for browsers, with which links in notifications begin."""
    public = inventory.notify.links.remediator
    if public is None and not inventory.notify.channels:
        return []
    url = public or inventory.remediator.url.url
    server = Server("console", Endpoint(url=url))
    is_local = (urlsplit(url).hostname or "") in ("127.0.0.1", "localhost", "::1", "remediator")
    problem = f"links in notifications begin with {url}, which leads nowhere on other machines" if is_local else ""
    server.add("public URL", problem, "set notify.links.remediator to its address for browsers", severe=False)
    if public is not None:
        async with server.client:
            if await server.get("/-/ready") is not None:
                server.add("reachable")
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
