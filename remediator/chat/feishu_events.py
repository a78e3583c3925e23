"""Pressed buttons in Feishu's protocol, which callbacks and long connections share.

Reference: https://open.feishu.cn/document/feishu-cards/card-callback-communication
"""

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
    if verification_token is not None and header.get("token") != verification_token:
        raise InvalidPressError("the verification token is wrong")
    event_id, open_id = header.get("event_id"), _get_map(body, "operator").get("open_id")
    if not isinstance(event_id, str) or not event_id or not isinstance(open_id, str):
        raise InvalidPressError("the event has no event_id or no open_id")
    value = _get_map(_get_map(body, "action"), "value")
    return ButtonPress(event_id[:200], open_id[:200], _parse_time(header.get("create_time")), value)


def _get_map(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    item = value.get(key)
    return item if isinstance(item, dict) else {}


def _parse_time(text: Any) -> float | None:
    try:
        at = float(text)
    except (TypeError, ValueError):
        return None
    return at / 1e6 if at > MICROSECONDS else at / 1e3 if at > MILLISECONDS else at


def render_toast(toast: ToastText) -> dict[str, Any]:
    """Return the response to an event, which shows a toast."""
    return {"toast": {"type": toast.type, "content": toast.text}}
