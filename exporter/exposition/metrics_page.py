"""The pre-rendered part of `/metrics`: lines change when a result does, not at each scrape."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

CHUNK = 500  # services, or hosts, of one family


@dataclass(frozen=True)
class MetricFamily:
    """A metric family; `name` is as it stands on the page, a counter's with `_total`."""

    name: str
    type: Literal["gauge", "counter"]
    help: str

    def header(self, *, openmetrics: bool) -> str:
        name = self.name.removesuffix("_total") if openmetrics and self.type == "counter" else self.name
        return f"# HELP {name} {self.help}\n# TYPE {name} {self.type}\n"


class MetricsPage:
    """Lines by family and by key (a service's or a host's), joined at a scrape."""

    def __init__(self, families: Iterable[MetricFamily]) -> None:
        self._families = {family.name: family for family in families}
        self._lines: dict[str, dict[str, str]] = {name: {} for name in self._families}
        self._names: dict[str, set[str]] = {}  # the families that a key has lines of

    def put(self, key: str, lines: Mapping[str, str]) -> None:
        """Replace all lines of `key` by `lines`, whole lines by family name."""
        there = {name for name, text in lines.items() if text and name in self._lines}
        for name in self._names.get(key, there) - there:
            del self._lines[name][key]
        for name in there:
            self._lines[name][key] = lines[name]
        self._names[key] = there

    def drop(self, key: str) -> None:
        for name in self._names.pop(key, ()):
            del self._lines[name][key]

    def chunks(self, *, openmetrics: bool = False) -> Iterator[bytes]:
        """The page in pieces, none of which takes long; it may change between two of them, whole lines at a time."""
        for name, family in self._families.items():
            texts = list(self._lines[name].values())
            if texts:
                yield family.header(openmetrics=openmetrics).encode()
            for start in range(0, len(texts), CHUNK):
                yield "".join(texts[start : start + CHUNK]).encode("utf-8", "replace")


def labels(pairs: Mapping[str, str]) -> str:
    """`a="1",b="2"`, escaped as the text format wants it."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
