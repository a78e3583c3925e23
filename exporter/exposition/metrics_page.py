"""The pre-rendered part of `/metrics`: most lines are rendered when a result arrives, not at each scrape."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import structlog

from exporter.exposition.label_values import escape_value

CHUNK = 500  # keys (services or hosts) of one family
RENDERED_TOGETHER = 50  # keys that are rendered in one turn of the event loop


@dataclass(frozen=True)
class MetricFamily:
    """A metric family; the `name` of a counter ends in `_total`."""

    name: str
    type: Literal["gauge", "counter"]
    help: str

    def header(self, *, openmetrics: bool) -> str:
        name = self.name.removesuffix("_total") if openmetrics and self.type == "counter" else self.name
        return f"# HELP {name} {self.help}\n# TYPE {name} {self.type}\n"


log = structlog.get_logger()
_BETWEEN = "\0"  # the lines of two families; label values have no control characters


class _Group:
    """Keys that have lines in the same families, as thousands of services have."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.lines: dict[str, bytes] = {}


class MetricsPage:
    """Rendered lines by key (a service or a host), joined by metric family at a scrape.

    The lines of a key are one text: a string for each family would take twice the memory.
    """

    def __init__(self, families: Iterable[MetricFamily]) -> None:
        self._families = {family.name: family for family in families}
        self._groups: dict[tuple[str, ...], _Group] = {}
        self._group_of: dict[str, _Group] = {}
        self._stale: dict[str, Callable[[], Mapping[str, str]]] = {}

    def put(self, key: str, lines: Mapping[str, str]) -> None:
        """Replace all lines of `key` by `lines`, which maps family names to complete lines."""
        self._stale.pop(key, None)
        names = tuple([name for name, text in lines.items() if text and name in self._families])
        group = self._group_of.get(key)
        if group is None or group.names != names:
            self.drop(key)
            group = self._group_of[key] = self._groups.setdefault(names, _Group(names))
        group.lines[key] = _BETWEEN.join([lines[name] for name in names]).encode("utf-8", "replace")

    def put_later(self, key: str, render: Callable[[], Mapping[str, str]]) -> None:
        """Replace all lines of `key`, which has some, by what `render` returns when they are needed."""
        self._stale[key] = render

    def get(self, key: str) -> dict[str, str]:
        """Return the lines of `key` by family name."""
        if key in self._stale:
            self.put(key, self._stale[key]())
        group = self._group_of.get(key)
        if group is None or not group.names:
            return {}
        return dict(zip(group.names, group.lines[key].decode().split(_BETWEEN), strict=True))

    def drop(self, key: str) -> None:
        """Remove all lines of `key`."""
        self._stale.pop(key, None)
        group = self._group_of.pop(key, None)
        if group is not None:
            del group.lines[key]
            if not group.lines:
                del self._groups[group.names]

    def chunks(self, *, openmetrics: bool = False) -> Iterator[bytes]:
        """Yield the page in small chunks of complete lines, also empty ones; no key is missing, or there twice."""
        yield from self._put_stale()
        # At one moment, since a key that moves to another group would otherwise be missing, or there twice.
        groups = [(group.names, list(group.lines.values())) for group in self._groups.values() if group.names]
        parts: dict[str, list[bytes]] = {name: [] for name in self._families}
        while groups:
            names, lines = groups.pop(0)
            for start in range(0, len(lines), CHUNK):
                texts = [text.split(_BETWEEN.encode()) for text in lines[start : start + CHUNK]]
                for name, of_family in zip(names, zip(*texts, strict=True), strict=True):
                    parts[name].append(b"".join(of_family))
                yield b""
        for name, family in self._families.items():
            header = family.header(openmetrics=openmetrics).encode()
            for part in parts.pop(name):
                yield header + part
                header = b""

    def _put_stale(self) -> Iterator[bytes]:
        for number, key in enumerate(list(self._stale), 1):
            if (render := self._stale.pop(key, None)) is not None:
                try:
                    self.put(key, render())
                except Exception:  # the lines of all others are needed
                    log.exception("metrics_not_rendered", key=key)
            if number % RENDERED_TOGETHER == 0:
                yield b""


def format_labels(labels: Mapping[str, str]) -> str:
    """Return `a="1",b="2"`, escaped for the text format, without control characters."""
    return ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())


def _escape(value: str) -> str:
    return escape_value(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
