"""The probes of a host's own state: `container`, `unit`, `program`, `port`, `file`. Probes share a host's readings."""

from collections.abc import Callable
from typing import ClassVar, TypeVar

from pydantic import Field

from exporter.probes import ProbeContext, ProbeKind
from exporter.results import ProbeDetails, ProbeFailure
from fleet.host import files, ports
from fleet.host.sections import Section
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import PositiveDuration, Size, format_duration
from fleet.managers import docker, supervisor, systemd
from fleet.managers.containers import ContainerName
from fleet.shells import ENDED_BY_TIMEOUT, ShellError

T = TypeVar("T")
MAX_SKEW = 300.0  # seconds by which a file of another machine may be ahead of the host's clock


class HostProbeOptions(ConfigModel):
    """Options of a probe that uses a reading of the host."""

    needs_host: ClassVar[bool] = True

    @property
    def section(self) -> Section:
        """The section that must be read from the host."""
        raise NotImplementedError


class ContainerProbeOptions(HostProbeOptions):
    name: ContainerName

    @property
    def section(self) -> Section:
        return docker.SECTION


class UnitProbeOptions(HostProbeOptions):
    wrapper_arguments: ClassVar[tuple[str, ...]] = ("name",)
    name: systemd.UnitName

    @property
    def section(self) -> Section:
        return systemd.build_section(self.name)


class ProgramProbeOptions(HostProbeOptions):
    wrapper_arguments: ClassVar[tuple[str, ...]] = ("config",)
    name: supervisor.ProgramName
    config: supervisor.ConfigPath | None = None  # a path on the service's host

    @property
    def section(self) -> Section:
        return supervisor.build_section(self.config)


class PortProbeOptions(HostProbeOptions):
    listening: int = Field(ge=1, le=65535)

    @property
    def section(self) -> Section:
        return ports.SECTION


class FileProbeOptions(HostProbeOptions):
    wrapper_arguments: ClassVar[tuple[str, ...]] = ("path",)
    to_wrapper_argument: ClassVar[Callable[[str], str]] = files.name_of
    path: files.FilePath  # on the service's host
    newer_than: PositiveDuration | None = None
    larger_than: Size | None = None

    @property
    def section(self) -> Section:
        return files.build_section(self.path)


