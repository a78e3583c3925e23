"""The `feishu_app` channel: an app's bot, whose cards can be updated and have buttons.

Reference: https://open.feishu.cn/document/server-docs/im-v1/message/create, …/patch and …/reply
"""

import hashlib
import json
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from fleet.inventory.endpoints import Token, Url
from fleet.inventory.notify import OpenId
from remediator.notifications.cards import Card
from remediator.notifications.channels import ChannelKind, ChannelMessage, SendResult
from remediator.notifications.channels.feishu import (
    PLAIN,
    FeishuChannelOptions,
    FeishuResult,
    FeishuSession,
    RetryState,
    parse_reply,
    plan_retry,
)
from remediator.notifications.channels.feishu_cards import render_version_2, shorten_to_fit, simplify_card
from remediator.notifications.channels.http import HttpReply

RENEW_BEFORE = 600.0  # seconds before a token expires
_REFUSED_TOKENS = {99991663, 99991664, 99991665, 99991666, 99991668}


class FeishuAppOptions(FeishuChannelOptions):
    updatable_for: ClassVar[float | None] = 13 * 86400.0  # Feishu permits 14 days
    has_threads: ClassVar[bool] = True
    app_id: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
    app_secret: Token
    chat_id: Annotated[str, Field(pattern=r"^oc_[0-9A-Za-z_-]{1,80}$")] | None = None
    open_id: OpenId | None = None
    email: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")] | None = None
    url: Url = "https://open.feishu.cn"
    encrypt_key: Token | None = None
    verification_token: Token | None = None
    long_connection: bool = False

    @model_validator(mode="after")
    def _one_receiver(self) -> "FeishuAppOptions":
        if sum(each is not None for each in (self.chat_id, self.open_id, self.email)) != 1:
            raise ValueError("must have exactly one of chat_id, open_id, email")
        return self

    @property
    def bot_id(self) -> str:
        return f"{self.app_id} at {self.base}"

    @property
    def audience_id(self) -> str:
        return " ".join((self.bot_id, *self.receiver))

    @property
    def base(self) -> str:
        return self.url.rstrip("/")

    @property
    def address(self) -> str:
        return self.url

    @property
    def has_buttons(self) -> bool:
        return self.long_connection or self.encrypt_key is not None

    @property
    def receiver(self) -> tuple[str, str]:
        """Return the type of the receiver's id, and the id."""
        kinds = {"chat_id": self.chat_id, "open_id": self.open_id, "email": self.email}
        return next((kind, name) for kind, name in kinds.items() if name is not None)


async def send(session: FeishuSession, options: FeishuAppOptions, message: ChannelMessage, now: float) -> SendResult:
    """Send, update or reply, with an access token that is renewed once if Feishu refuses it."""
    result = await _try_to_send(session, options, message, now)
    if result.code in _REFUSED_TOKENS:
        session.tokens.pop(options.bot_id, None)
        result = await _try_to_send(session, options, message, now)
        if result.code in _REFUSED_TOKENS:  # the app may be enabled again, or its secret corrected
            return replace(result, outcome="retry")
    return plan_retry(result, message)


async def _try_to_send(
    session: FeishuSession, options: FeishuAppOptions, message: ChannelMessage, now: float
) -> FeishuResult:
    token = await _access_token(session, options, now)
    if isinstance(token, FeishuResult):
        return token
    method, path, body = format_request(options, message)
    reply = await session.request(method, f"{options.base}{path}", body, {"Authorization": f"Bearer {token}"})
    result = parse_reply(reply)
    return replace(result, message_id=_message_id(reply)) if result.outcome == "sent" else result


async def _access_token(session: FeishuSession, options: FeishuAppOptions, now: float) -> str | FeishuResult:
    """Return the stored access token, or a new one; the result of the request if there is none."""
    stored = session.tokens.get(options.bot_id)
    if stored is not None and now < stored[1]:
        return stored[0]
    url = f"{options.base}/open-apis/auth/v3/tenant_access_token/internal"
    body = {"app_id": options.app_id, "app_secret": options.app_secret.get_secret_value()}
    reply = await session.request("POST", url, body)
    result, parsed = parse_reply(reply), reply.parse_json()
    token, expires_in = parsed.get("tenant_access_token"), parsed.get("expire")
    if result.outcome != "sent" or not isinstance(token, str) or not isinstance(expires_in, int):
        return replace(result, outcome="retry", response=f"no access token for the app: {result.response}")
    session.tokens[options.bot_id] = (token, now + max(0.0, expires_in - RENEW_BEFORE))
    return token


def format_request(options: FeishuAppOptions, message: ChannelMessage) -> tuple[str, str, dict[str, Any]]:
    """Return the method, path and body of a request that sends a message."""
    simplified = RetryState.parse(message.retry_state).simplified
    card = message.card
    if simplified:
        card = simplify_card(card) if simplified == PLAIN else card.without_mentions()
    if message.update_id is not None:
        return "PATCH", f"/open-apis/im/v1/messages/{message.update_id}", shorten_to_fit(card, _content)
    id_type, receiver = options.receiver
    if message.reply_to is not None:
        fields: dict[str, Any] = {"reply_in_thread": True}
        path = f"/open-apis/im/v1/messages/{message.reply_to}/reply"
    else:
        fields, path = {"receive_id": receiver}, f"/open-apis/im/v1/messages?receive_id_type={id_type}"
    fields["uuid"] = _uuid(message.key, simplified)
    return "POST", path, shorten_to_fit(card, lambda shown: {"msg_type": "interactive", **_content(shown), **fields})


def _uuid(key: str, simplified: int) -> str:
    """Return the id by which Feishu ignores repetitions of a message; a simpler form is another message."""
    return hashlib.sha256(f"{key} {simplified}".encode()).hexdigest()[:40]


def _content(card: Card) -> dict[str, Any]:
    return {"content": json.dumps(render_version_2(card), ensure_ascii=False)}


def _message_id(reply: HttpReply) -> str | None:
    data = reply.parse_json().get("data")
    message_id = data.get("message_id") if isinstance(data, dict) else None
    is_valid = isinstance(message_id, str) and message_id.isascii() and message_id.replace("_", "").isalnum()
    return message_id if is_valid else None


FEISHU_APP = ChannelKind(FeishuAppOptions, FeishuSession, send)
