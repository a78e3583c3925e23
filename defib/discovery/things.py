"""The things that run on a host, each with its ports, and the reasons why some are not proposed as services."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from defib.discovery import known
from defib.discovery.coverage import Coverage
from defib.discovery.model import Container, Endpoint, Findings, Listener, Process, Program, Unit
from fleet.managers import supervisor, systemd
from fleet.managers.containers import ContainerName

Kind = Literal["container", "unit", "program", "process", "port"]
Key = tuple[Kind, str]
OWN_UNITS = ("/etc/systemd/system/", "/usr/local/lib/systemd/")  # not a package's
EPHEMERAL = 32768  # the first port that Linux gives to programs that ask for none
FORWARDERS = ("docker-proxy", "rootlessport", "conmon")  # they listen on the published ports of containers
_CONTAINER_ID = re.compile(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:$|/)")
_SHORT_ID = 12  # characters of the ID in `docker ps`
_NAMES: Mapping[str, TypeAdapter[str]] = {
    "container": TypeAdapter(ContainerName),
    "unit": TypeAdapter(systemd.UnitName),
    "program": TypeAdapter(supervisor.ProgramName),
}
_CONFIG = TypeAdapter(supervisor.ConfigPath)


@dataclass
class Thing:
    """One thing that runs on the host, with its ports and what docker, systemd or supervisor say of it."""

    kind: Kind
    name: str
    ports: dict[int, Listener | None] = field(default_factory=dict)
    container: Container | None = None
    unit: Unit | None = None
    program: Program | None = None
    process: Process | None = None

    @property
    def label(self) -> str:
        if self.kind == "process":
            return f"process {self.name} (port {min(self.ports)})"
        return f"{self.kind} {self.name}"


def find_things(found: Findings) -> list[Thing]:
    """Return everything that runs, each once: with the port of a container, its process is not a thing of its own."""
    things: dict[Key, Thing] = {}
    owners = _Owners(found)
    for container in found.containers:
        things["container", container.name] = thing = Thing("container", container.name, container=container)
        thing.ports |= dict.fromkeys(each.port for each in container.ports)
    for unit in found.units:
        things["unit", unit.name] = Thing("unit", unit.name, unit=unit)
    for program in found.programs:
        key = owners.key_of_program(program)
        things[key] = Thing("program", program.name, program=program)
    for listener in found.listeners:
        key = owners.find(listener)
        thing = things.setdefault(key, Thing(key[0], listener.process.name if listener.process else key[1]))
        thing.ports[listener.port] = listener
        thing.process = thing.process or listener.process
    return list(things.values())


class _Owners:
    """Finds what a listening socket belongs to."""

    def __init__(self, found: Findings) -> None:
        self._by_port = {each.port: box.name for box in found.containers for each in box.ports}
        self._by_id = {container.id: container.name for container in found.containers if container.id}
        self._units = {unit.name for unit in found.units}
        self._by_pid = {each.pid: self.key_of_program(each) for each in found.programs if each.pid is not None}

    @staticmethod
    def key_of_program(program: Program) -> Key:
        return "program", f"{program.config} {program.name}"

    def find(self, listener: Listener) -> Key:
        process = listener.process
        cgroups = [each for each in (process.cgroup if process else "", listener.cgroup) if each]
        return (
            self._find_published(listener)
            or next(filter(None, map(self._find_container, cgroups)), None)
            or self._find_program(process)
            or next(filter(None, map(self._find_unit, cgroups)), None)
            or (("process", f"{process.name} {process.pid}") if process else ("port", str(listener.port)))
        )

    def _find_published(self, listener: Listener) -> Key | None:
        name = self._by_port.get(listener.port)
        # Another program may listen on the same port of another address.
        foreign = listener.process is not None and listener.process.name not in FORWARDERS
        return None if name is None or foreign else ("container", name)

    def _find_container(self, cgroup: str) -> Key | None:
        match = _CONTAINER_ID.search(cgroup)
        name = self._by_id.get(match[1][:_SHORT_ID]) if match else None
        return None if name is None else ("container", name)

    def _find_program(self, process: Process | None) -> Key | None:
        pids = (process.pid, *process.ancestors) if process else ()
        return next((self._by_pid[pid] for pid in pids if pid in self._by_pid), None)

    def _find_unit(self, cgroup: str) -> Key | None:
        """Return the unit of a control group, unless the unit starts what belongs to others."""
        for part in reversed(cgroup.split("/")):
            if known.MANAGERS.fullmatch(part) is not None:
                return None
            if part in self._units:
                return "unit", part
        return None


def is_covered(thing: Thing, coverage: Coverage) -> bool:
    if thing.container is not None and coverage.has_container(thing.container):
        return True
    if thing.program is not None and (thing.program.config, thing.name) in coverage.programs:
        return True
    return (thing.kind == "unit" and thing.name in coverage.units) or not coverage.ports.isdisjoint(thing.ports)


def find_reason_against(thing: Thing, endpoints: Mapping[int, Endpoint]) -> str | None:
    """Return why a thing is not proposed, which is empty for what nobody expects in a list; None if it is proposed."""
    if not _has_valid_name(thing):
        return "the name cannot be used in a configuration"
    if thing.kind == "container":
        state = thing.container.state if thing.container else ""
        return None if state in ("running", "restarting", "paused") else f"it is {state or 'in an unknown state'}"
    if thing.kind == "program":
        return "it is STOPPED" if thing.program and thing.program.state == "STOPPED" else None
    if thing.kind == "unit":
        return _find_reason_against_unit(thing)
    if thing.process is not None:
        return "" if known.is_no_service(thing.process.name) else None
    return _find_reason_against_port(int(thing.name), endpoints)


def _find_reason_against_unit(thing: Thing) -> str | None:
    unit = thing.unit
    if unit is None or known.is_no_service(unit.name):
        return ""
    if unit.active == "failed" and unit.path.startswith(OWN_UNITS):
        return None
    runs = systemd.is_active_state(unit.active, unit.sub) and unit.sub == "running"
    return None if thing.ports or (runs and unit.path.startswith(OWN_UNITS)) else ""


def _find_reason_against_port(port: int, endpoints: Mapping[int, Endpoint]) -> str | None:
    if known.PROTOCOLS.get(port) == "SSH":
        return ""
    is_unknown = port not in endpoints or endpoints[port].kind in ("closed", "tcp")
    return "an unknown program on a temporary port" if port >= EPHEMERAL and is_unknown else None


def _has_valid_name(thing: Thing) -> bool:
    """Whether a configuration can name a thing; in a name with a brace, placeholders would be replaced."""
    if "{" in f"{thing.name}{thing.program.config if thing.program else ''}":
        return False
    try:
        if thing.program is not None and thing.program.config != supervisor.config_name(None):
            _CONFIG.validate_python(thing.program.config)
        return thing.kind not in _NAMES or _NAMES[thing.kind].validate_python(thing.name) == thing.name
    except ValidationError:
        return False
