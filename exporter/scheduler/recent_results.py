"""The last results of a service, packed: those of 10,000 services are half a million."""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import get_args

from exporter.results import FailureReason, ProbeResult
from fleet.inventory.reasons import UNDETERMINED

LIMIT = 50  # results of each service
SUCCESS, FAILURE, UNKNOWN = "+", "-", "?"
_PACKED = Struct("<dfB")  # when the probe started, its duration, and its outcome's index
_OUTCOMES: tuple[FailureReason | None, ...] = (None, *get_args(FailureReason))  # None is a success
_INDEXES = {reason: index for index, reason in enumerate(_OUTCOMES)}


def _mark(reason: FailureReason | None) -> str:
    if reason is None:
        return SUCCESS
    return UNKNOWN if reason in UNDETERMINED else FAILURE


_MARKS = "".join(map(_mark, _OUTCOMES)).encode().ljust(256)  # a table for bytes.translate()


@dataclass(frozen=True, slots=True)
class RecentResult:
    """One result; `reason` is None for a success. `started_at` is Unix time, `duration` seconds."""

    started_at: float
    duration: float
    reason: FailureReason | None


class RecentResults:
    """The last `LIMIT` results in 13 bytes each, oldest first."""

    __slots__ = ("_packed",)

    def __init__(self) -> None:
        self._packed = b""

    def add(self, result: ProbeResult) -> None:
        packed = _PACKED.pack(result.started_at, result.duration, _INDEXES[result.reason])
        self._packed = self._packed[-(LIMIT - 1) * _PACKED.size :] + packed

    @property
    def marks(self) -> str:
        """One character per result: a success, a failure, or a probe that could not be carried out."""
        return self._packed[_PACKED.size - 1 :: _PACKED.size].translate(_MARKS).decode()

    def __iter__(self) -> Iterator[RecentResult]:
        for started_at, duration, index in _PACKED.iter_unpack(self._packed):
            # The duration has the precision of 32 bits: its digits beyond are not those that were measured.
            yield RecentResult(started_at, round(duration, 6), _OUTCOMES[index])
