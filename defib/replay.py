"""`defib replay`: what the remediator would have decided, by the history in Prometheus."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import tzinfo
from itertools import islice

from defib.output import format_time, parenthesized, print_json, print_lines, print_text, time_zone
from fleet.inventory.loading import LoadedInventory
from fleet.json_client import ClientError, JsonClient
from remediator.replay import ReplayedDecision, evaluation_times, read_history, replay
from runtime.errors import DefibError
from runtime.times import format_rfc3339

HISTORY_LIMIT = 1024**3  # bytes of a response of Prometheus
_VERBS = {"act": "would", "wait": "would wait:", "refuse": "would not act:", "nothing": "alert resolved"}
_NOTE = """\
Decisions of the policy as if automation had been on, evaluated every {step:g} s since {since}.
Whether a restart would have helped is unknown: an attempt ends when the service came up, or fails after start_within.
Silences, maintenance begun by operators, and stopped or restarting targets would also have held restarts; the history
does not contain them.
"""


async def run(load: Callable[[], LoadedInventory], since: float, *, as_json: bool) -> int:
    """Print the decisions that would have been made in the last `since` seconds. Raises DefibError."""
    loaded = load()
    inventory = loaded.inventory
    rules = [f"services.{name}.{key}" for name in inventory.services for key in ("remediation", "control.start_within")]
    loaded.require_resolved("remediator.prometheus_url", "remediation", "notify.timezone", "defaults.control", *rules)
    endpoint = inventory.remediator.prometheus_url
    if endpoint is None:
        raise DefibError("replay needs the history in Prometheus: set remediator.prometheus_url")
    now = time.time()
    # A history has millions of values. This process does nothing else meanwhile, so that parsing may block it.
    prometheus = JsonClient(endpoint, response_limit=HISTORY_LIMIT, decode=json.loads)
    try:
        decisions = replay(inventory, await read_history(prometheus, inventory, now - since, now))
    except ClientError as error:
        raise DefibError(f"cannot query Prometheus at {endpoint.base}: {error}") from error
    finally:
        await prometheus.close()
    if as_json:
        print_json([{**asdict(each), "at": format_rfc3339(each.at)} for each in decisions])
        return 0
    zone = time_zone(inventory)
    first, second = islice(evaluation_times(now - since, now), 2)
    print_text(_NOTE.format(step=second - first, since=format_time(first, zone)))
    print_lines(_format_decisions(decisions, zone))
    return 0


def _format_decisions(decisions: Sequence[ReplayedDecision], zone: tzinfo | None) -> list[str]:
    lines = [_format_decision(decision, zone) for decision in decisions]
    actions = Counter(decision.service for decision in decisions if decision.verb == "act")
    by_service = ", ".join(f"{service} {count}" for service, count in actions.most_common())
    lines.append(f"{actions.total()} actions{f': {by_service}' if by_service else ''}")
    return lines


def _format_decision(decision: ReplayedDecision, zone: tzinfo | None) -> str:
    summary = " ".join(part for part in (_VERBS[decision.verb], decision.reason) if part)
    return f"{format_time(decision.at, zone)}  {decision.service}  {summary}{parenthesized(decision.detail)}"
