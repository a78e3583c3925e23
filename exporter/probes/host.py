"""The probes of what a host itself knows: containers, units, programs, ports. They share one reading of the host."""

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

from pydantic import Field

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.results import ProbeFailure, Seen
from fleet.host import ports
from fleet.host.sections import Section
from fleet.inventory.endpoints import ConfigModel
from fleet.managers import docker, supervisor, systemd
from fleet.shells import ENDED_BY_TIMEOUT, ShellError

T = TypeVar("T")


class HostOptions(ConfigModel):
    """Options of a probe that rests on a reading of the host."""

    needs_host: ClassVar[bool] = True

    @property
    def section(self) -> Section:
        """What is to be read of the host."""
        raise NotImplementedError


class ContainerOptions(HostOptions):
    name: docker.ContainerName

    @property
    def section(self) -> Section:
        return docker.SECTION


class UnitOptions(HostOptions):
    wrapper_argument: ClassVar[str] = "name"
    name: systemd.UnitName

    @property
    def section(self) -> Section:
        return systemd.build_section(self.name)


class ProgramOptions(HostOptions):
    wrapper_argument: ClassVar[str] = "config"
    name: supervisor.ProgramName
    config: supervisor.ConfigPath | None = None  # on the service's host

    @property
    def section(self) -> Section:
        return supervisor.build_section(self.config)


class PortOptions(HostOptions):
    listening: int = Field(ge=1, le=65535)

    @property
    def section(self) -> Section:
        return ports.SECTION


async def probe_container(options: ContainerOptions, means: Means, seen: Seen) -> None:
    found = (await _read(options, means, seen, docker.parse_containers, partly=options.name)).get(options.name)
    if found is None:
        raise ProbeFailure("state", f"there is no container {options.name} on {means.host}")
    seen.evidence["container"] = f"{found.state}, {found.health or 'no health check'}, started {found.started}"
    if found.state != "running":
        ended = f" (exit {found.exit_code})" if found.state == "exited" else ""
        raise ProbeFailure("state", f"the container {options.name} is {found.state}{ended}, expected running")
    if not found.is_up:
        raise ProbeFailure("state", f"the container {options.name} is running, but its health is {found.health}")


async def probe_unit(options: UnitOptions, means: Means, seen: Seen) -> None:
    found = (await _read(options, means, seen, systemd.parse_units)).get(options.name)
    if not isinstance(found, systemd.UnitStatus):
        said = seen.redact((found or "it said nothing").splitlines()[-1])
        raise ProbeFailure("shell", f"{means.host}: systemd cannot be asked: {said}")
    seen.evidence["unit"] = f"{found.load}, {found.active} ({found.sub}), result {found.result}"
    if found.load == "not-found":
        raise ProbeFailure("state", f"there is no unit {options.name} on {means.host}")
    if not found.is_active:
        why = f", {found.result}" if found.result not in ("", "success") else ""
        raise ProbeFailure("state", f"the unit {options.name} is {found.active} ({found.sub}{why}), expected active")


async def probe_program(options: ProgramOptions, means: Means, seen: Seen) -> None:
    told = (await _read(options, means, seen, supervisor.parse_status)).get(
        supervisor.config_name(options.config), supervisor.SupervisordStatus()
    )
    if told.error:
        raise ProbeFailure("shell", f"{means.host}: supervisor cannot be asked: {seen.redact(told.error)}")
    found = told.programs.get(options.name)
    if found is None:
        raise ProbeFailure("state", f"there is no program {options.name} in supervisor on {means.host}")
    state, description = found
    seen.evidence["supervisor"] = f"{state} {description}"
    if state != "RUNNING":
        raise ProbeFailure("state", f"the program {options.name} is {state} ({description}), expected RUNNING")


async def probe_port(options: PortOptions, means: Means, seen: Seen) -> None:
    if options.listening not in await _read(options, means, seen, ports.parse_listening_ports):
        raise ProbeFailure("state", f"nothing listens on port {options.listening} of {means.host}")


async def _read(
    options: HostOptions, means: Means, seen: Seen, parse: Callable[[str], T], partly: str | None = None
) -> T:
    """What a reading of the host says for this probe. Raises ProbeFailure.

    A reading that was not finished in time is good enough where it has come as far as the key `partly`.
    """
    name = options.section.name
    late = ProbeFailure("shell", f"{means.host}: {name} did not answer in time")
    seen.overdue = late  # the deadline says nothing of the service either
    try:
        reading = means.reading()
        seen.began = reading.started_at
        output, told, took = await reading.section(name, parse)
    except ShellError as error:
        raise ProbeFailure("shell", str(error)) from error
    seen.phase("processing", took)
    if output.status in ENDED_BY_TIMEOUT:
        if isinstance(told, Mapping) and partly in told:
            return told
        raise late
    seen.evidence[name] = output.last_line
    if output.status != 0:
        raise ProbeFailure("shell", f"{means.host}: {name} cannot be asked: {seen.redact(output.last_line)}")
    return told


CONTAINER = Kind(ContainerOptions, probe_container)
UNIT = Kind(UnitOptions, probe_unit)
PROGRAM = Kind(ProgramOptions, probe_program)
PORT = Kind(PortOptions, probe_port)
