"""What the services of an inventory probe and control already."""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from defib.discovery.model import Container, is_loopback
from fleet.inventory.model import Host, Inventory, Service
from fleet.managers import supervisor
from fleet.managers.containers import ContainerSelector

DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


@dataclass(frozen=True)
class Coverage:
    """Containers, compose services (directory, service), units, programs and ports of one host that services have."""

    containers: frozenset[ContainerSelector]
    composed: frozenset[tuple[str, str]]
    units: frozenset[str]
    programs: frozenset[tuple[str, str]]  # configuration and name
    ports: frozenset[int]

    def has_container(self, container: Container) -> bool:
        return (
            any(_selects(selector, container) for selector in self.containers)
            or (posixpath.normpath(container.directory), container.service) in self.composed
        )


def _selects(selector: ContainerSelector, container: Container) -> bool:
    """Whether a control or a probe is for a container; of its labels, only those of compose are known."""
    if selector.labels:
        return set(selector.labels) <= set(container.compose_labels)
    return selector.name == container.name or selector.matches_image(container.image)


def find_coverage(host: Host, inventory: Inventory) -> Coverage:
    """Return what services of the host, or of its address, have."""
    found: dict[str, set[Any]] = {"container": set(), "compose": set(), "unit": set(), "program": set(), "port": set()}
    for service in inventory.services.values():
        if service.host == host.name:
            for kind, name in (*_probed(service), *_controlled(service)):
                found[kind].add(name)
        found["port"].update(_find_ports(service, host))
    found["port"].update(_find_own_ports(host, inventory))
    if host.ssh is not None:
        found["port"].add(host.ssh.port)
    return Coverage(*(frozenset(names) for names in found.values()))


def _probed(service: Service) -> Iterator[tuple[str, Any]]:
    kind, options = service.probe.kind, service.probe.options
    if kind == "port":
        yield kind, options.listening
    elif kind == "program":
        yield kind, (supervisor.config_name(options.config), options.name)
    elif kind == "container":
        yield kind, ContainerSelector(options.name)
    elif kind == "unit":
        yield kind, options.name


def _controlled(service: Service) -> Iterator[tuple[str, Any]]:
    if service.control is None:
        return
    kind, options = service.control.kind, service.control.options
    if kind == "docker":
        yield "container", options.selector
    elif kind == "compose":
        yield "compose", (posixpath.normpath(options.directory), options.service)
    elif kind == "systemd":
        yield "unit", options.unit
    elif kind == "supervisor":
        yield "program", (supervisor.config_name(options.config), options.program)


def _find_ports(service: Service, host: Host) -> Iterator[int]:
    """Yield the ports of the host that a service probes over the network."""
    options = service.probe.options
    for text in (getattr(options, "url", None), getattr(options, "address", None)):
        if not isinstance(text, str):
            continue
        try:
            parts = urlsplit(text if "://" in text else f"//{text}")
            name, port = parts.hostname or "", parts.port or DEFAULT_PORTS.get(parts.scheme)
        except ValueError:  # a reference in place of the port
            continue
        on_same_machine = host.shell == "local" and is_loopback(name)
        if port is not None and (name in (host.address.lower(), host.name.lower()) or on_same_machine):
            yield port


def _find_own_ports(host: Host, inventory: Inventory) -> Iterable[int]:
    """Return the ports of Defib's own servers, which run on this machine by default."""
    urls = (inventory.exporter.url.base, inventory.remediator.url.base)
    parts = [urlsplit(url) for url in urls]
    return [
        each.port
        for each in parts
        if each.port and (each.hostname == host.address or (host.shell == "local" and is_loopback(each.hostname or "")))
    ]
