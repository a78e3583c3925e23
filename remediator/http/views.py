"""Rows of the record as JSON: times in RFC 3339; texts of hosts and services only for authenticated callers."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from aiohttp import web
from sqlalchemy import Text

from remediator.record.clock import SteadyClock
from remediator.record.database import Database, StorageError
from remediator.record.schema import actions, deliveries, evidence, incidents, notifications
from remediator.record.transaction import Transaction
from runtime.redaction import Redactor
from runtime.times import format_rfc3339
from runtime.web import ApiError, is_authenticated

P = ParamSpec("P")
T = TypeVar("T")

# Texts from hosts, services and servers have the column type Text. The timeline's details have some by the same names.
_PRIVATE = frozenset(
    column.name
    for table in (incidents, actions, evidence, notifications, deliveries)
    for column in table.columns
    if isinstance(column.type, Text)
) | {"evidence", "message"}
_TARGET_FACTS = frozenset({"before", "after"})  # may quote a command's output
_TIMES = ("at", "until", "queued_since", "healing_since", "first_seen", "last_seen")


async def read_record(
    database: Database, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a query. Raises ApiError if the record cannot be read."""
    try:
        return await database.read(work, *args, **kwargs)
    except StorageError as error:
        raise ApiError(503, "not_stored", "cannot read the record") from error


def respond(request: web.Request, rows: dict[str, Any], redact: Redactor, clock: SteadyClock) -> web.Response:
    """Return rows as a JSON response, without private texts if the caller is not authenticated."""
    visible = rows if is_authenticated(request) else remove_private_texts(rows)
    return web.json_response(redact.redact_all(format_times(visible, clock)))


def remove_private_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_private(key, item) for key, item in value.items()}
    return [remove_private_texts(item) for item in value] if isinstance(value, list) else value


def _without_private(key: str, value: Any) -> Any:
    if key in _TARGET_FACTS:
        return None
    if key not in _PRIVATE or isinstance(value, dict):
        return remove_private_texts(value)
    return [] if isinstance(value, list) else None


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
