"""Pressed buttons as HTTP callbacks: signed and encrypted requests of Feishu, one URL for each app channel.

Reference: https://open.feishu.cn/document/event-subscription-guide/callback-subscription/callback-overview
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fleet.inventory.model import Inventory
from remediator.chat.buttons import MAX_AGE, ButtonHandler
from remediator.chat.feishu_events import InvalidPressError, check_token, parse_press, render_toast
from remediator.notifications.channels.feishu_app import FeishuAppOptions
from remediator.record.database import Database
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.logs import LimitedLog
from runtime.payloads import load_json
from runtime.web import add_route

RESPOND_WITHIN = 2.0  # seconds; Feishu waits for three
BODY_LIMIT = 64 * 1024  # bytes
UNSIGNED_LIMIT = 2048  # bytes of the check of a new URL; Feishu's has about 300
BLOCK = 16  # bytes of an AES block
log = LimitedLog()


def add_routes(app: web.Application, database: Database, buttons: ButtonHandler) -> None:
    """Add the callback's route. The request's signature is its credential."""

    async def callback(request: web.Request) -> web.Response:
        name = request.match_info["channel"]
        options = _find_options(database.inventory, name)
        clock = database.clock
        try:
            event = decrypt_event(request.headers, await _read_body(request), options.key, clock.unix(clock.now()))
            if event.get("type") == "url_verification":
                return web.json_response({"challenge": _challenge(event, options.verification_token)})
            press = parse_press(event, options.app_id, options.verification_token)
        except InvalidPressError as error:
            log.warning("callback_refused", channel=name, error=str(error))
            # Always the same answer: the caller must not learn which channels exist, or which check failed.
            raise ApiError(
                401, "not_verified", "the callback was refused; the remediator's log has the reason"
            ) from None
        return web.json_response(render_toast(await buttons.handle(name, press, RESPOND_WITHIN)))

    add_route(app, "POST", "/webhook/feishu/{channel}", callback, AccessRequirement.UNCHECKED)


@dataclass(frozen=True)
class _CallbackOptions:
    app_id: str
    key: str = field(repr=False)
    verification_token: str | None = field(repr=False)


# For channels that do not exist: a key that nobody knows, so that a refusal takes as long as for one that exists.
_NO_CHANNEL = _CallbackOptions("", secrets.token_hex(), None)


def _find_options(inventory: Inventory, name: str) -> _CallbackOptions:
    channel = inventory.notify.channels.get(name)
    options = channel.options if channel is not None else None
    if not isinstance(options, FeishuAppOptions) or options.encrypt_key is None:
        return _NO_CHANNEL
    token = options.verification_token.get_secret_value() if options.verification_token else None
    return _CallbackOptions(options.app_id, options.encrypt_key.get_secret_value(), token)


async def _read_body(request: web.Request) -> bytes:
    """Return the body. Raises InvalidPressError if it is larger than BODY_LIMIT."""
    raw = b""
    async for chunk in request.content.iter_any():
        raw += chunk
        if len(raw) > BODY_LIMIT:
            raise InvalidPressError("the body is larger than 64 KiB")
    return raw


def decrypt_event(headers: Mapping[str, str], raw: bytes, key: str, now: float) -> dict[str, Any]:
    """Verify a callback, then decrypt it. Raises InvalidPressError.

    Feishu does not sign the check of a new URL, which is short. Only that is decrypted without a signature.
    """
    signed = "X-Lark-Signature" in headers
    if signed:
        verify(headers, raw, key, now)
    elif len(raw) > UNSIGNED_LIMIT:
        raise InvalidPressError("the callback is not signed")
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
        ciphertext = base64.b64decode(load_json(raw)["encrypt"], validate=True)
        cipher = Cipher(algorithms.AES(hashlib.sha256(key.encode()).digest()), modes.CBC(ciphertext[:BLOCK]))
        decryptor = cipher.decryptor()
        padded = decryptor.update(ciphertext[BLOCK:]) + decryptor.finalize()
        event = load_json(padded[: -padded[-1]])
    except (ValueError, KeyError, TypeError, IndexError, binascii.Error) as error:
        raise InvalidPressError("the body is not encrypted with the channel's encrypt_key") from error
    if not isinstance(event, dict):
        raise InvalidPressError("the decrypted body is not a JSON object")
    return event


def _challenge(event: Mapping[str, Any], expected_token: str | None) -> str:
    """Return the response to the check of a new URL. Raises InvalidPressError."""
    check_token(event.get("token"), expected_token)
    return str(event.get("challenge", ""))
