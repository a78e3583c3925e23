"""What the console's lists show, as JSON: the services with their states, what is unusual, and the hosts."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import fields
from typing import Any

from aiohttp import web

from fleet.inventory.notify import Notify
from fleet.json_client import ClientError
from remediator.filters import TEXT_LIMIT, ServiceFilter
from remediator.http.views import describe_automation, format_times, may_read_evidence, remove_evidence
from remediator.policy.service_states import STATES
from remediator.record.database import Database
from remediator.snapshot import ServiceRow, Snapshot, SnapshotSource
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.redaction import Redactor
from runtime.streaming import stream_texts
from runtime.times import format_rfc3339
from runtime.web import add_route

PARAMETERS = ("state", "host", "provider", "category", "group", "q", "sort", "limit")
LISTED = 100  # of the open incidents, the oldest first, and of the services that one program does not have
PATIENCE = 5.0  # seconds in which the exporter may answer after the deadline of pages
_LIMIT_DIGITS = 6
_TIMES = frozenset({"since", "probed_at"})
_RENAMED = {"title": "name", "latency": "latency_seconds"}
_FIELDS = tuple(each.name for each in fields(ServiceRow) if each.name != "verbs")


def add_routes(app: web.Application, source: SnapshotSource, database: Database, redact: Redactor) -> None:
    api = _OverviewApi(source, database, redact)
    add_route(app, "GET", "/api/v1/overview", api.read_overview, AccessRequirement.VIEWER)
    add_route(app, "GET", "/api/v1/hosts", api.read_hosts, AccessRequirement.VIEWER)


class _OverviewApi:
    def __init__(self, source: SnapshotSource, database: Database, redact: Redactor) -> None:
        self._source, self._database, self._redact = source, database, redact
        self._texts: dict[str, tuple[ServiceRow, str]] = {}  # the JSON of each row, which is the same for all callers
        self._hosts: asyncio.Task[str] | None = None

    async def read_overview(self, request: web.Request) -> web.StreamResponse:
        chosen, limit = _parse_filter(request)
        snapshot = await self._source.read(PATIENCE)
        rows = chosen.select(snapshot.rows.values())
        head = await asyncio.to_thread(self._describe, snapshot, len(rows))
        if not may_read_evidence(request):
            head = remove_evidence(head)
        for removed in self._texts.keys() - snapshot.rows.keys():
            del self._texts[removed]
        return await stream_texts(request, head, "services", self._list_texts(rows[:limit]))

    def _describe(self, snapshot: Snapshot, total: int) -> dict[str, Any]:
        """Return everything but the services; `total` is how many match."""
        overview, clock = snapshot.overview, self._database.clock
        incidents = list(overview.incidents.values())
        now = clock.unix(clock.now())
        described = {
            "at": format_rfc3339(now),
            "counts": {state: snapshot.counts.get(state, 0) for state in STATES},
            "automation": describe_automation(overview.automation, self._database.inventory),
            "maintenance": list(overview.maintenance),
            "on_call": _describe_on_call(self._database.inventory.notify, now),
            "problems": [
                {"source": each.source, "text": each.text, "since": format_rfc3339(each.since)}
                for each in snapshot.problems.values()
            ],
            "mismatched": sorted(snapshot.mismatched)[:LISTED],
            "incidents": incidents[:LISTED],
            "incident_count": len(incidents),
            "total": total,
        }
        visible: dict[str, Any] = self._redact.redact_all(format_times(described, clock))
        return visible

    async def _list_texts(self, rows: Iterable[ServiceRow]) -> AsyncIterator[str]:
        for row in rows:
            known = self._texts.get(row.id)
            if known is None or known[0] is not row:
                text = json.dumps(self._redact.redact_all(_describe_row(row)))
                known = self._texts[row.id] = (row, text)
            yield known[1]

    async def read_hosts(self, _request: web.Request) -> web.Response:
        # Requests at the same time get the same list.
        if self._hosts is None or self._hosts.done():
            self._hosts = asyncio.create_task(self._render_hosts(), name="hosts")
        try:
            text = await asyncio.shield(self._hosts)
        except ClientError as error:
            raise ApiError(502, "exporter_unreachable", f"cannot read the exporter's hosts: {error}") from error
        return web.Response(text=text, content_type="application/json")

    async def _render_hosts(self) -> str:
        answer = await self._source.read_from_exporter("/api/v1/hosts")
        return await asyncio.to_thread(lambda: json.dumps(self._redact.redact_all(answer)))


def _describe_row(row: ServiceRow) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in _FIELDS}
    return {
        _RENAMED.get(name, name): format_rfc3339(value) if name in _TIMES else value for name, value in values.items()
    }


def _describe_on_call(notify: Notify, at: float) -> list[dict[str, Any]]:
    """Return who is on call at a Unix time, by calendar."""
    return [
        {
            "calendar": name, "person": shift.person, "name": notify.name_of(shift.person),
            "until": None if shift.until is None else format_rfc3339(shift.until),
        }
        for name, shift in notify.find_shifts(at).items()
    ]  # fmt: skip


def _parse_filter(request: web.Request) -> tuple[ServiceFilter, int | None]:
    """Return which services a request asks for, and how many at most. Raises ApiError."""
    query: Mapping[str, str] = {name: ",".join(request.query.getall(name)) for name in request.query}
    for name, value in query.items():
        if name not in PARAMETERS:
            raise _bad(f"unknown parameter `{name[:TEXT_LIMIT]}`; there are {', '.join(PARAMETERS)}")
        if len(value) > TEXT_LIMIT:
            raise _bad(f"`{name}` has more than {TEXT_LIMIT} characters")
    unknown = [state for state in query.get("state", "").split(",") if state and state not in STATES]
    if unknown:
        raise _bad(f"unknown state {unknown[0]!r}; there are {', '.join(STATES)}")
    limit = query.get("limit", "")
    if limit and not (limit.isascii() and limit.isdigit() and len(limit) <= _LIMIT_DIGITS):
        raise _bad("`limit` must be a number")
    return ServiceFilter.parse(query), int(limit) if limit else None


def _bad(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)
