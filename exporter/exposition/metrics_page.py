"""The pre-rendered part of `/metrics`: lines are rendered when a result arrives, not at each scrape."""

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from exporter.exposition.label_values import escape_value

CHUNK = 500  # keys (services or hosts) of one family


@dataclass(frozen=True)
class MetricFamily:
    """A metric family; the `name` of a counter ends in `_total`."""

    name: str
    type: Literal["gauge", "counter"]
    help: str

    def header(self, *, openmetrics: bool) -> str:
        name = self.name.removesuffix("_total") if openmetrics and self.type == "counter" else self.name
        return f"# HELP {name} {self.help}\n# TYPE {name} {self.type}\n"


_Lines = tuple[bytes, "array[int]"]  # of a key, and the offsets at which those of each family begin and end


class _Group:
    """Keys that have lines in the same families, as thousands of services have."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.lines: dict[str, _Lines] = {}


class MetricsPage:
    """Rendered lines by key (a service or a host), joined by metric family at a scrape.

    The lines of a key are one text: a string for each family would take twice the memory.
    """

    def __init__(self, families: Iterable[MetricFamily]) -> None:
        self._families = {family.name: family for family in families}
        self._groups: dict[tuple[str, ...], _Group] = {}
        self._group_of: dict[str, _Group] = {}

    def put(self, key: str, lines: Mapping[str, str]) -> None:
        """Replace all lines of `key` by `lines`, which maps family names to complete lines."""
        names = tuple([name for name, text in lines.items() if text and name in self._families])
        group = self._group_of.get(key)
        if group is None or group.names != names:
            self.drop(key)
            group = self._group_of[key] = self._groups.setdefault(names, _Group(names))
        texts = [lines[name].encode("utf-8", "replace") for name in names]
        group.lines[key] = b"".join(texts), array("L", itertools.accumulate(map(len, texts), initial=0))

    def get(self, key: str) -> dict[str, str]:
        """Return the lines of `key` by family name."""
        group = self._group_of.get(key)
        if group is None:
            return {}
        text, ends = group.lines[key]
        parts = zip(group.names, itertools.pairwise(ends), strict=True)
        return {name: text[start:end].decode() for name, (start, end) in parts}

    def drop(self, key: str) -> None:
        """Remove all lines of `key`."""
        group = self._group_of.pop(key, None)
        if group is not None:
            del group.lines[key]
            if not group.lines:
                del self._groups[group.names]

    def chunks(self, *, openmetrics: bool = False) -> Iterator[bytes]:
        """Yield the page in small chunks of complete lines; lines may change between two chunks."""
        for name, family in self._families.items():
            header = family.header(openmetrics=openmetrics).encode()
            for group in list(self._groups.values()):
                if name not in group.names:
                    continue
                number, lines = group.names.index(name), list(group.lines.values())
                for start in range(0, len(lines), CHUNK):
                    part = lines[start : start + CHUNK]
                    yield header + b"".join([text[ends[number] : ends[number + 1]] for text, ends in part])
                    header = b""


def format_labels(labels: Mapping[str, str]) -> str:
    """Return `a="1",b="2"`, escaped for the text format, without control characters."""
    return ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())


def _escape(value: str) -> str:
    return escape_value(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
