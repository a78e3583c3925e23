"""When reports are sent, and to which channels. Pure.

Times are local times of `notify.timezone`. A report is due once on its day, also when clocks change: where the time
does not exist, an hour later; where it occurs twice, at the first one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import DAYS, TIME_OF_DAY, TimeOfDay, format_value

ReportName = Literal["daily", "weekly"]
DAYS_BETWEEN: dict[ReportName, int] = {"daily": 1, "weekly": 7}
_WEEKLY = re.compile(f"({'|'.join(DAYS)}) {TIME_OF_DAY}")


def _weekly_time(value: object) -> str:
    text = value.lower() if isinstance(value, str) else ""
    if _WEEKLY.fullmatch(text) is None:
        raise ValueError(f"{format_value(value)} is not a day and a time; write 'mon 09:00'")
    return text


WeeklyTime = Annotated[
    str,
    BeforeValidator(_weekly_time),
    WithJsonSchema({"type": "string", "pattern": f"^({'|'.join([*DAYS, *map(str.capitalize, DAYS)])}) {TIME_OF_DAY}$"}),
]


@dataclass(frozen=True)
class DueReport:
    """A report that is due at `end`, about the time since the one before it was due. Unix times.

    `time` is the configured one. `date` is the local one, by which a report is known.
    """

    name: ReportName
    time: str
    date: str
    start: float
    end: float


class Reports(ConfigModel):
    daily: TimeOfDay | None = None
    weekly: WeeklyTime | None = None
    channels: Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_times(self) -> "Reports":
        if self.daily is None and self.weekly is None:
            raise ValueError("needs a time: daily: '09:00', weekly: 'mon 09:00', or both")
        return self

    def find_due(self, at: float, zone: ZoneInfo) -> Iterator[DueReport]:
        """Yield the report of each configured kind that was due last at a Unix time."""
        if self.daily is not None:
            yield _last_due("daily", self.daily, at, zone)
        if self.weekly is not None:
            yield _last_due("weekly", self.weekly, at, zone)


def _last_due(name: ReportName, text: str, at: float, zone: ZoneInfo) -> DueReport:
    *day, clock = text.split()
    today = datetime.fromtimestamp(at, zone).date()
    since = (today.weekday() - DAYS.index(day[0])) % 7 if day else 0
    every = timedelta(days=DAYS_BETWEEN[name])
    first = today - timedelta(days=since)
    dates = [first - number * every for number in range(3)]
    times = [datetime.combine(date, time.fromisoformat(clock), zone).timestamp() for date in dates]
    last = 0 if times[0] <= at else 1
    return DueReport(name, text, dates[last].isoformat(), times[last + 1], times[last])
