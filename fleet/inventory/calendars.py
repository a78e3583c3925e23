"""On-call calendars: who is on call at a given time, by a rotation with overrides. Pure.

Times are local times of `notify.timezone`. A shift lasts whole days of the calendar, so that it ends at the same time
of day when clocks change.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import PositiveDuration, format_duration, format_value
from fleet.inventory.yaml_files import TextWithBase

DAY = 86400
# Other centuries are mistakes, and their distance to the present could exceed what a time can be.
_LOCAL_TIME = re.compile(r"20\d\d-\d\d-\d\d([ T]\d\d:\d\d(:\d\d)?)?")


def _local_time(value: object) -> object:
    """Return a local time as text: YAML reads `2026-11-30` as a date, and with seconds as a time."""
    text = str(value) if isinstance(value, str | date) else ""
    with contextlib.suppress(ValueError):  # such as of a 30th of February
        if _LOCAL_TIME.fullmatch(text):
            datetime.fromisoformat(text)
            return text
    message = f"{format_value(text or value)} is not a date or local time; write 2026-11-30, or '2026-11-30 09:00'"
    raise ValueError(message)


def _whole_days(seconds: float) -> float:
    if seconds % DAY:
        raise ValueError(f"must be whole days, such as 7d, not {format_duration(seconds)}")
    return seconds


LocalTime = Annotated[
    str, BeforeValidator(_local_time), WithJsonSchema({"type": "string", "pattern": f"^{_LOCAL_TIME.pattern}$"})
]
WholeDays = Annotated[PositiveDuration, AfterValidator(_whole_days)]


@dataclass(frozen=True)
class Shift:
    """Who is on call, and until when in Unix time; None if nobody else ever follows."""

    person: str
    until: float | None


class Override(ConfigModel):
    """Replaces who is on call; `to` is the end, which is not included."""

    from_: LocalTime = Field(alias="from")
    to: LocalTime
    person: str


class Calendar(ConfigModel):
    """People who are on call in turn, each for `every`; the last override that includes a time decides.

    Dates without a time of day are at that of `starts`. Before `starts`, the rotation is continued backwards.
    """

    rotation: Annotated[list[str], Field(min_length=1)]
    starts: LocalTime
    every: WholeDays = 7.0 * DAY
    overrides: list[Override] = []

    @model_validator(mode="after")
    def _check_overrides(self) -> "Calendar":
        for index, each in enumerate(self.overrides):
            times = (self.starts, each.from_, each.to)
            if any(isinstance(text, TextWithBase) and text.pending for text in times):
                continue
            if self._parse(each.to) <= self._parse(each.from_):
                raise ValueError(f"overrides[{index}]: to ({each.to}) is not after from ({each.from_})")
        return self

    def find_shift(self, at: float, zone: ZoneInfo) -> Shift:
        """Return who is on call at a Unix time, and until when."""
        person = self.find_person(at, zone)
        changes = self._find_changes(at, zone)
        return Shift(person, next((end for end in changes if self.find_person(end, zone) != person), None))

    def find_person(self, at: float, zone: ZoneInfo) -> str:
        """Return the name of the person who is on call at a Unix time."""
        for each in reversed(self.overrides):
            if self._to_unix(each.from_, zone) <= at < self._to_unix(each.to, zone):
                return each.person
        return self.rotation[self._find_turn(at, zone) % len(self.rotation)]

    def _find_changes(self, at: float, zone: ZoneInfo) -> Iterator[float]:
        """Yield the times after `at` at which another person may follow, in order.

        After the last override, one round of the rotation has all people.
        """
        edges = sorted({self._to_unix(text, zone) for each in self.overrides for text in (each.from_, each.to)})
        for edge in (edge for edge in edges if edge > at):
            yield from self._find_handovers(at, edge, zone)
            yield edge
            at = edge
        yield from self._find_handovers(at, None, zone)

    def _find_handovers(self, after: float, before: float | None, zone: ZoneInfo) -> Iterator[float]:
        """Yield the handovers of the rotation's next round after a time, and before another one."""
        turn = self._find_turn(after, zone)
        for each in range(turn + 1, turn + 1 + len(self.rotation)):
            handover = self._begin_of(each, zone)
            if before is not None and handover >= before:
                return
            yield handover

    def _find_turn(self, at: float, zone: ZoneInfo) -> int:
        """Return the number of the turn at a Unix time; 0 begins at `starts`, and those before are negative."""
        local = datetime.fromtimestamp(at, zone).replace(tzinfo=None)
        turn = (local - self._begin) // timedelta(seconds=self.every)
        # Where clocks change, local times occur twice or not at all, and do not show which handover has passed.
        while at < self._begin_of(turn, zone):
            turn -= 1
        while at >= self._begin_of(turn + 1, zone):
            turn += 1
        return turn

    def _begin_of(self, turn: int, zone: ZoneInfo) -> float:
        return (self._begin + turn * timedelta(seconds=self.every)).replace(tzinfo=zone).timestamp()

    def _to_unix(self, text: str, zone: ZoneInfo) -> float:
        return self._parse(text).replace(tzinfo=zone).timestamp()

    def _parse(self, text: str) -> datetime:
        at = datetime.fromisoformat(text)
        return at if len(text) > len("2026-11-30") else datetime.combine(at, self._begin.time())

    @property
    def _begin(self) -> datetime:
        return datetime.fromisoformat(self.starts)
