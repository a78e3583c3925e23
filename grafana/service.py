"""The *Service* dashboard: availability, latency, failures, incidents and restarts of one service."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import (
    AVAILABILITY_DECIMALS,
    AVAILABILITY_THRESHOLDS,
    GREEN,
    ORANGE,
    RED,
    STATE_MAPPINGS,
    STATE_THRESHOLDS,
    UP_DOWN_MAPPINGS,
    ZERO_IS_GOOD,
    graph,
    range_query,
    stat_panel,
)
from grafana.tables import Value, table_panel

SERVICE = 'service="$service"'
OF_SERVICE = "service, host, provider, category"
STATE = panels.state(
    f"service:up:max{{{SERVICE}}}", f"service_probe_interval_seconds{{{SERVICE}}}", OF_SERVICE, "service"
)


def build() -> Dashboard:
    board = panels.dashboard(
        "service",
        "Service",
        "Availability, latency, failures, incidents and restarts of one service",
        [
            panels.variable("provider", "Provider", "label_values(service_info, provider)"),
            panels.variable("category", "Category", 'label_values(service_info{provider=~"$provider"}, category)'),
            panels.variable(
                "service",
                "Service",
                'label_values(service_info{provider=~"$provider", category=~"$category"}, service)',
                single=True,
            ),
        ],
        rows=False,
    )
    done, before = (
        f"max by (service, kind, outcome) (defib_remediator_actions_total{{{SERVICE}}}{offset})"
        for offset in ("", " offset 1m")
    )
    # increase() misses the first action, which creates the series.
    started = f"(({done} - {before}) > 0 or {done} unless {before})"
    down = f'ALERTS{{alertname="ServiceDown", alertstate="firing", {SERVICE}}}'
    board = board.annotation(panels.annotation("Incidents", down, RED)).annotation(
        panels.annotation("Actions", started, ORANGE)
    )
    board = _availability(board)
    board = _probes(board.with_row(Row("Probes")))
    board = _remediation(board.with_row(Row("Remediation")))
    return board.with_row(_certificate()).with_row(_model())


def _availability(board: Dashboard) -> Dashboard:
    board = panels.add_panels(
        board,
        stat_panel("State", "none", f"max({STATE})", STATE_THRESHOLDS, mappings=STATE_MAPPINGS),
        stat_panel(
            "Time in this state",
            "s",
            f"time() - max(service_last_change_timestamp_seconds{{{SERVICE}}})",
            [(None, "text")],
        ),
    )
    for window, title in (("1h", "1 hour"), ("1d", "1 day"), ("30d", "30 days")):
        board = panels.add_panels(
            board,
            stat_panel(
                f"Availability, {title}",
                "percentunit",
                f"service:availability:avg{window}{{{SERVICE}}}",
                AVAILABILITY_THRESHOLDS,
                decimals=AVAILABILITY_DECIMALS,
            ),
        )
    left = f"1 - (1 - service:availability:avg30d{{{SERVICE}}}) / service:error_budget:ratio{{{SERVICE}}}"
    board = panels.add_panels(
        board,
        stat_panel(
            "Error budget left",
            "percentunit",
            left,
            [(None, RED), (0, ORANGE), (0.25, GREEN)],
            description="Share of the downtime that its `objective` allows in 30 days. Negative when the objective is missed.",
        ),
    )
    # Recorded for a day after a service was last known.
    known = f"service:availability:avg1d{{{SERVICE}}}"
    return board.with_panel(
        panels.state_timeline(
            "State over time",
            f"max by (service) ({STATE} or on (service) group by ({OF_SERVICE}) ({known}))",
            "{{service}}",
            height=4,
            description="Unknown: not probed, or not scraped.",
        )
    )


def _probes(board: Dashboard) -> Dashboard:
    board = panels.add_panels(
        board,
        graph(
            "Latency",
            "s",
            range_query(f"max(service_probe_duration_seconds{{{SERVICE}}})", "last probe"),
            range_query(f"service:probe_duration_seconds:avg5m{{{SERVICE}}}", "5 min average", "B"),
            range_query(f"service:probe_duration_seconds:avg1d{{{SERVICE}}}", "1 day average", "C"),
            range_query(f"max(service_probe_slow_seconds{{{SERVICE}}})", "slow_after", "D"),
        ),
        graph(
            "Phases of a probe",
            "s",
            range_query(f"max by (phase) (service_probe_phase_seconds{{{SERVICE}}})", "{{phase}}"),
            stacked=True,
        ),
    )
    failed = f"service_probe_failures_total{{{SERVICE}}}"
    # increase() misses the first failure for a reason, which creates the series.
    failures = f"sum by (reason) (increase({failed}[$__rate_interval]) > 0 or {failed} unless {failed} offset 1m)"
    results = f"sum by (result) (increase(service_probes_total{{{SERVICE}}}[$__rate_interval]))"
    components = Value(f"service_component_up{{{SERVICE}}}", mappings=UP_DOWN_MAPPINGS)
    return panels.add_panels(
        board,
        graph("Failures by reason", "none", range_query(failures, "{{reason}}"), stacked=True, bars=True, width=8),
        graph("Probes", "none", range_query(results, "{{result}}"), stacked=True, bars=True, width=8),
        graph(
            "Consecutive failures",
            "none",
            range_query(f"max(service_consecutive_failures{{{SERVICE}}})", "failures"),
            width=4,
        ),
        stat_panel(
            "Last HTTP status",
            "none",
            f"max(service_http_status_code{{{SERVICE}}})",
            [(None, GREEN), (400, ORANGE), (500, RED)],
            height=8,
        ),
        table_panel(
            "Components on its status page",
            {"component": "Component"},
            {"State": components},
            bounded=True,
            height=6,
            sort=("State", "Component"),
        ),
    )


def _remediation(board: Dashboard) -> Dashboard:
    done = f"sum by (kind, outcome) (max by (service, kind, outcome) (defib_remediator_actions_total{{{SERVICE}}}))"
    return panels.add_panels(
        board,
        graph("Actions since the remediator started", "none", range_query(done, "{{kind}} {{outcome}}"), width=12),
        stat_panel(
            "State changes in 24 hours",
            "none",
            f"sum(increase(service_state_changes_total{{{SERVICE}}}[1d]))",
            [(None, GREEN), (6, ORANGE)],
        ),
        stat_panel(
            "Given up",
            "none",
            f"max(defib_remediator_breaker_open{{{SERVICE}}}) or 0 * max(defib_remediator_automation_enabled)",
            ZERO_IS_GOOD,
            mappings=panels.value_mappings({"0": ("no", GREEN), "1": ("yes", RED)}),
        ),
        stat_panel(
            "Last success", "s", f"time() - max(service_last_success_timestamp_seconds{{{SERVICE}}})", [(None, "text")]
        ),
    )


def _certificate() -> Row:
    expiry = f"service:certificate_expiry_timestamp_seconds:min{{{SERVICE}}} - time()"
    steps = [(None, RED), (7 * 86400, ORANGE), (30 * 86400, GREEN)]
    columns = {"subject": "Subject", "issuer": "Issuer", "version": "Protocol"}
    served = table_panel(
        "Issuer and protocol", columns, {"": Value(f"service_tls_info{{{SERVICE}}}")}, bounded=True, width=18, height=4
    )
    return Row("Certificate").with_panel(stat_panel("Expires in", "s", expiry, steps, width=6)).with_panel(served)


def _model() -> Row:
    first = range_query(f"max(service_llm_first_token_seconds{{{SERVICE}}})", "first token")
    speed = range_query(f"max(service_llm_tokens_per_second{{{SERVICE}}})", "tokens/s")
    row = Row("Model").with_panel(graph("First token", "s", first))
    return row.with_panel(graph("Tokens per second", "none", speed))
