"""The `feishu` channel: a signed custom bot, and what Feishu's answers mean.

Reference: https://open.feishu.cn/document/client-docs/bot-v3/add-custom-bot
"""

import asyncio
import base64
import email.utils
import hashlib
import hmac
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

import httpx
from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from fleet.inventory.endpoints import ConfigModel, SecretUrl, Token
from fleet.inventory.notify import Severity
from remediator.notifications.channels import Kind
from remediator.notifications.channels.feishu_cards import Card, fitted, text, version_1

TIMEOUT = httpx.Timeout(10.0, connect=5.0)
DEADLINE = 15.0  # seconds for the whole of an answer, however it drips
ANSWER_LIMIT = 64 * 1024
OFFSET_HOLDS = 60.0  # seconds: a clock that is no further from where it was known to be is the same
What = Literal["sent", "again", "sign again", "degrade", "dead", "unknown"]

_WORDS = {
    9499: "malformed or too large",
    11232: "the bot is busy",
    11246: "a mention is wrong, or mentioning all is not allowed in the chat",
    19001: "the webhook's token is wrong",
    19002: "the parameters are wrong",
    19021: "the signature or the clock is wrong",
    19022: "this machine's address is not on the bot's list",
    19024: "the bot wants one of its keywords in the text",
    100290: "a mention is wrong",
    230002: "the bot is not in the chat",
    230020: "the chat gets too many messages",
    230025: "the message is too long",
    230034: "the receiver is not there",
    230049: "the message is still being sent",
    230099: "the card is not one that Feishu takes",
    232009: "the chat was dissolved",
    99991400: "too many requests",
    99991663: "the access token is not valid",
}
_BAD_MENTION = {11246, 100290}
_DEAD = {10014, 19001, 19002, 19022, 19024, 230002, 230034, 232009}
_AGAIN = {11232, 99991400, 230020, 230049}
_DEGRADE = {9499, 230025, 230099} | _BAD_MENTION
PLAIN = 2
_SIGN_AGAIN = 19021
_MALFORMED = 9499
_TOO_MANY = re.compile("too many requests?", re.IGNORECASE)


def _mention(name: str) -> str:
    if name not in ("all", "on_call") and not name.startswith("ou_"):
        raise ValueError("is none of all, on_call, an open_id (ou_…)")
    return name


def _for_all(value: Any) -> Any:
    return dict.fromkeys(get_args(Severity), value) if isinstance(value, list) else value


_Called = list[Annotated[str, AfterValidator(_mention)]]
Mention = Annotated[
    dict[Severity, _Called],
    BeforeValidator(_for_all),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "object"}]}),
]


class FeishuOptions(ConfigModel):
    can_update_cards: ClassVar[bool] = False
    answers: ClassVar[bool] = False
    webhook: SecretUrl
    secret: Token | None = None
    mention: Mention = {}

    @property
    def bot(self) -> str:
        """A name for the bot that tells nothing of its token; limits hold per bot."""
        return hashlib.sha256(self.webhook.get_secret_value().encode()).hexdigest()[:16]

    @property
    def place(self) -> str:
        """A name for where it leads to: two channels with the same one tell the same people."""
        return self.bot

    @property
    def address(self) -> str:
        """Where it is sent to; it holds the token."""
        return self.webhook.get_secret_value()


@dataclass(frozen=True)
class Answer:
    """What to do after a send, in our words and with Feishu's code.

    `after` is a wait in seconds it asked for, `message_id` names what was made, and `offset` is how many seconds our
    clock is ahead of Feishu's.
    """

    what: What
    words: str
    after: float | None = None
    code: int | None = None
    message_id: str | None = None
    offset: float | None = None

    @property
    def wants(self) -> int:
        """How far a card is to be degraded after this answer."""
        return (1 if self.code in _BAD_MENTION else PLAIN) if self.what == "degrade" else 0


@dataclass(frozen=True)
class Letter:
    """A card on its way: to be sent, put in the place of `message_id`, or told in the thread of `reply_to`."""

    card: Card
    uuid: str = ""
    message_id: str | None = None
    reply_to: str | None = None
    degraded: int = 0  # 1: without mentions, which were refused; 2: plain


@dataclass
class Session:
    """What all sends share: the client, and what was learned of each bot.

    `tokens` are the access tokens of app bots with the time until which they hold; `offsets` are how many seconds our
    clock was ahead of Feishu's at the bot's last answer.
    """

    client: httpx.AsyncClient
    tokens: dict[str, tuple[str, float]] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)

    async def ask(self, method: str, url: str, body: Any, headers: Mapping[str, str] | None = None) -> "Heard":
        """One request, and whatever came of it."""
        content = json.dumps(body, ensure_ascii=False).encode()
        said = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        try:
            async with (
                asyncio.timeout(DEADLINE),
                self.client.stream(method, url, content=content, headers=said, timeout=TIMEOUT) as response,
            ):
                heard = b""
                async for chunk in response.aiter_bytes():
                    heard += chunk
                    if len(heard) > ANSWER_LIMIT:
                        break
                return Heard(response.status_code, response.headers, heard)
        except (httpx.TimeoutException, TimeoutError):
            return Heard(why=f"no answer in time from {urlsplit(url).netloc}")
        except httpx.HTTPError as error:
            # The error's own text may hold the address, and so the token.
            return Heard(why=f"{urlsplit(url).netloc} was not reached: {type(error).__name__}")


