"""`defib replay`: what the remediator would have done, by the history in Prometheus."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import tzinfo

from defib.output import format_time, parenthesized, print_json, time_zone
from fleet.inventory.loading import LoadedInventory
from remediator.clients.json_client import ClientError, JsonClient
from remediator.replay import Event, history, replay
from runtime.errors import DefibError
from runtime.times import format_rfc3339

_VERBS = {"act": "would", "wait": "would wait:", "refuse": "would not act:", "nothing": "alert resolved"}


async def run(load: Callable[[], LoadedInventory], since: float, *, as_json: bool) -> int:
    """Print the decisions that would have been made in the last `since` seconds. Raises DefibError."""
    loaded = load()
    loaded.require("remediator.prometheus_url", "remediation")
    inventory = loaded.inventory
    endpoint = inventory.remediator.prometheus_url
    if endpoint is None:
        raise DefibError("replay needs the history in Prometheus: set remediator.prometheus_url")
    now = time.time()
    peer = JsonClient(endpoint)
    try:
        events = replay(inventory, await history(peer, inventory, now - since, now))
    except ClientError as error:
        raise DefibError(f"cannot query Prometheus at {endpoint.base}: {error}") from error
    finally:
        await peer.close()
    if as_json:
        print_json([{**asdict(event), "at": format_rfc3339(event.at)} for event in events])
    else:
        print(_format(events, time_zone(inventory)))
    return 0


def _format(events: list[Event], zone: tzinfo | None) -> str:
    lines = [_format_line(event, zone) for event in events]
    actions = Counter(event.service for event in events if event.verb == "act")
    by_service = ", ".join(f"{service} {count}" for service, count in actions.most_common())
    lines.append(f"{actions.total()} actions{f': {by_service}' if by_service else ''}")
    return "\n".join(lines)


def _format_line(event: Event, zone: tzinfo | None) -> str:
    decision = " ".join(part for part in (_VERBS[event.verb], event.reason) if part)
    return f"{format_time(event.at, zone)}  {event.service}  {decision}{parenthesized(event.detail)}"
