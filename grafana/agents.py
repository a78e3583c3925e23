"""The *Agents* dashboard: heartbeats and progress of AI agents, their rounds, tasks and requests to models."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import GREEN, ORANGE, RED, ZERO_IS_GOOD, graph, range_query, stat_panel, state_timeline
from grafana.promql import highest
from grafana.tables import Value, table_panel

SELECTED = 'service=~"$agent"'
# As the dashboards that teams of agents had before.
NO_PROGRESS = [(None, GREEN), (3600, ORANGE), (14400, RED)]
PENDING = [(None, GREEN), (5, ORANGE), (10, RED)]
REFUSED = [(None, GREEN), (10, ORANGE), (50, RED)]
ROUNDS = [(None, GREEN), (0.8, ORANGE), (1, RED)]
WITHOUT_PROGRESS = f"time() - max by (service) (agent_last_progress_timestamp_seconds{{{SELECTED}}})"
REFUSED_1H = f'max by (service) (increase(agent_llm_requests_total{{outcome="429", {SELECTED}}}[1h]))'
USED = f"max by (service) (agent_rounds_used{{{SELECTED}}})"
LIMIT = f"max by (service) (agent_rounds_limit{{{SELECTED}}})"
ALIVE = f"max by (service) (service_up{{{SELECTED}}} and on (service) agent_stuck_after_seconds)"
PENDING_TASKS = f"max by (service) (agent_pending_tasks{{{SELECTED}}})"


def build() -> Dashboard:
    board = panels.dashboard(
        "agents",
        "Agents",
        "Heartbeats and progress of AI agents",
        [panels.variable("agent", "Agent", "label_values(agent_stuck_after_seconds, service)")],
    )
    board = _current(board)
    return _over_time(board.with_row(Row("Over time")))


def _current(board: Dashboard) -> Dashboard:
    known = f"count(max by (service) (agent_stuck_after_seconds{{{SELECTED}}}))"
    for title, expression, steps in (
        ("Agents", known, [(None, GREEN)]),
        (
            "Silent",
            f"count(service:up:max{{{SELECTED}}} == 0 and on (service) agent_stuck_after_seconds) or 0 * {known}",
            ZERO_IS_GOOD,
        ),
        (
            "Stuck",
            f'count(max by (service) (ALERTS{{alertname="AgentStuck", alertstate="firing", {SELECTED}}})) or 0 * {known}',
            ZERO_IS_GOOD,
        ),
        (
            "Waiting for others",
            f"count(max by (service) (agent_waiting_since_timestamp_seconds{{{SELECTED}}})) or 0 * {known}",
            [(None, GREEN)],
        ),
        ("Waiting tasks", f"sum({PENDING_TASKS})", [(None, GREEN)]),
        ("Requests refused in an hour (429)", f"sum({REFUSED_1H})", [(None, GREEN), (50, ORANGE), (200, RED)]),
    ):
        board = panels.add_panels(board, stat_panel(title, "none", expression, steps, decimals=0))
    return panels.add_panels(
        board,
        table_panel(
            "Agents",
            {"service": "Agent"},
            {
                "Without progress": Value(WITHOUT_PROGRESS, "s", steps=NO_PROGRESS),
                "Since the last ping": Value(
                    f"time() - max by (service) (agent_last_heartbeat_timestamp_seconds{{{SELECTED}}})", "s"
                ),
                "Rounds": Value(USED, decimals=0),
                "Rounds used": Value(f"{USED} / {LIMIT}", "percentunit", decimals=0, steps=ROUNDS),
                "Waiting tasks": Value(PENDING_TASKS, decimals=0, steps=PENDING),
                "429 in an hour": Value(REFUSED_1H, decimals=0, steps=REFUSED),
                "Response time": Value(f"max by (service) (agent_response_seconds{{{SELECTED}}})", "s"),
            },
            key="service",
            rank=f"agent_stuck_after_seconds{{{SELECTED}}}",
            sort=("-Without progress",),
        ),
    )


def _over_time(board: Dashboard) -> Dashboard:
    requests = f"sum by (outcome) (rate(agent_llm_requests_total{{{SELECTED}}}[$__rate_interval])) * 60"
    return panels.add_panels(
        board,
        state_timeline(
            "Heartbeats", highest(ALIVE, "service", 25, lowest=True), "{{service}}",
            mappings=panels.value_mappings({"1": ("alive", GREEN), "0": ("silent", RED)}), steps=[(None, RED), (1, GREEN)],
        ),
        graph("Without progress", "s", range_query(highest(WITHOUT_PROGRESS, "service"), "{{service}}"), steps=NO_PROGRESS[1:]),
        graph("Waiting tasks", "none", range_query(highest(PENDING_TASKS, "service"), "{{service}}"), steps=PENDING[1:]),
        graph("Rounds used", "percentunit", range_query(highest(f"{USED} / {LIMIT}", "service"), "{{service}}"), maximum=1),
        graph("Requests to models per minute", "none", range_query(requests, "{{outcome}}"), stacked=True),
    )  # fmt: skip
