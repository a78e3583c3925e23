"""Finding services, hosts and channels by name, with suggestions for mistyped names."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class HostSelection:
    """The hosts that a command is about: those named, those of a group, or all."""

    names: Sequence[str] = ()
    group: str = ""
    everything: bool = False

    def find_hosts(self, inventory: Inventory) -> list[Host]:
        """Return the hosts, each once. Raises DefibError."""
        if not (self.names or self.group or self.everything):
            raise DefibError("no hosts: name them, or use --group GROUP or --all")
        groups = names_of(inventory, "group")
        if self.group and self.group not in groups:
            raise UnknownNameError("group", self.group, groups)
        named = {name: find_host(inventory, name) for name in self.names}
        others = inventory.hosts if self.everything else {}
        of_group = {name: host for name, host in inventory.hosts.items() if self.group and host.group == self.group}
        return list({**named, **of_group, **others}.values())

    def find_ssh_hosts(self, inventory: Inventory) -> tuple[list[Host], list[Host]]:
        """Return the hosts with SSH settings, and those without. Raises DefibError if one of these is named."""
        hosts = self.find_hosts(inventory)
        others = [host for host in hosts if host.ssh is None]
        for name in self.names:
            if inventory.hosts[name].ssh is None:
                raise DefibError(f"the host {name!r} has no SSH settings: set hosts.{name}.ssh")
        if len(others) == len(hosts):
            raise DefibError("none of these hosts has SSH settings: set `ssh` of the hosts")
        return [host for host in hosts if host.ssh is not None], others


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
