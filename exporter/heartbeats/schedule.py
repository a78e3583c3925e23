"""When a heartbeat's next ping is due: an interval after the last one, or at the times of a cron expression."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from zoneinfo import ZoneInfo

from cronsim import CronSim

from exporter.probes.heartbeat import HeartbeatProbeOptions

# Seconds before its time at which a ping counts for it: the clock of a job may be fast.
EARLY = 5.0


@dataclass(frozen=True, slots=True)
class Interval:
    """Due a fixed time after the last ping. Times are of the steady clock."""

    every: float

    def next_due(self, after: float) -> float:
        return after + self.every


@dataclass(frozen=True)
class Cron:
    """Due at the times of a cron expression in a time zone.

    `to_unix` and `from_unix` convert times of the steady clock.
    """

    expression: str
    timezone: str
    to_unix: Callable[[float], float]
    from_unix: Callable[[float], float]

    def next_due(self, after: float) -> float:
        """Return the first time after a ping. In the hour that is skipped or repeated, as Debian's cron does."""
        return self.from_unix(_find_next(self.expression, self.timezone, int(self.to_unix(after) + EARLY)))


@lru_cache(maxsize=20_000)  # a list of heartbeats asks for the same ones again and again
def _find_next(expression: str, timezone: str, after: int) -> float:
    """Return the first Unix time of a cron expression after a Unix time."""
    return next(CronSim(expression, datetime.fromtimestamp(after, ZoneInfo(timezone)))).timestamp()


PingSchedule = Interval | Cron


def create_schedule(
    options: HeartbeatProbeOptions,
    timezone: str,
    to_unix: Callable[[float], float],
    from_unix: Callable[[float], float],
) -> PingSchedule:
    """Return the schedule of a heartbeat; `timezone` applies where its options have none."""
    if options.cron is None:
        return Interval(options.every or 0.0)
    return Cron(options.cron, options.timezone or timezone, to_unix, from_unix)
