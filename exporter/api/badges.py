"""Badges on the listener for pings: their URLs are for pages without a sign-in, and cannot ping."""

import json
from collections.abc import Mapping, Sequence

from aiohttp import web

from exporter.heartbeats.badges import BadgeState, render_json, render_shields, render_svg
from exporter.heartbeats.monitor import HeartbeatMonitor

PATH = r"/badge/{id:[0-9a-f]{32}}.{format:svg|json|shields}"
HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Cache-Control": "no-cache, no-store, max-age=0",
    "Content-Security-Policy": "default-src 'none'",
}
MEASURED_FOR = 1.0  # seconds for which the state of a category is not determined again


class BadgesApi:
    def __init__(self, heartbeats: HeartbeatMonitor) -> None:
        self._heartbeats = heartbeats
        self._states: dict[str, tuple[float, BadgeState]] = {}  # of categories, with when they were determined

    async def show(self, request: web.Request) -> web.Response:
        """Return a badge in the format that the path ends with."""
        badge_id, form = request.match_info["id"], request.match_info["format"]
        subject = self._heartbeats.registry.find_badge(badge_id)
        if subject is None:
            self._states.pop(badge_id, None)
            return web.Response(status=404, text="not found", headers=HEADERS)
        state = self._determine(badge_id, subject.services)
        if form == "svg":
            return web.Response(text=render_svg(subject.label, state), content_type="image/svg+xml", headers=HEADERS)
        shown: Mapping[str, object] = render_json(state) if form == "json" else render_shields(subject.label, state)
        return web.json_response(shown, headers=HEADERS, dumps=lambda value: json.dumps(value, ensure_ascii=False))

    def _determine(self, badge_id: str, services: Sequence[str]) -> BadgeState:
        now = self._heartbeats.now()
        if badge_id in self._states and now - self._states[badge_id][0] < MEASURED_FOR:
            return self._states[badge_id][1]
        found = filter(None, map(self._heartbeats.find, services))
        state = BadgeState.of(((each.state, each.timing) for each in found), now)
        if len(services) > 1:
            self._states[badge_id] = now, state
        return state
