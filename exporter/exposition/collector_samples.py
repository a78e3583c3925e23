"""What a collector measured, as lines of the page."""

import sys
from collections.abc import Iterable

from exporter.exposition.metrics_page import labels

SERIES_LIMIT = 5000  # of one collector of one host
LABEL_LIMIT = 1000  # characters of a label's value
SIZE_LIMIT = 4 * 1024 * 1024  # characters of all lines of one run


def _series(metric: str, host: str, *more: tuple[str, str]) -> str:
    """A line up to its value."""
    return f"{metric}{{{labels({'host': host, **dict(more)})}}} "


class CollectorSamples:
    """Lines by metric, all of one host; what has no value has no line.

    A host may print anything. What would have Prometheus refuse the page of all hosts, or is more than any host has, is
    left out, and `fault` says so.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._room = SERIES_LIMIT
        self._size = 0
        self._lines: dict[str, list[str]] = {}
        self.fault: str | None = None

    def add(self, metric: str, value: float | None, **more: str) -> None:
        if value is None:
            return
        fault = self._fault_of(metric, value, more.values())
        if fault is not None:
            self.fault = fault
            return
        line = f"{_series(metric, self._host, *more.items())}{value}\n"
        if self._size + len(line) > SIZE_LIMIT:
            self.fault = f"all lines together are longer than {SIZE_LIMIT} characters"
            return
        self._room -= 1
        self._size += len(line)
        self._lines.setdefault(metric, []).append(line)

    @property
    def lines(self) -> dict[str, str]:
        """By metric; joined once, since each join copies all of them."""
        return {metric: "".join(lines) for metric, lines in self._lines.items()}

    def _fault_of(self, metric: str, value: float, texts: Iterable[str]) -> str | None:
        if not self._room:
            return f"there are more than {SERIES_LIMIT} series"
        # Prometheus reads a float; an integer of Python has no largest value.
        if not abs(value) <= sys.float_info.max:
            return f"{metric} is no number that can be kept"
        if any(len(text) > LABEL_LIMIT for text in texts):
            return f"a label of {metric} is longer than {LABEL_LIMIT} characters"
        return None
