"""A stand-in for Feishu's custom bots that enforces their rules and keeps the cards.

It is what the demo and the tests send to, since the real service may not be reached from either.
"""

import asyncio
import html
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from remediator.notices.feishu import sign

BODY_LIMIT = 20 * 1024
PER_SECOND, PER_MINUTE = 5, 100
CLOCK_TOLERANCE = 3600
TOKEN = "demo-token"  # noqa: S105 - a stand-in's
SECRET = "demo-secret"  # noqa: S105
_STYLE = """
body { font-family: sans-serif; max-width: 50em; margin: auto }
.red { color: #c00 } .green { color: #080 } .orange { color: #c60 }
"""


@dataclass(frozen=True)
class Received:
    """A message that was accepted; `at` is Unix time."""

    at: float
    message: Mapping[str, Any]

    @property
    def title(self) -> str:
        if self.message["msg_type"] == "text":
            return str(self.message["content"]["text"]).splitlines()[0]
        return str(self.message["card"]["header"]["title"]["content"])

    @property
    def colour(self) -> str:
        return str(self.message.get("card", {}).get("header", {}).get("template", ""))

    @property
    def text(self) -> str:
        return json.dumps(self.message, ensure_ascii=False)


@dataclass
class StandIn:
    """One bot; `misbehave` holds answers (status, headers, body) to give instead of accepting, in order."""

    secret: str | None = SECRET
    now: Callable[[], float] = time.time
    received: list[Received] = field(default_factory=list)
    refused: list[tuple[float, str]] = field(default_factory=list)
    misbehave: deque[tuple[int, Mapping[str, str], bytes]] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _times: deque[float] = field(default_factory=deque)
    _runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> str:
        """Listen on loopback; returns the bot's webhook address."""
        app = web.Application()
        app.router.add_post("/open-apis/bot/v2/hook/{token}", self._hook)
        app.router.add_get("/", self._page)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return f"{self.url}/open-apis/bot/v2/hook/{TOKEN}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _hook(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.misbehave:
            status, headers, answer = self.misbehave.popleft()
            return web.Response(status=status, headers=dict(headers), body=answer)
        code, why = self._judge(request.match_info["token"], body)
        if code:
            self.refused.append((self.now(), f"{code}: {why}"))
            return web.json_response({"code": code, "msg": why, "data": {}})
        self.received.append(Received(self.now(), json.loads(body)))
        self.arrived.set()
        return web.json_response({"StatusCode": 0, "StatusMessage": "success", "code": 0, "data": {}, "msg": "success"})

    def _judge(self, token: str, body: bytes) -> tuple[int, str]:
        if token != TOKEN:
            return 19001, "param invalid: incoming webhook access token invalid"
        if len(body) > BODY_LIMIT:
            return 9499, "Bad Request"
        if not self._within_rates():
            return 11232, "frequency limited psm[lark.oapi.app_platform_runtime]appID[1500]"
        try:
            message = json.loads(body)
        except ValueError:
            return 9499, "Bad Request"
        if self.secret is not None and not self._signed(message):
            return 19021, "sign match fail or timestamp is not within one hour from current time"
        return (0, "") if _well_formed(message) else (19002, "params error, msg_type need")

    def _within_rates(self) -> bool:
        now = self.now()
        while self._times and self._times[0] <= now - 60:
            self._times.popleft()
        if len(self._times) >= PER_MINUTE or sum(1 for at in self._times if at > now - 1) >= PER_SECOND:
            return False
        self._times.append(now)
        return True

    def _signed(self, message: Mapping[str, Any]) -> bool:
        timestamp = message.get("timestamp")
        if not isinstance(timestamp, str) or not timestamp.isdigit():
            return False
        fresh = abs(self.now() - int(timestamp)) <= CLOCK_TOLERANCE
        return fresh and message.get("sign") == sign(self.secret or "", int(timestamp))

    async def _page(self, _request: web.Request) -> web.Response:
        cards = "".join(
            f"<article><h2 class={html.escape(each.colour)}>{html.escape(each.title)}</h2>"
            f"<pre>{html.escape(json.dumps(each.message, ensure_ascii=False, indent=1))}</pre></article>"
            for each in reversed(self.received)
        )
        head = f"<!doctype html><meta charset=utf-8><title>Feishu (stand-in)</title><style>{_STYLE}</style>"
        return web.Response(text=head + cards, content_type="text/html")


def _well_formed(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    if message.get("msg_type") == "text":
        return isinstance(message.get("content", {}).get("text"), str)
    card = message.get("card")
    return (
        message.get("msg_type") == "interactive"
        and isinstance(card, dict)
        and isinstance(card.get("elements"), list)
        and isinstance(card.get("header", {}).get("title", {}).get("content"), str)
    )
