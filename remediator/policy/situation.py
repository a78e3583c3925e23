"""What a decision depends on, and the decision: frozen data without behaviour."""

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fleet.inventory.model import RemediationStep

# Why a person is needed after an action, although the next attempt may follow.
Blocked = Literal["host-key-changed", "sudo-refused", "shell-refused", "crash-loop"]
Refusal = Literal[
    "not-an-alert-to-act-on", "notify-only", "no-control", "already-up", "not-restartable", "attempts-used-up",
    "host-key-changed", "sudo-refused",
]  # fmt: skip
Wait = Literal[
    "automation-off", "maintenance", "silenced", "alert-gone", "host-down", "dependency-down", "storm", "backing-off",
    "healing-itself", "approval", "target-busy", "host-busy", "fleet-busy", "blind", "config-mismatch", "stopped",
    "stopped-by-hand", "starting", "unconfirmed",
]  # fmt: skip
GateName = Refusal | Wait
LOCKS: frozenset[Wait] = frozenset({"target-busy", "host-busy"})
# Only these hold an action that is otherwise due.
QUEUED: frozenset[Wait] = frozenset({"approval", "host-busy", "fleet-busy"})
# Of these, the ones that end when other actions end.
CAPACITY: frozenset[Wait] = frozenset({"host-busy", "fleet-busy"})
# Refusals after which automation does nothing more although the service is down.
NEEDS_PERSON: frozenset[Refusal] = frozenset(
    {"no-control", "not-restartable", "host-key-changed", "sudo-refused", "attempts-used-up"}
)
# Gates that hold an operator's action, unless the operator overrules them.
OVERRULABLE: frozenset[Wait] = frozenset({"maintenance", "host-down", "dependency-down", "storm", "fleet-busy"})


STUCK = "stuck"  # the reason of an agent that is alive and makes no progress


@dataclass(frozen=True)
class Observation:
    """The exporter's view of a service. `success` and `reason` are of the last probe, None before the first one.

    An agent that is stuck counts as failed.
    """

    up: bool | None
    success: bool | None
    reason: str | None
    message: str = ""
    unchanged_for: float | None = None  # seconds since `up` last changed
    digest: str | None = None  # of the probe and the host in the exporter's configuration
    host_up: bool | None = None  # whether the host's shell responds; None: unknown
    paused: bool = False  # it is probed only on request
    confirmed: bool = False  # the agent is stuck for certain
    # The components of a status page, if they were read: with a probe on request, or of a single service.
    components_up: frozenset[str] = frozenset()
    components_down: frozenset[str] = frozenset()

    @property
    def is_up(self) -> bool | None:
        """Whether the service is up or responds; None if that is unknown."""
        return True if self.success or self.up else self.up

    @property
    def is_refused(self) -> bool:
        """Whether the service's port refused the connection: the host responds."""
        return self.reason == "connect" and os.strerror(errno.ECONNREFUSED) in self.message

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
class ComponentHistory:
    """Earlier automatic restarts of one component."""

    attempts: int = 0  # in a row, each within `window` after the one before
    tries: int = 0  # in this incident, including those that did not reach the host
    last_ended: float | None = None


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
    components: Mapping[str, ComponentHistory] = field(default_factory=dict)


@dataclass(frozen=True)
class ActionsInProgress:
    """Actions in progress in the fleet, and services with fewer tries that wait for the same limits."""

    target_busy: bool = False
    on_host: int = 0  # whose command runs; one that is only being verified does not hold others
    in_flight: int = 0
    in_group: int = 0  # of the services of its host group, those that are not up yet
    ahead_on_host: int = 0
    ahead_in_fleet: int = 0
    in_budget_window: Sequence[float] = ()  # claim times of the actions in the last ten minutes, oldest first


@dataclass(frozen=True)
class Situation:
    """Everything that a decision depends on, besides the inventory."""

    now: float
    firing: frozenset[str]  # names of the service's firing alerts
    history: ActionHistory
    in_progress: ActionsInProgress
    observed: Observation | None  # None: the exporter cannot be reached
    alerting_components: frozenset[str] = frozenset()  # components about which an alert is firing
    muted_components: frozenset[str] = frozenset()  # those whose alert Alertmanager mutes, or does not have any more
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
    storm_steps: bool = False  # it is no fault of the network: restart in small steps during the storm
    other_is_up: bool = False  # the exporter sees another service of its host up
    host_up_for: float | None = None  # seconds since HostDown ended for its host, if that was recently


@dataclass(frozen=True)
class Decision:
    """What to do and why. `until` is when to decide again; `ends` is when the wait ends, if that is known."""

    verb: Literal["act", "wait", "refuse", "nothing"]
    reason: GateName | None = None
    until: float | None = None
    detail: str = ""
    step: RemediationStep | None = None
    component: str = ""  # that is restarted; empty: the whole service
    ends: float | None = None
