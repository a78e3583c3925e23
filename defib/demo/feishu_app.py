"""A simulator of Feishu's app bots: access tokens, messages that can be updated, threads, buttons."""

import base64
import hashlib
import itertools
import json
import os
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from uuid import uuid4

import httpx
from aiohttp import web
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from defib.demo import feishu_cards
from remediator.chat.feishu_callback import signature

if TYPE_CHECKING:
    from defib.demo.feishu import FeishuSimulator

APP_ID, APP_SECRET = "cli_demo", "demo-app-secret"
CHAT = "oc_demo"
ENCRYPT_KEY, VERIFICATION_TOKEN = "demo-encrypt-key", "demo-verification"
USER_OPEN_ID = "ou_ann"  # the person who presses the buttons of the page
APP = {
    "app_id": APP_ID, "app_secret": APP_SECRET, "encrypt_key": ENCRYPT_KEY, "verification_token": VERIFICATION_TOKEN,
}  # fmt: skip
CARD_LIMIT = 30 * 1024
PER_SECOND = 5
TOKEN_LASTS, TOKEN_RENEWED = 7200, 1800
CHANGED_WITHIN = 14 * 86400.0
UUID_LASTS = 3600.0


@dataclass
class Message:
    """A message in a chat, with all versions of its card, the current one last."""

    id: str
    at: float
    cards: list[dict[str, Any]]
    root: str | None = None  # the message that began its thread
    replies: list["Message"] = field(default_factory=list)

    @property
    def card(self) -> dict[str, Any]:
        return self.cards[-1]

    @property
    def title(self) -> str:
        return str(self.card["header"]["title"]["content"])

    @property
    def titles(self) -> list[str]:
        """The titles of all versions."""
        return [each["header"]["title"]["content"] for each in self.cards]

    @property
    def colour(self) -> str:
        return str(self.card["header"]["template"])

    @property
    def text(self) -> str:
        return feishu_cards.extract_text(self.card)

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """The values that its buttons send, by answer."""
        sent = [
            does["value"]
            for each in feishu_cards.find_buttons(self.card)
            for does in each["behaviors"]
            if "value" in does
        ]
        return {value["answer"]: value for value in sent}

    def as_html(self) -> str:
        shown = feishu_cards.render_html(self.card, f"/press/{self.id}/")
        return shown.removesuffix("</article>") + "".join(each.as_html() for each in self.replies) + "</article>"


