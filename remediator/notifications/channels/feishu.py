"""The `feishu` channel: a custom bot with signed messages, and the meaning of Feishu's responses.

Reference: https://open.feishu.cn/document/client-docs/bot-v3/add-custom-bot
"""

import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, get_args

import httpx
from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from fleet.inventory.endpoints import SecretUrl, Token
from fleet.inventory.notify import ChannelOptions, Severity
from remediator.notifications.channels import ChannelKind, ChannelMessage, SendResult
from remediator.notifications.channels.feishu_cards import render_plain_text, render_version_1, shorten_to_fit
from remediator.notifications.channels.http import HttpReply, parse_seconds, send_request
from runtime.times import parse_http_date

SAME_CLOCK = 60.0  # seconds: a clock offset that changed by less is the same

EXPLANATIONS = {
    9499: "malformed or too large",
    11232: "the bot is busy",
    11246: "a mention is invalid, or the chat does not permit @all",
    19001: "the webhook's token is wrong",
    19002: "the parameters are wrong",
    19021: "the signature or the clock is wrong",
    19022: "the address of this machine is not in the bot's allow-list",
    19024: "the bot requires one of its keywords in the text",
    100290: "a mention is invalid",
    230002: "the bot is not in the chat",
    230020: "the chat receives too many messages",
    230025: "the message is too long",
    230034: "the receiver does not exist",
    230049: "the message is still being sent",
    230099: "the card is invalid",
    232009: "the chat was dissolved",
    99991400: "too many requests",
    99991663: "the access token is not valid",
}
SIGNATURE_REFUSED = 19021
_MALFORMED = 9499
_STILL_SENDING = 230049  # concerns one message, not the bot
_BAD_MENTION = {11246, 100290}
_REJECTED = {10014, 19001, 19002, 19022, 19024, 230002, 230034, 232009}
_BUSY = {11232, 99991400, 230020, _STILL_SENDING}
_CARD_REFUSED = {_MALFORMED, 230025, 230099} | _BAD_MENTION
_TOO_MANY = re.compile("too many requests?", re.IGNORECASE)

WITHOUT_MENTIONS, PLAIN = 1, 2


def _check_mention(name: str) -> str:
    if name not in ("all", "on_call") and not name.startswith("ou_"):
        raise ValueError("must be all, on_call or an open_id (ou_…)")
    return name


def _for_all_severities(value: Any) -> Any:
    return dict.fromkeys(get_args(Severity), value) if isinstance(value, list) else value


Mention = Annotated[
    dict[Severity, list[Annotated[str, AfterValidator(_check_mention)]]],
    BeforeValidator(_for_all_severities),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "object"}]}),
]


class FeishuChannelOptions(ChannelOptions):
    """Options that both types of Feishu channels have."""

    per_second: ClassVar[int] = 4  # Feishu permits 5
    per_minute: ClassVar[int] = 90  # Feishu permits 100
    mention: Mention = {}

    def mentions(self, severity: Severity) -> Sequence[str]:
        return self.mention.get(severity, ())


class FeishuOptions(FeishuChannelOptions):
    webhook: SecretUrl
    secret: Token | None = None

    @property
    def bot_id(self) -> str:
        """Identify the bot without its token."""
        return hashlib.sha256(self.address.encode()).hexdigest()[:16]

    @property
    def address(self) -> str:
        return self.webhook.get_secret_value()


@dataclass(frozen=True)
class RetryState:
    """What was done to a message since Feishu refused it: 1 without mentions, 2 plain; whether it was signed again."""

    simplified: int = 0
    signed_again: bool = False

    @classmethod
    def parse(cls, state: Mapping[str, Any] | None) -> "RetryState":
        stored = state or {}
        return cls(int(stored.get("degraded", 0)), bool(stored.get("signed_again")))

    def dump(self) -> dict[str, Any]:
        return {"degraded": self.simplified, "signed_again": self.signed_again}


@dataclass(frozen=True)
class FeishuResult(SendResult):
    """A result with Feishu's code, None if there is none."""

    code: int | None = None


