"""The ladder of steps, how many attempts each has left, and the back-off between them."""

from collections.abc import Sequence

from fleet.inventory.model import Backoff, Remediation, RemediationStep, Service
from remediator.policy.situation import ActionHistory


def next_step(service: Service, rules: Remediation, history: ActionHistory) -> RemediationStep | None:
    """Return the first step that the service's control supports and that has an attempt left."""
    for step in supported_steps(service, rules):
        if history.attempts.get(step.kind, 0) < max_attempts(step, rules):
            return step
    return None


def supported_steps(service: Service, rules: Remediation) -> list[RemediationStep]:
    """Return the steps that the service's control supports: not every kind can recreate without a command."""
    can_recreate = service.control is not None and getattr(service.control.options, "can_recreate", False)
    return [step for step in rules.steps if can_recreate or step.recreate is None or step.recreate.command]


def max_attempts(step: RemediationStep, rules: Remediation) -> int:
    return rules.attempts if step.recreate is None else step.recreate.attempts


def backoff_delay(rules: Backoff, tries: int) -> float:
    """Return the seconds between the end of try number `tries` and the next one."""
    # The exponent is limited because a large one overflows a float.
    return min(rules.cap, rules.first * rules.factor ** min(tries - 1, 64))


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