class AppSimulator:
    """One app whose bot is in one chat; it also sends to a person, by open_id or email address."""

    def __init__(self, simulator: "FeishuSimulator") -> None:
        self._simulator = simulator
        self.receivers = {CHAT, "ou_ann", "ann@example.org"}
        self.messages: dict[str, Message] = {}
        self.token_asked = 0
        self.callback_url = ""  # receives the events of pressed buttons
        self._tokens: dict[str, float] = {}  # Unix time at which each expires
        self._by_uuid: dict[str, Message] = {}
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)
        self._numbers = itertools.count(1)

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/open-apis/auth/v3/tenant_access_token/internal", self._token)
        app.router.add_post("/open-apis/im/v1/messages", self._create)
        app.router.add_post("/open-apis/im/v1/messages/{id}/reply", self._reply)
        app.router.add_patch("/open-apis/im/v1/messages/{id}", self._patch)
        app.router.add_post("/press/{id}/{answer}", self._press)

    @property
    def in_chat(self) -> list[Message]:
        """The messages of the chat outside threads, oldest first."""
        return [each for each in self.messages.values() if each.root is None]

    def revoke(self) -> None:
        """Revoke all tokens."""
        self._tokens.clear()

    async def _token(self, request: web.Request) -> web.Response:
        body, now = await request.json(), self._simulator.now()
        if body.get("app_id") != APP_ID or body.get("app_secret") != APP_SECRET:
            return self._simulator.refuse(10014, "app secret invalid")
        self.token_asked += 1
        held = [(token, until - now) for token, until in self._tokens.items() if until - now >= TOKEN_RENEWED]
        if held:
            token, left = held[-1]
        else:
            token, left = f"t-{uuid4().hex}", TOKEN_LASTS
            self._tokens[token] = now + left
        return web.json_response({"code": 0, "msg": "ok", "tenant_access_token": token, "expire": int(left)})

    def _is_authorized(self, request: web.Request) -> bool:
        _, _, token = request.headers.get("Authorization", "").partition(" ")
        return self._tokens.get(token, 0.0) > self._simulator.now()

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("receive_id") not in self.receivers:
            return self._refuse(230002, "the bot can not be outside the group")
        return self._send(request, body, None)

    async def _reply(self, request: web.Request) -> web.Response:
        root = self.messages.get(request.match_info["id"])
        if root is None:
            return self._refuse(230001, "invalid message_id")
        return self._send(request, await request.json(), root)

    def _send(self, request: web.Request, body: Mapping[str, Any], root: Message | None) -> web.Response:
        now = self._simulator.now()
        known = self._by_uuid.get(str(body.get("uuid")))
        if self._is_authorized(request) and known is not None and now - known.at < UUID_LASTS:
            return _data(known)
        refused = self._check(request, body, "chat")
        if refused is not None:
            return refused
        message = Message(f"om_{next(self._numbers)}", now, [json.loads(body["content"])], root.id if root else None)
        self.messages[message.id] = message
        if root is not None:
            root.replies.append(message)
        if "uuid" in body:
            self._by_uuid[str(body["uuid"])] = message
        self._simulator.arrived.set()
        return _data(message)

    async def _patch(self, request: web.Request) -> web.Response:
        message = self.messages.get(request.match_info["id"])
        body = await request.json()
        if message is None:
            return self._refuse(230001, "invalid message_id")
        refused = self._check(request, {**body, "msg_type": "interactive"}, message.id)
        if refused is not None:
            return refused
        card = json.loads(body["content"])
        if self._simulator.now() - message.at > CHANGED_WITHIN:
            return self._refuse(230031, "the message is too old to be changed")
        if not all(each.get("config", {}).get("update_multi") for each in (message.card, card)):
            return self._refuse(230099, "update_multi is not true")
        message.cards.append(card)
        self._simulator.arrived.set()
        return _data(message)

    def _check(self, request: web.Request, body: Mapping[str, Any], place: str) -> web.Response | None:
        if not self._is_authorized(request):
            return self._refuse(99991663, "Invalid access token for authorization. Please make a test attempt")
        if not self._is_within_rate(place):
            return self._refuse(230020, "This operation triggers the frequency limit")
        content = body.get("content")
        if body.get("msg_type") != "interactive" or not isinstance(content, str):
            return self._refuse(230001, "invalid request")
        if len(content.encode()) > CARD_LIMIT:
            return self._refuse(230025, "the message's length reaches its limit")
        try:
            fault = feishu_cards.check_version_2(json.loads(content))
        except ValueError:
            fault = "content is not JSON"
        fault = fault or self._simulator.mention_error(content)
        return self._refuse(230099, f"Failed to create card content, ext=ErrMsg: {fault}") if fault else None

    def _is_within_rate(self, place: str) -> bool:
        now, times = self._simulator.now(), self._times[place]
        while times and times[0] <= now - 1:
            times.popleft()
        if len(times) >= PER_SECOND:
            return False
        times.append(now)
        return True

    def _refuse(self, code: int, why: str) -> web.Response:
        return self._simulator.refuse(code, why, 400)

    async def _press(self, request: web.Request) -> web.Response:
        """Handle a pressed button of the page: send the event to the app, and show its answer."""
        if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise web.HTTPForbidden(text="the button is on a page of another site\n")
        message, answer = self.messages.get(request.match_info["id"]), request.match_info["answer"]
        if message is None or answer not in message.values:
            raise web.HTTPNotFound
        body, headers = self.callback(self.event(message, answer))
        async with httpx.AsyncClient(trust_env=False, timeout=3.0) as client:
            answered = (await client.post(self.callback_url, content=body, headers=headers)).json()
        raise web.HTTPSeeOther(f"/?{urlencode({'toast': answered['toast']['content']})}")

    def event(self, message: Message, answer: str, person: str = USER_OPEN_ID, **changed: Any) -> dict[str, Any]:
        """Return the event of a pressed button; `changed` replaces keys of its header."""
        header = {
            "event_id": uuid4().hex, "token": VERIFICATION_TOKEN, "event_type": "card.action.trigger",
            "create_time": str(int(self._simulator.now() * 1e6)), "tenant_key": "demo", "app_id": APP_ID, **changed,
        }  # fmt: skip
        return {
            "schema": "2.0",
            "header": header,
            "event": {
                "operator": {"open_id": person},
                "token": f"c-{uuid4().hex}",
                "action": {"tag": "button", "value": message.values[answer]},
                "host": "im_message",
                "context": {"open_message_id": message.id, "open_chat_id": CHAT},
            },
        }

    def callback(self, event: Mapping[str, Any], key: str = ENCRYPT_KEY) -> tuple[bytes, dict[str, str]]:
        """Return the body and headers of the request that carries an event."""
        body = json.dumps({"encrypt": encrypt(json.dumps(event).encode(), key)}).encode()
        timestamp, nonce = str(int(self._simulator.now())), uuid4().hex
        return body, {
            "Content-Type": "application/json",
            "X-Lark-Request-Timestamp": timestamp,
            "X-Lark-Request-Nonce": nonce,
            "X-Lark-Signature": signature(timestamp, nonce, key, body),
        }


def encrypt(plain: bytes, key: str) -> str:
    """Encrypt as Feishu does: AES-256-CBC with the SHA-256 of the key, IV first, PKCS #7 padding, base64."""
    left = 16 - len(plain) % 16
    iv = os.urandom(16)
    sealing = Cipher(algorithms.AES(hashlib.sha256(key.encode()).digest()), modes.CBC(iv)).encryptor()
    return base64.b64encode(iv + sealing.update(plain + bytes([left]) * left) + sealing.finalize()).decode()


def _data(message: Message) -> web.Response:
    data = {"message_id": message.id, "root_id": message.root or "", "msg_type": "interactive", "chat_id": CHAT}
    return web.json_response({"code": 0, "msg": "success", "data": data})
