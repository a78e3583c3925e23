"""What a probe found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Reason = Literal[
    "resolve", "connect", "timeout", "tls", "status", "body", "header", "json",
    "latency", "protocol", "auth", "shell", "exit", "state", "error",
]  # fmt: skip


class ProbeFailure(Exception):  # noqa: N818 - the vocabulary's word: a probe gives success or a failure
    """A probe failed: one reason, and one line that names what was expected and what came."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message


@dataclass(slots=True)
class Seen:
    """What a probe notes while it runs, so that a failure half-way still tells how far it came.

    `phases` are seconds by name, in order; `evidence` is for people (`defib probe`), never for labels.
    """

    phases: dict[str, float] = field(default_factory=dict)
    status_code: int | None = None
    certificate_expiry: float | None = None  # Unix time
    evidence: dict[str, Any] = field(default_factory=dict)
    redact: Callable[[str], str] = str
    overdue: ProbeFailure | None = None  # what to tell at the deadline instead of a bare timeout


@dataclass(frozen=True, slots=True)
class Result:
    """One probe's outcome; `reason` is None for a success. Times are seconds and Unix time."""

    success: bool
    reason: Reason | None
    message: str
    started_at: float
    duration: float
    seen: Seen
