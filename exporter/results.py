"""What a probe found."""

from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.redaction import Redactor

Reason = Literal[
    "resolve", "connect", "timeout", "tls", "redirect", "status", "body", "header", "json",
    "latency", "protocol", "auth", "shell", "exit", "state", "error",
]  # fmt: skip


class ProbeFailure(Exception):  # noqa: N818 - the vocabulary's word: a probe gives success or a failure
    """A probe failed: one reason, and one line that names what was expected and what came."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message


def sayable(text: str) -> str:
    """`text` without what no encoding has: JSON may hold half a character."""
    return text.encode("utf-8", "replace").decode()


@dataclass(slots=True)
class Seen:
    """What a probe notes while it runs, so that a failure half-way still tells how far it came.

    `phases` are seconds by name, in order; `gauges` are values by metric; `evidence` is for people (`defib probe`),
    never for labels.
    """

    phases: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    tls: tuple[str, str] | None = None  # the certificate's issuer and the protocol's version
    components: dict[str, bool] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    redact: Redactor = field(default_factory=Redactor)
    overdue: ProbeFailure | None = None  # what to tell at the deadline instead of a bare timeout
    began: float | None = None  # Unix time of what the result rests on, where that is older than the probe

    def phase(self, name: str, seconds: float) -> None:
        """Note a phase; one that happens again, after a redirect, takes its time again."""
        self.phases[name] = self.phases.get(name, 0.0) + seconds


@dataclass(frozen=True, slots=True)
class Result:
    """One probe's outcome; `reason` is None for a success. Times are seconds and Unix time."""

    success: bool
    reason: Reason | None
    message: str
    started_at: float
    duration: float
    seen: Seen
