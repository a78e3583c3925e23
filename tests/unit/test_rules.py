"""The alert rules match the metrics, the documentation and their promtool tests."""

import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import promtool_gaps
from tests.metric_names import RULES, TRUSTED_JOBS, known_metrics, metrics_in, metrics_of_wrong_job, rules

ROOT = Path(__file__).parents[2]
ALERTS = [rule for rule in rules() if "alert" in rule]
NAMES = sorted({rule["alert"] for rule in ALERTS})
FILES = sorted((ROOT / "alerts" / "tests").glob("*.yml"))
OF_DAYS = ("availability_test", "service_gaps_test", "slowness_test")  # evaluated every 15 s for days
TESTED_TOGETHER = ("gpus", "hosts")  # in test_alert_gaps.py
TESTED_BY_CASES = [
    rule for rule in rules(*(path for path in RULES if path.stem not in TESTED_TOGETHER)) if "alert" in rule
]
FIRING = list(promtool_gaps.list_firing(FILES))
TESTS: list[dict[str, Any]] = [
    case
    for path in FILES
    for test in yaml.safe_load(path.read_text())["tests"]
    for case in (*test.get("promql_expr_test", []), *test.get("alert_rule_test", []))
]


def name_with_labels(rule: Mapping[str, Any]) -> str:
    return "-".join([rule["alert"], *rule.get("labels", {}).values()])


@pytest.mark.needs("promtool")
@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[pytest.mark.long] * (path.stem in OF_DAYS)) for path in FILES]
)
def test_the_rules_pass_their_promtool_tests(path: Path) -> None:
    run_promtool(path)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule.get("alert", rule.get("record"))))
def test_a_rule_uses_only_metrics_that_exist(rule: dict[str, Any]) -> None:
    assert metrics_in(rule["expr"]) - known_metrics() == set()


def test_unknown_metrics_are_detected() -> None:
    assert metrics_in('sum(rate(nope_total{a="b"}[5m])) > on () max_over_time(up[1h:1m])') - known_metrics() == {
        "nope_total"
    }
    assert metrics_in('{__name__=~"nope_a|up"}') - known_metrics() == {"nope_a"}
    with pytest.raises(ValueError, match="promql"):
        metrics_in("a +")


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule.get("alert", rule.get("record"))))
def test_a_rule_selects_the_job_that_publishes_a_metric(rule: dict[str, Any]) -> None:
    assert metrics_of_wrong_job(rule["expr"]) == set()


def test_metrics_of_another_job_are_detected() -> None:
    for expression in (
        "service_up", 'rate(service_up{job=~".+"}[5m])', 'service_up{job="node"}', 'service_up{job=~"defib-.*"}',
        'service_up{job="defib-exporter"} or on () (sum(max_over_time(service_up[1h:1m])))',
        '{__name__=~"service_up|service_info", job="defib-exporter"} or service_up{service="web"}',
    ):  # fmt: skip
        assert metrics_of_wrong_job(expression) == {"service_up"}, expression
    assert metrics_of_wrong_job("defib_remediator_action_duration_seconds_bucket + up") == {
        "defib_remediator_action_duration_seconds_bucket",
        "up",
    }
    assert metrics_of_wrong_job('service_up{job="defib-exporter"} * service:up:max * ALERTS') == set()
    assert metrics_of_wrong_job('defib_build_info{job=~"defib-(exporter|remediator)"}') == set()


