"""`python -m grafana`: write the dashboards' JSON."""

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


def render(dashboard: Dashboard) -> str:
    """Return a dashboard's JSON, with its panels numbered in order."""
    written = json.loads(json.dumps(dashboard.build(), cls=JSONEncoder))
    number = 0
    for panel in written["panels"]:
        for each in (panel, *panel.get("panels", [])):
            number += 1
            each["id"] = number
    for annotation in written.get("annotations", {}).get("list", []):
        annotation |= {
            "titleFormat": annotation["name"],
            "textFormat": "{{service}} {{kind}} {{outcome}}",
        }  # missing in the SDK
    return json.dumps(written, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> None:
    for name, build in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(render(build()), encoding="utf-8")


if __name__ == "__main__":
    main()
