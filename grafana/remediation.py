"""The *Remediation* dashboard: queued actions, outcomes, recovery times, budgets and notifications."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import GREEN, ORANGE, RED, ZERO_IS_GOOD, bar_gauge, graph, range_query, stat_panel
from grafana.promql import highest
from grafana.tables import Value, table_panel

ACTIONS = "max by (service, kind, outcome) (defib_remediator_actions_total)"
NOTIFICATIONS = "max by (channel, outcome) (defib_remediator_notices_total)"


def build() -> Dashboard:
    board = panels.dashboard("remediation", "Remediation", "Actions of the remediator and their outcomes")
    board = _current(board)
    board = _actions(board.with_row(Row("Actions")))
    return _notifications(board.with_row(Row("Notifications")))


def _current(board: Dashboard) -> Dashboard:
    waiting = [(None, GREEN), (60, ORANGE), (900, RED)]
    for title, unit, expression, steps in (
        ("Open incidents", "none", 'max(defib_remediator_incidents{state="open"})', [(None, GREEN), (1, ORANGE)]),
        ("Oldest queued action", "s", "max(defib_remediator_queue_oldest_seconds)", waiting),
        (
            "Oldest unsent notification",
            "s",
            "max(defib_remediator_outbox_oldest_seconds)",
            [(None, GREEN), (60, ORANGE), (300, RED)],
        ),
        (
            "Given up",
            "none",
            "count(max by (service) (defib_remediator_breaker_open) == 1) or 0 * max(defib_remediator_automation_enabled)",
            ZERO_IS_GOOD,
        ),
    ):
        board = panels.add_panels(board, stat_panel(title, unit, expression, steps))
    on = panels.value_mappings({"1": ("on", GREEN), "0": ("off", ORANGE)})
    automatic = "max(defib_remediator_automation_enabled)"
    board = panels.add_panels(
        board, stat_panel("Automation", "none", automatic, [(None, ORANGE), (1, GREEN)], mappings=on)
    )
    watchdog = "time() - max(defib_remediator_watchdog_last_timestamp_seconds)"
    return panels.add_panels(
        board, stat_panel("Time since the last Watchdog", "s", watchdog, [(None, GREEN), (180, ORANGE), (300, RED)])
    )


def _actions(board: Dashboard) -> Dashboard:
    used = "max by (budget) (defib_remediator_budget_used) / max by (budget) (defib_remediator_budget_limit)"
    board = panels.add_panels(
        board,
        graph(
            "Actions by outcome",
            "none",
            range_query(f"sum by (kind, outcome) ({ACTIONS})", "{{kind}} {{outcome}}"),
            width=8,
            description="Since the remediator started.",
        ),
        graph("Incidents", "none", range_query("max by (state) (defib_remediator_incidents)", "{{state}}"), width=8),
        bar_gauge(
            "Used share of the fleet's limits",
            "percentunit",
            used,
            "{{budget}}",
            ((None, GREEN), (0.7, ORANGE), (1, RED)),
            width=8,
            description="`10m`: actions_per_10m; `in_flight`: actions_in_flight. At the limit, actions wait (fleet-busy).",
        ),
    )
    recovery = "sum by ({by}) (rate(defib_remediator_recovery_seconds_bucket[$__range]))"
    duration = "sum by (le) (rate(defib_remediator_action_duration_seconds_bucket[$__range]))"
    half, most = (f"histogram_quantile({share}, {recovery.format(by='le, by')})" for share in (0.5, 0.95))
    return panels.add_panels(
        board,
        bar_gauge(
            "Time to recover, median",
            "s",
            half,
            "by {{by}}",
            ((None, GREEN), (120, ORANGE), (600, RED)),
            width=8,
            description="By the cause of the recovery: Defib, a person, or none (the service recovered without an action).",
        ),
        bar_gauge(
            "Time to recover, 95th percentile",
            "s",
            most,
            "by {{by}}",
            ((None, GREEN), (300, ORANGE), (1800, RED)),
            width=8,
        ),
        graph(
            "Duration of an action, from claim to verification",
            "s",
            range_query(f"histogram_quantile(0.5, {duration})", "50th percentile"),
            range_query(f"histogram_quantile(0.95, {duration})", "95th percentile", "B"),
            width=8,
        ),
        table_panel(
            "Actions by service",
            {"service": "Service", "kind": "Kind", "outcome": "Outcome"},
            {"Actions": Value("defib_remediator_actions_total")},
            sort=("-Actions",),
            description="Since the remediator started.",
        ),
    )


def _notifications(board: Dashboard) -> Dashboard:
    return panels.add_panels(
        board,
        graph(
            "Notifications by outcome",
            "none",
            range_query(highest(NOTIFICATIONS, "channel, outcome"), "{{channel}} {{outcome}}"),
            width=12,
        ),
        graph(
            "Oldest unsent notification",
            "s",
            range_query("max(defib_remediator_outbox_oldest_seconds)", "oldest"),
            width=12,
        ),
    )