async def probe_container(options: ContainerProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    containers = await _read_section(
        options, context, details, docker.parse_containers, lambda containers: options.name in containers
    )
    container = containers.get(options.name)
    if container is None:
        raise ProbeFailure("state", f"no container {options.name} on {context.host}")
    health = container.health or "no health check"
    details.evidence["container"] = f"{container.state}, {health}, started {container.started}"
    if container.state != "running":
        exit_code = f" (exit code {container.exit_code})" if container.state == "exited" else ""
        raise ProbeFailure("state", f"the container {options.name} is {container.state}{exit_code}, expected running")
    if not container.is_up:
        raise ProbeFailure("state", f"the container {options.name} is running, but its health is {container.health}")


async def probe_unit(options: UnitProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    units = await _read_section(options, context, details, systemd.parse_units, lambda units: options.name in units)
    unit = units.get(options.name)
    if not isinstance(unit, systemd.UnitStatus):
        error = details.redact((unit or "no output").splitlines()[-1])
        raise ProbeFailure("shell", f"{context.host}: cannot query systemd: {error}")
    details.evidence["unit"] = f"{unit.load}, {unit.active} ({unit.sub}), result {unit.result}"
    if unit.load == "not-found":
        raise ProbeFailure("state", f"no unit {options.name} on {context.host}")
    if not unit.is_active:
        result = f", {unit.result}" if unit.result not in ("", "success") else ""
        raise ProbeFailure("state", f"the unit {options.name} is {unit.active} ({unit.sub}{result}), expected active")


async def probe_program(options: ProgramProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    config = supervisor.config_name(options.config)
    instances = await _read_section(
        options, context, details, supervisor.parse_supervisord_statuses,
        lambda instances: config in instances and options.name in instances[config].programs,
    )  # fmt: skip
    instance = instances.get(config, supervisor.SupervisordStatus())
    if instance.error:
        raise ProbeFailure("shell", f"{context.host}: cannot query supervisor: {details.redact(instance.error)}")
    program = instance.programs.get(options.name)
    if program is None:
        raise ProbeFailure("state", f"no program {options.name} in supervisor on {context.host}")
    state, description = program
    details.evidence["supervisor"] = f"{state} {description}"
    if state != "RUNNING":
        raise ProbeFailure("state", f"the program {options.name} is {state} ({description}), expected RUNNING")


async def probe_port(options: PortProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    listening = await _read_section(
        options, context, details, ports.parse_listening_ports, lambda found: options.listening in found
    )
    if options.listening not in listening:
        raise ProbeFailure("state", f"nothing listens on port {options.listening} of {context.host}")


async def probe_file(options: FileProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    path, name = options.path, files.name_of(options.path)
    listings = await _read_section(options, context, details, files.parse_listings, lambda found: name in found)
    listing = listings.get(name, files.FileListing(0.0, error="no output"))
    if listing.error:
        raise ProbeFailure("shell", f"{context.host}: cannot read {name}: {details.redact(listing.error)}")
    details.evidence.pop(options.section.name, None)  # which is the end of the listing
    if listing.is_other:
        raise ProbeFailure("state", f"{path} on {context.host} is not a regular file")
    found = listing.find_newest(path)
    if found is None and listing.count > len(listing.files):
        searched = f"only the newest {len(listing.files)} of {listing.count} files of the folder were looked at"
        raise ProbeFailure("shell", f"{context.host}: {path} was not found; {searched}")
    if found is None:
        raise ProbeFailure("state", f"there is no file {path} on {context.host}")
    details.gauges["service_file_modified_timestamp_seconds"] = found.modified
    details.gauges["service_file_size_bytes"] = found.size
    shown, age = details.redact(found.name), listing.now - found.modified
    if age < -MAX_SKEW and options.newer_than is not None:
        raise ProbeFailure("state", f"{shown} was changed in the future, by the clock of {context.host}")
    age = max(0.0, age)
    details.evidence["file"] = f"{shown}, {found.size} bytes, changed {format_duration(round(age))} ago"
    if options.newer_than is not None and age > options.newer_than:
        expected = f"expected less than {format_duration(options.newer_than)}"
        raise ProbeFailure("state", f"{shown} was changed {format_duration(round(age))} ago, {expected}")
    if options.larger_than is not None and found.size <= options.larger_than:
        raise ProbeFailure("state", f"{shown} has {found.size} bytes, expected more than {options.larger_than}")


async def _read_section(
    options: HostProbeOptions,
    context: ProbeContext,
    details: ProbeDetails,
    parse: Callable[[str], T],
    suffices: Callable[[T], bool],
) -> T:
    """Return the probe's section of a reading of the host, parsed. Raises ProbeFailure.

    An incomplete section, because the reading timed out or exceeded a limit, is returned only if it `suffices`.
    """
    name = options.section.name
    late = ProbeFailure("shell", f"{context.host}: {name} did not answer in time")
    details.timeout_failure = late  # reading the host timed out, which says nothing about the service
    try:
        reading = context.reading()
        details.measured_at = reading.started_at
        output, parsed, duration = await reading.section(name, parse)
    except ShellError as error:
        raise ProbeFailure("shell", str(error)) from error
    details.add_phase("processing", duration)
    is_late = output.status in ENDED_BY_TIMEOUT
    if (is_late or output.truncated) and suffices(parsed):
        return parsed
    if is_late:
        raise late
    details.evidence[name] = output.last_line
    if output.status != 0:
        raise ProbeFailure("shell", f"{context.host}: cannot query {name}: {details.redact(output.last_line)}")
    if output.truncated:
        raise ProbeFailure("shell", f"{context.host}: the output of {name} is too long; a part of it was not read")
    return parsed


CONTAINER = ProbeKind(ContainerProbeOptions, probe_container)
UNIT = ProbeKind(UnitProbeOptions, probe_unit)
PROGRAM = ProbeKind(ProgramProbeOptions, probe_program)
PORT = ProbeKind(PortProbeOptions, probe_port)
FILE = ProbeKind(FileProbeOptions, probe_file)
