"""The dashboards' JSON matches their Python, and uses only metrics that exist."""

import json
import re
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from exporter.collectors import gpu
from grafana.__main__ import CHINESE_FOLDER, DASHBOARDS, FOLDER, render
from grafana.fleet import DETAILS
from grafana.promql import at_end, highest, keep_last, select_job
from grafana.translation import CHINESE, translate
from tests.dashboard_queries import DASHBOARD_JSON, Query, panels, queries
from tests.metric_names import RULES, known_metrics, metrics_in, metrics_of_wrong_job

NAMES = sorted(DASHBOARDS)
WIDTH = 24
LINK = r"/d/defib-(\w+)\?var-(\w+)=\$\{__value\.raw\}&\$\{datasource:queryparam\}&\$\{__url_time_range\}"


@pytest.mark.parametrize("name", NAMES)
def test_the_json_is_current(name: str) -> None:
    """If this fails, run `python -m grafana`."""
    assert (FOLDER / f"{name}.json").read_text() == render(DASHBOARDS[name]())
    assert (CHINESE_FOLDER / f"{name}.json").read_text() == render(DASHBOARDS[name](), CHINESE)
    for folder in (FOLDER, CHINESE_FOLDER):
        assert {path.stem for path in folder.iterdir()} == set(NAMES)


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


def test_a_lost_scrape_is_bridged_for_every_series_but_alerts() -> None:
    expression = 'count by (host) (host_up{a="}"} offset 1h or host:up:max or rate(up[1m])) or ALERTS{host="up"}'
    assert keep_last(expression) == (
        'count by (host) (last_over_time(host_up{a="}"}[5m] offset 1h) or last_over_time(host:up:max[5m])'
        ' or rate(up[1m])) or ALERTS{host="up"}'
    )


def test_a_graph_shows_the_same_series_at_all_times() -> None:
    assert at_end("rate(node_x_total[1m] offset 1h)") == "rate(node_x_total[1m] @ end() offset 1h)"
    assert highest("gpu_power_watts", "host, gpu", 5) == (
        "(gpu_power_watts) and on (host, gpu) topk(5, max by (host, gpu) (last_over_time(gpu_power_watts[5m] @ end())))"
    )


# There are only so many values of these: they come from the code, or are named by the people who run Defib.
FEW = {
    "budget", "by", "code", "instance", "job", "kind", "le", "outcome", "phase", "priority", "reason", "result", "rule_group",
    "state", "status", "version",
}  # fmt: skip


def is_bounded(node: Any) -> bool:
    """Return whether an expression has few series, however many services, hosts, GPUs and alerts there are."""
    literals = (promql_parser.NumberLiteral, promql_parser.StringLiteral)
    match node:
        case promql_parser.AggregateExpr():
            return is_bounded(node.expr) or bounds(node)
        case promql_parser.BinaryExpr():
            sides = is_bounded(node.lhs), is_bounded(node.rhs)
            op = str(node.op)
            return all(sides) if op == "or" else sides[0] if op == "unless" else any(sides)
        case promql_parser.Call():
            vectors = [each for each in node.args if not isinstance(each, literals)]
            return bool(vectors) and all(is_bounded(each) for each in vectors)
    inner = getattr(node, "expr", None) or getattr(node, "vector_selector", None)
    return inner is not None and is_bounded(inner)


def bounds(node: promql_parser.AggregateExpr) -> bool:
    """Return whether an aggregation has few series, whatever it aggregates."""
    if node.modifier is None:
        return True
    limits = str(node.op) in ("topk", "bottomk")
    return not limits and "By" in str(node.modifier.type) and set(node.modifier.labels) <= FEW


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("service:up:max", False),
        ("topk(3, service:up:max)", True),
        ("topk by (host) (3, service:up:max)", False),
        ("count by (state) (service:up:max)", True),
        ("max by (host) (service:up:max)", False),
        ("1 + service:up:max", False),
        ("service:up:max and on (service) topk(3, service:up:max)", True),
        ("service:up:max unless topk(3, service:up:max)", False),
        ("service:up:max or topk(3, service:up:max)", False),
    ],
)
def test_what_is_bounded(expression: str, expected: bool) -> None:
    assert is_bounded(promql_parser.parse(expression)) == expected


PANEL_QUERIES = [each for each in queries() if not each.of_labels]


@pytest.mark.parametrize("query", PANEL_QUERIES, ids=lambda query: str(query.where))
def test_a_query_returns_few_series_however_large_the_fleet(query: Query) -> None:
    if re.search(r'\bup{|defib_build|defib_config|service="\$service"', query.text):
        return  # of the processes of Defib, or of one service
    assert is_bounded(promql_parser.parse(query.with_variables())), query.text


TABLES = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, dashboard in DASHBOARD_JSON.items()
    for panel in panels(dashboard)
    if panel["type"] == "table"
]


@pytest.mark.parametrize("panel", TABLES)
def test_a_table_can_be_joined_and_survives_a_lost_scrape(panel: Any) -> None:
    """All queries lose the name of their metric, which differs, and have the labels that are shown."""
    (organized,) = (each["options"] for each in panel["transformations"] if each["id"] == "organize")
    order = organized["indexByName"]
    labels = [name for name in sorted(order, key=order.__getitem__) if not name.startswith("Value")]
    for target in panel["targets"]:
        assert f"max by ({', '.join(labels)}) (" in target["expr"] or "max without (alertstate) (" in target["expr"]
        assert keep_last(target["expr"]) == target["expr"]
    assert panel["options"]["footer"]["enablePagination"] is True
    shown = set(organized["renameByName"].values())
    assert {each["matcher"]["options"] for each in panel["fieldConfig"]["overrides"]} <= shown
    assert {each["displayName"] for each in panel["options"]["sortBy"]} <= shown


