"""A simulator of Feishu's custom bots and app bots, for the demo and the tests.

It enforces the documented rules, and stores all messages that it accepts.
"""

import asyncio
import contextlib
import html
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Literal

from aiohttp import web

from defib.demo import feishu_cards
from defib.demo.feishu_app import AppSimulator
from remediator.notifications.channels.feishu import compute_signature

BODY_LIMIT = 20 * 1024
PER_SECOND, PER_MINUTE = 5, 100
CLOCK_TOLERANCE = 3600
TOKEN = "demo-token"  # noqa: S105 - of the simulator
SECRET = "demo-secret"  # noqa: S105 - of the simulator
HANG = 30.0  # seconds, longer than the timeout of any sender
_STYLE = """
body { font-family: sans-serif; margin: 1em; background: #f5f6f7 }
main { display: flex; flex-wrap: wrap; gap: 2em } section { flex: 1 1 30em } h1 { font-size: 1.1em }
article { background: #fff; border: 1px solid #dee0e3; border-radius: 8px; margin: 1em 0; overflow: hidden }
article article { margin: .5em 1em } p { padding: 0 1em; line-height: 1.6; overflow-wrap: anywhere }
h2 { margin: 0; padding: .5em 1em; font-size: 1em; background: #e1eaff }
form { padding: 0 0 1em 1em }
form > * { display: inline-block; margin: 0 .6em .4em 0; padding: .35em 1em; font: inherit; font-size: .9em }
form > * { color: #1f2329; background: #fff; border: 1px solid #d0d3d6; border-radius: 6px; text-decoration: none }
.red, .carmine { background: #fde2e2 } .green, .turquoise { background: #d9f5d6 } .grey { background: #eff0f1 }
.orange, .yellow { background: #feead2 } .violet, .purple, .indigo { background: #ece2fe }
form > .primary { color: #1456f0; border-color: #1456f0 } form > .danger { color: #d83931; border-color: #d83931 }
"""
SimulatedFault = tuple[int, Mapping[str, str], bytes] | Literal["hang", "reset", "drip", "take and hang"]


