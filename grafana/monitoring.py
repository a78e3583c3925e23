"""*Monitoring*: the pipeline itself, from the exporter's schedule to Alertmanager's deliveries."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import parts
from grafana.parts import GREEN, ORANGE, RED, UP_DOWN_WORDS, lines, number, query, rows

EVERY = "[$__rate_interval]"
PROGRAMS = 'job=~"defib-exporter|defib-remediator|prometheus|alertmanager"'


def build() -> Dashboard:
    made = parts.dashboard("monitoring", "Monitoring", "Whether the monitoring itself is well")
    made = _targets(made)
    made = _exporter(made.with_row(Row("Exporter")))
    made = _remediator(made.with_row(Row("Remediator")))
    return _others(made.with_row(Row("Prometheus and Alertmanager")))


def _targets(made: Dashboard) -> Dashboard:
    values = {
        "State": f"up{{{PROGRAMS}}}",
        "Scrape": f"scrape_duration_seconds{{{PROGRAMS}}}",
        "Samples": f"scrape_samples_scraped{{{PROGRAMS}}}",
    }
    loaded = parts.words({"1": ("taken", GREEN), "0": ("refused", RED)})
    configuration = (
        "defib_config_last_reload_successful or prometheus_config_last_reload_successful"
        " or alertmanager_config_last_reload_successful"
    )
    return parts.add(
        made,
        rows("Programs", values, {"job": "Job", "instance": "Instance"}, width=10, sort="State", units={"Scrape": "s"},
             meaning={"State": UP_DOWN_WORDS}),
        rows("Configuration", {"State": configuration}, {"job": "Job", "instance": "Instance"}, width=8,
             meaning={"State": loaded}),
        rows("Versions", {"": "defib_build_info"}, {"job": "Job", "version": "Version"}, width=6)
    )  # fmt: skip


def _exporter(made: Dashboard) -> Dashboard:
    lag = f"sum by (le) (rate(defib_exporter_schedule_lag_seconds_bucket{EVERY}))"
    made = parts.add(
        made,
        lines("Probes per second", "none",
              query(f"sum by (result) (rate(service_probes_total{EVERY}))", "{{result}}"), stacked=True, width=8),
        lines("Probes begin late by", "s", query(f"histogram_quantile(0.5, {lag})", "half"),
              query(f"histogram_quantile(0.99, {lag})", "99 in 100", "B"), width=8, steps=((None, GREEN), (1, RED))),
        lines("Under way, and left out", "none", query("sum(defib_exporter_probes_in_flight)", "under way"),
              query(f"sum(increase(defib_exporter_probes_skipped_total{EVERY}))", "left out", "B"), width=8)
    )  # fmt: skip
    return parts.add(
        made,
        lines("SSH connections", "none",
              query("sum by (state) (defib_exporter_ssh_connections)", "{{state}}"), width=12, height=6),
        lines("Oldest probe, against its interval", "none",
              query("max((time() - service_last_probe_timestamp_seconds) / service_probe_interval_seconds)", "intervals"),
              width=12, height=6, about="Above 1 some probe is late; ServiceProbeStale fires above 2 and five minutes.")
    )  # fmt: skip


def _remediator(made: Dashboard) -> Dashboard:
    return parts.add(
        made,
        lines("Alerts received", "none",
              query(f"sum by (status) (increase(defib_remediator_alerts_received_total{EVERY}))", "{{status}}"), width=8),
        lines("Deliveries refused", "none",
              query(f"sum by (code) (increase(defib_remediator_webhook_refusals_total{EVERY}))", "{{code}}"), width=8),
        number("Watchdog, ago", "s", "time() - max(defib_remediator_watchdog_last_timestamp_seconds)",
               [(None, GREEN), (180, ORANGE), (300, RED)], height=8),
        number("Clock, against Feishu's", "s", "max(defib_remediator_feishu_clock_offset_seconds)",
               [(None, RED), (-300, GREEN), (300, RED)], height=8)
    )  # fmt: skip


def _others(made: Dashboard) -> Dashboard:
    sent = f"sum(increase(alertmanager_notifications_total{EVERY}))"
    failed = f"sum(increase(alertmanager_notifications_failed_total{EVERY}))"
    return parts.add(
        made,
        lines("Series in Prometheus", "short", query("max by (instance) (prometheus_tsdb_head_series)", "{{instance}}"), width=8),
        lines("Rules: time that a group takes", "s",
              query("max by (rule_group) (prometheus_rule_group_last_duration_seconds)", "{{rule_group}}"), width=8),
        lines("Rules that failed, alerts that were dropped", "none",
              query(f"sum(increase(prometheus_rule_evaluation_failures_total{EVERY}))", "rules"),
              query(f"sum(increase(prometheus_notifications_dropped_total{EVERY}))", "alerts", "B"), width=8),
        lines("Alertmanager: alerts", "none", query("max by (state) (alertmanager_alerts)", "{{state}}"), width=12),
        lines("Alertmanager: deliveries", "none", query(sent, "sent"),
              query(failed, "failed", "B"), width=12)
    )  # fmt: skip
