"""A stand-in for the exporter that serves events as its API promises, and refuses requests that break the contract."""

import itertools
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

from aiohttp import web

MAX_PAGE = 1000
TOKEN = "a-token-of-the-exporter"


class RingExporter:
    """Keeps the last `size` events; `clock` is its Unix time. It is an older version while not `supported`."""

    def __init__(self, clock: Callable[[], float], size: int = 10_000, token: str = TOKEN) -> None:
        self.clock, self.token, self.supported = clock, token, True
        self.ring: deque[dict[str, Any]] = deque(maxlen=size)
        self.requests: list[dict[str, str]] = []
        self.refused = 0
        self.answers: dict[str, Any] = {}  # by path, in place of its own
        self._process, self._next = 1, itertools.count(1)

    def add(
        self, name: str, state: str, *, kind: str = "service", host: str = "h", detail: str = "", ago: float = 0
    ) -> None:
        at = datetime.fromtimestamp(self.clock() - ago, UTC).isoformat().replace("+00:00", "Z")
        self.ring.append(
            {
                "id": next(self._next),
                "at": at,
                "kind": kind,
                "host": host,
                "name": name,
                "state": state,
                "detail": detail,
            }
        )

    def restart(self) -> None:
        self.ring.clear()
        self._process, self._next = self._process + 1, itertools.count(1)

    async def handle(self, request: web.Request) -> web.Response:
        headers = {"Date": formatdate(int(self.clock()), usegmt=True)}
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            self.refused += 1
            return web.json_response({"error": {"code": "unauthorized", "message": "no token"}}, status=401)
        if request.path in self.answers:
            return web.json_response(self.answers[request.path], headers=headers)
        if request.path == "/api/v1/services":
            return web.json_response({"services": []}, headers=headers)
        if request.path != "/api/v1/events" or not self.supported:
            return web.json_response({"error": {"code": "not_found", "message": "Not Found"}}, status=404)
        query = dict(request.query)
        self.requests.append(dict(query))
        limit = int(query.pop("limit", MAX_PAGE))
        after = query.pop("after", None)
        if request.method != "GET" or query or not 1 <= limit <= MAX_PAGE:
            return web.json_response({"error": {"code": "bad_request", "message": "bad request"}}, status=400)
        process, number = (self._process, 0) if after is None else map(int, after.split("/"))
        first = self.ring[0]["id"] if self.ring else number + 1
        gap = process != self._process or (after is not None and first > number + 1)
        start = 0 if gap else number
        page = [event for event in self.ring if event["id"] > start][:limit]
        cursor = f"{self._process}/{page[-1]['id'] if page else start}"
        return web.json_response({"cursor": cursor, "gap": gap, "events": page}, headers=headers)
