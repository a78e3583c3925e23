"""What a service consists of on its host: the container, the unit or the program that it probes or acts on."""

from collections.abc import Mapping
from types import MappingProxyType

from fleet.inventory.model import Inventory, Service

# The option of each kind of control that names what it acts on.
_OPTIONS: Mapping[str, str] = MappingProxyType({"docker": "container", "systemd": "unit", "supervisor": "program"})
Thing = tuple[str, str]  # the key of a word, such as `unit`, and a name


def find_thing(service: Service) -> Thing | None:
    """Return what a service's control acts on; None where it has no name of its own."""
    control = service.control
    if control is None or (key := _OPTIONS.get(control.kind)) is None:
        return None
    name = getattr(control.options, key)
    return None if name is None else (key, str(name))


def find_services_of_things(inventory: Inventory, host: str) -> dict[str, dict[str, list[str]]]:
    """Return the services of the containers, units and programs of a host, by the word's key and the name."""
    found: dict[str, dict[str, list[str]]] = {key: {} for key in _OPTIONS.values()}
    for service in inventory.services.values():
        if service.host != host:
            continue
        for key, name in dict.fromkeys(filter(None, (find_thing(service), _find_probed(service)))):
            found[key].setdefault(_without_group(name), []).append(service.id)
    return found


def _find_probed(service: Service) -> Thing | None:
    probe = service.probe
    return (probe.kind, str(probe.options.name)) if probe.kind in _OPTIONS.values() else None


def _without_group(name: str) -> str:
    """Return the name of a program without its group in supervisor, if that has the same name."""
    group, _, program = name.rpartition(":")
    return program if group == program else name
