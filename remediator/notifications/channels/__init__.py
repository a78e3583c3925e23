"""Channel types. Each is one module: its options, its message format, and its protocol.

A channel type gets a `ChannelMessage` and returns a `SendResult`. What its server requires, such as escaping, size
limits, signatures and codes of responses, stays in its module.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from fleet.inventory.kinds import LazyTable
from fleet.inventory.notify import Channel, ChannelOptions
from remediator.notifications.cards import Card

if TYPE_CHECKING:  # slow to import, and the exporter needs only the options
    import httpx

    from remediator.notifications.content import Notification
    from remediator.notifications.outbox import MessageForm

OptionsT = TypeVar("OptionsT", bound=ChannelOptions)
SessionT = TypeVar("SessionT")
Outcome = Literal[
    "sent",
    "retry",  # after the sender's back-off, and not before `retry_after`
    "resend",  # at once, in another form that `retry_state` tells
    "reject",  # sending it again cannot succeed
    "unknown",  # an unknown response: retried a few times
]


@dataclass(frozen=True)
class ChannelMessage:
    """What a channel sends: a card, and the notifications that it was rendered from.

    It updates the message `update_id`, or is a reply to `reply_to`, or is new. `key` stays the same for every attempt
    that may send the same message again. `retry_state` is what the last attempt's result asked to be passed.
    """

    card: Card
    notifications: "Sequence[Notification]" = ()
    form: "MessageForm" = "one"
    key: str = ""
    update_id: str | None = None
    reply_to: str | None = None
    retry_state: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SendResult:
    """The outcome of an attempt, with the server's response in words.

    `retry_after` is in seconds. `pause_channel` says that a retry is due to the bot or its server, so that its other
    messages wait too. `clock_offset` is how many seconds the local clock is ahead of the server's, if that matters.
    """

    outcome: Outcome
    response: str
    retry_after: float | None = None
    retry_state: Mapping[str, Any] | None = None
    pause_channel: bool = True
    message_id: str | None = None
    clock_offset: float | None = None


@dataclass(frozen=True)
class ChannelKind(Generic[OptionsT, SessionT]):
    """A channel type. `send` sends a message at a Unix time; `open_session` creates what all its sends share."""

    options: type[OptionsT]
    open_session: "Callable[[httpx.AsyncClient], SessionT]"
    send: Callable[[SessionT, OptionsT, ChannelMessage, float], Awaitable[SendResult]]


CHANNELS: Mapping[str, ChannelKind[Any, Any]] = LazyTable(
    {
        "feishu": "remediator.notifications.channels.feishu:FEISHU",
        "feishu_app": "remediator.notifications.channels.feishu_app:FEISHU_APP",
        "webhook": "remediator.notifications.channels.webhook:WEBHOOK",
    }
)


class ChannelClient:
    """Sends messages to channels of all types."""

    def __init__(self, client: "httpx.AsyncClient") -> None:
        self.http_client = client
        self._sessions: dict[str, Any] = {}

    async def send(self, channel: Channel, message: ChannelMessage, now: float) -> SendResult:
        """Send a message at the Unix time `now`; every outcome is a result."""
        kind = CHANNELS[channel.kind]
        if channel.kind not in self._sessions:
            self._sessions[channel.kind] = kind.open_session(self.http_client)
        return await kind.send(self._sessions[channel.kind], channel.options, message, now)
