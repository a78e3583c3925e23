"""Reading a host: one script over its shell, then HTTP requests to its ports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from defib.discovery import known, sections
from defib.discovery.endpoints import find_endpoints
from defib.discovery.model import Container, Findings, Listener, Program, is_loopback
from defib.output import format_count
from fleet.host import gpu, ports
from fleet.host.sections import Section, SectionOutput, read_sections
from fleet.inventory.model import Host
from fleet.managers import docker, supervisor
from fleet.shells import ENDED_BY_TIMEOUT, Shell, ShellError

T = TypeVar("T")
SCRIPT_TIMEOUT = 20.0  # seconds, for the login, too
ENDPOINTS_TIMEOUT = 30.0
NOT_FOUND = 127
GPU_FIELDS = {"index": "index", "memory_total": "memory.total", "name": "name"}  # the last may contain the separator
_GPUS = gpu.build_nvidia_smi_section(GPU_FIELDS.values())
_PROGRAMS = {
    sections.CONTAINERS.name: "docker", sections.UNITS.name: "systemctl", supervisor.SECTION_NAME: "supervisorctl",
    _GPUS.name: "nvidia-smi",
}  # fmt: skip


async def read_host(host: Host, shell: Shell) -> Findings:
    """Return what runs on a host. Raises ShellError if its shell does not answer."""
    found = await read_over_shell(host, shell)
    candidates = find_candidates(host, found)
    endpoints = await find_endpoints(host.address, candidates, within=ENDPOINTS_TIMEOUT)
    notes = list(found.notes)
    if unasked := len(candidates) - len(endpoints):
        notes.append(
            f"{unasked} of {format_count(len(candidates), 'port')} not checked over the network: too many or too slow"
        )
    return replace(found, endpoints=endpoints, notes=notes)


def find_candidates(host: Host, found: Findings) -> list[int]:
    """Return the ports that this machine may reach at the host's address."""
    local = host.address == "localhost" or is_loopback(host.address)
    published = [each for container in found.containers for each in container.ports]
    return sorted(
        {each.port for each in published if local or not is_loopback(each.address)}
        | {each.port for each in found.listeners if (local or not each.only_loopback) and not _is_known(each)}
    )


def _is_known(listener: Listener) -> bool:
    """Whether a listener belongs to a program that is not proposed, such as sshd."""
    return listener.process is not None and known.is_no_service(listener.process.name)


async def read_over_shell(host: Host, shell: Shell) -> Findings:
    """Return what the host's shell shows. Raises ShellError if it does not answer."""
    # A wrapper runs its own scripts only.
    wanted = [docker.SECTION, ports.SECTION, _GPUS] if shell.wrapped else _find_sections(host)
    outputs: dict[str, SectionOutput] = {}
    error = await read_sections(shell, wanted, timeout=SCRIPT_TIMEOUT, on_section=outputs.__setitem__)
    if not outputs:
        if shell.wrapped:
            hint = f"is the wrapper set up? Run: defib host setup {host.name}"
            raise ShellError(f"{error} ({hint})")
        raise error
    reading = _Reading(outputs, error)
    return _parse_wrapped(host, reading) if shell.wrapped else _parse(host, reading)


def _find_sections(host: Host) -> list[Section]:
    collected = getattr(host.collect, "supervisor", None)
    configs: Sequence[Path | None] = [None, *(collected.configs if collected is not None else ())]
    programs = replace(supervisor.build_section(None), names=tuple(map(supervisor.config_name, configs)))
    return [sections.LISTENERS, sections.CONTAINERS, sections.UNITS, programs, _GPUS]


def _parse(host: Host, reading: "_Reading") -> Findings:
    containers = reading.parse(sections.CONTAINERS.name, sections.parse_containers)
    units = reading.parse(sections.UNITS.name, sections.parse_units)
    programs = reading.parse_programs()
    listeners = reading.parse(sections.LISTENERS.name, sections.parse_listeners)
    unknown = sum(each.process is None and each.cgroup in ("", "/") for each in listeners)
    if unknown:
        reading.notes.append(f"the account cannot see which processes listen on {format_count(unknown, 'port')}")
    gpus = reading.parse(_GPUS.name, _parse_gpus)
    return Findings(
        host.name, containers, units, programs, listeners, gpus,
        has_docker=reading.succeeded(sections.CONTAINERS.name), notes=reading.notes, missing=reading.missing,
    )  # fmt: skip


def _parse_wrapped(host: Host, reading: "_Reading") -> Findings:
    statuses = reading.parse(docker.SECTION.name, docker.parse_containers)
    containers = [Container(name, "", each.state, each.image) for name, each in sorted(statuses.items())]
    listening = reading.parse(ports.SECTION.name, ports.parse_listening_ports)
    gpus = reading.parse(_GPUS.name, _parse_gpus)
    note = "the key runs only the host's wrapper, which shows neither processes nor units nor ports of containers"
    return Findings(
        host.name, containers, listeners=[Listener(port) for port in sorted(listening)], gpus=gpus,
        has_docker=reading.succeeded(docker.SECTION.name), notes=[note, *reading.notes], missing=reading.missing,
    )  # fmt: skip


def _parse_gpus(output: str) -> list[gpu.Gpu]:
    return gpu.parse_query(output, list(GPU_FIELDS)).gpus


class _Reading:
    """The sections of a host's reading; what could not be read becomes a note, or the name of a missing program."""

    def __init__(self, outputs: Mapping[str, SectionOutput], error: ShellError) -> None:
        self._outputs, self._error = outputs, error
        self.notes: list[str] = []
        self.missing: list[str] = []

    def succeeded(self, name: str) -> bool:
        return name in self._outputs and self._outputs[name].status == 0

    def parse(self, name: str, parse: Callable[[str], T]) -> T:
        """Return a section, parsed as far as it was read; all parsers take an empty text."""
        output, program = self._outputs.get(name), _PROGRAMS.get(name, name)
        if output is None:
            self.notes.append(f"{program} was not read: {self._error}")
            return parse("")
        if output.status == NOT_FOUND:
            self.missing.append(program)
            return parse("")
        if output.status in ENDED_BY_TIMEOUT:
            self.notes.append(f"{program} did not answer in time")
        elif output.status != 0:
            denied = "permission denied" in f"{output.text} {output.last_line}".lower()
            why = "permission denied; --as USER reads as the administrator" if denied else output.last_line
            self.notes.append(f"{program}: {why}")
        if output.truncated:
            self.notes.append(f"{program}: the output is too long; {output.truncated} lines were left out or cut")
        return parse(output.text)

    def parse_programs(self) -> list[Program]:
        """Return the programs of each supervisord; the script succeeds even if one did not answer."""
        by_config = self.parse(supervisor.SECTION_NAME, supervisor.parse_supervisord_statuses)
        answered = any(instance.programs for instance in by_config.values())
        for config, instance in by_config.items():
            is_default = config == supervisor.config_name(None)
            if instance.error.endswith("not found"):
                self.missing.append("supervisorctl")
                return []
            if instance.error and not (is_default and answered):  # which need not exist beside others
                self.notes.append(f"supervisorctl{'' if is_default else f' {config}'}: {instance.error}")
        return sections.list_programs(by_config)
