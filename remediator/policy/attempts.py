"""The ladder of steps, how many attempts each has left, and the back-off between them."""

from collections.abc import Sequence
from dataclasses import dataclass

from fleet.inventory.model import Backoff, Remediable, Remediation, RemediationStep, Service, WakeStep
from remediator.policy.situation import ActionHistory


@dataclass(frozen=True)
class PastRestart:
    """A restart that counts as an attempt: when it began, and when the service was up and down again after it."""

    began: float
    up_at: float | None = None
    down_at: float | None = None

    @property
    def up_for(self) -> float | None:
        """How many seconds the service was up; None if it did not come up, or is up."""
        return None if self.up_at is None or self.down_at is None else max(0.0, self.down_at - self.up_at)


def next_step(service: Remediable, rules: Remediation, history: ActionHistory) -> RemediationStep | None:
    """Return the first step that the service's control supports and that has an attempt left."""
    for step in supported_steps(service, rules):
        if history.attempts.get(step.kind, 0) < max_attempts(step, rules):
            return step
    return None


def supported_steps(service: Remediable, rules: Remediation) -> list[RemediationStep]:
    """Return the steps that the service's control supports: not every kind can recreate without a command."""
    if isinstance(service, Service) and service.control is None:  # an agent can be woken without
        return [step for step in rules.steps if isinstance(step, WakeStep)]
    can_recreate = service.control is not None and getattr(service.control.options, "can_recreate", False)
    return [step for step in rules.steps if can_recreate or step.recreate is None or step.recreate.command]


def max_attempts(step: RemediationStep, rules: Remediation) -> int:
    return rules.attempts if step.restart is not None else int(step.options.attempts)


def backoff_delay(rules: Backoff, tries: int) -> float:
    """Return the seconds between the end of try number `tries` and the next one."""
    # The exponent is limited because a large one overflows a float.
    return min(rules.cap, rules.first * rules.factor ** min(tries - 1, 64))


def next_try_at(rules: Backoff, history: ActionHistory) -> float | None:
    """Return when the back-off after the last try in the incident ends; None if there was no try."""
    if not history.tries or history.last_ended is None:
        return None
    return history.last_ended + backoff_delay(rules, history.tries)


def find_queue_end(limit: int, window: float, waiting: int, claims: Sequence[float], now: float) -> float:
    """Return when the last of `waiting` actions can begin, if `limit` actions may begin within `window` seconds.

    `claims` are the times of the actions in the last `window`, oldest first.
    """
    begun = list(claims)
    for _ in range(waiting):
        begun.append(max(now, begun[-limit] + window) if len(begun) >= limit else now)
    return begun[-1] if begun else now


def count_in_a_row(restarts: Sequence[tuple[float, float | None]], window: float, now: float) -> int:
    """Return how many of the last restarts, newest first, were each followed by another or by `now` within `window`.

    `restarts` are (begun, ended); ended is None while one is in progress.
    """
    next_begun = now
    for number, (begun, ended) in enumerate(restarts):
        if ended is not None and next_begun - ended >= window:
            return number
        next_begun = begun
    return len(restarts)


def counted_since(outages: Sequence[tuple[float, float | None]], window: float, now: float) -> float:
    """Return the time after which attempts count: the start of the last `window` in which the service was up.

    `outages` are (opened, closed) of the service's incidents in order; closed is None where no recovery was seen.
    """
    since = float("-inf")
    recovered: float | None = None
    for opened, closed in [*outages, (now, None)]:
        if recovered is not None and opened - recovered >= window:
            since = recovered
        recovered = closed
    return since
