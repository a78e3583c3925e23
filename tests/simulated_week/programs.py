"""What the exporter, the remediator, the gateway, Prometheus and Alertmanager publish of themselves."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from tests.metric_names import ALERTMANAGER, GATEWAY, PROMETHEUS, REMEDIATOR
from tests.simulated_week.events import MINUTE, WEEK, Week
from tests.simulated_week.scrapes import EXPORTER_LABELS, Scrapes
from tests.simulated_week.store import Labels, as_labels

INSTANCES = {
    REMEDIATOR: "remediator:9095", GATEWAY: "gateway:9190", PROMETHEUS: "localhost:9090", ALERTMANAGER: "alertmanager:9093",
}  # fmt: skip
LAG_BUCKETS = ("0.001", "0.005", "0.01", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "+Inf")
PROBES_A_SECOND = 3.3
GROUPS = {"services": 15.0, "hosts": 15.0, "services-probing": 60.0, "services-hours": 3600.0}
EVALUATION_INTERVAL = 15.0
Value = float | Callable[[float], float]

PUBLISHED: Mapping[str, tuple[tuple[str, Value, Mapping[str, str]], ...]] = {
    REMEDIATOR: (
        ("defib_event_loop_lag_seconds", 0.02, {}),
        ("defib_config_last_reload_successful", 1.0, {}),
        ("defib_remediator_outbox_oldest_seconds", 0.0, {}),
        ("defib_remediator_notices_total", lambda at: 20 + at // 9000, {"channel": "oncall", "outcome": "sent"}),
        ("defib_remediator_notices_total", 0.0, {"channel": "oncall", "outcome": "dead"}),
        ("defib_remediator_feishu_connected", 1.0, {"channel": "oncall"}),
        ("defib_remediator_feishu_clock_offset_seconds", 0.3, {}),
        ("defib_remediator_queue_oldest_seconds", 0.0, {}),
        ("defib_remediator_automation_enabled", 1.0, {}),
        ("defib_remediator_automation_configured", 1.0, {}),
        ("defib_remediator_config_mismatch", 0.0, {}),
        ("defib_remediator_dead_man_pings_total", lambda at: at // 60, {"outcome": "sent"}),
        ("defib_remediator_dead_man_pings_total", 0.0, {"outcome": "failed"}),
    ),
    GATEWAY: (("defib_event_loop_lag_seconds", 0.02, {}), ("defib_config_last_reload_successful", 1.0, {})),
    PROMETHEUS: (
        ("prometheus_config_last_reload_successful", 1.0, {}),
        ("prometheus_notifications_alertmanagers_discovered", 1.0, {}),
        *((f"prometheus_{name}_total", 0.0, {}) for name in (
            "notifications_dropped", "tsdb_compactions_failed", "tsdb_head_truncations_failed", "tsdb_wal_writes_failed",
            "tsdb_wal_truncations_failed", "tsdb_wal_corruptions", "tsdb_checkpoint_creations_failed",
            "tsdb_reloads_failures", "target_scrapes_sample_duplicate_timestamp",
            "target_scrapes_sample_out_of_order", "target_scrapes_sample_out_of_bounds",
        )),
        *(("prometheus_rule_evaluation_failures_total", 0.0, {"rule_group": name}) for name in GROUPS),
        *(("prometheus_rule_group_interval_seconds", every, {"rule_group": name}) for name, every in GROUPS.items()),
    ),
    ALERTMANAGER: (
        ("alertmanager_config_last_reload_successful", 1.0, {}),
        ("alertmanager_cluster_members", 1.0, {}),
        ("alertmanager_config_hash", 1.5e14, {}),
        ("alertmanager_notifications_total", lambda at: at // 60, {"integration": "webhook"}),
        ("alertmanager_notifications_failed_total", 0.0, {"integration": "webhook"}),
    ),
}  # fmt: skip


def list_series(week: Week, scrapes: Scrapes) -> Iterator[tuple[Labels, list[float | None]]]:
    """Yield the series of all five jobs, and `up` of each."""
    yield as_labels("up", EXPORTER_LABELS), _list_up(scrapes)
    for name, value, labels in _list_of_exporter():
        yield as_labels(name, {**labels, **EXPORTER_LABELS}), _of_exporter(value, scrapes)
    for job, instance in INSTANCES.items():
        own = {"job": job, "instance": instance}
        for name, value, labels in (("up", 1.0, {}), *PUBLISHED[job]):
            yield as_labels(name, {**labels, **own}), _evaluate(value, scrapes)
    own = {"job": PROMETHEUS, "instance": INSTANCES[PROMETHEUS]}
    for group, every in GROUPS.items():
        missed = partial(_count_missed, week, every)
        yield (
            as_labels("prometheus_rule_group_iterations_missed_total", {"rule_group": group, **own}),
            _evaluate(missed, scrapes),
        )


def _list_up(scrapes: Scrapes) -> list[float | None]:
    return [
        float(scraped) if running else None
        for scraped, running in zip(scrapes.is_exporter_scraped, scrapes.is_running, strict=True)
    ]


def _list_of_exporter() -> Iterator[tuple[str, Value, Mapping[str, str]]]:
    """Yield what the exporter publishes, of the seconds since it was started."""
    yield "defib_event_loop_lag_seconds", 0.01, {}
    yield "defib_config_last_reload_successful", 1.0, {}
    yield "defib_exporter_probes_skipped_total", 0.0, {}
    for bound in LAG_BUCKETS:
        share = {"0.001": 0.6, "0.005": 0.98}.get(bound, 1.0)
        yield "defib_exporter_schedule_lag_seconds_bucket", partial(_count_probes, share), {"le": bound}


def _count_probes(share: float, since: float) -> float:
    return float(int(PROBES_A_SECOND * since * share))


def _of_exporter(value: Value, scrapes: Scrapes) -> list[float | None]:
    values: list[float | None] = [None] * scrapes.count
    for begin, end in scrapes.exporter_runs:
        for minute in scrapes.minutes_between(begin, end):
            values[minute] = value(minute * MINUTE - begin) if callable(value) else value
    return values


def _evaluate(value: Value, scrapes: Scrapes) -> list[float | None]:
    return [
        None if not running else value(minute * MINUTE) if callable(value) else value
        for minute, running in enumerate(scrapes.is_running)
    ]


def _count_missed(week: Week, every: float, at: float) -> float:
    """Return how many evaluations of a group the pause of Prometheus has missed."""
    pause = week.pause
    return float(int((pause.end - pause.begin) / every)) if pause.end <= at < WEEK else 0.0
