"""What to do about an incident. Pure: the same situation gives the same decision.

Times are seconds of the record's steady clock, which nobody can set.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal, get_args

from fleet.inventory.digests import digests_differ
from fleet.inventory.model import Backoff, Remediation, RemediationStep, Service

DECIDE_AGAIN = 30.0
BUDGET_WINDOW = 600.0
# Seconds by which a host's account may differ from ours, of a start, and of a stop: supervisor tells it by the minute.
START_DIFFERS, STOP_DIFFERS = 5.0, 45.0
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
LOCKS: frozenset[Wait] = frozenset({"target-busy", "host-busy"})
# What keeps an action from beginning though nothing else speaks against it.
QUEUED: frozenset[Wait] = frozenset({"approval", "host-busy", "fleet-busy"})
# After these nothing is tried any more, though the service is down and automation is to restart it.
NEEDS_PERSON: frozenset[Refusal] = frozenset(
    {"no-control", "not-restartable", "host-key-changed", "sudo-refused", "attempts-used-up"}
)
# What a person's own action is held by, unless they overrule it.
FOR_PEOPLE: frozenset[Wait] = frozenset({"maintenance", "host-down", "dependency-down", "storm", "fleet-busy"})


@dataclass(frozen=True)
class Observation:
    """What the exporter says of one service; `success` and `reason` are its last probe's, None before the first."""

    up: bool | None
    success: bool | None
    reason: str | None
    message: str = ""
    unchanged_for: float | None = None  # seconds since `up` was decided or changed
    digest: str | None = None  # of the probe and the host by the exporter's configuration
    host_up: bool | None = None  # whether the host's shell answers; None: not known


@dataclass(frozen=True)
class Done:
    """An action on a target, whichever service it was for: when its command ran, and whether it succeeded."""

    began: float
    ended: float | None  # None while it runs
    succeeded: bool = False
    after_failure: bool = False  # whether the target was in a failed state before
    of_incident: bool = False  # whether it was for the incident that is decided about

    def covers(self, at: float, differs: float) -> bool:
        """Whether what happened on the host at `at` may have been this action's doing."""
        return self.began - differs <= at and (self.ended is None or at <= self.ended + differs)


@dataclass(frozen=True)
class Past:
    """What was done to a target."""

    attempts: Mapping[str, int] = field(default_factory=dict)  # by step, since the last `window` of continuous up
    tries: int = 0  # in this incident, the ones that never reached the host too
    last_ended: float | None = None
    last_action: float = 0.0  # when the last one was claimed
    blocked: Blocked | None = None  # what only a person can mend, met by the last try in this incident
    healing_since: float | None = None  # when it was first seen to be healing itself, in this incident
    starting_since: float | None = None  # when it was first left alone as just started, in this incident
    stopped_run: str = ""  # the run of the target after which somebody stopped it, by what was seen earlier
    stopped_why: str = ""
    done: Sequence[Done] = ()  # the last actions on the target, the newest first


@dataclass(frozen=True)
class Present:
    """What is under way in the fleet."""

    target_busy: bool = False
    on_host: int = 0
    in_flight: int = 0
    in_budget_window: Sequence[float] = ()  # when each action of the last ten minutes was claimed, oldest first


@dataclass(frozen=True)
class Situation:
    """All that a decision depends on."""

    now: float
    firing: frozenset[str]  # names of the alerts that fire for the target
    past: Past
    present: Present
    observed: Observation | None  # None: the exporter cannot be asked
    automation: bool = True  # whether the switch is on
    maintenance: str = ""  # why, where a person began one
    scheduled: str = ""  # why, where the inventory has one now
    maintenance_ends: float | None = None
    silenced: str = ""  # by what, where Alertmanager says so
    gone: bool = False  # Alertmanager does not know the alert any more
    healing: str = ""  # what on the host is about to bring it back itself
    age: float | None = None  # seconds since the target was started, by its host's clock
    stopped: str = ""  # who stopped it through Defib
    run: str = ""  # what tells the target's last run from others, as its host tells of it
    unseen: str = ""  # why its host does not tell how the target stands
    refused: str = ""  # by what its host does not allow to look
    withheld: str = ""  # in which state somebody keeps it from running, by what its host says
    stopped_by_hand: str = ""  # that somebody stopped it after its last start, by what its host says
    stopped_for: float | None = None  # seconds since that stop, by the host's clock
    approved: bool = False  # a person has approved the step that is next
    host_down: bool = False
    dependencies_down: tuple[str, ...] = ()
    storm: tuple[int, int] | None = None  # failing and all services of the group, where that is a storm


