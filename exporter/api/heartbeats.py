"""Heartbeats: their states, their last pings, and their URLs; pings in the name of a person."""

from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from exporter.api.services import REMEDIATOR
from exporter.heartbeats.agent import describe_stuck
from exporter.heartbeats.bodies import SentBody
from exporter.heartbeats.monitor import Heartbeat, HeartbeatMonitor
from exporter.heartbeats.rate_limit import RateLimitedError
from exporter.heartbeats.schedule import Cron
from exporter.heartbeats.store import HeartbeatStoreError, ReceivedPing
from exporter.results import ProbeFailure
from exporter.scheduler.probe_scheduler import ProbeScheduler
from fleet.pings import PingBody
from runtime.access.audit import AuditEntry, write_to_log
from runtime.access.control import get_identity
from runtime.errors import ApiError
from runtime.request_bodies import parse_request
from runtime.streaming import stream_list
from runtime.terminal import escape_controls
from runtime.times import format_rfc3339


class _PingBody(PingBody):
    """A ping; `by` is in whose name the remediator sends it."""

    by: Annotated[str, Field(max_length=200)] = ""


class HeartbeatsApi:
    def __init__(self, scheduler: ProbeScheduler) -> None:
        self._scheduler = scheduler

    @property
    def _heartbeats(self) -> HeartbeatMonitor:
        return self._scheduler.heartbeats

    async def list_heartbeats(self, request: web.Request) -> web.StreamResponse:
        rows = (self._to_json(each) for each in self._heartbeats.list_all())
        return await stream_list(request, {}, "heartbeats", rows)

    async def show_heartbeat(self, request: web.Request) -> web.Response:
        """Return a heartbeat with its last pings, newest first, and what they have sent."""
        heartbeat = self._find(request)
        try:
            pings = await self._heartbeats.read_pings(heartbeat.service.id)
        except HeartbeatStoreError as error:
            raise ApiError(503, "storage", str(error)) from error
        return web.json_response({**self._to_json(heartbeat), "pings": list(map(self._ping_to_json, pings))})

    async def show_urls(self, request: web.Request) -> web.Response:
        """Return the URLs of a heartbeat. Those that are no badges are secrets: whoever knows them can send pings."""
        heartbeat = self._find(request)
        urls = self._heartbeats.find_urls(heartbeat.service.id)
        if urls is None:
            raise ApiError(404, "unknown_heartbeat", "a reload has removed the heartbeat")
        return web.json_response(
            {
                "url": urls.by_uuid, "slug_url": urls.by_slug, "push_url": urls.push, "badge_url": urls.badge,
                "category_badge_url": urls.category_badge,
            }
        )  # fmt: skip

    async def ping(self, request: web.Request) -> web.Response:
        """Receive a ping of a person, as if the job had sent it."""
        heartbeat, identity = self._find(request), get_identity(request)
        body = await parse_request(request, _PingBody)
        kind, name = body.kind, heartbeat.service.id
        if body.exit_status is not None:
            if kind not in ("success", "fail"):
                raise ApiError(400, "bad_request", f"exit_status: a ping of the kind {kind} has none")
            kind = "fail" if body.exit_status else "success"
        is_remediator = identity.claimed_user == REMEDIATOR
        sender = body.by if is_remediator and body.by else identity.label
        message = SentBody(body.message.encode("utf-8", "replace"))
        try:
            await self._heartbeats.receive(name, kind, body.exit_status, "", message, client=sender)
        except KeyError as error:
            raise ApiError(404, "unknown_heartbeat", "a reload has removed the heartbeat") from error
        except RateLimitedError as error:
            raise ApiError(429, "too_many_pings", "the heartbeat has received too many pings in a minute") from error
        except HeartbeatStoreError as error:
            raise ApiError(503, "storage", str(error)) from error
        if not is_remediator:  # whose audit log has the ping
            await write_to_log(AuditEntry.of(identity, "ping", name, detail=kind))
        return web.json_response({"service": name, "kind": kind, "exit_status": body.exit_status})

    async def remove(self, request: web.Request) -> web.Response:
        """Remove a heartbeat that a job has created; the next ping with `?create=1` creates it again."""
        heartbeat, identity = self._find(request), get_identity(request)
        name = heartbeat.service.id
        try:
            await self._scheduler.remove_heartbeat(name, f"removed by {identity.label}")
        except KeyError as error:
            message = f"the inventory has the heartbeat {name!r}: remove it there"
            raise ApiError(409, "in_inventory", message) from error
        except HeartbeatStoreError as error:
            raise ApiError(503, "storage", str(error)) from error
        if identity.claimed_user != REMEDIATOR:  # whose audit log has the removal
            await write_to_log(AuditEntry.of(identity, "remove heartbeat", name))
        return web.json_response({"service": name})

    def _find(self, request: web.Request) -> Heartbeat:
        name = request.match_info["id"]
        heartbeat = self._heartbeats.find(name)
        if heartbeat is None:
            raise ApiError(404, "unknown_heartbeat", f"the inventory has no heartbeat {name!r}")
        return heartbeat

    def _to_json(self, heartbeat: Heartbeat) -> dict[str, Any]:
        state, timing, options = heartbeat.state, heartbeat.timing, heartbeat.options
        status, since = state.status(timing, self._heartbeats.now())
        return {
            "service": heartbeat.service.id,
            "created": state.is_created,
            "status": status,
            "since": self._format(since),
            "every_seconds": options.every,
            "cron": options.cron,
            "timezone": timing.schedule.timezone if isinstance(timing.schedule, Cron) else None,
            "grace_seconds": options.grace,
            "deadline": self._format(state.deadline(timing)),
            "last_ping": self._format(state.last_ping),
            "started_at": self._format(state.started_at),
            "last_start": self._format(state.last_start),
            "duration_seconds": state.last_duration,
            "exit_status": state.exit_status,
            "fault": escape_controls(state.fault),
            "problem": "" if status == "up" else self._describe_problem(heartbeat),
            **self._agent_to_json(heartbeat),
        }

    def _agent_to_json(self, heartbeat: Heartbeat) -> dict[str, Any]:
        """Return what an agent has reported, as `agent`; empty if it is none."""
        settings, agent = heartbeat.service.agent, heartbeat.state.agent
        if settings is None:
            return {}
        status = heartbeat.find_agent_status(self._heartbeats.now())
        shown: dict[str, Any] = {
            "status": status,
            "stuck": describe_stuck(settings, status),
            "problem": escape_controls(heartbeat.report_problem),
        }
        if agent is not None:
            shown |= {
                "last_progress": self._format(agent.last_progress),
                "task": escape_controls(agent.task),
                "progress": escape_controls(agent.progress),
                "pending": agent.pending,
                "rounds": agent.rounds,
                "rounds_limit": agent.rounds_limit or settings.rounds_limit,
                "requests_ok": agent.requests_ok,
                "requests_429": agent.requests_rate_limited,
                "response_seconds": agent.response_seconds,
                "waiting_for": escape_controls(agent.waiting_for),
                "waiting_since": self._format(agent.waiting_since),
            }
        return {"agent": shown}

    def _describe_problem(self, heartbeat: Heartbeat) -> str:
        """Return why the heartbeat is not up; empty if it is."""
        try:
            self._heartbeats.check(heartbeat.service.id)
        except ProbeFailure as failure:
            return escape_controls(failure.message)
        return ""

    def _ping_to_json(self, ping: ReceivedPing) -> dict[str, Any]:
        return {
            "at": self._format(ping.at),
            "kind": ping.kind,
            "exit_status": ping.exit_status,
            "run_id": ping.run_id,
            "fault": escape_controls(ping.fault),
            "body": escape_controls(ping.body),
            "is_cut": ping.is_cut,
            "client": escape_controls(ping.client),
        }

    def _format(self, at: float | None) -> str | None:
        return None if at is None else format_rfc3339(self._heartbeats.to_unix(at))
