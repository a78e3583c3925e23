"""The dashboards' JSON is what their Python makes, and names nothing that does not exist."""

import json
import re
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from grafana.__main__ import DASHBOARDS, FOLDER, render
from grafana.panels import select_job
from tests.dashboards import WRITTEN, Query, panels, queries
from tests.names import known, named, taken_from_others

NAMES = sorted(DASHBOARDS)
WIDTH = 24


@pytest.mark.parametrize("name", NAMES)
def test_the_json_is_current(name: str) -> None:
    """Else: `python -m grafana`."""
    assert (FOLDER / f"{name}.json").read_text() == render(DASHBOARDS[name]())
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_knows_all_that_is_in_it(name: str) -> None:
    again = Dashboard.from_json(json.loads((FOLDER / f"{name}.json").read_text()))
    assert (again.uid, len(again.panels or [])) == (f"defib-{name}", len(WRITTEN[name]["panels"]))


@pytest.mark.parametrize("query", queries(), ids=lambda query: str(query.where))
def test_a_query_names_only_metrics_that_exist(query: Query) -> None:
    assert named(query.asked) - known() == set()


@pytest.mark.parametrize("query", queries(), ids=lambda query: str(query.where))
def test_a_query_selects_the_job_that_publishes_a_metric(query: Query) -> None:
    assert taken_from_others(query.asked) == set()


def test_jobs_are_selected_outside_of_strings_and_of_recorded_names() -> None:
    asked = 'sum(service_up) / gpu_count{host="service_up"} > service:up:max and on (host) host_info{}'
    assert select_job(asked) == (
        'sum(service_up{job="defib-exporter"}) / gpu_count{job="defib-exporter", host="service_up"}'
        ' > service:up:max and on (host) host_info{job="defib-exporter", }'
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_chosen_is_defined(name: str) -> None:
    written = WRITTEN[name]
    defined = {each["name"] for each in written.get("templating", {}).get("list", [])}
    used = {
        found
        for query in queries()
        if query.where.startswith(f"{name}:")
        for found in re.findall(r"\$([a-z]\w*)", query.text)
    }
    assert used <= defined
    # `group` and `category` may choose what the next choice offers, and no more.
    assert defined - used <= {"category", "group", "provider"}


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_a_title_a_unit_and_a_place_of_their_own(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in WRITTEN[name]["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= WIDTH, panel["title"]
        taken |= cells
    for panel in panels(WRITTEN[name]):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}


def links(part: Any) -> set[str]:
    if isinstance(part, dict):
        return {text for key, value in part.items() for text in ({value} if key == "url" else links(value))}
    return {text for item in part for text in links(item)} if isinstance(part, list) else set()


def test_links_lead_to_dashboards_that_exist_and_to_choices_that_they_have() -> None:
    found = {url for dashboard in WRITTEN.values() for url in links(dashboard) if url}
    assert found
    for url in found:
        leads = re.fullmatch(r"/d/defib-(\w+)\?var-(\w+)=\$\{__data\.fields\.(\w+)\}&\$\{__url_time_range\}", url)
        assert leads, url
        choices = WRITTEN[leads[1]]["templating"]["list"]
        assert leads[2] in {choice["name"] for choice in choices}


def test_grafana_is_given_the_data_source_and_the_dashboards() -> None:
    provisioning = FOLDER.parent / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "defib.yml").read_text())["datasources"]
    assert "prometheus" in {source["uid"] for source in sources}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "defib.yml").read_text())["providers"]
    assert provider["type"] == "file"
