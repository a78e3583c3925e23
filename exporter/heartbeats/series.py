"""The `service_heartbeat_*` series."""

from collections.abc import Callable

from exporter.exposition.metrics_page import MetricFamily, format_labels
from exporter.heartbeats.state import HeartbeatState, Timing
from fleet.inventory.model import Service

_LAST = "service_heartbeat_last_timestamp_seconds"
_DEADLINE = "service_heartbeat_deadline_timestamp_seconds"
_STARTED = "service_heartbeat_started"
_DURATION = "service_heartbeat_duration_seconds"
_EXIT_STATUS = "service_heartbeat_exit_status"
FAMILIES = (
    MetricFamily(_LAST, "gauge", "Unix time of the last ping that reported a success or a failure."),
    MetricFamily(_DEADLINE, "gauge", "Unix time at which the heartbeat becomes late; absent after a failure."),
    MetricFamily(_STARTED, "gauge", "Whether a job has reported its start and not its end."),
    MetricFamily(_DURATION, "gauge", "Duration of the last job that reported its start and its end."),
    MetricFamily(_EXIT_STATUS, "gauge", "Exit status of the last job; absent if it reported none."),
)


def render_heartbeat(
    service: Service, state: HeartbeatState, timing: Timing, to_unix: Callable[[float], float]
) -> dict[str, str]:
    """Return the lines of a heartbeat by metric name."""
    labels = format_labels(
        {"service": service.id, "host": service.host, "provider": service.provider, "category": service.category}
    )
    deadline = state.deadline(timing)
    values = {
        _LAST: None if state.last_ping is None else to_unix(state.last_ping),
        _DEADLINE: None if deadline is None else to_unix(deadline),
        _STARTED: int(state.started_at is not None),
        _DURATION: state.last_duration,
        _EXIT_STATUS: state.exit_status,
    }
    return {name: f"{name}{{{labels}}} {value}\n" for name, value in values.items() if value is not None}
