"""Probe results: success or failure, the reason, and the details that the probe recorded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.redaction import Redactor
from runtime.times import format_rfc3339

FailureReason = Literal[
    "resolve", "connect", "timeout", "tls", "redirect", "status", "body", "header", "json",
    "latency", "protocol", "auth", "shell", "exit", "state", "late", "failed", "error",
]  # fmt: skip


Scalar = str | int | float | bool


class ProbeFailure(Exception):  # noqa: N818 - a failed probe is an expected result, not an error of the program
    """A failed probe: its reason, and one line that says what was expected and what was received."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason: FailureReason = reason
        self.message = message


def replace_unencodable(text: str) -> str:
    """Return `text` with lone surrogates, which JSON may contain and UTF-8 cannot encode, replaced."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True, slots=True)
class Component:
    """What a status page says of one component, with the values that the probe reads of it."""

    up: bool
    values: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TlsInfo:
    """The TLS version of a connection, and what its certificate says; `names` are separated by commas."""

    version: str
    issuer: str
    subject: str = ""
    names: str = ""
    serial: str = ""
    fingerprint: str = ""  # SHA-256, hexadecimal


@dataclass(slots=True)
class ProbeDetails:
    """What a probe records while it runs; a failed probe keeps what it had recorded before it failed.

    `phases` maps phase names to seconds, in order; `gauges` maps metric names to values, `values` the names
    of configured values. `evidence` is shown by `defib probe` and never becomes a label.
    """

    phases: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    tls: TlsInfo | None = None
    components: dict[str, Component] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    redact: Redactor = field(default_factory=Redactor)
    timeout_failure: ProbeFailure | None = None  # reported instead of a plain timeout if the deadline passes now
    held: int = 0  # bytes of bodies that the probe keeps in memory
    measured_at: float | None = None  # Unix time of the data that the result is based on, if older than the probe

    def add_phase(self, name: str, seconds: float) -> None:
        """Add the duration of a phase; durations of a repeated phase (after a redirect) are summed."""
        self.phases[name] = self.phases.get(name, 0.0) + seconds

    def components_json(self) -> dict[str, Any]:
        """Return the JSON representation of the components, as `components`; empty if there are none."""
        rows = [{"name": name, "up": each.up, "values": dict(each.values)} for name, each in self.components.items()]
        return {"components": rows} if rows else {}

    @property
    def components_down(self) -> list[str]:
        return [name for name, each in self.components.items() if not each.up]

    def certificate_json(self) -> dict[str, Any]:
        """Return the JSON representation of the served certificate, as `certificate`; empty if none was seen."""
        expires = self.gauges.get("service_tls_certificate_expiry_timestamp_seconds")
        if self.tls is None or expires is None:
            return {}
        return {
            "certificate": {"issuer": self.tls.issuer, "not_after": format_rfc3339(expires), "tls": self.tls.version}
        }


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of one probe; `reason` is None for a success. `started_at` is Unix time, `duration` seconds."""

    success: bool
    reason: FailureReason | None
    message: str
    started_at: float
    duration: float
    details: ProbeDetails
