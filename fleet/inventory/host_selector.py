"""Which hosts a template makes services for, and on which hosts a runbook is run."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field

from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import as_list


class HostSelector(ConfigModel):
    """Hosts that match all of this: one of the groups, one of the names with wildcards, and all labels."""

    group: str | list[str] | None = None
    names: str | list[str] | None = None
    labels: dict[str, str | list[str]] = Field(default_factory=dict)


def matches_host(selector: Mapping[str, Any], name: str, group: str, labels: Mapping[str, Any]) -> bool:
    """Whether a host matches all parts of a selector as it is written."""
    wanted = selector.get("labels")
    return (
        ("group" not in selector or group in as_list(selector["group"]))
        and ("names" not in selector or any(fnmatchcase(name, str(each)) for each in as_list(selector["names"])))
        and all(
            labels.get(key) in as_list(value) for key, value in (wanted if isinstance(wanted, dict) else {}).items()
        )
    )
