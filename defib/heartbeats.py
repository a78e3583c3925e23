"""`defib heartbeat list`, `url`, `ping` and `remove`: heartbeats, their URLs, and pings in the name of a person."""

from collections.abc import Iterator, Mapping
from datetime import tzinfo
from typing import Any

from defib.output import format_age, format_table, format_time, print_json, print_text, terminal_width
from defib.remediator_client import Connect, checking_answers
from fleet.inventory.units import format_duration

TABLE_HEAD = ("STATE", "SERVICE", "SINCE", "LAST PING", "LATE AT", "DURATION", "WHAT IS SEEN")
URL_TIMEOUT = 4.0  # seconds in which a job that has started asks for it


async def list_heartbeats(connect: Connect, *, as_json: bool) -> int:
    """Print the heartbeats, those that failed or are late first."""
    async with connect() as remediator:
        answer = await remediator.request("GET", "/api/v1/heartbeats", timeout=30.0)
    if as_json:
        print_json(answer)
        return 0
    rows = [_table_row(each, answer["at"], remediator.zone) for each in answer["heartbeats"]]
    table = format_table([TABLE_HEAD, *rows], terminal_width(), cut=len(TABLE_HEAD) - 1)
    print_text(table if rows else "no heartbeats")
    return 0


def _table_row(heartbeat: Mapping[str, Any], now: str, zone: tzinfo | None) -> list[str]:
    times = [heartbeat["last_ping"], heartbeat["deadline"]]
    return [
        heartbeat["status"], heartbeat["service"], format_age(heartbeat["since"], now),
        *("" if time is None else format_time(time, zone) for time in times),
        _format_seconds(heartbeat["duration_seconds"]), "; ".join(_describe(heartbeat, now)),
    ]  # fmt: skip


def _describe(heartbeat: Mapping[str, Any], now: str) -> Iterator[str]:
    """Yield what is seen of a heartbeat."""
    if heartbeat.get("created"):
        yield "created by a ping"
    if heartbeat["started_at"] is not None:
        yield f"running for {format_age(heartbeat['started_at'], now)}"
    if heartbeat["problem"]:
        yield heartbeat["problem"]
    agent = heartbeat.get("agent")
    if agent is not None and agent["status"]:
        yield agent["stuck"] or ": ".join(filter(None, [agent["status"], agent.get("task", "")]))


def _format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f}s" if seconds < 10 else format_duration(float(round(seconds)))  # noqa: PLR2004 - digits


async def read_url(connect: Connect, service: str) -> str:
    """Return the URL of a heartbeat. Raises DefibError."""
    with checking_answers():
        async with connect() as remediator:
            path = "/api/v1/heartbeats/{name}/urls"
            urls = await remediator.request_named("service", service, "GET", path, timeout=URL_TIMEOUT)
        return str(urls["url"])


async def show_url(connect: Connect, service: str, name: str, *, as_json: bool) -> int:
    """Print the URL of a heartbeat with this name in the answer, alone."""
    async with connect() as remediator:
        urls = await remediator.request_named("service", service, "GET", "/api/v1/heartbeats/{name}/urls")
    if as_json:
        print_json(urls)
    else:
        with checking_answers():
            print_text(urls[name])
    return 0


async def remove(connect: Connect, service: str, *, as_json: bool) -> int:
    """Remove a heartbeat that a job has created."""
    async with connect() as remediator:
        answer = await remediator.request_named("service", service, "DELETE", "/api/v1/heartbeats/{name}")
    if as_json:
        print_json(answer)
    else:
        print_text(f"{answer['service']}: removed")
    return 0


async def ping(connect: Connect, service: str, body: Mapping[str, Any], *, as_json: bool) -> int:
    """Send a ping of a heartbeat."""
    async with connect() as remediator:
        answer = await remediator.request_named(
            "service", service, "POST", "/api/v1/heartbeats/{name}/ping", body=dict(body)
        )
    if as_json:
        print_json(answer)
    else:
        print_text(f"{answer['service']}: {answer['kind']}")
    return 0
