"""The state of a heartbeat: pure functions of its pings, of its schedule, and of the time in which none were received.

All times are of a steady clock, which does not jump.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from exporter.heartbeats.agent import AgentReport, AgentState
from fleet.pings import PingKind

Status = Literal["waiting", "up", "late", "failed"]


class Schedule(Protocol):
    """When pings are due."""

    def next_due(self, after: float) -> float: ...


@dataclass(frozen=True, slots=True)
class Timing:
    """The schedule of a heartbeat, and for how many seconds a ping, or the end of a started job, may be overdue."""

    schedule: Schedule
    grace: float
    start_grace: float


@dataclass(frozen=True, slots=True)
class Ping:
    """A ping: `run_id` ties the start of a job to its end. `fault` is why a failed one failed.

    `duration` is how long the job took, if it says so itself.
    """

    at: float
    kind: PingKind
    exit_status: int | None = None
    run_id: str = ""
    fault: str = ""
    duration: float | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatState:
    """What is known of a heartbeat. Nothing has been received before `known_since`.

    `last_ping` is the time of the last success or failure, `last_kind` which of them it was. `started_at` is set while
    a job runs. `not_late_before` is a later deadline than the schedule's: pings may have been lost; `has_grant` says
    that it includes a whole period, which is granted only once between two pings. `agent` is what an agent reports.
    `is_created` says that the job has created it with a ping.
    """

    known_since: float
    last_ping: float | None = None
    last_kind: Literal["success", "fail"] | None = None
    exit_status: int | None = None
    fault: str = ""
    started_at: float | None = None
    run_id: str = ""
    last_start: float | None = None
    last_duration: float | None = None
    changed_at: float | None = None
    not_late_before: float | None = None
    has_grant: bool = False
    agent: AgentState | None = None
    is_created: bool = False

    def after_ping(self, ping: Ping, timing: Timing) -> "HeartbeatState":
        """Return the state after one more ping. Starts and log entries do not change what is up or down."""
        if ping.kind == "log":
            return self
        if ping.kind == "start":
            return replace(self, started_at=ping.at, last_start=ping.at, run_id=ping.run_id)
        duration, started_at, run_id = ping.duration, self.started_at, self.run_id
        if started_at is not None:
            if ping.run_id == run_id and duration is None:
                duration = max(0.0, ping.at - started_at)
            if ping.run_id in ("", run_id) or ping.kind == "fail":
                started_at, run_id = None, ""
        status, _ = self.status(timing, ping.at)
        is_unchanged = status == ("up" if ping.kind == "success" else "failed")
        return replace(
            self,
            last_ping=ping.at,
            last_kind=ping.kind,
            exit_status=ping.exit_status,
            fault=ping.fault,
            started_at=started_at,
            run_id=run_id,
            last_duration=duration,
            changed_at=self.changed_at if is_unchanged else ping.at,
            not_late_before=None,
            has_grant=False,
        )

    def after_report(self, report: AgentReport, at: float) -> "HeartbeatState":
        """Return the state after a report of an agent."""
        return replace(self, agent=(self.agent or AgentState(at)).after_report(report, at))

    def deadline(self, timing: Timing) -> float | None:
        """Return when the heartbeat becomes late; None after a failure, which lasts until the next success."""
        if self.last_kind == "fail":
            return None
        deadline = self._due(timing) + timing.grace
        if self.started_at is not None:
            deadline = min(deadline, self.started_at + timing.start_grace)
        return max(deadline, self.not_late_before or deadline)

    def _due(self, timing: Timing) -> float:
        return timing.schedule.next_due(self.known_since if self.last_ping is None else self.last_ping)

    def status(self, timing: Timing, now: float) -> tuple[Status, float]:
        """Return the status, and since when: a heartbeat is late from its deadline on, whenever that is noticed."""
        deadline = self.deadline(timing)
        if deadline is None:
            return "failed", self.changed_at or self.known_since
        if now >= deadline:
            return "late", deadline
        if self.last_kind is None:
            return "waiting", self.known_since
        return "up", self.changed_at or self.known_since

    def is_overdue(self, timing: Timing, now: float) -> bool:
        """Whether it is up, and a ping is due that has not been received."""
        return self.status(timing, now)[0] == "up" and now >= self._due(timing)

    def silent_since(self, timing: Timing, now: float) -> float | None:
        """Return since when it is down without a ping; None if it is not down."""
        status, since = self.status(timing, now)
        return max(since, self.last_ping or since, self.last_start or since) if status in ("late", "failed") else None

    def after_absence(self, timing: Timing, begin: float, end: float) -> "HeartbeatState":
        """Return the state after a time in which no pings could be received.

        That time makes nobody late or stuck. Where a ping was due in it, and may have been lost, the next one is
        waited for.
        """
        extended = self._extend_deadline(timing, begin, end)
        if extended.agent is None:
            return extended
        progress = extended.agent.last_progress + end - begin
        return replace(extended, agent=replace(extended.agent, last_progress=progress))

    def _extend_deadline(self, timing: Timing, begin: float, end: float) -> "HeartbeatState":
        deadline = self.deadline(timing)
        if deadline is None or deadline <= begin:
            return self
        # The end of a job that runs may be reported at any time.
        expected_from = deadline - timing.grace if self.started_at is None else self.started_at
        if expected_from >= end:
            return self
        extended = deadline + (end - begin)
        if not self.has_grant:
            extended = max(extended, self._next_due_after(timing, end) + timing.grace)
        return replace(self, not_late_before=extended, has_grant=True)

    def _next_due_after(self, timing: Timing, time: float) -> float:
        """Return the first time after `time` at which the schedule expects a ping."""
        due = self._due(timing)
        return due if due > time else timing.schedule.next_due(time)
