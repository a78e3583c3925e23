"""What the watcher knows of the pings: when they are missing, and which channels have been notified. Times are Unix."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

RESTART_GRACE = 90.0  # seconds after a start in which a ping may arrive before one that is overdue is missed


@dataclass(frozen=True)
class Watch:
    """The pings until now.

    `since` is when the watcher was started first, `missing_since` when the last missing ping was, and `returned_at`
    when the pings returned after it. `notified` has, by channel, the `missing_since` of which it was notified and not
    yet of the return.
    """

    since: float
    pinged_at: float | None = None
    missing_since: float | None = None
    returned_at: float | None = None
    notified: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_missing(self) -> bool:
        return self.missing_since is not None and self.returned_at is None

    @property
    def last(self) -> float:
        """When the last ping arrived, or the watcher was started first."""
        return self.since if self.pinged_at is None else self.pinged_at


def receive_ping(watch: Watch, now: float) -> Watch:
    """Return what is known after a ping."""
    returned_at = now if watch.is_missing else watch.returned_at
    return replace(watch, pinged_at=now, returned_at=returned_at)


def check_deadline(watch: Watch, now: float, within: float, started: float) -> Watch:
    """Return what is known at a time, `within` seconds after which a ping is missing.

    One that became overdue while the watcher did not run gets a little time after it `started`: it may only not have
    been received.
    """
    deadline = max(min(watch.last, now) + within, started + min(within, RESTART_GRACE))
    if watch.is_missing or now < deadline:
        return watch
    return replace(watch, missing_since=min(watch.last, now), returned_at=None)


def list_due(watch: Watch, channels: Iterable[str]) -> list[str]:
    """Return the channels that must be notified that pings are missing, or have returned."""
    return [name for name in channels if (name in watch.notified) != watch.is_missing]


def record_notified(watch: Watch, channel: str, *, missing: bool) -> Watch:
    """Return what is known after a channel was notified."""
    others = {name: at for name, at in watch.notified.items() if name != channel}
    if missing and watch.missing_since is not None:
        others[channel] = watch.missing_since
    return replace(watch, notified=others)
