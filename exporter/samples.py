"""What a collector measured, as lines of the page."""

import sys
from collections.abc import Iterable
from functools import lru_cache

from exporter.page import labels

SERIES_LIMIT = 5000  # of one collector of one host
LABEL_LIMIT = 1000  # characters of a label's value


@lru_cache(maxsize=100_000)
def _series(metric: str, host: str, *more: tuple[str, str]) -> str:
    """A line up to its value, which is the same at every run."""
    return f"{metric}{{{labels({'host': host, **dict(more)})}}} "


class Samples:
    """Lines by metric, all of one host; what has no value has no line.

    A host may print anything. What would have Prometheus refuse the page of all hosts, or is more than any host has, is
    left out, and `fault` says so.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._room = SERIES_LIMIT
        self.lines: dict[str, str] = {}
        self.fault: str | None = None

    def add(self, metric: str, value: float | None, **more: str) -> None:
        if value is None:
            return
        fault = self._fault_of(metric, value, more.values())
        if fault is not None:
            self.fault = fault
            return
        self._room -= 1
        series = _series(metric, self._host, *more.items())
        self.lines[metric] = f"{self.lines.get(metric, '')}{series}{value}\n"

    def _fault_of(self, metric: str, value: float, texts: Iterable[str]) -> str | None:
        if not self._room:
            return f"there are more than {SERIES_LIMIT} series"
        # Prometheus reads a float; an integer of Python has no largest value.
        if not abs(value) <= sys.float_info.max:
            return f"{metric} is no number that can be kept"
        if any(len(text) > LABEL_LIMIT for text in texts):
            return f"a label of {metric} is longer than {LABEL_LIMIT} characters"
        return None
