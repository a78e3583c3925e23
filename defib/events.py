"""`defib list events`: the timeline of everything that happened."""

from collections.abc import Mapping, Sequence
from datetime import tzinfo
from typing import Any
from urllib.parse import urlencode

from defib.output import format_time, parenthesized, print_json, print_lines
from defib.remediator_client import Connect

MAX_PAGE = 1000  # events in a response of the API


async def list_events(connect: Connect, limit: int, wanted: Mapping[str, str | Sequence[str]], *, as_json: bool) -> int:
    """Print the newest events, the newest last; `wanted` are the values of the API's parameters that filter them."""
    events: list[dict[str, Any]] = []
    before: dict[str, str] = {}
    async with connect() as remediator:
        while len(events) < limit:
            size = min(MAX_PAGE, limit - len(events))
            query = urlencode({**wanted, **before, "limit": size}, doseq=True)
            page = await remediator.request("GET", f"/api/v1/events?{query}")
            events += page["events"]
            if page["next"] is None:
                break
            before = {"before": page["next"]}
    if as_json:
        print_json({"events": events})
        return 0
    print_lines([_format_event(each, remediator.zone) for each in reversed(events)] or ["no events"])
    return 0


def _format_event(event: Mapping[str, Any], zone: tzinfo | None) -> str:
    subject = " ".join(filter(None, [event["host"], event["name"] if event["name"] != event["host"] else ""]))
    what = " ".join(filter(None, [event["operation"], event["state"]]))
    by = f" by {event['by']}" if event["by"] else ""
    line = f"{format_time(event['at'], zone)}  {event['kind']:<11}  {subject}: {what}{by}"
    return line + parenthesized(event["detail"]) + _format_times(event, zone)


def _format_times(event: Mapping[str, Any], zone: tzinfo | None) -> str:
    """Return how often something happened, and when it did last."""
    last = format_time(event["last_at"], zone) if event["last_at"] else ""
    if last and event["kind"] != "gap":
        return f" [the last of {event['times']}, at {last}]"
    until = f" until {last}" if last else ""
    return f" [{event['times']} times{until}]" if event["times"] > 1 else until
