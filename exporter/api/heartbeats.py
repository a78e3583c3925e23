"""Heartbeats: their states, their last pings, and their URLs."""

from typing import Any

from aiohttp import web

from exporter.heartbeats.agent import describe_stuck
from exporter.heartbeats.monitor import Heartbeat, HeartbeatMonitor
from exporter.heartbeats.store import HeartbeatStoreError, ReceivedPing
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.errors import ApiError
from runtime.streaming import stream_list
from runtime.terminal import escape_controls
from runtime.times import format_rfc3339


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
        """Return the URLs of a heartbeat, which are secrets: whoever knows them can send pings."""
        heartbeat = self._find(request)
        urls = self._heartbeats.find_urls(heartbeat.service.id)
        if urls is None:
            raise ApiError(404, "unknown_heartbeat", "a reload has removed the heartbeat")
        return web.json_response({"url": urls.by_uuid, "slug_url": urls.by_slug})

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
            "status": status,
            "since": self._format(since),
            "every_seconds": options.every,
            "cron": options.cron,
            "grace_seconds": options.grace,
            "deadline": self._format(state.deadline(timing)),
            "last_ping": self._format(state.last_ping),
            "started_at": self._format(state.started_at),
            "last_start": self._format(state.last_start),
            "duration_seconds": state.last_duration,
            "exit_status": state.exit_status,
            "fault": escape_controls(state.fault),
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
