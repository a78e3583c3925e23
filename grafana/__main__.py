"""`python -m grafana`: write the dashboards' JSON, in English and in Chinese."""

import json
from collections.abc import Mapping
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana import agents, fleet, gateway, gpus, hosts, monitoring, remediation, service
from grafana.translation import CHINESE, translate

# Both sets have the same UIDs, to which cards and bookmarks lead: a Grafana has one of them.
FOLDER = Path(__file__).parent / "dashboards"
CHINESE_FOLDER = FOLDER.with_name("dashboards-zh")
DASHBOARDS = {
    "fleet": fleet.build,
    "service": service.build,
    "hosts": hosts.build,
    "gpus": gpus.build,
    "agents": agents.build,
    "gateway": gateway.build,
    "remediation": remediation.build,
    "monitoring": monitoring.build,
}


def render(dashboard: Dashboard, texts: Mapping[str, str] | None = None) -> str:
    """Return a dashboard's JSON, with its panels numbered in order, in English or with other texts."""
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
    if texts is not None:
        written = translate(written, texts)
    return json.dumps(written, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> None:
    for name, build in DASHBOARDS.items():
        for folder, texts in ((FOLDER, None), (CHINESE_FOLDER, CHINESE)):
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.json").write_text(render(build(), texts), encoding="utf-8")


if __name__ == "__main__":
    main()
