"""The kinds of channels."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.kinds import LazyTable

if TYPE_CHECKING:
    from remediator.notifications.channels.feishu import Answer, Letter, Session

Options = TypeVar("Options", bound=ConfigModel)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of channel, and how a letter is sent there at a Unix time.

    Its options say `bot`, what limits hold for; `place`, where it leads to; `mention`; `can_update_cards`, whether what
    was told can be changed; and `answers`, whether buttons can be pressed there.
    """

    options: type[Options]
    send: "Callable[[Session, Options, Letter, float], Awaitable[Answer]]"


CHANNELS: Mapping[str, Kind[Any]] = LazyTable(
    {
        "feishu": "remediator.notifications.channels.feishu:FEISHU",
        "feishu_app": "remediator.notifications.channels.feishu_app:FEISHU_APP",
    }
)
