"""Reads the lines of `/metrics` that this process has rendered."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from exporter.exposition.label_values import unescape_value

_LABEL = re.compile(r'(\w+)="([^"\\]*(?:\\.[^"\\]*)*)"')
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of one metric, with its labels and their values as they were before they were escaped."""

    labels: Mapping[str, str]
    value: float


def parse_lines(lines: str) -> Iterator[Sample]:
    """Yield the samples of complete lines, the reverse of `format_labels`."""
    for line in lines.split("\n")[:-1]:
        labels = {name: _unescape(value) for name, value in _LABEL.findall(line)}
        yield Sample(labels, float(line.rpartition(" ")[2]))


def _unescape(value: str) -> str:
    if "\\" not in value:
        return value
    return unescape_value(_ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], value))
