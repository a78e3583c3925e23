"""The samples of one collector run, rendered as lines of `/metrics` within limits."""

import sys
from collections.abc import Iterable, Mapping

from exporter.exposition.metrics_page import format_labels

SERIES_LIMIT = 5000  # of one collector of one host
LABEL_LIMIT = 1000  # characters of a label's value
SIZE_LIMIT = 4 * 1024 * 1024  # characters of all lines of one run
AddedSample = tuple[str, float, Mapping[str, str]]  # metric, value, labels without that of the host


class CollectorSamples:
    """Lines by metric name, all of one host.

    A host may print anything. Samples that exceed a limit, or that would make Prometheus reject the page of all hosts,
    are left out: `truncated` is their number, and `fault` the last reason.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._series_left = SERIES_LIMIT
        self._size = 0
        self._lines: dict[str, list[str]] = {}
        self._formatted: dict[tuple[tuple[str, str], ...], str] = {}  # labels: all metrics of a card have the same
        self.added: list[AddedSample] = []
        self.fault: str | None = None
        self.truncated = 0

    def add(self, metric: str, value: float | None, **labels: str) -> None:
        """Add a sample, unless `value` is None."""
        if value is None:
            return
        fault = self._find_fault(metric, value, labels.values())
        if fault is not None:
            self.leave_out(1, fault)
            return
        key = tuple(labels.items())
        formatted = self._formatted.get(key)
        if formatted is None:
            formatted = self._formatted[key] = format_labels({"host": self._host, **labels})
        line = f"{metric}{{{formatted}}} {value}\n"
        if self._size + len(line) > SIZE_LIMIT:
            self.leave_out(1, f"the samples exceed {SIZE_LIMIT} characters")
            return
        self._series_left -= 1
        self._size += len(line)
        self._lines.setdefault(metric, []).append(line)
        self.added.append((metric, value, labels))

    def leave_out(self, number: int, fault: str) -> None:
        """Record that `number` samples, or lines that they are read from, are left out because of `fault`."""
        self.truncated += number
        self.fault = fault

    @property
    def lines(self) -> dict[str, str]:
        """The lines by metric name. Copies all of them at each access."""
        return {metric: "".join(lines) for metric, lines in self._lines.items()}

    def _find_fault(self, metric: str, value: float, label_values: Iterable[str]) -> str | None:
        if not self._series_left:
            return f"there are more than {SERIES_LIMIT} series"
        # Prometheus reads floats; Python's integers have no upper limit.
        if not abs(value) <= sys.float_info.max:
            return f"the value of {metric} is not a finite number"
        if max(map(len, label_values), default=0) > LABEL_LIMIT:
            return f"a label of {metric} is longer than {LABEL_LIMIT} characters"
        return None