@dataclass(frozen=True)
class Decision:
    """`act` (with a step), `wait` (until a time), `refuse` or `nothing`, and why.

    `until` is when to decide again; `ends` is when the wait is over, where that is known.
    """

    verb: Literal["act", "wait", "refuse", "nothing"]
    reason: Refusal | Wait | None = None
    until: float | None = None
    detail: str = ""
    step: RemediationStep | None = None
    ends: float | None = None


@dataclass(frozen=True)
class Held:
    """A gate that is shut: why, and until when where that is known."""

    detail: str = ""
    until: float | None = None


@dataclass(frozen=True)
class Passed:
    """One gate as `explain` tells of it; `held` is None where it is open."""

    name: Refusal | Wait
    held: Held | None


def decide(service: Service | None, rules: Remediation, situation: Situation) -> Decision:
    """The decision about a target whose inventory entry is `service`; `rules` are those that hold for it."""
    if service is None or not situation.firing:
        return Decision("nothing")
    for name, gate in GATES.items():
        held = gate(service, rules, situation)
        if held is not None:
            return _shut(name, held, situation.now)
    return Decision("act", step=next_step(service, rules, situation.past))


def explain(service: Service, rules: Remediation, situation: Situation) -> list[Passed]:
    """Every gate, in the order in which they are looked at."""
    return [Passed(name, gate(service, rules, situation)) for name, gate in GATES.items()]


def held_for_person(
    service: Service, rules: Remediation, situation: Situation, overruled: Collection[str]
) -> Decision | None:
    """What holds back an action that a person asks for, and that they have not overruled; locks always do."""
    for name, gate in GATES.items():
        if name in LOCKS or (name in FOR_PEOPLE and name not in overruled):
            held = gate(service, rules, situation)
            if held is not None:
                return _shut(name, held, situation.now)
    return None


def next_step(service: Service, rules: Remediation, past: Past) -> RemediationStep | None:
    """The first step of the ladder that has an attempt left, of those that this service's control can take."""
    for step in ladder(service, rules):
        if past.attempts.get(step.kind, 0) < allowed(step, rules):
            return step
    return None


def ladder(service: Service, rules: Remediation) -> list[RemediationStep]:
    """The steps that can be taken: to recreate without a command of the user's needs a container."""
    docker = service.control is not None and service.control.kind == "docker"
    return [step for step in rules.steps if docker or step.recreate is None or step.recreate.command]


def allowed(step: RemediationStep, rules: Remediation) -> int:
    """How many attempts a step has."""
    return rules.attempts if step.recreate is None else step.recreate.attempts


def _shut(name: Refusal | Wait, held: Held, now: float) -> Decision:
    if name in get_args(Refusal):
        return Decision("refuse", name, detail=held.detail)
    again = now + DECIDE_AGAIN
    until = min(held.until, again) if held.until is not None else again
    return Decision("wait", name, until, held.detail, ends=held.until)


def _not_an_alert(_service: Service, rules: Remediation, situation: Situation) -> Held | None:
    return None if situation.firing & set(rules.alerts) else Held(", ".join(sorted(situation.firing)))


def _notify_only(service: Service, _rules: Remediation, _situation: Situation) -> Held | None:
    return Held() if service.on_failure == "notify" else None


def _no_control(service: Service, _rules: Remediation, _situation: Situation) -> Held | None:
    return None if service.control is not None and "restart" in service.control.options.verbs else Held()


