"""What a decision depends on, and the decision: frozen data without behaviour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fleet.inventory.model import RemediationStep

Blocked = Literal["host-key-changed", "sudo-refused", "shell-refused"]
Refusal = Literal[
    "not-an-alert-to-act-on", "notify-only", "no-control", "already-up", "not-restartable", "attempts-used-up",
    "host-key-changed", "sudo-refused",
]  # fmt: skip
Wait = Literal[
    "automation-off", "maintenance", "silenced", "alert-gone", "host-down", "dependency-down", "storm", "backing-off",
    "healing-itself", "approval", "target-busy", "host-busy", "fleet-busy", "blind", "config-mismatch", "stopped",
    "stopped-by-hand", "starting",
]  # fmt: skip
GateName = Refusal | Wait
LOCKS: frozenset[Wait] = frozenset({"target-busy", "host-busy"})
# Only these hold an action that is otherwise due.
QUEUED: frozenset[Wait] = frozenset({"approval", "host-busy", "fleet-busy"})
# Refusals after which automation does nothing more although the service is down.
NEEDS_PERSON: frozenset[Refusal] = frozenset(
    {"no-control", "not-restartable", "host-key-changed", "sudo-refused", "attempts-used-up"}
)
# Gates that hold an operator's action, unless the operator overrules them.
OVERRULABLE: frozenset[Wait] = frozenset({"maintenance", "host-down", "dependency-down", "storm", "fleet-busy"})


@dataclass(frozen=True)
class Observation:
    """The exporter's view of a service. `success` and `reason` are of the last probe, None before the first one."""

    up: bool | None
    success: bool | None
    reason: str | None
    message: str = ""
    unchanged_for: float | None = None  # seconds since `up` last changed
    digest: str | None = None  # of the probe and the host in the exporter's configuration
    host_up: bool | None = None  # whether the host's shell responds; None: unknown
    components_up: frozenset[str] = frozenset()  # those of a status page that are up, only after a probe on request

    @property
    def summary(self) -> str:
        """The result of the last probe in one line."""
        return f"{self.reason}: {self.message}" if self.reason else "success"


@dataclass(frozen=True)
class PastAction:
    """An earlier action on the target, for this or another service that shares it."""

    began: float
    ended: float | None  # None while its command runs
    succeeded: bool = False
    after_failure: bool = False  # the target was in a failed state before
    of_incident: bool = False  # it was for the incident that is being decided

    def covers(self, at: float, tolerance: float) -> bool:
        """Whether what happened on the host at `at` may be an effect of this action."""
        return self.began - tolerance <= at and (self.ended is None or at <= self.ended + tolerance)


@dataclass(frozen=True)
class ActionHistory:
    """Earlier actions on a service and its target."""

    attempts: Mapping[str, int] = field(default_factory=dict)  # by step, since the service was last up for `window`
    tries: int = 0  # in this incident, including those that did not reach the host
    last_ended: float | None = None
    last_action: float = 0.0  # when the last action was claimed
    blocked: Blocked | None = None  # what the last try in this incident found that only an operator can fix
    healing_since: float | None = None  # when the target was first seen to recover without Defib, in this incident
    starting_since: float | None = None  # when `starting` first held, in this incident
    stopped_run: str = ""  # the run of the target that somebody stopped, as observed earlier
    stopped_why: str = ""
    actions: Sequence[PastAction] = ()  # newest first


@dataclass(frozen=True)
class ActionsInProgress:
    """Actions in progress in the fleet."""

    target_busy: bool = False
    on_host: int = 0
    in_flight: int = 0
    in_budget_window: Sequence[float] = ()  # claim times of the actions in the last ten minutes, oldest first


@dataclass(frozen=True)
class Situation:
    """Everything that a decision depends on, besides the inventory."""

    now: float
    firing: frozenset[str]  # names of the service's firing alerts
    history: ActionHistory
    in_progress: ActionsInProgress
    observed: Observation | None  # None: the exporter cannot be reached
    automation: bool = True  # the automation switch
    maintenance: str = ""  # why, if an operator began maintenance
    scheduled: str = ""  # why, if the inventory has a maintenance window now
    maintenance_ends: float | None = None
    silenced: str = ""  # by which silence or inhibition, according to Alertmanager
    gone: bool = False  # Alertmanager no longer has the alert
    healing: str = ""  # what on the host is about to restart the target
    age: float | None = None  # seconds since the target was started, by its host's clock
    stopped: str = ""  # who stopped it through Defib
    run: str = ""  # identifies the target's current or last run
    unseen: str = ""  # why the host does not report the target's state
    refused: str = ""  # why the host refuses to report it
    withheld: str = ""  # the state in which somebody keeps the target from running
    stopped_by_hand: str = ""  # evidence that somebody stopped the target after its last start
    stopped_for: float | None = None  # seconds since that stop, by the host's clock
    approved: bool = False  # an operator approved the next step
    host_down: bool = False
    dependencies_down: tuple[str, ...] = ()
    storm: tuple[int, int] | None = None  # (failing, all) services of the group, if that is a storm


@dataclass(frozen=True)
class Decision:
    """What to do and why. `until` is when to decide again; `ends` is when the wait ends, if that is known."""

    verb: Literal["act", "wait", "refuse", "nothing"]
    reason: GateName | None = None
    until: float | None = None
    detail: str = ""
    step: RemediationStep | None = None
    ends: float | None = None