@pytest.mark.parametrize("name", NAMES)
def test_shares_have_digits_that_matter(name: str) -> None:
    """An availability of 99.95 % is not shown as 100.0 %."""
    for panel in panels(DASHBOARD_JSON[name]):
        defaults = panel["fieldConfig"]["defaults"]
        if defaults["unit"] == "percentunit":
            assert defaults["decimals"] == 3 or "vailability" not in panel["title"], panel["title"]
            assert "decimals" in defaults, panel["title"]
        for override in panel["fieldConfig"]["overrides"]:
            properties = {each["id"]: each["value"] for each in override["properties"]}
            if properties.get("unit") == "percentunit":
                assert "decimals" in properties, (panel["title"], override)


def test_alerts_are_shown_with_all_their_labels() -> None:
    """Those of the rules' tests, of which every alert has some."""
    shown = {"alertname", "severity", "service", "host", "team", *DETAILS}
    implied = {"category", "group", "job"}  # by the service and the host
    tests = [yaml.safe_load(path.read_text()) for path in (RULES[0].parents[1] / "tests").glob("*.yml")]
    labels = {
        name
        for file in tests
        for test in file["tests"]
        for case in test.get("alert_rule_test", [])
        for alert in case.get("exp_alerts") or []
        for name in alert["exp_labels"]
    }
    assert labels - shown - implied == set(), "add these to DETAILS in grafana/fleet.py"


def test_all_that_is_collected_of_gpus_is_shown() -> None:
    shown = {name for query in queries() if query.where.startswith("gpus:") for name in metrics_in(query.expression)}
    # GPUMissing compares with the first; of the power, the average is shown.
    elsewhere = {"gpu_expected_count", "gpu_power_instant_watts"}
    assert {family.name for family in gpu.FAMILIES} - shown == elsewhere


def without_texts(part: Any) -> Any:
    """Return JSON without texts that a person reads."""
    if isinstance(part, dict):
        return {key: without_texts(value) for key, value in part.items()}
    if isinstance(part, list):
        return [without_texts(each) for each in part]
    return None if isinstance(part, str) and (part in CHINESE or part in CHINESE.values()) else part


@pytest.mark.parametrize("name", NAMES)
def test_the_chinese_dashboards_differ_in_texts_only(name: str) -> None:
    chinese = json.loads((CHINESE_FOLDER / f"{name}.json").read_text())
    assert without_texts(chinese) == without_texts(DASHBOARD_JSON[name])
    for panel in panels(chinese):
        # Only what has no Chinese name.
        assert re.search("[\u4e00-\u9fff]", panel["title"]) or panel["title"] in {"CPU", "GPU", "P-state"}


def test_every_text_is_translated_and_needed() -> None:
    used: set[str] = set()

    class Recorder(dict[str, str]):
        def __missing__(self, text: str) -> str:
            used.add(text)
            return text

    for dashboard in DASHBOARD_JSON.values():
        translate(dashboard, Recorder())
    assert used == set(CHINESE)
    keys = re.findall(r"^(?!#)(.+?): ", (FOLDER.parent / "zh.yaml").read_text(), re.MULTILINE)
    assert [key for key in set(keys) if keys.count(key) > 1] == []


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
    assert defined - used <= {"category", "group", "provider", "datasource"}


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


def links(part: Any) -> set[str]:
    if isinstance(part, dict):
        return {text for key, value in part.items() for text in ({value} if key == "url" else links(value))}
    return {text for item in part for text in links(item)} if isinstance(part, list) else set()


def test_links_lead_to_existing_dashboards_and_variables() -> None:
    urls = {url for dashboard in DASHBOARD_JSON.values() for url in links(dashboard) if url}
    assert urls
    for url in urls:
        match = re.fullmatch(LINK, url)
        assert match, url
        variables = DASHBOARD_JSON[match[1]]["templating"]["list"]
        assert match[2] in {variable["name"] for variable in variables}


def data_sources(part: Any) -> list[Any]:
    """Return every reference to a data source, wherever it is."""
    if isinstance(part, dict):
        found = [part["datasource"]] if "datasource" in part else []
        return found + [each for value in part.values() for each in data_sources(value)]
    return [each for item in part for each in data_sources(item)] if isinstance(part, list) else []


@pytest.mark.parametrize("name", NAMES)
def test_the_data_source_can_be_chosen(name: str) -> None:
    """Everything asks the chosen Prometheus; at first, the one that is provisioned."""
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(each == chosen for each in data_sources(DASHBOARD_JSON[name]))
    (variable,) = (each for each in DASHBOARD_JSON[name]["templating"]["list"] if each["type"] == "datasource")
    assert (variable["name"], variable["query"]) == ("datasource", "prometheus")
    assert variable["current"]["value"] == "prometheus"


def test_provisioning_has_the_data_source_and_the_dashboards() -> None:
    provisioning = FOLDER.parent / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "defib.yml").read_text())["datasources"]
    assert "prometheus" in {source["uid"] for source in sources}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "defib.yml").read_text())["providers"]
    assert provider["type"] == "file"
