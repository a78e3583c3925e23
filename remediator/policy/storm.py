"""Storms: so many services of a host group fail at once that the cause is probably the network, or Defib itself.

Failures that a host or a refused connection explains are no fault of the network. They are repaired in small steps.
"""

from collections.abc import Collection, Mapping

from fleet.inventory.model import Remediation

STEP_RATIO = 0.1  # of a group's services that are acted on at a time during a storm


def is_storm(rules: Remediation, failing: int, total: int) -> bool:
    return failing >= rules.storm.at_least and failing > rules.storm.ratio * total


def can_step(
    rules: Remediation, service: str, failing: Collection[str], explained: Collection[str], total: int
) -> bool:
    """Whether a failing service is restarted in small steps during a storm.

    `explained` are those of the `failing` services whose host says that they exited, or refuses their connections. The
    others are held if they are a storm by themselves.
    """
    return service in explained or not is_storm(rules, len(set(failing) - set(explained)), total)


def step_size(total: int) -> int:
    """Return how many services of a group are acted on at a time during a storm."""
    return max(1, int(total * STEP_RATIO))


def services_in_group(service: str, groups: Mapping[str, str]) -> list[str]:
    """Return the services whose host group is that of `service`; all services if it has no group.

    `groups` maps each service to its host's group, which may be empty.
    """
    group = groups.get(service, "")
    return [name for name, other in groups.items() if other == group] if group else list(groups)
