"""The probes of what a host itself knows: containers, units, programs, ports. They share one reading of the host."""

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

from pydantic import Field

from exporter.probes import ProbeKind
from exporter.probes.context import ProbeContext
from exporter.results import ProbeDetails, ProbeFailure
from fleet.host import ports
from fleet.host.reading import Section
from fleet.inventory.endpoints import Part
from fleet.managers import docker, supervisor, systemd
from fleet.shells import ENDED_BY_TIMEOUT, ShellError

T = TypeVar("T")


class HostProbeOptions(Part):
    """ProbeOptionsT of a probe that rests on a reading of the host."""

    needs_host: ClassVar[bool] = True

    @property
    def section(self) -> Section:
        """What is to be read of the host."""
        raise NotImplementedError


class ContainerProbeOptions(HostProbeOptions):
    name: docker.ContainerName

    @property
    def section(self) -> Section:
        return docker.READING


class UnitProbeOptions(HostProbeOptions):
    name: systemd.UnitName

    @property
    def section(self) -> Section:
        return systemd.reading(self.name)


class ProgramProbeOptions(HostProbeOptions):
    name: supervisor.Program
    config: supervisor.Config | None = None  # on the service's host

    @property
    def section(self) -> Section:
        return supervisor.reading(self.config)


class PortProbeOptions(HostProbeOptions):
    listening: int = Field(ge=1, le=65535)

    @property
    def section(self) -> Section:
        return ports.READING


async def probe_container(options: ContainerProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    found = (await _read(options, context, details, docker.containers, partly=options.name)).get(options.name)
    if found is None:
        raise ProbeFailure("state", f"there is no container {options.name} on {context.host}")
    details.evidence["container"] = f"{found.state}, {found.health or 'no health check'}, started {found.started}"
    if found.state != "running":
        ended = f" (exit {found.exit_code})" if found.state == "exited" else ""
        raise ProbeFailure("state", f"the container {options.name} is {found.state}{ended}, expected running")
    if not found.is_up:
        raise ProbeFailure("state", f"the container {options.name} is running, but its health is {found.health}")


async def probe_unit(options: UnitProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    found = (await _read(options, context, details, systemd.units)).get(options.name)
    if not isinstance(found, systemd.Unit):
        said = details.redact((found or "it said nothing").splitlines()[-1])
        raise ProbeFailure("shell", f"{context.host}: systemd cannot be asked: {said}")
    details.evidence["unit"] = f"{found.load}, {found.active} ({found.sub}), result {found.result}"
    if found.load == "not-found":
        raise ProbeFailure("state", f"there is no unit {options.name} on {context.host}")
    if not found.is_active:
        why = f", {found.result}" if found.result not in ("", "success") else ""
        raise ProbeFailure("state", f"the unit {options.name} is {found.active} ({found.sub}{why}), expected active")


async def probe_program(options: ProgramProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    told = (await _read(options, context, details, supervisor.told)).get(
        supervisor.named(options.config), supervisor.Told()
    )
    if told.failed:
        raise ProbeFailure("shell", f"{context.host}: supervisor cannot be asked: {details.redact(told.failed)}")
    found = told.programs.get(options.name)
    if found is None:
        raise ProbeFailure("state", f"there is no program {options.name} in supervisor on {context.host}")
    state, description = found
    details.evidence["supervisor"] = f"{state} {description}"
    if state != "RUNNING":
        raise ProbeFailure("state", f"the program {options.name} is {state} ({description}), expected RUNNING")


async def probe_port(options: PortProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    if options.listening not in await _read(options, context, details, ports.listening):
        raise ProbeFailure("state", f"nothing listens on port {options.listening} of {context.host}")


async def _read(
    options: HostProbeOptions,
    context: ProbeContext,
    details: ProbeDetails,
    parse: Callable[[str], T],
    partly: str | None = None,
) -> T:
    """What a reading of the host says for this probe. Raises ProbeFailure.

    A reading that was not finished in time is good enough where it has come as far as the key `partly`.
    """
    name = options.section.name
    late = ProbeFailure("shell", f"{context.host}: {name} did not answer in time")
    details.timeout_failure = late  # the deadline says nothing of the service either
    try:
        reading = context.reading()
        details.measured_at = reading.began
        output, told, took = await reading.section(name, parse)
    except ShellError as error:
        raise ProbeFailure("shell", str(error)) from error
    details.add_phase("processing", took)
    if output.status in ENDED_BY_TIMEOUT:
        if isinstance(told, Mapping) and partly in told:
            return told
        raise late
    details.evidence[name] = output.last_line
    if output.status != 0:
        raise ProbeFailure("shell", f"{context.host}: {name} cannot be asked: {details.redact(output.last_line)}")
    return told


CONTAINER = ProbeKind(ContainerProbeOptions, probe_container)
UNIT = ProbeKind(UnitProbeOptions, probe_unit)
PROGRAM = ProbeKind(ProgramProbeOptions, probe_program)
PORT = ProbeKind(PortProbeOptions, probe_port)