@dataclass(frozen=True)
class Heard:
    """An answer; `why` says why there is none."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    why: str = ""

    @property
    def parsed(self) -> dict[str, Any]:
        try:
            parsed = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}


def sign(secret: str, timestamp: int) -> str:
    """The signature: HMAC-SHA256 of nothing, keyed by the timestamp and the secret, base64."""
    key = f"{timestamp}\n{secret}".encode()
    return base64.b64encode(hmac.new(key, b"", hashlib.sha256).digest()).decode()


def message(letter: Letter) -> dict[str, Any]:
    """The message of a custom bot: a card, or plain text where cards were refused."""
    if letter.degraded == PLAIN:
        return fitted(letter.card, lambda made: {"msg_type": "text", "content": {"text": text(made)}})
    card = letter.card.without_calls() if letter.degraded else letter.card
    return fitted(card, lambda made: {"msg_type": "interactive", "card": version_1(made)})


async def send(session: Session, options: FeishuOptions, letter: Letter, now: float) -> Answer:
    """Send one message at the Unix time `now`; every outcome is an Answer.

    It is signed with Feishu's time, as far as that is known: an answer that refuses the signature tells it, and the
    message is then signed once more. A refusal is final only for a signature that was made with Feishu's time.
    """
    body = message(letter)
    known = session.offsets.get(options.bot)
    answer = await _sent(session, options, body, now - (known or 0.0))
    if answer.code != _SIGN_AGAIN:
        return answer
    learned = session.offsets.get(options.bot)
    if learned is not None and (known is None or abs(learned - known) > OFFSET_HOLDS):
        known = learned
        answer = await _sent(session, options, body, now - known)
    return replace(answer, what="again") if answer.code == _SIGN_AGAIN and known is None else answer


async def _sent(session: Session, options: FeishuOptions, body: Mapping[str, Any], at: float) -> Answer:
    """Send a message that is signed with the Unix time `at`; the answer tells Feishu's time for the next."""
    signed = dict(body)
    if options.secret is not None:
        timestamp = int(at)
        signed |= {"timestamp": str(timestamp), "sign": sign(options.secret.get_secret_value(), timestamp)}
    answer = read(await session.ask("POST", options.webhook.get_secret_value(), signed))
    if answer.offset is not None:
        session.offsets[options.bot] = answer.offset
    return answer


def read(heard: Heard) -> Answer:
    """What an answer means: `code` counts, or `StatusCode` where an older bot answers with that alone; 0 is success."""
    if heard.why:
        return Answer("again", heard.why)
    found = _read(heard)
    offset = clock_offset(heard.headers)
    if found.code == _SIGN_AGAIN and offset is not None:
        words = f"{found.words}; this machine's clock is {offset:+.0f} s off Feishu's"
        return replace(found, words=words, offset=offset)
    return replace(found, offset=offset)


def _read(heard: Heard) -> Answer:
    parsed = heard.parsed
    code = parsed["code"] if "code" in parsed else parsed.get("StatusCode")
    after = _seconds(heard.headers.get("x-ogw-ratelimit-reset"))
    if not isinstance(code, int) or isinstance(code, bool) or ("code" not in parsed and code != 0):
        return Answer("again", f"HTTP {heard.status} without a code", after)
    # Feishu has one code for what is malformed and for too many requests, which only its text tells apart.
    busy = code == _MALFORMED and _TOO_MANY.search(_said(parsed)) is not None
    words = f"{code}: {'too many requests' if busy else _WORDS.get(code) or _said(parsed)}"
    if heard.status == 429 or heard.status >= 500:  # noqa: PLR2004
        return Answer("again", f"HTTP {heard.status}, {words}", after, code)
    if code == 0 and heard.status < 300:  # noqa: PLR2004
        return Answer("sent", "0: success", code=0)
    if busy or code in _AGAIN:
        return Answer("again", words, after, code)
    if code == _SIGN_AGAIN:
        return Answer("sign again", words, code=code)
    return Answer("degrade" if code in _DEGRADE else "dead" if code in _DEAD else "unknown", words, code=code)


def _said(parsed: Mapping[str, Any]) -> str:
    return " ".join(str(parsed.get("msg") or "refused").split())[:200]


def _seconds(text: str | None) -> float | None:
    try:
        return min(max(float(text), 0.0), 3600.0) if text else None
    except ValueError:
        return None


def clock_offset(headers: Mapping[str, str]) -> float | None:
    """How many seconds our clock is ahead of the one that an answer was dated by."""
    try:
        return time.time() - email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


FEISHU = Kind(FeishuOptions, send)
