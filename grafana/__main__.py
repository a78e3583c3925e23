"""`python -m grafana`: writes the dashboards' JSON anew."""

import json
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana import fleet, gpus, hosts, monitoring, remediation, service

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = {
    "fleet": fleet.build,
    "service": service.build,
    "hosts": hosts.build,
    "gpus": gpus.build,
    "remediation": remediation.build,
    "monitoring": monitoring.build,
}


def rendered(dashboard: Dashboard) -> str:
    """A dashboard as Grafana reads it; its panels numbered in their order."""
    written = json.loads(json.dumps(dashboard.build(), cls=JSONEncoder))
    number = 0
    for panel in written["panels"]:
        for each in (panel, *panel.get("panels", [])):
            number += 1
            each["id"] = number
    for mark in written.get("annotations", {}).get("list", []):
        mark |= {"titleFormat": mark["name"], "textFormat": "{{service}} {{kind}} {{outcome}}"}  # the SDK has none
    return json.dumps(written, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> None:
    for name, make in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(rendered(make()), encoding="utf-8")


if __name__ == "__main__":
    main()
