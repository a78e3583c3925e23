"""*Remediation*: what waits, what was done and with what outcome, how long it took, and what is left of the budgets."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import parts
from grafana.parts import GREEN, NONE_IS_WELL, ORANGE, RED, gauges, lines, number, query, rows

ACTIONS = "max by (service, kind, outcome) (defib_remediator_actions_total)"
NOTICES = "max by (channel, outcome) (defib_remediator_notices_total)"


def build() -> Dashboard:
    made = parts.dashboard("remediation", "Remediation", "What the remediator does, and whether it helps")
    made = _now(made)
    made = _actions(made.with_row(Row("Actions")))
    return _telling(made.with_row(Row("Telling people")))


def _now(made: Dashboard) -> Dashboard:
    waiting = [(None, GREEN), (60, ORANGE), (900, RED)]
    for title, unit, expression, steps in (
        ("Open incidents", "none", 'max(defib_remediator_incidents{state="open"})', [(None, GREEN), (1, ORANGE)]),
        ("Oldest action that waits", "s", "max(defib_remediator_queue_oldest_seconds)", waiting),
        ("Oldest notice unsent", "s", "max(defib_remediator_outbox_oldest_seconds)", [(None, GREEN), (60, ORANGE), (300, RED)]),
        ("Breakers open", "none", "count(max by (service) (defib_remediator_breaker_open) == 1) or 0 * max(defib_remediator_automation_enabled)", NONE_IS_WELL),
    ):  # fmt: skip
        made = parts.add(made, number(title, unit, expression, steps))
    on = parts.words({"1": ("on", GREEN), "0": ("off", ORANGE)})
    automatic = "max(defib_remediator_automation_enabled)"
    made = parts.add(made, number("Automation", "none", automatic, [(None, ORANGE), (1, GREEN)], meaning=on))
    watchdog = "time() - max(defib_remediator_watchdog_last_timestamp_seconds)"
    return parts.add(made, number("Watchdog, ago", "s", watchdog, [(None, GREEN), (180, ORANGE), (300, RED)]))


def _actions(made: Dashboard) -> Dashboard:
    used = "max by (budget) (defib_remediator_budget_used) / max by (budget) (defib_remediator_budget_limit)"
    made = parts.add(
        made,
        lines("Actions by outcome", "none", query(f"sum by (kind, outcome) ({ACTIONS})", "{{kind}} {{outcome}}"), width=8,
              about="Since the remediator's start."),
        lines("Incidents", "none", query("max by (state) (defib_remediator_incidents)", "{{state}}"), width=8),
        gauges("Budgets of the fleet, used", "percentunit", used, "{{budget}}", ((None, GREEN), (0.7, ORANGE), (1, RED)),
               width=8, about="`10m`: actions_per_10m; `in_flight`: actions_in_flight. Past them, actions wait: fleet-busy.")
    )  # fmt: skip
    recovery = "sum by ({by}) (rate(defib_remediator_recovery_seconds_bucket[$__range]))"
    duration = "sum by (le) (rate(defib_remediator_action_duration_seconds_bucket[$__range]))"
    half, most = (f"histogram_quantile({share}, {recovery.format(by='le, by')})" for share in (0.5, 0.95))
    return parts.add(
        made,
        gauges("Time to recover, half of the incidents", "s", half, "by {{by}}", ((None, GREEN), (120, ORANGE), (600, RED)), width=8,
               about="By who brought the service back: Defib, a person, or itself."),
        gauges("Time to recover, nineteen in twenty", "s", most, "by {{by}}", ((None, GREEN), (300, ORANGE), (1800, RED)), width=8),
        lines("Time of an action, from claim to verified", "s", query(f"histogram_quantile(0.5, {duration})", "half"),
              query(f"histogram_quantile(0.95, {duration})", "nineteen in twenty", "B"), width=8),
        rows("Actions by service", {"Actions": ACTIONS}, {"service": "Service", "kind": "Kind", "outcome": "Outcome"},
             sort="Actions", down=True, links={"Service": "/d/defib-service?var-service=${__data.fields.Service}"})
    )  # fmt: skip


def _telling(made: Dashboard) -> Dashboard:
    return parts.add(
        made,
        lines("Notices by outcome", "none", query(NOTICES, "{{channel}} {{outcome}}"), width=12),
        lines("Oldest notice unsent", "s", query("max(defib_remediator_outbox_oldest_seconds)", "oldest"), width=12)
    )  # fmt: skip
