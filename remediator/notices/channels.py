"""The kinds of channels."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fleet.endpoints import Part
from remediator.notices import feishu, feishu_app
from remediator.notices.feishu import Answer, Letter, Session

Options = TypeVar("Options", bound=Part)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of channel, and how a letter is sent there at a Unix time.

    Its options say `bot`, what limits hold for; `mention`; `keeps_cards`, whether what was told can be changed; and
    `answers`, whether buttons can be pressed there.
    """

    options: type[Options]
    send: Callable[[Session, Options, Letter, float], Awaitable[Answer]]


CHANNELS: Mapping[str, Kind[Any]] = {
    "feishu": Kind(feishu.FeishuOptions, feishu.send),
    "feishu_app": Kind(feishu_app.FeishuAppOptions, feishu_app.send),
}
