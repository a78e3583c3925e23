"""Finding services, hosts and channels by name, with suggestions for mistyped names."""

import difflib
from collections.abc import Iterable

from fleet.inventory.model import Host, Inventory, Service
from fleet.inventory.notify import Channel
from runtime.errors import DefibError

LISTED = 10  # names in an error message, if none is similar


class UnknownNameError(DefibError):
    """The inventory has nothing with this name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"the inventory has no {kind} {name!r}{suggest(kind, name, known)}")


def suggest(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the names closest to a mistyped one, else those that exist."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if not names:
        return f" (it has no {kind}s)"
    more = ", …" if len(names) > LISTED else ""
    return f" ({kind}s: {', '.join(names[:LISTED])}{more})"


def find_service(inventory: Inventory, name: str) -> Service:
    """Return the service with a name. Raises UnknownNameError."""
    if name not in inventory.services:
        raise UnknownNameError("service", name, inventory.services)
    return inventory.services[name]


def find_host(inventory: Inventory, name: str) -> Host:
    """Return the host with a name. Raises UnknownNameError."""
    if name not in inventory.hosts:
        raise UnknownNameError("host", name, inventory.hosts)
    return inventory.hosts[name]


def find_channel(inventory: Inventory, name: str) -> Channel:
    """Return the channel with a name. Raises UnknownNameError."""
    if name not in inventory.notify.channels:
        raise UnknownNameError("channel", name, inventory.notify.channels)
    return inventory.notify.channels[name]


def names_of(inventory: Inventory, kind: str) -> list[str]:
    """Return the names of all services, hosts or groups of an inventory; `kind` is singular."""
    if kind == "group":
        return sorted({host.group for host in inventory.hosts.values() if host.group})
    return list(inventory.services if kind == "service" else inventory.hosts)
