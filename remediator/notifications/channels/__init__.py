"""The kinds of channels."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fleet.inventory.endpoints import Part
from fleet.inventory.kinds import Table

if TYPE_CHECKING:
    from remediator.notifications.channels.feishu import Answer, Letter, Session

Options = TypeVar("Options", bound=Part)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of channel, and how a letter is sent there at a Unix time.

    Its options say `bot`, what limits hold for; `place`, where it leads to; `mention`; `keeps_cards`, whether what was
    told can be changed; and `answers`, whether buttons can be pressed there.
    """

    options: type[Options]
    send: "Callable[[Session, Options, Letter, float], Awaitable[Answer]]"


CHANNELS: Mapping[str, Kind[Any]] = Table(
    {
        "feishu": "remediator.notifications.channels.feishu:FEISHU",
        "feishu_app": "remediator.notifications.channels.feishu_app:FEISHU_APP",
    }
)
