"""The names of all metrics, and those that a PromQL expression uses."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client import CollectorRegistry

from exporter.exposition.service_series import FAMILIES
from exporter.heartbeats import series
from exporter.metrics import ExporterMetrics
from exporter.scheduler import collector_scheduler
from gateway.metrics import GatewayMetrics
from remediator.metrics import RemediatorMetrics

RULES = sorted((Path(__file__).parents[1] / "alerts" / "rules").glob("*.yml"))
# Published by Prometheus and Alertmanager; tests/e2e/test_fleet.py verifies that they exist. And by node_exporter.
EXTERNAL_METRICS = {
    "node_disk_io_time_seconds_total", "node_disk_read_bytes_total", "node_disk_written_bytes_total",
    "node_memory_SwapFree_bytes", "node_memory_SwapTotal_bytes", "node_network_receive_bytes_total",
    "node_network_receive_drop_total", "node_network_receive_errs_total", "node_network_transmit_bytes_total",
    "node_network_transmit_drop_total", "node_network_transmit_errs_total", "node_vmstat_pswpin", "node_vmstat_pswpout",
    "up", "ALERTS", "ALERTS_FOR_STATE", "scrape_duration_seconds", "scrape_samples_scraped",
    "alertmanager_alerts", "alertmanager_cluster_members", "alertmanager_config_hash",
    "alertmanager_config_last_reload_successful", "alertmanager_notifications_failed_total",
    "alertmanager_notifications_total", "prometheus_config_last_reload_successful",
    "prometheus_notifications_alertmanagers_discovered", "prometheus_notifications_dropped_total",
    "prometheus_rule_evaluation_failures_total", "prometheus_rule_group_interval_seconds",
    "prometheus_rule_group_iterations_missed_total", "prometheus_rule_group_last_duration_seconds",
    "prometheus_target_scrapes_sample_duplicate_timestamp_total", "prometheus_target_scrapes_sample_out_of_bounds_total",
    "prometheus_target_scrapes_sample_out_of_order_total", "prometheus_tsdb_checkpoint_creations_failed_total",
    "prometheus_tsdb_compactions_failed_total", "prometheus_tsdb_head_series",
    "prometheus_tsdb_head_truncations_failed_total", "prometheus_tsdb_reloads_failures_total",
    "prometheus_tsdb_wal_corruptions_total", "prometheus_tsdb_wal_truncations_failed_total",
    "prometheus_tsdb_wal_writes_failed_total",
}  # fmt: skip
EXPORTER, REMEDIATOR, PROMETHEUS, ALERTMANAGER = "defib-exporter", "defib-remediator", "prometheus", "alertmanager"
GATEWAY = "defib-gateway"
NODE = "node"
TRUSTED_JOBS = {EXPORTER, REMEDIATOR, GATEWAY, PROMETHEUS, ALERTMANAGER}


@cache
def rules(*paths: Path) -> list[dict[str, Any]]:
    """Return the rules of these files, or of all files."""
    files = [yaml.safe_load(path.read_text()) for path in paths or RULES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def own_metrics(registry: CollectorRegistry) -> set[str]:
    """Return the metric names in a registry, counters with `_total`."""
    counters = {family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()}
    return {name for name in counters if not name.endswith("_created")}


def published_metrics() -> set[str]:
    """Return the names of all metrics that the exporter and the remediator publish."""
    own = own_metrics(ExporterMetrics().registry) | own_metrics(RemediatorMetrics().registry)
    own |= own_metrics(GatewayMetrics().registry)
    return {family.name for family in (*FAMILIES, *collector_scheduler.FAMILIES, *series.FAMILIES)} | own


@cache
def jobs() -> dict[str, set[str]]:
    """The jobs that may publish each metric that is scraped; Prometheus itself adds `up` and the like to all of them."""
    exporter = {family.name for family in (*FAMILIES, *collector_scheduler.FAMILIES)} | own_metrics(
        ExporterMetrics().registry
    )
    found = {name: {EXPORTER} for name in exporter}
    for name in own_metrics(RemediatorMetrics().registry):
        found[name] = found.get(name, set()) | {REMEDIATOR}
    for name in own_metrics(GatewayMetrics().registry):
        found[name] = found.get(name, set()) | {GATEWAY}
    for name in EXTERNAL_METRICS - {"ALERTS", "ALERTS_FOR_STATE"}:
        found[name] = {PROMETHEUS, ALERTMANAGER, NODE} & {name.partition("_")[0]} or TRUSTED_JOBS
    return found


@cache
def known_metrics() -> set[str]:
    """Return all names that an expression may use: metrics, histogram parts, recorded series, external metrics."""
    registries = (ExporterMetrics().registry, RemediatorMetrics().registry, GatewayMetrics().registry)
    histograms = {family.name for registry in registries for family in registry.collect() if family.type == "histogram"}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    return published_metrics() | parts | {rule["record"] for rule in rules() if "record" in rule} | EXTERNAL_METRICS


def metrics_in(expression: str) -> set[str]:
    """Return the metrics that an expression uses. Raises ValueError if it is not PromQL."""
    return set(_metrics_in(promql_parser.parse(expression)))


def metrics_of_wrong_job(expression: str) -> set[str]:
    """Return the metrics that an expression selects from jobs that do not publish them."""
    publish = jobs()
    return {
        name
        for selector in _selectors(promql_parser.parse(expression))
        for name in _names(selector)
        for allowed in [publish.get(name, publish.get(re.sub("_(bucket|sum|count)$", "", name)))]
        if allowed is not None and not _jobs(selector) <= allowed
    }


def _jobs(selector: promql_parser.VectorSelector) -> set[str]:
    """Return the jobs that a selector matches, among the trusted ones and two others."""
    matched = {*TRUSTED_JOBS, NODE, "defib-other"}
    for matcher in selector.matchers.matchers:
        if matcher.name == "job" and matcher.op == promql_parser.MatchOp.Equal:
            matched &= {matcher.value}
        elif matcher.name == "job" and matcher.op == promql_parser.MatchOp.Re:
            matched = {job for job in matched if re.fullmatch(matcher.value, job)}
    return matched


def _metrics_in(node: Any) -> Iterator[str]:
    for selector in _selectors(node):
        yield from _names(selector)


def _names(selector: promql_parser.VectorSelector) -> Iterator[str]:
    if selector.name:
        yield selector.name
    for matcher in selector.matchers.matchers:
        if matcher.name == "__name__":
            yield from re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", matcher.value)


def _selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("lhs", "rhs", "expr", "param", "vector_selector", "args"):
        children = getattr(node, part, None)
        for each in children if isinstance(children, list) else [children]:
            if each is not None:
                yield from _selectors(each)