@dataclass(frozen=True)
class ReceivedMessage:
    """An accepted message; `at` is a Unix time."""

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
class FeishuSimulator:
    """One custom bot and one app; the next requests are answered with `faults`, in order.

    With `old`, the bot answers as older bots do: success without a `code`, and 9499 also for too many requests.
    """

    secret: str | None = SECRET
    keyword: str | None = None
    all_disabled: bool = False
    old: bool = False
    undated: bool = False
    now: Callable[[], float] = time.time
    received: list[ReceivedMessage] = field(default_factory=list)
    refused: list[tuple[float, str]] = field(default_factory=list)
    faults: deque[SimulatedFault] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    extra_routes: list[Callable[[web.Application], None]] = field(default_factory=list)
    _times: deque[float] = field(default_factory=deque)
    _runner: web.AppRunner | None = None

    def __post_init__(self) -> None:
        self.apps = AppSimulator(self)

    async def start(self, port: int = 0) -> str:
        """Listen on loopback and return the webhook URL of the custom bot; `url` is the base of all URLs."""
        app = web.Application(middlewares=[self._add_date, self._simulate_fault])
        app.router.add_post("/open-apis/bot/v2/hook/{token}", self._hook)
        app.router.add_get("/", self._page)
        for add_routes in (self.apps.add_routes, *self.extra_routes):
            add_routes(app)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self.webhook

    @property
    def webhook(self) -> str:
        """The webhook URL of the custom bot."""
        return f"{self.url}/open-apis/bot/v2/hook/{TOKEN}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _add_date(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Set the Date header of every response by the simulator's clock."""
        response: web.StreamResponse = await handler(request)
        response.headers["Date"] = "" if self.undated else formatdate(self.now(), usegmt=True)
        return response

    @web.middleware
    async def _simulate_fault(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Answer with the next fault, if there is one."""
        if not self.faults or request.method == "GET":
            return await handler(request)  # type: ignore[no-any-return] # aiohttp types handlers as Any
        fault = self.faults.popleft()
        if isinstance(fault, tuple):
            status, headers, body = fault
            return web.Response(status=status, headers=dict(headers), body=body)
        if fault == "take and hang":
            await handler(request)
        if fault == "drip":
            await _drip(request)
        if fault != "reset":
            await asyncio.sleep(HANG)
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _hook(self, request: web.Request) -> web.Response:
        body = await request.read()
        code, why = self.check_message(request.match_info["token"], body)
        if code:
            return self.refuse(code, why)
        self.received.append(ReceivedMessage(self.now(), json.loads(body)))
        self.arrived.set()
        success = {"StatusCode": 0, "StatusMessage": "success"}
        return web.json_response(success if self.old else {**success, "code": 0, "data": {}, "msg": "success"})

    def refuse(self, code: int, why: str, status: int = 200) -> web.Response:
        """Answer with an error, and store it in `refused`."""
        self.refused.append((self.now(), f"{code}: {why}"))
        return web.json_response({"code": code, "msg": why, "data": {}}, status=status)

    def check_message(self, token: str, body: bytes) -> tuple[int, str]:  # noqa: PLR0911 - one return per rule
        if token != TOKEN:
            return 19001, "param invalid: incoming webhook access token invalid"
        if len(body) > BODY_LIMIT:
            return 9499, "Bad Request"
        if not self._is_within_rates():
            if self.old:
                return 9499, "too many request"
            return 11232, "frequency limited psm[lark.oapi.app_platform_runtime]appID[1500]"
        try:
            message = json.loads(body)
        except ValueError:
            return 9499, "Bad Request"
        if self.secret is not None and not self._is_signed(message):
            return 19021, "sign match fail or timestamp is not within one hour from current time"
        if not _is_well_formed(message):
            return 19002, "params error, msg_type need"
        if self.keyword is not None and self.keyword not in json.dumps(message, ensure_ascii=False):
            return 19024, "Key Words Not Found"
        error = self.mention_error(message)
        return (11246, error) if error else (0, "")

    def mention_error(self, message: Any) -> str:
        """Return an error if a message has an invalid mention, else an empty string."""
        for mention in feishu_cards.find_mentions(message):
            match = feishu_cards.VALID_MENTION.fullmatch(mention)
            if match is None or (match[1] == "all" and self.all_disabled):
                return f"invalid mention {mention}"
        return ""

    def _is_within_rates(self) -> bool:
        now = self.now()
        while self._times and self._times[0] <= now - 60:
            self._times.popleft()
        if len(self._times) >= PER_MINUTE or sum(1 for at in self._times if at > now - 1) >= PER_SECOND:
            return False
        self._times.append(now)
        return True

    def _is_signed(self, message: Mapping[str, Any]) -> bool:
        timestamp = message.get("timestamp")
        if not isinstance(timestamp, str) or not timestamp.isdigit():
            return False
        fresh = abs(self.now() - int(timestamp)) <= CLOCK_TOLERANCE
        return fresh and message.get("sign") == compute_signature(self.secret or "", int(timestamp))

    async def _page(self, request: web.Request) -> web.Response:
        """Show the chats of both bots, newest message first."""
        chats = {
            "Chat of the custom bot": [(each.at, _render(each.message)) for each in self.received],
            "Chat of the app": [(each.at, each.as_html()) for each in self.apps.in_chat],
        }
        head = f"<!doctype html><meta charset=utf-8><title>Feishu (simulated)</title><style>{_STYLE}</style>"
        toast = request.query.get("toast", "")
        head += f"<p><b>{html.escape(toast)}</b></p>" if toast else ""
        cards = (
            f"<section><h1>{name}</h1>{''.join(text for _, text in sorted(shown, reverse=True))}</section>"
            for name, shown in chats.items()
        )
        return web.Response(text=f"{head}<main>{''.join(cards)}</main>", content_type="text/html")


async def _drip(request: web.Request) -> None:
    """Send a space every 0.1 s."""
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for _ in range(int(HANG * 10)):
            await response.write(b" ")
            await asyncio.sleep(0.1)


def _render(message: Mapping[str, Any]) -> str:
    if message["msg_type"] == "text":
        return f"<article><p>{html.escape(message['content']['text'])}</p></article>"
    return feishu_cards.render_html(message["card"])


def _is_well_formed(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    if message.get("msg_type") == "text":
        return isinstance(message.get("content", {}).get("text"), str)
    return message.get("msg_type") == "interactive" and not feishu_cards.check_version_1(message.get("card"))
