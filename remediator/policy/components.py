"""Which components of a service are restarted automatically, before the service itself is."""

from fleet.inventory.model import Remediable, Remediation
from remediator.policy.attempts import backoff_delay
from remediator.policy.situation import ComponentHistory, Situation

COMPONENT_DOWN = "ServiceComponentDown"
_NONE = ComponentHistory()


def find_down(service: Remediable, rules: Remediation, situation: Situation) -> list[str]:
    """Return the components that are down and may be restarted automatically.

    Unless an alert is firing about the service itself, these are only components about which one is firing.
    """
    down = situation.observed.components_down if situation.observed is not None else frozenset()
    if concerns_only_components(rules, situation):
        down &= situation.alerting_components - situation.muted_components
    return [name for name in service.automatic_components if name in down]


def find_restartable(service: Remediable, rules: Remediation, situation: Situation) -> list[str]:
    """Return those of `find_down` that have an attempt left.

    If no component at all is up, the service itself is restarted instead, if that is possible and due.
    """
    seen, known = situation.observed, situation.history.components
    can_restart = service.control is not None and "restart" in service.control.options.verbs
    if can_restart and seen is not None and not seen.components_up and not concerns_only_components(rules, situation):
        return []
    return [name for name in find_down(service, rules, situation) if known.get(name, _NONE).attempts < rules.attempts]


def next_component(service: Remediable, rules: Remediation, situation: Situation) -> str:
    """Return the component that is restarted now; empty if there is none, or each is backing off."""
    ready = (
        name
        for name in find_restartable(service, rules, situation)
        if backing_off_until(name, rules, situation) <= situation.now
    )
    return next(ready, "")


def backing_off_until(name: str, rules: Remediation, situation: Situation) -> float:
    """Return when a component may be restarted again."""
    history = situation.history.components.get(name, _NONE)
    if not history.tries or history.last_ended is None:
        return float("-inf")
    return history.last_ended + backoff_delay(rules.backoff, history.tries)


def concerns_only_components(rules: Remediation, situation: Situation) -> bool:
    """Whether no alert is firing about the service itself."""
    return not situation.firing & set(rules.alerts)


def is_about_components(service: Remediable, rules: Remediation, situation: Situation) -> bool:
    """Whether it is components that would be restarted, also if none of them has an attempt left."""
    if find_restartable(service, rules, situation):
        return True
    return concerns_only_components(rules, situation) and bool(find_down(service, rules, situation))
