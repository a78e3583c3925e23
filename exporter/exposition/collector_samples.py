"""The samples of one collector run, rendered as lines of `/metrics` within limits."""

import sys
from collections.abc import Mapping
from types import MappingProxyType

from exporter.exposition.metrics_page import format_labels

SERIES_LIMIT = 5000  # of one collector of one host
LABEL_LIMIT = 1000  # characters of a label's value
SIZE_LIMIT = 4 * 1024 * 1024  # characters of all lines of one run
AddedSample = tuple[str, float, Mapping[str, str]]  # metric, value, labels without that of the host
LabelTexts = Mapping[tuple[tuple[str, str], ...], str]  # labels, as `/metrics` has them


class CollectorSamples:
    """Lines by metric name, all of one host.

    A host may print anything. Samples that exceed a limit, or that would make Prometheus reject the page of all hosts,
    are left out: `truncated` is their number, and `fault` the last reason. `known_labels` are the `labels` of the
    host's last run: they are rarely others.
    """

    def __init__(self, host: str, known_labels: LabelTexts = MappingProxyType({})) -> None:
        self._host, self._known_labels = host, known_labels
        self._series_left = SERIES_LIMIT
        self._size = 0
        self._lines: dict[str, list[str]] = {}
        self.labels: dict[tuple[tuple[str, str], ...], str] = {}  # all metrics of a card have the same
        self.added: list[AddedSample] = []
        self.fault: str | None = None
        self.truncated = 0

    def add(self, metric: str, value: float | None, **labels: str) -> None:
        """Add a sample, unless `value` is None."""
        if value is None:
            return
        key = tuple(labels.items())
        text = self.labels.get(key) or self._known_labels.get(key)
        fault = self._find_fault(metric, value, labels if text is None else {})
        if fault is not None:
            self.leave_out(1, fault)
            return
        if text is None:
            text = format_labels({"host": self._host, **labels})
        self.labels[key] = text
        line = f"{metric}{{{text}}} {value}\n"
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

    def _find_fault(self, metric: str, value: float, new_labels: Mapping[str, str]) -> str | None:
        if not self._series_left:
            return f"there are more than {SERIES_LIMIT} series"
        # Prometheus reads floats; Python's integers have no upper limit.
        if not abs(value) <= sys.float_info.max:
            return f"the value of {metric} is not a finite number"
        if new_labels and max(map(len, new_labels.values())) > LABEL_LIMIT:
            return f"a label of {metric} is longer than {LABEL_LIMIT} characters"
        return None
