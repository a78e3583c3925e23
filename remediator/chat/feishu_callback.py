"""Presses over HTTP: signed, fresh, encrypted requests of Feishu's, one address for each channel of an app's bot.

Reference: https://open.feishu.cn/document/event-subscription-guide/callback-subscription/callback-overview
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

import structlog
from aiohttp import web
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from remediator.chat.buttons import FRESH_FOR, NotAPress, Presses, read
from remediator.engine.engine import Engine
from remediator.notifications.channels.feishu_app import FeishuAppOptions
from remediator.record.database import Database
from runtime.web import ApiError, Requirement, add_route

BODY_LIMIT = 64 * 1024
BLOCK = 16
log = structlog.get_logger()


def add_routes(app: web.Application, engine: Engine, database: Database, presses: Presses) -> None:
    """What opens this address is Feishu's signature, so nobody logs in."""

    async def callback(request: web.Request) -> web.Response:
        name = request.match_info["channel"]
        channel = engine.inventory.notify.channels.get(name)
        options = channel.options if channel is not None else None
        if not isinstance(options, FeishuAppOptions) or options.encrypt_key is None:
            raise ApiError(404, "no_callback", "there is no such channel, or it has no encrypt_key")
        raw = await _body(request)
        clock = database.clock
        wanted = options.verification_token.get_secret_value() if options.verification_token else None
        try:
            event = opened(request.headers, raw, options.encrypt_key.get_secret_value(), clock.unix(clock.now()))
            if event.get("type") == "url_verification":
                return web.json_response({"challenge": _challenge(event, wanted)})
            press = read(event, options.app_id, wanted)
        except NotAPress as error:
            log.warning("a callback was refused", channel=name, why=str(error))
            raise ApiError(401, "not_verified", str(error)) from error
        return web.json_response(await presses.take(name, press))

    add_route(app, "POST", "/webhook/feishu/{channel}", callback, Requirement.PUBLIC)


async def _body(request: web.Request) -> bytes:
    """The body of a request. Raises Problem."""
    raw = b""
    async for chunk in request.content.iter_any():
        raw += chunk
        if len(raw) > BODY_LIMIT:
            raise ApiError(413, "too_large", "no press is that long")
    return raw


def opened(headers: Mapping[str, str], raw: bytes, key: str, now: float) -> dict[str, Any]:
    """The event of a callback; only the check of a new address may come unsigned. Raises NotAPress."""
    signed = "X-Lark-Signature" in headers
    if signed:
        verify(headers, raw, key, now)
    event = decrypted(raw, key)
    if not signed and event.get("type") != "url_verification":
        raise NotAPress("it is not signed")
    return event


def verify(headers: Mapping[str, str], raw: bytes, key: str, now: float) -> None:
    """Raise NotAPress unless a request was signed with the key, lately; `now` is Unix time."""
    timestamp, nonce = headers.get("X-Lark-Request-Timestamp", ""), headers.get("X-Lark-Request-Nonce", "")
    given = headers.get("X-Lark-Signature", "").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(given, signature(timestamp, nonce, key, raw).encode()):
        raise NotAPress("its signature is another")
    if not timestamp.isascii() or not timestamp.isdigit() or abs(now - int(timestamp[:15])) > FRESH_FOR:
        raise NotAPress("it was signed too long ago, or this machine's clock is wrong")


def signature(timestamp: str, nonce: str, key: str, raw: bytes) -> str:
    """Feishu's signature of a callback, in hexadecimal."""
    return hashlib.sha256((timestamp + nonce + key).encode("utf-8", "surrogateescape") + raw).hexdigest()


def decrypted(raw: bytes, key: str) -> dict[str, Any]:
    """The event in a callback's body. Raises NotAPress.

    It is AES-256-CBC: the key is the SHA-256 of ours, the first block the IV.
    """
    try:
        sealed = base64.b64decode(json.loads(raw)["encrypt"], validate=True)
        cipher = Cipher(algorithms.AES(hashlib.sha256(key.encode()).digest()), modes.CBC(sealed[:BLOCK]))
        unsealing = cipher.decryptor()
        padded = unsealing.update(sealed[BLOCK:]) + unsealing.finalize()
        event = json.loads(padded[: -padded[-1]])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, binascii.Error) as error:
        raise NotAPress("it is not encrypted with the channel's encrypt_key") from error
    if not isinstance(event, dict):
        raise NotAPress("it holds no event")
    return event


def _challenge(event: Mapping[str, Any], wanted: str | None) -> str:
    """What the check of a new address is answered with. Raises NotAPress."""
    if wanted is not None and event.get("token") != wanted:
        raise NotAPress("its verification token is another")
    return str(event.get("challenge", ""))
