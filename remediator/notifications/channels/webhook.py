"""The `webhook` channel: posts notifications as JSON. docs/configuration.md documents the schema.

A response of 2xx is success. 429, 5xx, timeouts and connection errors are retried, after `Retry-After` if the response
has it. Every other response is a rejection; redirects are not followed.
"""

import email.utils
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import httpx
from pydantic import AfterValidator, Field, SecretStr

from fleet.inventory.endpoints import SecretUrl
from fleet.inventory.notify import ChannelOptions
from remediator.notifications.channels import ChannelKind, ChannelMessage, SendResult
from remediator.notifications.channels.http import HttpReply, parse_seconds, send_request
from runtime.times import format_rfc3339

if TYPE_CHECKING:  # slow to import, and the exporter needs only the options
    from remediator.notifications.content import Notification

SCHEMA_VERSION = 1
BODY_LIMIT = 1024 * 1024  # bytes; notifications beyond it are counted in `omitted`
_SET_BY_CLIENT = {"content-type", "content-length", "host", "transfer-encoding", "connection"}


def _check_value(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text.isascii() or not text.isprintable():
        raise ValueError("must contain only printable ASCII characters")
    return value


def _check_name(name: str) -> str:
    if name.lower() in _SET_BY_CLIENT:
        raise ValueError("is set by Defib and cannot be configured")
    return name


HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"), AfterValidator(_check_name)]
HeaderValue = Annotated[SecretStr, AfterValidator(_check_value)]


class WebhookOptions(ChannelOptions):
    per_second: ClassVar[int] = 10
    per_minute: ClassVar[int] = 300
    url: SecretUrl
    headers: dict[HeaderName, HeaderValue] = Field(default_factory=dict)

    @property
    def address(self) -> str:
        return self.url.get_secret_value()

    @property
    def bot_id(self) -> str:
        return hashlib.sha256(self.address.encode()).hexdigest()[:16]

    @property
    def audience_id(self) -> str:
        # Headers may select the receiver.
        headers = sorted((name.lower(), value.get_secret_value()) for name, value in self.headers.items())
        return hashlib.sha256(json.dumps([self.address, headers]).encode()).hexdigest()[:16]


@dataclass
class WebhookSession:
    client: httpx.AsyncClient


async def send(session: WebhookSession, options: WebhookOptions, message: ChannelMessage, now: float) -> SendResult:
    headers = {name: value.get_secret_value() for name, value in options.headers.items()}
    headers["Content-Type"] = "application/json"
    reply = await send_request(session.client, "POST", options.address, format_body(message), headers)
    return parse_reply(reply, now)


def format_body(message: ChannelMessage) -> bytes:
    """Return the JSON body, at most BODY_LIMIT bytes unless a single notification is larger."""
    body: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "id": message.key,
        "form": message.form,
        "state": message.card.state,
        "severity": message.card.severity,
        "title": message.card.title,
        "text": [line.plain for line in message.card.lines],
        "notifications": [],
        "omitted": 0,
    }
    size = len(_encode(body))
    for number, notification in enumerate(message.notifications):
        item = format_notification(notification)
        size += len(_encode(item)) + 2
        if size > BODY_LIMIT and number:
            body["omitted"] = len(message.notifications) - number
            break
        body["notifications"].append(item)
    return _encode(body)


def format_notification(notification: "Notification") -> dict[str, Any]:
    """Return one notification as a JSON object."""
    service = notification.service
    acknowledged = notification.acknowledged
    verb, reason, detail = notification.decision
    return {
        "state": notification.state,
        "severity": notification.severity,
        "service": None if service is None else {"id": service.id, "name": service.title},
        "host": notification.host or None,
        "incident": notification.incident,
        "labels": dict(notification.labels),
        "annotations": dict(notification.annotations),
        "firing": list(notification.firing),
        "since": format_rfc3339(notification.since.timestamp()),
        "duration_seconds": notification.duration,
        "probe": notification.details.get("probe"),
        "decision": {"verb": verb, "reason": reason or None, "detail": detail or None} if verb else None,
        "acknowledged_by": None if acknowledged is None else acknowledged[0],
        "acknowledged_at": None if acknowledged is None else format_rfc3339(acknowledged[1].timestamp()),
        "recovered_by": notification.recovered_by or None,
        "links": dict(notification.links),
        **({"report": notification.details["report"]} if notification.state == "report" else {}),
    }


def _encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def parse_reply(reply: HttpReply, now: float | None = None) -> SendResult:
    """Return the result of a response; `now` is a Unix time."""
    if reply.error:
        return SendResult("retry", reply.error)
    if 200 <= reply.status < 300:  # noqa: PLR2004 - success
        return SendResult("sent", f"HTTP {reply.status}")
    if reply.status == 429 or reply.status >= 500:  # noqa: PLR2004 - too many requests, errors of the server
        return SendResult("retry", _describe(reply), _retry_after(reply.headers, now or time.time()))
    if 300 <= reply.status < 400:  # noqa: PLR2004 - redirects
        return SendResult("reject", f"HTTP {reply.status}: redirects are not followed")
    return SendResult("reject", _describe(reply))


def _describe(reply: HttpReply) -> str:
    text = " ".join(reply.body.decode(errors="replace").split())[:200]
    return f"HTTP {reply.status}: {text}" if text else f"HTTP {reply.status}"


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds to wait, from a number or a date (RFC 9110, 10.2.3)."""
    text = headers.get("retry-after")
    seconds = parse_seconds(text)
    if seconds is not None or not text:
        return seconds
    try:
        return parse_seconds(str(email.utils.parsedate_to_datetime(text).timestamp() - now))
    except (ValueError, TypeError, OverflowError):
        return None


WEBHOOK = ChannelKind(WebhookOptions, WebhookSession, send)
