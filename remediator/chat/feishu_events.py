"""Pressed buttons in Feishu's protocol, which callbacks and long connections share.

Reference: https://open.feishu.cn/document/feishu-cards/card-callback-communication
"""

import hmac
import math
from collections.abc import Mapping
from typing import Any

from remediator.chat.buttons import ButtonPress, ToastText

MICROSECONDS, MILLISECONDS = 1e14, 1e11  # Unix times above these are in those units


class InvalidPressError(ValueError):
    """The event is not a press of one of Defib's buttons."""


def parse_press(event: Any, app_id: str, verification_token: str | None) -> ButtonPress:
    """Parse an event `card.action.trigger`. Raises InvalidPressError."""
    if not isinstance(event, dict):
        raise InvalidPressError("the event is not a JSON object")
    header, body = _get_map(event, "header"), _get_map(event, "event")
    if header.get("event_type") != "card.action.trigger":
        raise InvalidPressError("the event type is not card.action.trigger")
    if header.get("app_id") != app_id:
        raise InvalidPressError(f"the event is for another app than this channel's app_id ({app_id})")
    check_token(header.get("token"), verification_token)
    event_id, open_id = header.get("event_id"), _get_map(body, "operator").get("open_id")
    if not isinstance(event_id, str) or not event_id or not isinstance(open_id, str):
        raise InvalidPressError("the event has no event_id or no open_id")
    value = _get_map(_get_map(body, "action"), "value")
    return ButtonPress(event_id[:200], open_id[:200], _parse_time(header.get("create_time")), value)


def check_token(given: Any, expected: str | None) -> None:
    """Raise InvalidPressError unless an event has the channel's verification token, if one is configured."""
    if expected is None:
        return
    if not isinstance(given, str) or not hmac.compare_digest(_encode(given), _encode(expected)):
        raise InvalidPressError("the verification token is wrong")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _get_map(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    item = value.get(key)
    return item if isinstance(item, dict) else {}


def _parse_time(value: Any) -> float | None:
    """Return a Unix time in seconds, or None if there is none."""
    try:
        at = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(at):
        return None
    return at / 1e6 if at > MICROSECONDS else at / 1e3 if at > MILLISECONDS else at


def render_toast(toast: ToastText) -> dict[str, Any]:
    """Return the response to an event, which shows a toast."""
    return {"toast": {"type": toast.type, "content": toast.text}}
