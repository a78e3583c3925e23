"""Pressed buttons as HTTP callbacks: signed and encrypted requests of Feishu, one URL for each app channel.

Reference: https://open.feishu.cn/document/event-subscription-guide/callback-subscription/callback-overview
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from remediator.chat.buttons import MAX_AGE, ButtonHandler
from remediator.chat.feishu_events import InvalidPressError, parse_press, render_toast
from remediator.notifications.channels.feishu_app import FeishuAppOptions
from remediator.record.database import Database
from runtime.logs import LimitedLog
from runtime.web import AccessRequirement, ApiError, add_route

RESPOND_WITHIN = 2.0  # seconds; Feishu waits for three
BODY_LIMIT = 64 * 1024  # bytes
BLOCK = 16  # bytes of an AES block
log = LimitedLog()


def add_routes(app: web.Application, database: Database, buttons: ButtonHandler) -> None:
    """Add the callback's route. The request's signature is its credential."""

    async def callback(request: web.Request) -> web.Response:
        name = request.match_info["channel"]
        channel = database.inventory.notify.channels.get(name)
        options = channel.options if channel is not None else None
        if not isinstance(options, FeishuAppOptions) or options.encrypt_key is None:
            raise ApiError(404, "no_callback", f"there is no channel {name!r} with an encrypt_key")
        raw = await _read_body(request)
        clock = database.clock
        expected_token = options.verification_token.get_secret_value() if options.verification_token else None
        try:
            event = decrypt_event(request.headers, raw, options.encrypt_key.get_secret_value(), clock.unix(clock.now()))
            if event.get("type") == "url_verification":
                return web.json_response({"challenge": _challenge(event, expected_token)})
            press = parse_press(event, options.app_id, expected_token)
        except InvalidPressError as error:
            log.warning("callback_refused", channel=name, error=str(error))
            raise ApiError(401, "not_verified", str(error)) from error
        return web.json_response(render_toast(await buttons.handle(name, press, RESPOND_WITHIN)))

    add_route(app, "POST", "/webhook/feishu/{channel}", callback, AccessRequirement.PUBLIC)


async def _read_body(request: web.Request) -> bytes:
    """Return the body. Raises ApiError if it is larger than BODY_LIMIT."""
    raw = b""
    async for chunk in request.content.iter_any():
        raw += chunk
        if len(raw) > BODY_LIMIT:
            raise ApiError(413, "too_large", "the body is larger than 64 KiB")
    return raw


def decrypt_event(headers: Mapping[str, str], raw: bytes, key: str, now: float) -> dict[str, Any]:
    """Verify and decrypt a callback; only the check of a new URL may be unsigned. Raises InvalidPressError."""
    signed = "X-Lark-Signature" in headers
    if signed:
        verify(headers, raw, key, now)
    event = decrypt(raw, key)
    if not signed and event.get("type") != "url_verification":
        raise InvalidPressError("the callback is not signed")
    return event


def verify(headers: Mapping[str, str], raw: bytes, key: str, now: float) -> None:
    """Raise InvalidPressError unless the request was signed with the key recently; `now` is a Unix time."""
    timestamp, nonce = headers.get("X-Lark-Request-Timestamp", ""), headers.get("X-Lark-Request-Nonce", "")
    given = headers.get("X-Lark-Signature", "").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(given, signature(timestamp, nonce, key, raw).encode()):
        raise InvalidPressError("the signature is wrong")
    if not timestamp.isascii() or not timestamp.isdigit() or abs(now - int(timestamp[:15])) > MAX_AGE:
        raise InvalidPressError("the signature is too old, or this machine's clock is wrong")


def signature(timestamp: str, nonce: str, key: str, raw: bytes) -> str:
    """Compute Feishu's signature of a callback, in hexadecimal."""
    return hashlib.sha256((timestamp + nonce + key).encode("utf-8", "surrogateescape") + raw).hexdigest()


def decrypt(raw: bytes, key: str) -> dict[str, Any]:
    """Decrypt the event in a callback's body. Raises InvalidPressError.

    AES-256-CBC; its key is the SHA-256 of the channel's, and the first block is the IV.
    """
    try:
        ciphertext = base64.b64decode(json.loads(raw)["encrypt"], validate=True)
        cipher = Cipher(algorithms.AES(hashlib.sha256(key.encode()).digest()), modes.CBC(ciphertext[:BLOCK]))
        decryptor = cipher.decryptor()
        padded = decryptor.update(ciphertext[BLOCK:]) + decryptor.finalize()
        event = json.loads(padded[: -padded[-1]])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, binascii.Error) as error:
        raise InvalidPressError("the body is not encrypted with the channel's encrypt_key") from error
    if not isinstance(event, dict):
        raise InvalidPressError("the decrypted body is not a JSON object")
    return event


def _challenge(event: Mapping[str, Any], expected_token: str | None) -> str:
    """Return the response to the check of a new URL. Raises InvalidPressError."""
    if expected_token is not None and event.get("token") != expected_token:
        raise InvalidPressError("the verification token is wrong")
    return str(event.get("challenge", ""))
