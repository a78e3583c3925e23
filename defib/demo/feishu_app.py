"""The stand-in's app bots: access tokens that end, messages in chats that can be changed, threads, pressed buttons."""

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
USER_OPEN_ID = "ou_ann"  # who presses the buttons of the page
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
    """A message in a chat: every card it has shown, the last one now."""

    id: str
    at: float
    cards: list[dict[str, Any]]
    root: str | None = None  # the message in whose thread it stands
    replies: list["Message"] = field(default_factory=list)

    @property
    def card(self) -> dict[str, Any]:
        return self.cards[-1]

    @property
    def title(self) -> str:
        return str(self.card["header"]["title"]["content"])

    @property
    def titles(self) -> list[str]:
        """The titles it has had."""
        return [each["header"]["title"]["content"] for each in self.cards]

    @property
    def colour(self) -> str:
        return str(self.card["header"]["template"])

    @property
    def text(self) -> str:
        return feishu_cards.text_of(self.card)

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """What its buttons send back, by the answer they stand for."""
        sent = [
            does["value"] for each in feishu_cards.buttons(self.card) for does in each["behaviors"] if "value" in does
        ]
        return {value["answer"]: value for value in sent}

    def as_html(self) -> str:
        shown = feishu_cards.as_html(self.card, f"/press/{self.id}/")
        return shown.removesuffix("</article>") + "".join(each.as_html() for each in self.replies) + "</article>"


