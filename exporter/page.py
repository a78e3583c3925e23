"""The pre-rendered part of `/metrics`: lines change when a result does, not at each scrape."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """A metric family; `name` is as it stands on the page, a counter's with `_total`."""

    name: str
    type: Literal["gauge", "counter"]
    help: str

    def header(self, *, openmetrics: bool) -> str:
        name = self.name.removesuffix("_total") if openmetrics and self.type == "counter" else self.name
        return f"# HELP {name} {self.help}\n# TYPE {name} {self.type}\n"


class Page:
    """Lines by family and by key (a service's or a host's), joined at a scrape."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = {family.name: family for family in families}
        self._lines: dict[str, dict[str, str]] = {name: {} for name in self._families}

    def put(self, key: str, lines: Mapping[str, str]) -> None:
        """Replace all lines of `key` by `lines`, whole lines by family name."""
        for name, of_family in self._lines.items():
            text = lines.get(name)
            if text:
                of_family[key] = text
            else:
                of_family.pop(key, None)

    def drop(self, key: str) -> None:
        for of_family in self._lines.values():
            of_family.pop(key, None)

    def render(self, *, openmetrics: bool = False) -> str:
        return "".join(
            family.header(openmetrics=openmetrics) + "".join(self._lines[name].values())
            for name, family in self._families.items()
            if self._lines[name]
        )


def labels(pairs: Mapping[str, str]) -> str:
    """`a="1",b="2"`, escaped as the text format wants it."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
