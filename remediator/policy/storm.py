"""Storms: so many services of a host group fail at once that restarting them would not help."""

from collections.abc import Mapping

from fleet.inventory.model import Remediation


def is_storm(rules: Remediation, failing: int, total: int) -> bool:
    return failing >= rules.storm.at_least and failing > rules.storm.ratio * total


def services_in_group(service: str, groups: Mapping[str, str]) -> list[str]:
    """Return the services whose host group is that of `service`; all services if it has no group.

    `groups` maps each service to its host's group, which may be empty.
    """
    group = groups.get(service, "")
    return [name for name, other in groups.items() if other == group] if group else list(groups)
