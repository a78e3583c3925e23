"""The series of heartbeats, and of the agents that report with them."""

from collections.abc import Callable

from exporter.exposition.metrics_page import MetricFamily, format_labels
from exporter.exposition.service_series import format_service_labels
from exporter.heartbeats.state import HeartbeatState, Timing
from fleet.inventory.agents import Agent
from fleet.inventory.model import Service

_LAST = "service_heartbeat_last_timestamp_seconds"
_DEADLINE = "service_heartbeat_deadline_timestamp_seconds"
_STARTED = "service_heartbeat_started"
_DURATION = "service_heartbeat_duration_seconds"
_EXIT_STATUS = "service_heartbeat_exit_status"
_ALIVE = "agent_last_heartbeat_timestamp_seconds"
_PROGRESS = "agent_last_progress_timestamp_seconds"
_IDLE = "agent_idle"
_WAITING = "agent_waiting_since_timestamp_seconds"
_PENDING = "agent_pending_tasks"
_ROUNDS = "agent_rounds_used"
_ROUNDS_LIMIT = "agent_rounds_limit"
_REQUESTS = "agent_llm_requests_total"
_RESPONSE = "agent_response_seconds"
_STUCK_AFTER = "agent_stuck_after_seconds"
_CONFIRM_AFTER = "agent_confirm_after_seconds"
_WARN_RATIO = "agent_rounds_warn_ratio"
_DEPENDENCY_WAIT = "agent_dependency_wait_seconds"
FAMILIES = (
    MetricFamily(_LAST, "gauge", "Unix time of the last ping that reported a success or a failure."),
    MetricFamily(_DEADLINE, "gauge", "Unix time at which the heartbeat becomes late; absent after a failure."),
    MetricFamily(_STARTED, "gauge", "Whether a job has reported its start and not its end."),
    MetricFamily(_DURATION, "gauge", "Duration of the last job that reported its start and its end."),
    MetricFamily(_EXIT_STATUS, "gauge", "Exit status of the last job; absent if it reported none."),
    MetricFamily(_ALIVE, "gauge", "Unix time of the last ping of an agent."),
    MetricFamily(_PROGRESS, "gauge", "Unix time at which an agent last made progress, or had nothing to do."),
    MetricFamily(_IDLE, "gauge", "Whether an agent has reported that it has nothing to do."),
    MetricFamily(_WAITING, "gauge", "Unix time since which an agent has been waiting for others; absent otherwise."),
    MetricFamily(_PENDING, "gauge", "Number of tasks that wait for an agent."),
    MetricFamily(_ROUNDS, "gauge", "Number of rounds that an agent has used for its task."),
    MetricFamily(_ROUNDS_LIMIT, "gauge", "Number of rounds that an agent may use for a task."),
    MetricFamily(_REQUESTS, "counter", "Number of requests of an agent to its model by outcome."),
    MetricFamily(_RESPONSE, "gauge", "Response time of an agent's model, as last reported."),
    MetricFamily(_STUCK_AFTER, "gauge", "Configured time without progress after which an agent may be stuck."),
    MetricFamily(_CONFIRM_AFTER, "gauge", "Configured time without progress after which an agent is stuck."),
    MetricFamily(_WARN_RATIO, "gauge", "Configured share of the rounds at which an agent is reported."),
    MetricFamily(_DEPENDENCY_WAIT, "gauge", "Configured time for which an agent may wait for others."),
)


def render_heartbeat(
    service: Service, state: HeartbeatState, timing: Timing, to_unix: Callable[[float], float]
) -> dict[str, str]:
    """Return the lines of a heartbeat by metric name."""
    labels = format_service_labels(service)
    deadline = state.deadline(timing)
    agent = {} if service.agent is None else _render_agent(service.id, service.agent, state, to_unix)
    values = {
        _LAST: None if state.last_ping is None else to_unix(state.last_ping),
        _DEADLINE: None if deadline is None else to_unix(deadline),
        _STARTED: int(state.started_at is not None),
        _DURATION: state.last_duration,
        _EXIT_STATUS: state.exit_status,
    }
    return {name: f"{name}{{{labels}}} {value}\n" for name, value in values.items() if value is not None} | agent


def _render_agent(
    name: str, settings: Agent, state: HeartbeatState, to_unix: Callable[[float], float]
) -> dict[str, str]:
    """Return the lines of an agent by metric name; all have the label `service` only."""
    labels, agent = format_labels({"service": name}), state.agent
    alive = max(state.last_ping or 0.0, state.last_start or 0.0)
    values: dict[str, float | None] = {
        _ALIVE: to_unix(alive) if alive else None,
        _STUCK_AFTER: settings.stuck_after,
        _CONFIRM_AFTER: settings.confirm_after,
        _WARN_RATIO: settings.warn_at,
        _DEPENDENCY_WAIT: settings.dependency_wait,
    }
    requests = ""
    if agent is not None:
        values |= {
            _PROGRESS: to_unix(agent.last_progress),
            _IDLE: int(agent.is_idle),
            _WAITING: None if agent.waiting_since is None else to_unix(agent.waiting_since),
            _PENDING: agent.pending,
            _ROUNDS: agent.rounds,
            _ROUNDS_LIMIT: agent.rounds_limit or settings.rounds_limit,
            _RESPONSE: agent.response_seconds,
        }
        outcomes = {"ok": agent.requests_ok, "429": agent.requests_rate_limited}
        requests = "".join(f'{_REQUESTS}{{{labels},outcome="{key}"}} {value}\n' for key, value in outcomes.items())
    lines = {metric: f"{metric}{{{labels}}} {value}\n" for metric, value in values.items() if value is not None}
    return {**lines, _REQUESTS: requests}
