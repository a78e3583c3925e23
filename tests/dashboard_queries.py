"""All queries in the dashboards' JSON: of panels, variables and annotations."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "grafana" / "dashboards"
DASHBOARD_JSON = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


@dataclass(frozen=True)
class Query:
    """A query: the dashboard and panel, its text, and whether it returns label values or is instant."""

    where: str
    text: str
    of_labels: bool = False
    instant: bool = False

    def with_variables(self, interval: str = "5m") -> str:
        """Return the query as Grafana sends it with all variables set to "All"."""
        text = self.text.replace("$__rate_interval", interval).replace("$__range", "1h").replace("$rows", "100")
        text = re.sub(r'="\$', '=~"$', text)  # variables with a single value
        return re.sub(r"\$\{?[a-z]\w*\}?", ".*", text)

    @property
    def expression(self) -> str:
        """Return a PromQL expression that must have a result; for label values, the series with that label."""
        if not self.of_labels:
            return self.with_variables("1m").replace(" or vector(0)", "")
        match = re.fullmatch(r"label_values\((\w+)(?:{(.+)})?, (\w+)\)", self.with_variables())
        assert match, self.text
        series, selector, label = match.groups()
        return f'count by ({label}) ({series}{{{selector + ", " if selector else ""}{label}!=""}})'


def panels(dashboard: Any) -> Iterator[Any]:
    """Return all panels except rows, including those in collapsed rows."""
    for panel in dashboard["panels"]:
        yield from (each for each in (panel, *panel.get("panels", [])) if each["type"] != "row")


def queries() -> list[Query]:
    """Return all queries of all dashboards."""
    found = []
    for name, dashboard in DASHBOARD_JSON.items():
        for panel in panels(dashboard):
            where = f"{name}: {panel['title']}"
            found += [Query(where, each["expr"], instant=each.get("instant", False)) for each in panel["targets"]]
        for annotation in dashboard.get("annotations", {}).get("list", []):
            found.append(Query(f"{name}: {annotation['name']}", annotation["expr"]))
        for variable in dashboard["templating"]["list"]:
            if variable["type"] != "query":
                continue
            found.append(Query(f"{name}: ${variable['name']}", variable["query"]["query"], of_labels=True))
    return found