def _stopped(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    return Held(situation.stopped) if situation.stopped and not situation.approved else None


def _target_busy(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    return Held() if situation.present.target_busy else None


def _blind(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    seen = situation.observed
    if seen is None:
        return Held("the exporter cannot be asked")
    return Held("the exporter has not decided yet") if seen.up is None and not seen.success else None


def _config_mismatch(service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    seen = situation.observed
    if seen is None or not digests_differ(service.digest, seen.digest):
        return None
    return Held("the exporter has another configuration of this service: reload the exporter or the remediator")


def _already_up(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    seen = situation.observed
    return Held() if seen is not None and (seen.success or seen.up) else None


def _not_restartable(_service: Service, rules: Remediation, situation: Situation) -> Held | None:
    seen = situation.observed
    return Held(f"{seen.reason}: {seen.message}") if seen is not None and seen.reason in rules.never_for else None


def _host_key_changed(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    return Held() if situation.past.blocked == "host-key-changed" else None


def _sudo_refused(_service: Service, rules: Remediation, situation: Situation) -> Held | None:
    """Not being allowed to act, or to see whether somebody stopped it on purpose."""
    if situation.past.blocked == "sudo-refused":
        return Held()
    return Held(situation.refused) if situation.refused and rules.respect_stop and not situation.approved else None


def _attempts_used_up(service: Service, rules: Remediation, situation: Situation) -> Held | None:
    if next_step(service, rules, situation.past) is not None:
        return None
    used = situation.past.attempts
    steps = ladder(service, rules)
    return Held(", ".join(f"{step.kind}: {used.get(step.kind, 0)} of {allowed(step, rules)}" for step in steps))


def _automation_off(_service: Service, rules: Remediation, situation: Situation) -> Held | None:
    if not rules.automatic:
        return Held("by the inventory")
    return None if situation.automation else Held("by the switch")


def _maintenance(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    why = situation.maintenance or situation.scheduled
    return Held(why, situation.maintenance_ends) if why else None


def _silenced(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    return Held(situation.silenced) if situation.silenced else None


def _alert_gone(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    return Held() if situation.gone else None


def _backing_off(_service: Service, rules: Remediation, situation: Situation) -> Held | None:
    past = situation.past
    if not past.tries or past.last_ended is None:
        return None
    until = past.last_ended + backoff(rules.backoff, past.tries)
    return Held(f"after {past.tries} tries", until) if situation.now < until else None


def _healing_itself(service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    """What restarts itself is left to, for as long as a start may take; what has not helped by then never will."""
    patience = service.control.start_within if service.control is not None else 0.0
    since = situation.past.healing_since
    ends = since + patience if since is not None else None
    long_enough = ends is not None and situation.now >= ends
    return Held(situation.healing, ends) if situation.healing and not long_enough else None


def _stopped_by_hand(_service: Service, rules: Remediation, situation: Situation) -> Held | None:
    """What a person stopped is not started; what our own action stopped, and could not start again, is."""
    if situation.approved or not rules.respect_stop:
        return None
    if situation.withheld:
        return Held(situation.withheld)
    past = situation.past
    if not situation.stopped_by_hand:
        # What was seen earlier holds as long as nothing shows that the target has run since.
        still = bool(situation.unseen) if not situation.run else situation.run == past.stopped_run
        return Held(past.stopped_why) if past.stopped_why and still else None
    since = situation.stopped_for
    at = situation.now - since if since is not None else None
    in_vain = takewhile(lambda done: not done.succeeded, past.done)
    return None if any(_stopped_it(done, at) for done in in_vain) else Held(situation.stopped_by_hand)


def _stopped_it(done: Done, at: float | None) -> bool:
    """Whether what looks like a stop at a time is what an action without success has left of its target."""
    if at is not None and done.covers(at, STOP_DIFFERS):
        return True
    # Its failure was reset, and it was not started: it has not run since.
    earlier = at is None or (done.ended is not None and at <= done.ended)
    return done.after_failure and done.of_incident and earlier


def _starting(service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    """What somebody else has just started is left alone for as long as a start may take, once in an incident."""
    patience = service.control.start_within if service.control is not None else 0.0
    now, age, past = situation.now, situation.age, situation.past
    if age is None or age >= patience or any(done.covers(now - age, START_DIFFERS) for done in past.done):
        return None
    if past.starting_since is not None and now - past.starting_since >= patience:
        return None
    return Held(f"it was started {age:.0f} s ago, and has {patience:g} s to come up", now + patience - age)


def _host_down(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    return Held() if situation.host_down else None


def _dependency_down(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    return Held(", ".join(situation.dependencies_down)) if situation.dependencies_down else None


def _storm(_service: Service, _rules: Remediation, situation: Situation) -> Held | None:
    if situation.storm is None:
        return None
    failing, total = situation.storm
    return Held(f"{failing} of {total} services of its group are failing")


def _approval(service: Service, rules: Remediation, situation: Situation) -> Held | None:
    step = next_step(service, rules, situation.past)
    return Held(step.kind) if step is not None and step.needs_approval and not situation.approved else None


def _host_busy(_service: Service, rules: Remediation, situation: Situation) -> Held | None:
    return Held() if situation.present.on_host >= rules.actions_per_host else None


def _fleet_busy(_service: Service, rules: Remediation, situation: Situation) -> Held | None:
    present = situation.present
    if present.in_flight >= rules.actions_in_flight:
        return Held(f"{present.in_flight} commands are running")
    if len(present.in_budget_window) >= rules.actions_per_10m:
        oldest = present.in_budget_window[-rules.actions_per_10m]
        return Held("the actions of ten minutes are used up", oldest + BUDGET_WINDOW)
    return None


Gate = Callable[[Service, Remediation, Situation], Held | None]
GATES: Mapping[Refusal | Wait, Gate] = {
    "not-an-alert-to-act-on": _not_an_alert,
    "stopped": _stopped,
    "notify-only": _notify_only,
    "no-control": _no_control,
    "target-busy": _target_busy,
    "blind": _blind,
    "config-mismatch": _config_mismatch,
    "already-up": _already_up,
    "host-down": _host_down,  # before what a host that is down makes of every probe
    "not-restartable": _not_restartable,
    "host-key-changed": _host_key_changed,
    "sudo-refused": _sudo_refused,
    "attempts-used-up": _attempts_used_up,
    "automation-off": _automation_off,
    "maintenance": _maintenance,
    "silenced": _silenced,
    "alert-gone": _alert_gone,
    "backing-off": _backing_off,
    "dependency-down": _dependency_down,
    "storm": _storm,
    "stopped-by-hand": _stopped_by_hand,
    "healing-itself": _healing_itself,
    "starting": _starting,
    "approval": _approval,
    "host-busy": _host_busy,
    "fleet-busy": _fleet_busy,
}


def backoff(rules: Backoff, tries: int) -> float:
    """Seconds between the end of try number `tries` and the next."""
    # The exponent is bounded, since a float is not.
    return min(rules.cap, rules.first * rules.factor ** min(tries - 1, 64))


def is_storm(rules: Remediation, failing: int, total: int) -> bool:
    return failing >= rules.storm.at_least and failing > rules.storm.ratio * total


def since_refill(outages: Sequence[tuple[float, float | None]], window: float) -> float:
    """From when attempts count against the budget: the beginning of the last `window` of continuous up.

    `outages` are the target's incidents as (opened, closed) in order; between two of them it was up.
    """
    since = float("-inf")
    closed: float | None = None
    for opened, ended in outages:
        if closed is not None and opened - closed >= window:
            since = closed
        closed = ended
    return since


def group_of(service: str, groups: Mapping[str, str]) -> list[str]:
    """The services that share a host group with `service`; those without a group are one with the whole fleet."""
    group = groups.get(service, "")
    return [name for name, other in groups.items() if other == group] if group else list(groups)
