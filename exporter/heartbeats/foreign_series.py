"""The series of programs that Defib replaces: healthchecks', and those of an earlier exporter of agents.

The names, labels and help texts are theirs, so that dashboards and rules go on working.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from exporter.exposition.metrics_page import MetricFamily, format_labels
from exporter.heartbeats.monitor import Heartbeat


def _gauge(name: str, help_text: str) -> MetricFamily:
    return MetricFamily(name, "gauge", help_text)


CHECK_UP = _gauge("hc_check_up", "Whether the check is currently up (1 for yes, 0 for no).")
CHECK_STARTED = _gauge("hc_check_started", "Whether the check is currently started (1 for yes, 0 for no).")
CHECK_GRACE = _gauge("hc_check_grace", "Whether the check is currently in the grace period (1 for yes, 0 for no).")
CHECK_PAUSED = _gauge("hc_check_paused", "Whether the check is currently paused (1 for yes, 0 for no).")
TAG_UP = _gauge("hc_tag_up", "Whether all checks with this tag are up (1 for yes, 0 for no).")
CHECKS = _gauge("hc_checks_total", "The total number of checks.")
CHECKS_DOWN = _gauge("hc_checks_down_total", "The number of checks currently down.")
STAGNATION = _gauge("agent_task_stagnation_seconds", "Time since the agent last made progress.")
ERROR_RATE = _gauge("agent_429_error_rate", "Percentage of the last reported requests that were refused with 429.")
RESPONSE_TIME = _gauge("agent_response_time_seconds", "Response time of the agent's model, as last reported.")
STATUS = _gauge("agent_heartbeat_status", "Whether the agent's pings arrive in time (1 for yes, 0 for no).")
PENDING = _gauge("agent_workboard_pending", "Number of tasks that wait for agents, by where they come from.")
UNNAMED_SOURCE = "tasks"  # of tasks of which an agent reports the number only
Families = Sequence[tuple[MetricFamily, Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Check:
    """A heartbeat as healthchecks sees it."""

    name: str
    tag: str
    unique_key: str
    is_down: bool
    is_started: bool
    is_in_grace: bool
    is_paused: bool

    @classmethod
    def of(cls, heartbeat: Heartbeat, uuid: str, now: float, *, is_paused: bool) -> "Check":
        state, timing = heartbeat.state, heartbeat.timing
        is_down = state.status(timing, now)[0] in ("late", "failed")
        is_overdue = state.is_overdue(timing, now)
        service = heartbeat.service
        return cls(
            service.title, service.category, _unique_key(uuid), is_down and not is_paused,
            state.started_at is not None, is_overdue and not is_paused, is_paused,
        )  # fmt: skip

    @property
    def labels(self) -> str:
        return format_labels({"name": self.name, "tags": self.tag, "unique_key": self.unique_key})


def _unique_key(uuid: str) -> str:
    """Return the key that healthchecks derives from the first half of a UUID."""
    half = uuid.replace("-", "")[:16]
    return hashlib.sha1(half.encode(), usedforsecurity=False).hexdigest()


def render_healthchecks(checks: Sequence[Check]) -> Families:
    """Return the lines of each family."""
    labels = [each.labels for each in checks]

    def lines(family: MetricFamily, get: Callable[[Check], bool]) -> tuple[MetricFamily, Sequence[str]]:
        return family, [f"{family.name}{{{own}}} {int(get(each))}\n" for own, each in zip(labels, checks, strict=True)]

    down = sum(each.is_down for each in checks)
    down_tags, tags = {each.tag for each in checks if each.is_down}, {each.tag for each in checks}
    return [
        lines(CHECK_UP, lambda each: not each.is_down),
        lines(CHECK_STARTED, lambda each: each.is_started),
        lines(CHECK_GRACE, lambda each: each.is_in_grace),
        lines(CHECK_PAUSED, lambda each: each.is_paused),
        (TAG_UP, [f"hc_tag_up{{{format_labels({'tag': tag})}}} {int(tag not in down_tags)}\n" for tag in sorted(tags)]),
        (CHECKS, [f"hc_checks_total {len(checks)}\n"]),
        (CHECKS_DOWN, [f"hc_checks_down_total {down}\n"]),
    ]


def render_agents(heartbeats: Iterable[Heartbeat], now: float) -> Families:
    """Return the lines of each family, without what the agents have not reported."""
    values: dict[MetricFamily, list[str]] = {family: [] for family in (STAGNATION, ERROR_RATE, RESPONSE_TIME, STATUS)}
    pending: Counter[str] = Counter()
    for heartbeat in heartbeats:
        labels = format_labels({"agent_name": heartbeat.service.id, "agent_label": heartbeat.service.title})
        for family, value in _values_of(heartbeat, now):
            if value is not None:
                values[family].append(f"{family.name}{{{labels}}} {value}\n")
        if heartbeat.state.agent is not None:
            pending.update(heartbeat.state.agent.pending_by_source)
    lines = [
        f"{PENDING.name}{{{format_labels({'type': source or UNNAMED_SOURCE})}}} {number}\n"
        for source, number in sorted(pending.items())
    ]
    return [*values.items(), (PENDING, lines)]


def _values_of(heartbeat: Heartbeat, now: float) -> Iterator[tuple[MetricFamily, float | None]]:
    state = heartbeat.state
    status, _ = state.status(heartbeat.timing, now)
    yield STATUS, None if status == "waiting" else int(status == "up")
    if (agent := state.agent) is not None:
        yield STAGNATION, max(0.0, now - agent.last_progress)
        yield ERROR_RATE, None if agent.rate_limited_ratio is None else 100 * agent.rate_limited_ratio
        yield RESPONSE_TIME, agent.response_seconds
