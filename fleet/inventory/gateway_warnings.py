"""What of the gateway's settings is valid, and more often a mistake than intended."""

import re
from collections.abc import Iterator

from fleet.inventory.gateway import GatewaySettings
from fleet.inventory.problems import Location

Warnings = Iterator[tuple[Location, str]]


def find_gateway_warnings(gateway: GatewaySettings) -> Warnings:
    """Yield the location of each mistake, and what it is."""
    yield from _find_unreached_patterns(gateway)
    yield from _find_unreached_aliases(gateway)
    for name, upstream in gateway.upstreams.items():
        is_fallback = any(name in other.fallback for other in gateway.upstreams.values())
        if not (upstream.match or upstream.aliases or is_fallback or gateway.default == name):
            message = (
                "has no `match` and no `aliases`, and is neither default nor fallback: only X-Upstream leads to it"
            )
            yield ("gateway", "upstreams", name), message
    if gateway.state_file is None:
        for name, client in gateway.clients.items():
            if client.budget.requests is not None or client.budget.tokens is not None:
                message = "what the client has used is forgotten at each restart: set gateway.state_file"
                yield ("gateway", "clients", name, "budget"), message


def _find_unreached_patterns(gateway: GatewaySettings) -> Warnings:
    """Yield patterns that another upstream's earlier pattern covers: it matches the text of the other, `*` included."""
    earlier: list[tuple[str, str]] = []
    for name, upstream in gateway.upstreams.items():
        for index, pattern in enumerate(upstream.match):
            found = next((each for each in earlier if each[0] != name and _covers(each[1], pattern)), None)
            if found is not None:
                message = f"{found[1]!r} of {found[0]}, which is written before it, has all of its models"
                yield ("gateway", "upstreams", name, "match", index), message
            earlier.append((name, pattern))


def _covers(pattern: str, other: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), other, re.DOTALL) is not None


def _find_unreached_aliases(gateway: GatewaySettings) -> Warnings:
    first: dict[str, str] = {}
    for name, upstream in gateway.upstreams.items():
        is_fallback = any(name in other.fallback for other in gateway.upstreams.values())
        for alias in upstream.aliases:
            owner = first.setdefault(alias, name)
            if owner != name and not is_fallback:
                message = f"{owner}, which is written before it, has the same alias: only X-Upstream leads here"
                yield ("gateway", "upstreams", name, "aliases", alias), message