class Apps:
    """One app, whose bot is in one chat; people and their mail are receivers too."""

    def __init__(self, stand_in: "FeishuSimulator") -> None:
        self._stand_in = stand_in
        self.receivers = {CHAT, "ou_ann", "ann@example.org"}
        self.messages: dict[str, Message] = {}
        self.token_asked = 0
        self.callback_url = ""  # where pressed buttons are told
        self._tokens: dict[str, float] = {}  # until when each holds
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
        """The messages of the chat itself, oldest first."""
        return [each for each in self.messages.values() if each.root is None]

    def revoke(self) -> None:
        """Let no token hold any more."""
        self._tokens.clear()

    async def _token(self, request: web.Request) -> web.Response:
        asked, now = await request.json(), self._stand_in.now()
        if asked.get("app_id") != APP_ID or asked.get("app_secret") != APP_SECRET:
            return self._stand_in.refuse(10014, "app secret invalid")
        self.token_asked += 1
        held = [(token, until - now) for token, until in self._tokens.items() if until - now >= TOKEN_RENEWED]
        if held:
            token, left = held[-1]
        else:
            token, left = f"t-{uuid4().hex}", TOKEN_LASTS
            self._tokens[token] = now + left
        return web.json_response({"code": 0, "msg": "ok", "tenant_access_token": token, "expire": int(left)})

    def _authorized(self, request: web.Request) -> bool:
        _, _, token = request.headers.get("Authorization", "").partition(" ")
        return self._tokens.get(token, 0.0) > self._stand_in.now()

    async def _create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if asked.get("receive_id") not in self.receivers:
            return self._refuse(230002, "the bot can not be outside the group")
        return self._sent(request, asked, None)

    async def _reply(self, request: web.Request) -> web.Response:
        root = self.messages.get(request.match_info["id"])
        if root is None:
            return self._refuse(230001, "invalid message_id")
        return self._sent(request, await request.json(), root)

    def _sent(self, request: web.Request, asked: Mapping[str, Any], root: Message | None) -> web.Response:
        now = self._stand_in.now()
        known = self._by_uuid.get(str(asked.get("uuid")))
        if self._authorized(request) and known is not None and now - known.at < UUID_LASTS:
            return _data(known)
        refused = self._refused(request, asked, "chat")
        if refused is not None:
            return refused
        made = Message(f"om_{next(self._numbers)}", now, [json.loads(asked["content"])], root.id if root else None)
        self.messages[made.id] = made
        if root is not None:
            root.replies.append(made)
        if "uuid" in asked:
            self._by_uuid[str(asked["uuid"])] = made
        self._stand_in.arrived.set()
        return _data(made)

    async def _patch(self, request: web.Request) -> web.Response:
        message = self.messages.get(request.match_info["id"])
        asked = await request.json()
        if message is None:
            return self._refuse(230001, "invalid message_id")
        refused = self._refused(request, {**asked, "msg_type": "interactive"}, message.id)
        if refused is not None:
            return refused
        card = json.loads(asked["content"])
        if self._stand_in.now() - message.at > CHANGED_WITHIN:
            return self._refuse(230031, "the message is too old to be changed")
        if not all(each.get("config", {}).get("update_multi") for each in (message.card, card)):
            return self._refuse(230099, "update_multi is not true")
        message.cards.append(card)
        self._stand_in.arrived.set()
        return _data(message)

    def _refused(self, request: web.Request, asked: Mapping[str, Any], place: str) -> web.Response | None:
        if not self._authorized(request):
            return self._refuse(99991663, "Invalid access token for authorization. Please make a test attempt")
        if not self._within_rate(place):
            return self._refuse(230020, "This operation triggers the frequency limit")
        content = asked.get("content")
        if asked.get("msg_type") != "interactive" or not isinstance(content, str):
            return self._refuse(230001, "invalid request")
        if len(content.encode()) > CARD_LIMIT:
            return self._refuse(230025, "the message's length reaches its limit")
        try:
            fault = feishu_cards.fault_of_version_2(json.loads(content))
        except ValueError:
            fault = "content is not JSON"
        fault = fault or self._stand_in.wrong_mention(content)
        return self._refuse(230099, f"Failed to create card content, ext=ErrMsg: {fault}") if fault else None

    def _within_rate(self, place: str) -> bool:
        now, times = self._stand_in.now(), self._times[place]
        while times and times[0] <= now - 1:
            times.popleft()
        if len(times) >= PER_SECOND:
            return False
        times.append(now)
        return True

    def _refuse(self, code: int, why: str) -> web.Response:
        return self._stand_in.refuse(code, why, 400)

    async def _press(self, request: web.Request) -> web.Response:
        """A button of the stand-in's page: Feishu tells the app, and shows what it answers."""
        message, answer = self.messages.get(request.match_info["id"]), request.match_info["answer"]
        if message is None or answer not in message.values:
            raise web.HTTPNotFound
        body, headers = self.callback(self.event(message, answer))
        async with httpx.AsyncClient(trust_env=False, timeout=3.0) as client:
            told = (await client.post(self.callback_url, content=body, headers=headers)).json()
        raise web.HTTPSeeOther(f"/?{urlencode({'said': told['toast']['content']})}")

    def event(self, message: Message, answer: str, person: str = USER_OPEN_ID, **changed: Any) -> dict[str, Any]:
        """What Feishu tells of a pressed button; `changed` are other keys of its header."""
        header = {
            "event_id": uuid4().hex, "token": VERIFICATION_TOKEN, "event_type": "card.action.trigger",
            "create_time": str(int(self._stand_in.now() * 1e6)), "tenant_key": "demo", "app_id": APP_ID, **changed,
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
        """The body and headers of the request by which an event is told."""
        body = json.dumps({"encrypt": sealed(json.dumps(event).encode(), key)}).encode()
        timestamp, nonce = str(int(self._stand_in.now())), uuid4().hex
        return body, {
            "Content-Type": "application/json",
            "X-Lark-Request-Timestamp": timestamp,
            "X-Lark-Request-Nonce": nonce,
            "X-Lark-Signature": signature(timestamp, nonce, key, body),
        }


def sealed(plain: bytes, key: str) -> str:
    """AES-256-CBC under the SHA-256 of the key, the IV first, padded by PKCS #7, base64."""
    left = 16 - len(plain) % 16
    iv = os.urandom(16)
    sealing = Cipher(algorithms.AES(hashlib.sha256(key.encode()).digest()), modes.CBC(iv)).encryptor()
    return base64.b64encode(iv + sealing.update(plain + bytes([left]) * left) + sealing.finalize()).decode()


def _data(message: Message) -> web.Response:
    data = {"message_id": message.id, "root_id": message.root or "", "msg_type": "interactive", "chat_id": CHAT}
    return web.json_response({"code": 0, "msg": "success", "data": data})
