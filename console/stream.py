"""`/stream`: what changes, as server-sent events. All viewers get the same, made once per second and language."""

import asyncio
import json
from typing import Any

from aiohttp import web

from console.history import History
from console.rendering import PageRenderer, Reader
from fleet.inventory.notify import Language
from remediator.snapshot import Snapshot, SnapshotSource
from runtime.access.control import AccessControl, find_session
from runtime.access.roles import AccessRequirement
from runtime.web import add_route, mark_as_lasting

BEAT_EVERY = 2.0  # seconds without a change after which a beat shows the browser that the connection works
RETRY = 2000  # milliseconds after which a browser connects again
SESSION_STREAM, TOKEN_STREAM = 3600.0, 60.0  # seconds after which a browser has to connect again, and is checked
MOST_ROWS = 50  # that are sent; if more have changed, browsers load the list again
HISTORY = 60  # versions that are kept for browsers that fell behind


class Stream:
    def __init__(self, source: SnapshotSource, history: History, renderer: PageRenderer, access: AccessControl) -> None:
        self._source, self._history, self._renderer, self._access = source, history, renderer, access
        self._events: dict[tuple[Language, int, int], bytes] = {}
        self._is_closed = False
        self._tasks: set[asyncio.Task[Any]] = set()

    def add_routes(self, app: web.Application) -> None:
        app.on_shutdown.append(self.close)
        add_route(app, "GET", "/stream", self.serve, AccessRequirement.VIEWER)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would keep events back
            }
        )
        mark_as_lasting(request)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        reader, version = self._renderer.find_reader(request), _parse_version(request)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a handler runs in a task
        self._tasks.add(task)
        try:
            await response.write(f"retry: {RETRY}\n\n".encode())
            ends = asyncio.get_running_loop().time() + (SESSION_STREAM if find_session(request) else TOKEN_STREAM)
            while self._goes_on(request, ends):
                self._source.watch()
                await self._source.wait_for_change(version, BEAT_EVERY)
                snapshot = self._source.snapshot
                if snapshot.version != version:
                    await response.write(self._event(snapshot, version, reader))
                    version = snapshot.version
                else:
                    await response.write(b"event: beat\ndata: \n\n")
        except ConnectionError:  # the browser has gone
            pass
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
        finally:
            self._tasks.discard(task)
        return response

    def _goes_on(self, request: web.Request, ends: float) -> bool:
        is_current = asyncio.get_running_loop().time() < ends and self._access.is_unchanged(request)
        return is_current and not self._is_closed

    async def close(self, _app: web.Application) -> None:
        """End all streams, for which the server would wait otherwise."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()

    def _event(self, snapshot: Snapshot, since: int, reader: Reader) -> bytes:
        """Return the changes since a version, which are the same for all who have that version."""
        key = (reader.language, since, snapshot.version)
        if key not in self._events:
            if len(self._events) > HISTORY:
                self._events.clear()
            data = self._describe(snapshot, since, reader)
            self._events[key] = f"id: {snapshot.version}\nevent: change\ndata: {json.dumps(data)}\n\n".encode()
        return self._events[key]

    def _describe(self, snapshot: Snapshot, since: int, reader: Reader) -> dict[str, Any]:
        changed = snapshot.changed_since(since)
        is_known = 0 < since < snapshot.version and snapshot.version - since <= HISTORY
        if not is_known or len(changed) > MOST_ROWS:
            return {"version": snapshot.version, "reload": True}
        ids = {row.id for row in changed}
        return {
            "version": snapshot.version,
            "rows": {row.id: self._renderer.render_fresh_row(row, reader, self._history) for row in changed},
            "states": {row.id: row.state for row in changed},
            "results": {
                **{row.id: [row.recent, row.latency] for row in snapshot.measured_since(since) if row.id not in ids},
                **{name: ["", None] for name in snapshot.created_since(since)},
            },
            "head": snapshot.head_version > since,
        }


def _parse_version(request: web.Request) -> int:
    text = request.headers.get("Last-Event-ID") or request.query.get("version", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else 0  # noqa: PLR2004 - digits
