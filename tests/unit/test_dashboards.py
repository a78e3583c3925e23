"""The dashboards' JSON matches their Python, and uses only metrics that exist."""

import json
import re
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from grafana.__main__ import DASHBOARDS, FOLDER, render
from grafana.panels import select_job
from tests.dashboard_queries import DASHBOARD_JSON, Query, panels, queries
from tests.metric_names import known_metrics, metrics_in, metrics_of_wrong_job

NAMES = sorted(DASHBOARDS)
WIDTH = 24


@pytest.mark.parametrize("name", NAMES)
def test_the_json_is_current(name: str) -> None:
    """If this fails, run `python -m grafana`."""
    assert (FOLDER / f"{name}.json").read_text() == render(DASHBOARDS[name]())
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_json_matches_grafana_s_schema(name: str) -> None:
    parsed = Dashboard.from_json(json.loads((FOLDER / f"{name}.json").read_text()))
    assert (parsed.uid, len(parsed.panels or [])) == (f"defib-{name}", len(DASHBOARD_JSON[name]["panels"]))


@pytest.mark.parametrize("query", queries(), ids=lambda query: str(query.where))
def test_a_query_uses_only_metrics_that_exist(query: Query) -> None:
    assert metrics_in(query.expression) - known_metrics() == set()


@pytest.mark.parametrize("query", queries(), ids=lambda query: str(query.where))
def test_a_query_selects_the_job_that_publishes_a_metric(query: Query) -> None:
    assert metrics_of_wrong_job(query.expression) == set()


def test_select_job_ignores_strings_and_recorded_series() -> None:
    expression = 'sum(service_up) / gpu_count{host="service_up"} > service:up:max and on (host) host_info{}'
    assert select_job(expression) == (
        'sum(service_up{job="defib-exporter"}) / gpu_count{job="defib-exporter", host="service_up"}'
        ' > service:up:max and on (host) host_info{job="defib-exporter", }'
    )


@pytest.mark.parametrize("name", NAMES)
def test_variables_in_queries_are_defined(name: str) -> None:
    dashboard = DASHBOARD_JSON[name]
    defined = {each["name"] for each in dashboard.get("templating", {}).get("list", [])}
    used = {
        found
        for query in queries()
        if query.where.startswith(f"{name}:")
        for found in re.findall(r"\$([a-z]\w*)", query.text)
    }
    assert used <= defined
    # These may only restrict the values of other variables.
    assert defined - used <= {"category", "group", "provider"}


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_a_title_and_a_unit_and_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD_JSON[name]["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= WIDTH, panel["title"]
        taken |= cells
    for panel in panels(DASHBOARD_JSON[name]):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}


def links(part: Any) -> set[str]:
    if isinstance(part, dict):
        return {text for key, value in part.items() for text in ({value} if key == "url" else links(value))}
    return {text for item in part for text in links(item)} if isinstance(part, list) else set()


def test_links_lead_to_existing_dashboards_and_variables() -> None:
    urls = {url for dashboard in DASHBOARD_JSON.values() for url in links(dashboard) if url}
    assert urls
    for url in urls:
        match = re.fullmatch(r"/d/defib-(\w+)\?var-(\w+)=\$\{__data\.fields\.(\w+)\}&\$\{__url_time_range\}", url)
        assert match, url
        variables = DASHBOARD_JSON[match[1]]["templating"]["list"]
        assert match[2] in {variable["name"] for variable in variables}


def test_provisioning_has_the_data_source_and_the_dashboards() -> None:
    provisioning = FOLDER.parent / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "defib.yml").read_text())["datasources"]
    assert "prometheus" in {source["uid"] for source in sources}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "defib.yml").read_text())["providers"]
    assert provider["type"] == "file"
