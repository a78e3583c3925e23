"""The events: changes of state of services, hosts and what runs on them."""

from typing import Any

from aiohttp import web

from exporter.scheduler.events import Event
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.errors import ApiError
from runtime.streaming import stream_list
from runtime.terminal import escape_controls
from runtime.times import format_rfc3339

MAX_PAGE = 1000


class EventsApi:
    def __init__(self, scheduler: ProbeScheduler) -> None:
        self._scheduler = scheduler

    async def list_events(self, request: web.Request) -> web.StreamResponse:
        page = self._scheduler.events.page(request.query.get("after"), _parse_limit(request))
        return await stream_list(
            request, {"cursor": page.cursor, "gap": page.gap}, "events", map(_event_json, page.events)
        )


def _parse_limit(request: web.Request) -> int:
    text = request.query.get("limit", str(MAX_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_PAGE)) and 1 <= int(text) <= MAX_PAGE):
        raise ApiError(400, "bad_request", f"`limit` must be a number from 1 to {MAX_PAGE}")
    return int(text)


def _event_json(event: Event) -> dict[str, Any]:
    """Return the JSON representation of an event. Hosts choose the names of what runs on them."""
    return {
        "id": event.id,
        "at": format_rfc3339(event.at),
        "kind": event.kind,
        "host": event.host,
        "name": escape_controls(event.name),
        "state": event.state,
        "first": event.first,
        "detail": escape_controls(event.detail),
    }
