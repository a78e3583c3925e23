"""The pre-rendered part of `/metrics`: lines are rendered when a result arrives, not at each scrape."""

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


class MetricsPage:
    """Rendered lines by metric family and by key (a service or a host), joined at a scrape."""

    def __init__(self, families: Iterable[MetricFamily]) -> None:
        self._families = {family.name: family for family in families}
        self._lines: dict[str, dict[str, str]] = {name: {} for name in self._families}
        self._names: dict[str, set[str]] = {}  # names of the families in which a key has lines

    def put(self, key: str, lines: Mapping[str, str]) -> None:
        """Replace all lines of `key` by `lines`, which maps family names to complete lines."""
        names = {name for name, text in lines.items() if text and name in self._lines}
        for name in self._names.get(key, names) - names:
            del self._lines[name][key]
        for name in names:
            self._lines[name][key] = lines[name]
        self._names[key] = names

    def get(self, key: str) -> dict[str, str]:
        """Return the lines of `key` by family name."""
        return {name: self._lines[name][key] for name in self._names.get(key, ())}

    def drop(self, key: str) -> None:
        """Remove all lines of `key`."""
        for name in self._names.pop(key, ()):
            del self._lines[name][key]

    def chunks(self, *, openmetrics: bool = False) -> Iterator[bytes]:
        """Yield the page in small chunks of complete lines; lines may change between two chunks."""
        for name, family in self._families.items():
            texts = list(self._lines[name].values())
            if texts:
                yield family.header(openmetrics=openmetrics).encode()
            for start in range(0, len(texts), CHUNK):
                yield "".join(texts[start : start + CHUNK]).encode("utf-8", "replace")


def format_labels(labels: Mapping[str, str]) -> str:
    """Return `a="1",b="2"`, escaped for the text format, without control characters."""
    return ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())


def _escape(value: str) -> str:
    return escape_value(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
