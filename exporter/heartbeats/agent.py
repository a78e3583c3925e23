"""What AI agents report with their pings: their task and its progress. Being alive is not making progress."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet.inventory.agents import Agent
from fleet.inventory.units import format_duration
from runtime.validation_messages import describe

TEXT_LIMIT = 200  # characters of a task, of a progress, of a source of tasks, and of what is waited for
SOURCES_LIMIT = 20  # of tasks; those of the others are added up
AgentStatus = Literal["idle", "working", "waiting", "suspected", "confirmed"]
_Count = Annotated[int, Field(ge=0, le=1_000_000_000, strict=True)]
_Text = Annotated[str, Field(max_length=10_000)]


class _Requests(BaseModel):
    ok: _Count = 0
    rate_limited: _Count = Field(0, alias="429")

    @property
    def ratio(self) -> float | None:
        """The share of those that were refused, None without any requests."""
        total = self.ok + self.rate_limited
        return self.rate_limited / total if total else None


class AgentReport(BaseModel):
    """The JSON of a ping. What an agent does not report is None; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    pending: _Count | dict[str, _Count] | None = None
    task: _Text | _Count | None = None
    progress: Annotated[bool, Field(strict=True)] | int | float | _Text | None = None
    rounds: _Count | None = None
    rounds_limit: Annotated[_Count, Field(ge=1)] | None = None
    llm_requests: _Requests | None = None
    response_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    waiting_for: _Text | list[_Text] | None = None

    @property
    def pending_tasks(self) -> int | None:
        return sum(self.pending.values()) if isinstance(self.pending, dict) else self.pending

    @property
    def pending_by_source(self) -> dict[str, int]:
        """The tasks that wait by where they come from, as far as the agent says that."""
        if not isinstance(self.pending, dict):
            return {} if self.pending is None else {"": self.pending}
        listed = dict(islice(self.pending.items(), SOURCES_LIMIT))
        others = sum(self.pending.values()) - sum(listed.values())
        return {name[:TEXT_LIMIT]: number for name, number in listed.items()} | ({"": others} if others else {})

    @property
    def task_name(self) -> str | None:
        return None if self.task is None else str(self.task)[:TEXT_LIMIT]

    @property
    def is_idle(self) -> bool:
        """Whether the agent has reported that it has nothing to do."""
        return not self.task and self.pending_tasks == 0

    @property
    def dependencies(self) -> str:
        """What the agent waits for, empty if for nothing."""
        names = self.waiting_for if isinstance(self.waiting_for, list) else [self.waiting_for or ""]
        return ", ".join(filter(None, names))[:TEXT_LIMIT]


def parse_report(body: bytes) -> AgentReport | None:
    """Return what an agent reports; None if the body is no JSON object. Raises ValueError if that has a wrong value."""
    if not body.lstrip().startswith(b"{"):
        return None
    try:
        return AgentReport.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = first["loc"][0] if first["loc"] else "the report"  # not which of its types was tried
        raise ValueError(f"{field}: {describe(first)}") from None
    except (ValueError, RecursionError):
        raise ValueError("the report is not valid JSON") from None


@dataclass(frozen=True, slots=True)
class AgentState:
    """What is known of an agent. Times are of the steady clock."""

    last_progress: float
    progress: str = ""
    task: str = ""
    pending: int | None = None
    pending_by_source: Mapping[str, int] = field(default_factory=dict)
    is_idle: bool = False
    rounds: int | None = None
    rounds_limit: int | None = None
    requests_ok: int = 0
    requests_rate_limited: int = 0
    rate_limited_ratio: float | None = None  # of the requests in the last report with any
    response_seconds: float | None = None
    waiting_for: str = ""
    waiting_since: float | None = None

    def after_report(self, report: AgentReport, at: float) -> "AgentState":
        """Return the state after one more report. The numbers of requests are those since the report before."""
        task = "" if report.is_idle else self.task if report.task_name is None else report.task_name
        progress = self.progress if report.progress is None else json.dumps(report.progress)[:TEXT_LIMIT]
        is_progress = task != self.task or (
            report.progress is True if isinstance(report.progress, bool) else progress != self.progress
        )
        waiting_for, requests = report.dependencies, report.llm_requests or _Requests()
        return replace(
            self,
            last_progress=at if is_progress or report.is_idle else self.last_progress,
            progress=progress,
            task=task,
            pending=report.pending_tasks,
            pending_by_source=report.pending_by_source,
            is_idle=report.is_idle,
            rounds=report.rounds,
            rounds_limit=report.rounds_limit,
            requests_ok=self.requests_ok + requests.ok,
            requests_rate_limited=self.requests_rate_limited + requests.rate_limited,
            rate_limited_ratio=self.rate_limited_ratio if requests.ratio is None else requests.ratio,
            response_seconds=report.response_seconds,
            waiting_for=waiting_for,
            waiting_since=(self.waiting_since or at) if waiting_for else None,
        )

    def status(self, settings: Agent, now: float) -> AgentStatus:
        """Return what the agent does, if it is up. While it waits for others, or is idle, it is not stuck."""
        if self.waiting_since is not None:
            return "waiting"
        if self.is_idle:
            return "idle"
        without_progress = now - self.last_progress
        if without_progress >= settings.confirm_after:
            return "confirmed"
        return "suspected" if without_progress >= settings.stuck_after else "working"


def describe_stuck(settings: Agent, status: AgentStatus | None) -> str:
    """Return in a sentence why an agent is stuck; empty if it is not."""
    if status not in ("suspected", "confirmed"):
        return ""
    limit = settings.confirm_after if status == "confirmed" else settings.stuck_after
    return f"alive, but no progress for {format_duration(limit)}"


def state_to_json(state: AgentState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in AgentState.__slots__}


def state_from_json(stored: dict[str, Any]) -> AgentState:
    return AgentState(**{name: value for name, value in stored.items() if name in AgentState.__slots__})
