"""Which hosts modules of `exporter.modules_file` may probe."""

import ipaddress
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from fleet.inventory.access import Network, check_host_name, parse_network

_BELOW = "*."


def _check_pattern(pattern: str) -> str:
    if _find_network(pattern) is None:
        try:
            check_host_name(pattern.removeprefix(_BELOW))
        except ValueError:
            forms = "host.example, *.example, 10.0.0.5 or 10.0.0.0/8"
            raise ValueError(f"{pattern!r} is not a host or a network; write {forms}") from None
    return pattern


TargetPattern = Annotated[str, AfterValidator(_check_pattern)]


def _find_network(pattern: str) -> Network | None:
    try:
        return parse_network(pattern)
    except ValueError:
        return None


def matches_target(patterns: Sequence[str], host: str) -> bool:
    """Return whether a host is one of those in `patterns`. A name is not resolved: networks are for addresses only."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower().removesuffix(".")
        return any(_matches_name(pattern.lower(), name) for pattern in patterns)
    return any(address in network for network in map(_find_network, patterns) if network is not None)


def _matches_name(pattern: str, name: str) -> bool:
    return name.endswith(pattern.removeprefix("*")) if pattern.startswith(_BELOW) else name == pattern
