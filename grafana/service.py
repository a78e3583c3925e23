"""*Service*: one service's availability, latency and failures, with its incidents and restarts."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import parts
from grafana.parts import (
    AVAILABILITY,
    GREEN,
    NONE_IS_WELL,
    ORANGE,
    RED,
    UP_DOWN_WORDS,
    UP_OR_DOWN,
    lines,
    number,
    query,
)

IT = 'service="$service"'


def build() -> Dashboard:
    made = parts.dashboard(
        "service", "Service", "Availability, latency and failures of one service, with its incidents and restarts",
        [
            parts.variable("provider", "Provider", "label_values(service_info, provider)"),
            parts.variable("category", "Category", 'label_values(service_info{provider=~"$provider"}, category)'),
            parts.variable(
                "service", "Service",
                'label_values(service_info{provider=~"$provider", category=~"$category"}, service)', one=True,
            ),
        ],
    )  # fmt: skip
    done, before = (
        f"max by (service, kind, outcome) (defib_remediator_actions_total{{{IT}}}{offset})"
        for offset in ("", " offset 1m")
    )
    # A counter that has just appeared has no increase yet.
    begun = f"(({done} - {before}) > 0 or {done} unless {before})"
    down = f'ALERTS{{alertname="ServiceDown", alertstate="firing", {IT}}}'
    made = made.annotation(parts.marks("Incidents", down, RED)).annotation(parts.marks("Restarts", begun, ORANGE))
    made = _availability(made)
    made = _probes(made.with_row(Row("Probes")))
    made = _remediation(made.with_row(Row("What Defib did")))
    return made.with_row(_certificate()).with_row(_model())


def _availability(made: Dashboard) -> Dashboard:
    made = parts.add(
        made,
        number("Now", "none", f"service:up:max{{{IT}}}", UP_OR_DOWN, meaning=UP_DOWN_WORDS),
        number("Since", "s", f"time() - max(service_last_change_timestamp_seconds{{{IT}}})", [(None, "text")])
    )  # fmt: skip
    for window, title in (("1h", "1 hour"), ("1d", "1 day"), ("30d", "30 days")):
        made = parts.add(
            made,
            number(f"Available, {title}", "percentunit", f"service:availability:avg{window}{{{IT}}}", AVAILABILITY),
        )
    left = f"1 - (1 - service:availability:avg30d{{{IT}}}) / service:error_budget:ratio{{{IT}}}"
    made = parts.add(
        made,
        number(
            "Error budget left", "percentunit", left, [(None, RED), (0, ORANGE), (0.25, GREEN)],
            about="Of the time that it may be down in 30 days, by its `objective`; below 0 it has been down longer.",
        )
    )  # fmt: skip
    return made.with_panel(parts.states("Up and down", f"service:up:max{{{IT}}}", "{{service}}", height=4))


def _probes(made: Dashboard) -> Dashboard:
    made = parts.add(
        made,
        lines(
            "Latency", "s", query(f"max(service_probe_duration_seconds{{{IT}}})", "last probe"),
            query(f"service:probe_duration_seconds:avg5m{{{IT}}}", "average of 5 min", "B"),
            query(f"service:probe_duration_seconds:avg1d{{{IT}}}", "average of the day before", "C"),
            query(f"max(service_probe_slow_seconds{{{IT}}})", "slow from", "D"),
        ),
        lines(
            "Phases of a probe", "s", query(f"max by (phase) (service_probe_phase_seconds{{{IT}}})", "{{phase}}"),
            stacked=True,
        )
    )  # fmt: skip
    failed = f"service_probe_failures_total{{{IT}}}"
    # The first failure for a reason is where its series begins: there has been no increase yet.
    failures = f"sum by (reason) (increase({failed}[$__rate_interval]) > 0 or {failed} unless {failed} offset 1m)"
    results = f"sum by (result) (increase(service_probes_total{{{IT}}}[$__rate_interval]))"
    return parts.add(
        made,
        lines("Failures by reason", "none", query(failures, "{{reason}}"), stacked=True, bars=True, width=8),
        lines("Probes", "none", query(results, "{{result}}"), stacked=True, bars=True, width=8),
        lines("Failures in a row", "none", query(f"max(service_consecutive_failures{{{IT}}})", "failures"), width=4),
        number("Status of the last HTTP answer", "none", f"max(service_http_status_code{{{IT}}})",
               [(None, GREEN), (400, ORANGE), (500, RED)], height=8)
    )  # fmt: skip


def _remediation(made: Dashboard) -> Dashboard:
    done = f"sum by (kind, outcome) (max by (service, kind, outcome) (defib_remediator_actions_total{{{IT}}}))"
    return parts.add(
        made,
        lines("Actions since the remediator's start", "none", query(done, "{{kind}} {{outcome}}"), width=12),
        number("Changes of state in a day", "none",
               f"sum(increase(service_state_changes_total{{{IT}}}[1d]))", [(None, GREEN), (6, ORANGE)]),
        number("Attempts used up", "none", f"max(defib_remediator_breaker_open{{{IT}}}) or 0 * max(defib_remediator_automation_enabled)", NONE_IS_WELL,
               meaning=parts.words({"0": ("no", GREEN), "1": ("yes", RED)})),
        number("Last success", "s", f"time() - max(service_last_success_timestamp_seconds{{{IT}}})", [(None, "text")])
    )  # fmt: skip


def _certificate() -> Row:
    expiry = f"service:certificate_expiry_timestamp_seconds:min{{{IT}}} - time()"
    steps = [(None, RED), (7 * 86400, ORANGE), (30 * 86400, GREEN)]
    served = f"max by (issuer, version) (service_tls_info{{{IT}}})"
    columns = {"issuer": "Issuer", "version": "Protocol"}
    row = Row("Certificate").with_panel(number("Expires in", "s", expiry, steps, width=6))
    return row.with_panel(parts.rows("Served", {"": served}, columns, width=18, height=4))


def _model() -> Row:
    first = query(f"max(service_llm_first_token_seconds{{{IT}}})", "first token")
    speed = query(f"max(service_llm_tokens_per_second{{{IT}}})", "tokens/s")
    row = Row("Model").with_panel(lines("First token", "s", first))
    return row.with_panel(lines("Tokens per second", "none", speed))
