"""The `feishu_app` channel: an app's bot, whose cards are changed in their place and can be answered.

Reference: https://open.feishu.cn/document/server-docs/im-v1/message/create, …/patch and …/reply
"""

import json
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from fleet.inventory.endpoints import ConfigModel, Token, Url
from fleet.inventory.notify import OpenId
from remediator.notifications.channels import Kind
from remediator.notifications.channels.feishu import PLAIN, Answer, Heard, Letter, Mention, Session, read
from remediator.notifications.channels.feishu_cards import Card, fitted, version_2

RENEW_BEFORE = 600.0  # seconds before a token ends
_REFUSED_TOKENS = {99991663, 99991664, 99991665, 99991666, 99991668}


class FeishuAppOptions(ConfigModel):
    can_update_cards: ClassVar[bool] = True
    app_id: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
    app_secret: Token
    chat_id: Annotated[str, Field(pattern=r"^oc_[0-9A-Za-z_-]{1,80}$")] | None = None
    open_id: OpenId | None = None
    email: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")] | None = None
    url: Url = "https://open.feishu.cn"
    mention: Mention = {}
    encrypt_key: Token | None = None
    verification_token: Token | None = None
    long_connection: bool = False

    @model_validator(mode="after")
    def _one_receiver(self) -> "FeishuAppOptions":
        if sum(each is not None for each in (self.chat_id, self.open_id, self.email)) != 1:
            raise ValueError("wants exactly one of chat_id, open_id, email")
        return self

    @property
    def bot(self) -> str:
        """A name for the bot; limits hold per bot."""
        return f"{self.app_id} at {self.base}"

    @property
    def place(self) -> str:
        """A name for where it leads to: two channels with the same one tell the same people."""
        return " ".join((self.bot, *self.receiver))

    @property
    def base(self) -> str:
        return self.url.rstrip("/")

    @property
    def address(self) -> str:
        return self.url

    @property
    def answers(self) -> bool:
        """Whether pressed buttons can reach us."""
        return self.long_connection or self.encrypt_key is not None

    @property
    def receiver(self) -> tuple[str, str]:
        """(the kind of its id, its id)."""
        kinds = {"chat_id": self.chat_id, "open_id": self.open_id, "email": self.email}
        return next((kind, name) for kind, name in kinds.items() if name is not None)


async def send(session: Session, options: FeishuAppOptions, letter: Letter, now: float) -> Answer:
    """Send, change or reply, with a token that is renewed once where Feishu refuses it."""
    token = await _token(session, options, now)
    if isinstance(token, Answer):
        return token
    answer = await _sent(session, options, letter, token)
    if answer.code not in _REFUSED_TOKENS:
        return answer
    session.tokens.pop(options.bot, None)
    token = await _token(session, options, now)
    if isinstance(token, Answer):
        return token
    answer = await _sent(session, options, letter, token)
    # Nobody's fault that trying later could not mend: the app may be enabled again, or its secret put right.
    return replace(answer, what="again") if answer.code in _REFUSED_TOKENS else answer


async def _token(session: Session, options: FeishuAppOptions, now: float) -> str | Answer:
    kept = session.tokens.get(options.bot)
    if kept is not None and now < kept[1]:
        return kept[0]
    url = f"{options.base}/open-apis/auth/v3/tenant_access_token/internal"
    body = {"app_id": options.app_id, "app_secret": options.app_secret.get_secret_value()}
    heard = await session.ask("POST", url, body)
    answer = read(heard)
    token, lasts = heard.parsed.get("tenant_access_token"), heard.parsed.get("expire")
    if answer.what != "sent" or not isinstance(token, str) or not isinstance(lasts, int):
        return replace(answer, what="again", words=f"no access token for the app: {answer.words}")
    session.tokens[options.bot] = (token, now + max(0.0, lasts - RENEW_BEFORE))
    return token


async def _sent(session: Session, options: FeishuAppOptions, letter: Letter, token: str) -> Answer:
    method, path, body = request(options, letter)
    heard = await session.ask(method, f"{options.base}{path}", body, {"Authorization": f"Bearer {token}"})
    answer = read(heard)
    return replace(answer, message_id=_message_id(heard)) if answer.what == "sent" else answer


def request(options: FeishuAppOptions, letter: Letter) -> tuple[str, str, dict[str, Any]]:
    """(method, path, body) of a letter."""
    made = letter.card
    if letter.degraded:
        made = made.plainer() if letter.degraded == PLAIN else made.without_calls()
    kind, receiver = options.receiver
    if letter.message_id is not None:
        return "PATCH", f"/open-apis/im/v1/messages/{letter.message_id}", fitted(made, _content)
    if letter.reply_to is not None:
        more: dict[str, Any] = {"reply_in_thread": True}
        path = f"/open-apis/im/v1/messages/{letter.reply_to}/reply"
    else:
        more, path = {"receive_id": receiver}, f"/open-apis/im/v1/messages?receive_id_type={kind}"
    return (
        "POST",
        path,
        fitted(made, lambda card: {"msg_type": "interactive", **_content(card), "uuid": letter.uuid, **more}),
    )


def _content(made: Card) -> dict[str, Any]:
    return {"content": json.dumps(version_2(made), ensure_ascii=False)}


def _message_id(heard: Heard) -> str | None:
    data = heard.parsed.get("data")
    found = data.get("message_id") if isinstance(data, dict) else None
    return found if isinstance(found, str) and found.isascii() and found.replace("_", "").isalnum() else None


FEISHU_APP = Kind(FeishuAppOptions, send)
