"""`defib list services`: the services with their states, the broken ones first."""

import sys
from collections.abc import Iterator, Mapping
from datetime import tzinfo
from typing import Any
from urllib.parse import urlencode

from defib.output import (
    format_age,
    format_table,
    format_time,
    parenthesized,
    print_json,
    print_lines,
    print_text,
    terminal_width,
)
from defib.remediator_client import Connect, RemediatorClient

TABLE_HEAD = ("STATE", "SINCE", "SERVICE", "HOST", "WHAT IS SEEN", "LATENCY", "LAST CHECKS")
SEEN = TABLE_HEAD.index("WHAT IS SEEN")
CHECKS_SHOWN = 20
_COMPONENTS_SHOWN = 5
_STALE = {"exporter": "states are those of then", "record": "incidents and actions are those of then"}
_PHASES = {"queued": "{} waits for approval", "running": "{} is in progress", "verifying": "{} is being verified"}


async def list_services(connect: Connect, wanted: Mapping[str, str], *, as_json: bool) -> int:
    """Print the services that match; `wanted` are the values of the API's parameters."""
    async with connect() as remediator:
        overview = await read_overview(remediator, wanted)
    if as_json:
        print_json(overview)
        return 0
    for line in describe_problems(overview, remediator.zone):
        print_lines([line], sys.stderr)
    rows = [table_row(each, overview["at"]) for each in overview["services"]]
    print_text(format_table([TABLE_HEAD, *rows], terminal_width(), cut=SEEN) if rows else "no services")
    return 0


async def read_overview(remediator: RemediatorClient, wanted: Mapping[str, str]) -> Any:
    """Return the services that match, and what is unusual. Raises ClientError."""
    query = urlencode({name: value for name, value in wanted.items() if value})
    return await remediator.request("GET", f"/api/v1/overview?{query}", timeout=30.0)


def describe_problems(overview: Mapping[str, Any], zone: tzinfo | None) -> Iterator[str]:
    """Yield a line for each source that the remediator cannot read."""
    for each in overview["problems"]:
        source, since = each["source"], format_time(each["since"], zone)
        yield f"cannot read the {source} since {since}: {_STALE[source]}{parenthesized(each['text'])}"


def table_row(service: Mapping[str, Any], now: str) -> list[str]:
    """Return a service as a row of a table with `TABLE_HEAD`."""
    title = service["name"] if service["name"] != service["id"] else ""
    return [
        service["state"], format_age(service["since"], now), service["id"] + parenthesized(title), service["host"],
        "; ".join(_describe(service)), _format_latency(service["latency_seconds"]),
        service["recent"][-CHECKS_SHOWN:],
    ]  # fmt: skip


def _describe(service: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is seen of a service, and what is done about it."""
    if service["action"]:
        yield _PHASES[service["phase"]].format(service["action"])
    if service["stopped_by"]:
        yield ": ".join(filter(None, [f"stopped by {service['stopped_by']}", service["stop_reason"]]))
    if service["reason"] or service["failure"]:
        yield ": ".join(filter(None, [service["reason"], service["failure"]]))
    if service["alerts"] and service["state"] != "down":
        yield f"firing: {', '.join(service['alerts'])}"
    if service.get("components_down") and service["state"] != "down":
        down = service["components_down"]
        yield f"components down: {', '.join(down[:_COMPONENTS_SHOWN])}{' …' if len(down) > _COMPONENTS_SHOWN else ''}"
    if service["decision"] and not service["action"]:
        yield f"{service['verb']} {service['decision']}{parenthesized(service['detail'])}"
    if service["acknowledged_by"]:
        yield f"acknowledged by {service['acknowledged_by']}"
    if service["maintenance"]:
        yield f"maintenance by {service['maintenance']}"
    if service.get("paused"):
        yield "probing is paused"


def _format_latency(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
