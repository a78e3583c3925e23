"""Rows of the record as JSON: times in RFC 3339; output of commands and evidence only for operators."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from aiohttp import web

from fleet.inventory.model import Inventory
from remediator.record.automation import AutomationSwitch
from remediator.record.database import Database, StorageError
from remediator.record.transaction import Transaction
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement, permits
from runtime.clock import SteadyClock
from runtime.errors import ApiError
from runtime.redaction import Redactor
from runtime.times import format_rfc3339

P = ParamSpec("P")
T = TypeVar("T")

# Keys of what commands on hosts and jobs printed, in rows and in details of the timeline.
_EVIDENCE = frozenset({"output", "evidence", "why", "message", "before", "after", "body"})
_TIMES = ("at", "until", "queued_since", "healing_since", "first_seen", "last_seen")


async def read_record(
    database: Database, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a query. Raises ApiError if the record cannot be read."""
    try:
        return await database.read_for_page(work, *args, **kwargs)
    except StorageError as error:
        raise ApiError(503, "not_stored", "cannot read the record") from error


async def respond(request: web.Request, rows: dict[str, Any], redact: Redactor, clock: SteadyClock) -> web.Response:
    """Return rows as a JSON response, without evidence if the caller's role does not permit it."""
    visible = rows if may_read_evidence(request) else remove_evidence(rows)
    # In a thread, since outputs and evidence may have megabytes.
    text = await asyncio.to_thread(lambda: json.dumps(redact.redact_all(format_times(visible, clock))))
    return web.json_response(text=text)


def describe_automation(switch: AutomationSwitch, inventory: Inventory) -> dict[str, Any]:
    """Return whether automation is on, and why; a time is of the record's clock."""
    automatic = inventory.remediation.automatic
    return {
        "enabled": switch.enabled and automatic, "by_inventory": automatic, "by_switch": switch.enabled,
        "at": switch.at, "by": switch.by, "reason": switch.reason,
    }  # fmt: skip


def may_read_evidence(request: web.Request) -> bool:
    return permits(get_identity(request).role, AccessRequirement.OPERATOR)


def remove_evidence(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: ([] if isinstance(item, list) else None) if key in _EVIDENCE else remove_evidence(item)
            for key, item in value.items()
        }
    return [remove_evidence(item) for item in value] if isinstance(value, list) else value


def format_times(value: Any, clock: SteadyClock) -> Any:
    """Convert times of the record's clock to RFC 3339, in UTC."""
    if isinstance(value, dict):
        return {
            key: format_rfc3339(clock.unix(item)) if _is_time(key, item) else format_times(item, clock)
            for key, item in value.items()
        }
    return [format_times(item, clock) for item in value] if isinstance(value, list) else value


def _is_time(key: str, value: Any) -> bool:
    return isinstance(value, float) and (key in _TIMES or key.endswith("_at"))
