"""The dashboards as Grafana reads them: every query of a panel, a variable or an annotation."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "grafana" / "dashboards"
WRITTEN = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


@dataclass(frozen=True)
class Query:
    """One query: where it stands, its text, and whether it asks for label values, or for one moment."""

    where: str
    text: str
    of_labels: bool = False
    instant: bool = False

    def filled(self, interval: str = "5m") -> str:
        """The query as Grafana sends it while everything is chosen."""
        text = self.text.replace("$__rate_interval", interval).replace("$__range", "1h")
        text = re.sub(r'="\$', '=~"$', text)  # where one alone is chosen
        return re.sub(r"\$\{?[a-z]\w*\}?", ".*", text)

    @property
    def asked(self) -> str:
        """What is to have an answer: of label values, the series that have such a label; no more than was known anyway."""
        if not self.of_labels:
            return self.filled("1m").replace(" or vector(0)", "")
        found = re.fullmatch(r"label_values\((\w+)(?:{(.+)})?, (\w+)\)", self.filled())
        assert found, self.text
        series, chosen, label = found.groups()
        return f'count by ({label}) ({series}{{{chosen + ", " if chosen else ""}{label}!=""}})'


def panels(dashboard: Any) -> Iterator[Any]:
    """Every panel that is no row, those in folded rows too."""
    for panel in dashboard["panels"]:
        yield from (each for each in (panel, *panel.get("panels", [])) if each["type"] != "row")


def queries() -> list[Query]:
    """Every query there is."""
    found = []
    for name, dashboard in WRITTEN.items():
        for panel in panels(dashboard):
            where = f"{name}: {panel['title']}"
            found += [Query(where, each["expr"], instant=each.get("instant", False)) for each in panel["targets"]]
        for mark in dashboard.get("annotations", {}).get("list", []):
            found.append(Query(f"{name}: {mark['name']}", mark["expr"]))
        for choice in dashboard.get("templating", {}).get("list", []):
            found.append(Query(f"{name}: ${choice['name']}", choice["query"]["query"], of_labels=True))
    return found