def test_no_job_can_serve_recorded_series_and_the_node_job_serves_node_metrics_only() -> None:
    jobs = {
        job["job_name"]: job
        for job in yaml.safe_load((ROOT / "alerts" / "prometheus.yml").read_text())["scrape_configs"]
    }
    assert set(jobs) == {*TRUSTED_JOBS, "node"}
    recorded = {rule["record"] for rule in rules() if "record" in rule} | {"ALERTS", "ALERTS_FOR_STATE"}
    for job in jobs.values():
        (dropped,) = (each for each in job["metric_relabel_configs"] if each["action"] == "drop")
        assert dropped["source_labels"] == ["__name__"]
        assert all(re.fullmatch(dropped["regex"], name) for name in recorded)
        assert not any(re.fullmatch(dropped["regex"], name) for name in known_metrics() - recorded)
    node = jobs["node"]
    assert {"source_labels": ["__name__"], "regex": "node_.*", "action": "keep"} in node["metric_relabel_configs"]
    assert (node["honor_labels"], node["honor_timestamps"], node["follow_redirects"]) == (False, False, False)
    assert {"body_size_limit", "sample_limit", "label_limit", "label_value_length_limit"} <= set(node)
    assert {name for name, job in jobs.items() if job.get("honor_labels")} == {"defib-exporter", "defib-remediator"}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_an_alert_has_texts_in_both_languages_and_a_runbook(rule: dict[str, Any]) -> None:
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "summary_zh", "description_zh", "runbook_url"}
    assert all(re.search("[一-鿿]", annotations[name]) for name in ("summary_zh", "description_zh"))
    assert annotations["runbook_url"] == f"docs/alerts.md#{rule['alert'].lower()}"
    severity = rule.get("labels", {}).get("severity")
    assert severity in ("critical", "warning", "info") or (severity is None and rule["alert"] == "ServiceDown")


def count_cases(alert: str) -> tuple[int, int]:
    """Return how many test cases expect the alert to fire, and how many expect it not to."""
    fires = quiet = 0
    for case in TESTS:
        queried = case.get("alertname") or re.findall(r'alertname=~?"([^"]*)"', case["expr"])
        expected = case.get("exp_alerts", case.get("exp_samples"))
        if any(re.fullmatch(pattern, alert) for pattern in ([queried] if isinstance(queried, str) else queried)):
            fires += bool(expected) and (queried in (alert, [alert]) or f'alertname="{alert}"' in str(expected))
            quiet += not expected
    return fires, quiet


@pytest.mark.parametrize("alert", NAMES)
def test_every_alert_has_a_firing_and_a_quiet_test_case(alert: str) -> None:
    fires, quiet = count_cases(alert)
    assert fires
    assert quiet or alert == "Watchdog"  # always fires


def run_promtool(*paths: Path) -> None:
    done = subprocess.run(["promtool", "test", "rules", *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def find_firing(rule: Mapping[str, Any]) -> list[promtool_gaps.Firing]:
    of_rule = rule.get("labels", {}).items()
    return [each for each in FIRING if each.alert == rule["alert"] and of_rule <= each.labels.items()]


@pytest.mark.parametrize("rule", TESTED_BY_CASES, ids=name_with_labels)
def test_a_case_expects_a_rule_to_fire_with_its_labels(rule: Mapping[str, Any]) -> None:
    assert find_firing(rule)


@pytest.mark.long
@pytest.mark.needs("promtool")
@pytest.mark.parametrize(
    "changed",
    [
        promtool_gaps.with_lost_scrape,
        promtool_gaps.with_restart,
        promtool_gaps.with_two_exporters,
        promtool_gaps.with_rename,
    ],
)
@pytest.mark.parametrize("rule", TESTED_BY_CASES, ids=name_with_labels)
def test_an_alert_that_fires_crosses_a_gap(
    rule: dict[str, Any], changed: Callable[[promtool_gaps.Firing], dict[str, Any]], tmp_path: Path
) -> None:
    """Where a case expects it to fire, it still does after a lost scrape, or if all programs have restarted.

    It fires once if there are two exporters, and no longer if its service was renamed.
    """
    first = min(find_firing(rule), key=lambda each: each.at)
    if changed is promtool_gaps.with_rename and "service" not in first.labels:
        return  # it is about no service
    path = tmp_path / "gap.yml"
    path.write_text(yaml.safe_dump(changed(first), allow_unicode=True, width=10_000_000))
    run_promtool(path)


def test_rule_files_are_split_by_subject() -> None:
    assert [path.stem for path in RULES] == [
        "agents",
        "certificates",
        "gateway",
        "gpus",
        "hosts",
        "monitoring",
        "services",
    ]
