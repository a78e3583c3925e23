"""`defib replay`: what the remediator would have done, by Prometheus' history."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

from fleet.inventory.loading import LoadedInventory
from remediator.clients.json_client import ClientError, JsonClient
from remediator.replay import Event, history, replay
from runtime.errors import DefibError
from runtime.times import format_rfc3339

_WORDS = {"act": "would", "wait": "would wait:", "refuse": "would not:", "nothing": "over"}


async def run(load: Callable[[], LoadedInventory], since: float, *, as_json: bool) -> int:
    """Print what would have been decided in the last `since` seconds. Raises DefibError."""
    inventory = load().inventory
    endpoint = inventory.remediator.prometheus_url
    if endpoint is None:
        raise DefibError("replay asks Prometheus: set remediator.prometheus_url")
    now = time.time()
    peer = JsonClient(endpoint)
    try:
        events = replay(inventory, await history(peer, inventory, now - since, now))
    except ClientError as error:
        raise DefibError(f"Prometheus at {endpoint.base} refused or did not answer: {error}") from error
    finally:
        await peer.close()
    print(json.dumps([asdict(event) for event in events], ensure_ascii=False) if as_json else _as_text(events))
    return 0


def _as_text(events: list[Event]) -> str:
    lines = [_line(event) for event in events]
    acted = Counter(event.service for event in events if event.verb == "act")
    each = ", ".join(f"{service} {count}" for service, count in acted.most_common())
    lines.append(f"{acted.total()} actions{f': {each}' if each else ''}")
    return "\n".join(lines)


def _line(event: Event) -> str:
    said = " ".join(part for part in (_WORDS[event.verb], event.reason) if part)
    detail = f" ({event.detail})" if event.detail else ""
    return f"{(format_rfc3339(event.at) or '')[:19]}Z  {event.service}  {said}{detail}"
