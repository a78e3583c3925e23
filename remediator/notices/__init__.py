"""Telling people: the outbox, the sender, and the kinds of channels."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from fleet.endpoints import Part
from fleet.model import Inventory
from remediator.notices import cards, feishu
from remediator.notices.outbox import Notice

Options = TypeVar("Options", bound=Part)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of channel: how a notice becomes a message, and how that is sent, at a time, to what answer."""

    options: type[Options]
    message: Callable[[Notice, Inventory, Options], Mapping[str, Any]]
    send: Callable[[httpx.AsyncClient, Options, Mapping[str, Any], float], Awaitable[feishu.Answer]]


def _feishu_card(notice: Notice, inventory: Inventory, options: feishu.FeishuOptions) -> Mapping[str, Any]:
    return cards.message(notice, inventory, options.mention)


CHANNELS: Mapping[str, Kind[Any]] = {"feishu": Kind(feishu.FeishuOptions, _feishu_card, feishu.send)}
