"""The *Monitoring* dashboard: the pipeline itself, from the exporter's schedule to Alertmanager's deliveries."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import GREEN, ORANGE, RED, UP_DOWN_MAPPINGS, graph, range_query, stat_panel
from grafana.tables import Value, table_panel

INTERVAL = "[$__rate_interval]"
PROCESSES = 'job=~"defib-exporter|defib-remediator|defib-gateway|prometheus|alertmanager"'


def build() -> Dashboard:
    board = panels.dashboard("monitoring", "Monitoring", "Health of the monitoring itself", rows=False)
    board = _targets(board)
    board = _exporter(board.with_row(Row("Exporter")))
    board = _remediator(board.with_row(Row("Remediator")))
    return _prometheus(board.with_row(Row("Prometheus and Alertmanager")))


def _targets(board: Dashboard) -> Dashboard:
    process = {"job": "Job", "instance": "Instance"}
    loaded = panels.value_mappings({"1": ("loaded", GREEN), "0": ("failed", RED)})
    configuration = (
        "defib_config_last_reload_successful or prometheus_config_last_reload_successful"
        " or alertmanager_config_last_reload_successful"
    )
    return panels.add_panels(
        board,
        table_panel(
            "Processes",
            process,
            {
                "State": Value(f"up{{{PROCESSES}}}", mappings=UP_DOWN_MAPPINGS),
                "Scrape": Value(f"scrape_duration_seconds{{{PROCESSES}}}", "s"),
                "Samples": Value(f"scrape_samples_scraped{{{PROCESSES}}}"),
            },
            bounded=True,
            width=10,
            sort=("State", "Job"),
        ),
        table_panel("Configuration", process, {"State": Value(configuration, mappings=loaded)}, bounded=True, width=8),
        table_panel(
            "Versions", {"job": "Job", "version": "Version"}, {"": Value("defib_build_info")}, bounded=True, width=6
        ),
    )


def _exporter(board: Dashboard) -> Dashboard:
    lag = f"sum by (le) (rate(defib_exporter_schedule_lag_seconds_bucket{INTERVAL}))"
    board = panels.add_panels(
        board,
        graph(
            "Probes per second",
            "none",
            range_query(f"sum by (result) (rate(service_probes_total{INTERVAL}))", "{{result}}"),
            stacked=True,
            width=8,
        ),
        graph(
            "Schedule lag of probes",
            "s",
            range_query(f"histogram_quantile(0.5, {lag})", "50th percentile"),
            range_query(f"histogram_quantile(0.99, {lag})", "99th percentile", "B"),
            width=8,
            steps=((None, GREEN), (1, RED)),
        ),
        graph(
            "Probes in flight and skipped",
            "none",
            range_query("sum(defib_exporter_probes_in_flight)", "in flight"),
            range_query(f"sum(increase(defib_exporter_probes_skipped_total{INTERVAL}))", "skipped", "B"),
            width=8,
        ),
    )
    return panels.add_panels(
        board,
        graph(
            "SSH connections",
            "none",
            range_query("sum by (state) (defib_exporter_ssh_connections)", "{{state}}"),
            width=12,
            height=6,
        ),
        graph(
            "Age of the oldest probe, in intervals",
            "none",
            range_query(
                "max((time() - service_last_probe_timestamp_seconds) / service_probe_interval_seconds)", "intervals"
            ),
            width=12,
            height=6,
            description="Above 1, a probe is late. ServiceProbeStale fires above 2 intervals plus 5 minutes.",
        ),
    )


def _remediator(board: Dashboard) -> Dashboard:
    return panels.add_panels(
        board,
        graph(
            "Alerts received",
            "none",
            range_query(f"sum by (status) (increase(defib_remediator_alerts_received_total{INTERVAL}))", "{{status}}"),
            width=8,
        ),
        graph(
            "Deliveries rejected",
            "none",
            range_query(f"sum by (code) (increase(defib_remediator_webhook_refusals_total{INTERVAL}))", "{{code}}"),
            width=8,
        ),
        stat_panel(
            "Time since the last Watchdog",
            "s",
            "time() - max(defib_remediator_watchdog_last_timestamp_seconds)",
            [(None, GREEN), (180, ORANGE), (300, RED)],
            height=8,
        ),
        stat_panel(
            "Clock offset from Feishu",
            "s",
            "max(defib_remediator_feishu_clock_offset_seconds)",
            [(None, RED), (-300, GREEN), (300, RED)],
            height=8,
        ),
    )


def _prometheus(board: Dashboard) -> Dashboard:
    sent = f"sum(increase(alertmanager_notifications_total{INTERVAL}))"
    failed = f"sum(increase(alertmanager_notifications_failed_total{INTERVAL}))"
    return panels.add_panels(
        board,
        graph(
            "Series in Prometheus",
            "short",
            range_query("max by (instance) (prometheus_tsdb_head_series)", "{{instance}}"),
            width=8,
        ),
        graph(
            "Rule evaluation time by group",
            "s",
            range_query("max by (rule_group) (prometheus_rule_group_last_duration_seconds)", "{{rule_group}}"),
            width=8,
        ),
        graph(
            "Failed rule evaluations and dropped alerts",
            "none",
            range_query(f"sum(increase(prometheus_rule_evaluation_failures_total{INTERVAL}))", "rules"),
            range_query(f"sum(increase(prometheus_notifications_dropped_total{INTERVAL}))", "alerts", "B"),
            width=8,
        ),
        graph(
            "Alerts in Alertmanager", "none", range_query("max by (state) (alertmanager_alerts)", "{{state}}"), width=12
        ),
        graph(
            "Deliveries by Alertmanager",
            "none",
            range_query(sent, "sent"),
            range_query(failed, "failed", "B"),
            width=12,
        ),
    )