@dataclass
class FeishuSession:
    """What the sends of a Feishu channel type share.

    `tokens` are access tokens by bot, each with the Unix time until which it is used. `offsets` are how many seconds
    the local clock was ahead of Feishu's at the bot's last response.
    """

    client: httpx.AsyncClient
    tokens: dict[str, tuple[str, float]] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)

    async def request(
        self, method: str, url: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> HttpReply:
        content = json.dumps(body, ensure_ascii=False).encode()
        sent_headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        return await send_request(self.client, method, url, content, sent_headers)


def compute_signature(secret: str, timestamp: int) -> str:
    """Return the signature: base64 of the HMAC-SHA256 of no data, with the timestamp and the secret as its key."""
    key = f"{timestamp}\n{secret}".encode()
    return base64.b64encode(hmac.new(key, b"", hashlib.sha256).digest()).decode()


def format_message(message: ChannelMessage) -> dict[str, Any]:
    """Return the body for a custom bot: a card, or plain text after cards were refused."""
    simplified = RetryState.parse(message.retry_state).simplified
    if simplified == PLAIN:
        return shorten_to_fit(
            message.card, lambda card: {"msg_type": "text", "content": {"text": render_plain_text(card)}}
        )
    shown = message.card.without_mentions() if simplified else message.card
    return shorten_to_fit(shown, lambda card: {"msg_type": "interactive", "card": render_version_1(card)})


async def send(session: FeishuSession, options: FeishuOptions, message: ChannelMessage, now: float) -> SendResult:
    """Send a message, signed with Feishu's time as far as it is known.

    A refused signature tells Feishu's time, and the message is signed once more. The refusal is final only for a
    signature that was made with Feishu's time.
    """
    body = format_message(message)
    offset = session.offsets.get(options.bot_id)
    result = await _send_signed(session, options, body, now - (offset or 0.0))
    if result.code == SIGNATURE_REFUSED:
        learned = session.offsets.get(options.bot_id)
        if learned is not None and (offset is None or abs(learned - offset) > SAME_CLOCK):
            offset = learned
            result = await _send_signed(session, options, body, now - offset)
        if result.code == SIGNATURE_REFUSED and offset is None:
            return replace(result, outcome="retry")
    return plan_retry(result, message)


async def _send_signed(
    session: FeishuSession, options: FeishuOptions, body: Mapping[str, Any], at: float
) -> FeishuResult:
    """Send a body that is signed with the Unix time `at`, and store the clock offset that the response shows."""
    signed = dict(body)
    if options.secret is not None:
        timestamp = int(at)
        signed |= {"timestamp": str(timestamp), "sign": compute_signature(options.secret.get_secret_value(), timestamp)}
    result = parse_reply(await session.request("POST", options.address, signed))
    if result.clock_offset is not None:
        session.offsets[options.bot_id] = result.clock_offset
    return result


def plan_retry(result: FeishuResult, message: ChannelMessage) -> SendResult:
    """Resend a refused message once in a simpler form, and once with a new signature; reject it after that."""
    state = RetryState.parse(message.retry_state)
    if result.outcome != "reject":
        return result
    if result.code == SIGNATURE_REFUSED and not state.signed_again:
        return replace(result, outcome="resend", retry_state=replace(state, signed_again=True).dump())
    if result.code in _CARD_REFUSED:
        simplified = WITHOUT_MENTIONS if result.code in _BAD_MENTION else PLAIN
        if state.simplified < simplified:
            return replace(result, outcome="resend", retry_state=replace(state, simplified=simplified).dump())
    return result


def parse_reply(reply: HttpReply) -> FeishuResult:
    """Parse a response: `code` counts, or `StatusCode` if an old bot returns only that; 0 is success."""
    if reply.error:
        return FeishuResult("retry", reply.error)
    result = _parse_code(reply)
    offset = measure_clock_offset(reply.headers)
    if result.code == SIGNATURE_REFUSED and offset is not None:
        response = f"{result.response}; this machine's clock is {offset:+.0f} s off Feishu's"
        return replace(result, response=response, clock_offset=offset)
    return replace(result, clock_offset=offset)


def _parse_code(reply: HttpReply) -> FeishuResult:
    parsed = reply.parse_json()
    code = parsed["code"] if "code" in parsed else parsed.get("StatusCode")
    retry_after = parse_seconds(reply.headers.get("x-ogw-ratelimit-reset"))
    if not isinstance(code, int) or isinstance(code, bool) or ("code" not in parsed and code != 0):
        return FeishuResult("retry", f"HTTP {reply.status} without a code", retry_after)
    # Malformed messages and too many requests have the same code, and differ only in the text.
    is_busy = code == _MALFORMED and _TOO_MANY.search(_message_of(parsed)) is not None
    explanation = "too many requests" if is_busy else EXPLANATIONS.get(code) or _message_of(parsed)
    response = f"{code}: {explanation}"
    if reply.status == 429 or reply.status >= 500:  # noqa: PLR2004 - too many requests, errors of the server
        return FeishuResult("retry", f"HTTP {reply.status}, {response}", retry_after, code=code)
    if code == 0 and reply.status < 300:  # noqa: PLR2004 - success
        return FeishuResult("sent", "0: success", code=0)
    if is_busy or code in _BUSY:
        return FeishuResult("retry", response, retry_after, pause_channel=code != _STILL_SENDING, code=code)
    is_known = code in _CARD_REFUSED or code in _REJECTED or code == SIGNATURE_REFUSED
    return FeishuResult("reject" if is_known else "unknown", response, code=code)


def _message_of(parsed: Mapping[str, Any]) -> str:
    return " ".join(str(parsed.get("msg") or "refused").split())[:200]


def measure_clock_offset(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds the local clock is ahead of the `Date` of a response."""
    date = parse_http_date(headers.get("date", ""))
    return None if date is None else time.time() - date


FEISHU = ChannelKind(FeishuOptions, FeishuSession, send)
