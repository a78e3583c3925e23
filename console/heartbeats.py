"""The pages of heartbeats: all of them, those that failed or are late first, and one with its last pings."""

import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from console.rendering import PageRenderer
from fleet.inventory.units import format_duration
from fleet.json_client import ClientError, parsing_response
from remediator.http.heartbeats_api import read_heartbeat, read_heartbeats
from remediator.record.database import Database
from remediator.snapshot import SnapshotSource, parse_time
from runtime.access.roles import AccessRequirement
from runtime.web import add_route

STATES = {"failed": "down", "late": "down", "waiting": "unknown", "up": "up"}  # as of services
NO_PROGRESS = (3600.0, 14400.0)  # seconds without progress of an agent from which a warning, and an error, is shown
MOST_LIVE = 200  # heartbeats of which each ping is shown when it arrives; of more, changes of states
_TIMES = ("since", "deadline", "last_ping", "started_at", "last_start")


class HeartbeatPages:
    def __init__(self, source: SnapshotSource, renderer: PageRenderer, database: Database) -> None:
        self._source, self._renderer, self._database = source, renderer, database

    def add_routes(self, app: web.Application) -> None:
        add_route(app, "GET", "/heartbeats", self.show_list, AccessRequirement.VIEWER)
        add_route(app, "GET", "/heartbeats/{id}", self.show_heartbeat, AccessRequirement.VIEWER)

    async def show_list(self, request: web.Request) -> web.Response:
        heartbeats, unavailable = [], ""
        try:
            with parsing_response():
                heartbeats = [_describe(each) for each in await read_heartbeats(self._source)]
        except ClientError as error:
            unavailable = str(error)
        snapshot = await self._source.get()
        return await self._renderer.respond(
            request, "heartbeats.html", snapshot=snapshot.describe(), heartbeats=heartbeats, unavailable=unavailable,
            is_live=len(heartbeats) <= MOST_LIVE,
        )  # fmt: skip

    async def show_heartbeat(self, request: web.Request) -> web.Response:
        name, inventory = request.match_info["id"], self._database.inventory
        heartbeat: Mapping[str, Any] | None = None
        unavailable = ""
        try:
            with parsing_response():
                heartbeat = _describe(await read_heartbeat(self._source, inventory, name))
        except ClientError as error:
            unavailable = str(error)
        snapshot = await self._source.get()
        return await self._renderer.respond(
            request, "heartbeat.html", snapshot=snapshot.describe(), heartbeat=heartbeat, name=name,
            unavailable=unavailable, is_service=name in inventory.services,
        )  # fmt: skip


def _describe(heartbeat: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a heartbeat with Unix times, and each ping that ended a job with how long the job took."""
    described = {
        "agent": None,
        "created": False,
        **heartbeat,
        "state": STATES[heartbeat["status"]],
        "grace": format_duration(heartbeat["grace_seconds"]),
        "every": None if heartbeat["every_seconds"] is None else format_duration(heartbeat["every_seconds"]),
        **{name: parse_time(heartbeat[name]) for name in _TIMES},
    }
    agent = heartbeat.get("agent")
    if agent is not None and "last_progress" in agent:
        times = {name: parse_time(agent[name]) for name in ("last_progress", "waiting_since")}
        described["agent"] = {**agent, **times, "without_progress": _rate_lateness(times["last_progress"])}
    if "pings" in heartbeat:
        described["pings"] = _describe_pings(heartbeat["pings"])
    return described


def _rate_lateness(last_progress: float | None) -> int:
    """Return how bad it is that an agent has made no progress for so long: 0, 1 or 2."""
    without = 0.0 if last_progress is None else time.time() - last_progress
    return sum(without >= limit for limit in NO_PROGRESS)


def _describe_pings(pings: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return pings, newest first, with Unix times and the seconds since the start that they belong to."""
    described: list[Mapping[str, Any]] = []
    started: dict[str, float] = {}  # by run, as far as they have not ended
    for ping in reversed(pings):
        at, run, duration = parse_time(ping["at"]), ping["run_id"], None
        if at is not None and ping["kind"] == "start":
            started[run] = at
        elif at is not None and ping["kind"] != "log" and run in started:
            duration = max(0.0, at - started.pop(run))
        described.append({**ping, "at": at, "duration": duration})
    return described[::-1]
