"""The `feishu` channel: a signed custom bot, and what its answers mean.

Reference: https://open.feishu.cn/document/client-docs/bot-v3/add-custom-bot
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import httpx
from pydantic import AfterValidator

from fleet.endpoints import Part, SecretUrl, Token

BODY_LIMIT = 20_000
TIMEOUT = httpx.Timeout(10.0, connect=5.0)
What = Literal["sent", "again", "sign again", "degrade", "dead"]

_WORDS = {
    9499: "malformed or too large",
    11232: "the bot is busy",
    11246: "a mention is wrong",
    19001: "the webhook's token is wrong",
    19002: "the parameters are wrong",
    19021: "the signature or the clock is wrong",
    19022: "this machine's address is not on the bot's list",
    19024: "the bot wants one of its keywords in the text",
    100290: "a mention is wrong",
}
_AGAIN = {11232, 99991400, 230020, 230049}
_DEGRADE = {9499, 11246, 100290, 230025, 230099}
_SIGN_AGAIN = 19021


def _mention(name: str) -> str:
    if name != "all" and not name.startswith("ou_"):
        raise ValueError("is neither all nor an open_id (ou_…)")
    return name


class FeishuOptions(Part):
    webhook: SecretUrl
    secret: Token | None = None
    mention: list[Annotated[str, AfterValidator(_mention)]] = []

    @property
    def bot(self) -> str:
        """A name for the bot that tells nothing of its token; limits hold per bot."""
        return hashlib.sha256(self.webhook.get_secret_value().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """What to do after a send, in our words and with Feishu's code; `after` is a wait in seconds it asked for."""

    what: What
    words: str
    after: float | None = None


def sign(secret: str, timestamp: int) -> str:
    """The signature: HMAC-SHA256 of nothing, keyed by the timestamp and the secret, base64."""
    key = f"{timestamp}\n{secret}".encode()
    return base64.b64encode(hmac.new(key, b"", hashlib.sha256).digest()).decode()


def body_of(message: Mapping[str, Any], options: FeishuOptions, now: float) -> bytes:
    """The request's body, signed where the bot has a secret."""
    signed = dict(message)
    if options.secret is not None:
        timestamp = int(now)
        signed |= {"timestamp": str(timestamp), "sign": sign(options.secret.get_secret_value(), timestamp)}
    return json.dumps(signed, ensure_ascii=False).encode()


async def send(client: httpx.AsyncClient, options: FeishuOptions, message: Mapping[str, Any], now: float) -> Answer:
    """Send one message; every outcome is an Answer."""
    try:
        response = await client.post(
            options.webhook.get_secret_value(),
            content=body_of(message, options, now),
            headers={"Content-Type": "application/json; charset=utf-8"},
            timeout=TIMEOUT,
        )
    except httpx.TimeoutException:
        return Answer("again", "no answer in time")
    except httpx.HTTPError as error:
        # The error's own text may hold the address, and so the token.
        return Answer("again", f"not reached: {type(error).__name__}")
    return read(response.status_code, response.headers, response.content)


def read(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    """What an answer means: only `code` counts, and only 0 is success."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        parsed = None
    code = parsed.get("code") if isinstance(parsed, dict) else None
    after = _seconds(headers.get("x-ogw-ratelimit-reset"))
    if status == 429 or status >= 500:  # noqa: PLR2004
        return Answer("again", f"HTTP {status}", after)
    if not isinstance(code, int) or isinstance(code, bool):
        return Answer("again", f"HTTP {status} without a code")
    words = f"{code}: {_WORDS.get(code, _said(parsed))}"
    if code == 0 and status < 300:  # noqa: PLR2004
        return Answer("sent", "0: success")
    if code in _AGAIN:
        return Answer("again", words, after)
    if code == _SIGN_AGAIN:
        return Answer("sign again", words)
    return Answer("degrade" if code in _DEGRADE else "dead", words)


def _said(parsed: Any) -> str:
    said = parsed.get("msg") if isinstance(parsed, dict) else None
    return " ".join(str(said or "refused").split())[:200]


def _seconds(text: str | None) -> float | None:
    try:
        return min(max(float(text), 0.0), 3600.0) if text else None
    except ValueError:
        return None
