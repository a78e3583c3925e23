"""Badges on the listener for pings: their URLs are for pages without a sign-in, and cannot ping."""

import json
from collections.abc import Mapping

from aiohttp import web

from exporter.heartbeats.badges import BadgeState, render_json, render_shields, render_svg
from exporter.heartbeats.monitor import HeartbeatMonitor

PATH = r"/badge/{signature:[0-9a-f]{32}}/{name:[\s\S]+}.{format:svg|json|shields}"
HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Cache-Control": "no-cache, no-store, max-age=0",
    "Content-Security-Policy": "default-src 'none'",
}
MEASURED_FOR = 1.0  # seconds for which the state of a category is not determined again


class BadgesApi:
    def __init__(self, heartbeats: HeartbeatMonitor) -> None:
        self._heartbeats = heartbeats
        self._measured: dict[tuple[str, str], tuple[float, str, BadgeState]] = {}  # by signature and name

    async def show(self, request: web.Request) -> web.Response:
        """Return a badge in the format that the path ends with."""
        signature, name, form = (request.match_info[part] for part in ("signature", "name", "format"))
        found = self._measure(signature, name)
        if found is None:
            return web.Response(status=404, text="not found", headers=HEADERS)
        label, state = found
        if form == "svg":
            return web.Response(text=render_svg(label, state), content_type="image/svg+xml", headers=HEADERS)
        shown: Mapping[str, object] = render_json(state) if form == "json" else render_shields(label, state)
        return web.json_response(shown, headers=HEADERS, dumps=lambda value: json.dumps(value, ensure_ascii=False))

    def _measure(self, signature: str, name: str) -> tuple[str, BadgeState] | None:
        """Return the label and the state of a badge; None if there is none."""
        now, key = self._heartbeats.now(), (signature, name)
        at, label, state = self._measured.pop(key, (-MEASURED_FOR, "", BadgeState(0, 0, 0, 0)))
        if now - at >= MEASURED_FOR:
            subject = self._heartbeats.registry.find_badge(signature, name)
            if subject is None:
                return None
            heartbeats = filter(None, map(self._heartbeats.find, subject.services))
            state = BadgeState.of(((each.state, each.timing) for each in heartbeats), now)
            if len(subject.services) == 1:
                return subject.label, state
            at, label = now, subject.label
        self._measured[key] = at, label, state
        return label, state
