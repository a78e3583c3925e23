"""What Defib runs and reads on a host: the commands of its controls, and the sections of its collectors and probes."""

import asyncio
import contextlib
from collections.abc import Sequence

from exporter.collectors import COLLECTORS
from exporter.probes.host import HostProbeOptions
from fleet.host.sections import Section
from fleet.inventory.model import Host, Inventory, Service, SudoOptions
from fleet.shells import CompletedCommand, ShellError
from remediator.execution import evidence
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.runner import VERBS, ControlRunner

WITHIN = 60.0  # seconds; nothing is run
HostCommand = tuple[tuple[str, ...], bytes]  # its arguments and its stdin, without the password of sudo


def sections_of(inventory: Inventory, host: Host) -> list[Section]:
    """Return everything that collectors and probes read from a host."""
    sections: list[Section] = []
    for name, options in host.collect:
        if options is not None:
            sections += COLLECTORS[name].create(options, host.name).sections()
    for service in inventory.services.values():
        if service.host == host.name and isinstance(service.probe.options, HostProbeOptions):
            sections.append(service.probe.options.section)
    return sections


class _Recorder:
    """A shell that runs nothing and records the commands."""

    wrapped = False

    def __init__(self) -> None:
        self.commands: list[HostCommand] = []

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", **_: object) -> CompletedCommand:
        self.commands.append((tuple(argv), stdin))
        return CompletedCommand(0, "", "")

    async def close(self) -> None:
        """Do nothing."""


def commands_of(inventory: Inventory, host: Host) -> list[HostCommand]:
    """Return every command that the controls of a host's services and its runbooks can run, each once."""
    recorder = _Recorder()

    async def record_all() -> None:
        for service in inventory.services.values():
            if service.host == host.name:
                await _record_controls(recorder, inventory, service)
        for runbook in inventory.runbooks.values():
            if host in inventory.hosts_of_runbook(runbook):
                recorder.commands.append((tuple(runbook.run), b""))
        if recorder.commands and host.ssh_for(control=True).wrapper:
            recorder.commands += [(tuple(argv), b"") for argv in evidence.HOST_COMMANDS.values()]

    asyncio.run(record_all())
    return sorted(set(recorder.commands))


async def _record_controls(recorder: _Recorder, inventory: Inventory, service: Service) -> None:
    control = service.control
    if service.agent is not None and service.agent.wake:
        recorder.commands.append((tuple(service.agent.wake), b""))
    if control is None or not CONTROLS[control.kind].options.needs_host:
        return
    kind, options = CONTROLS[control.kind], control.options
    for verb in sorted(VERBS & options.verbs):
        with contextlib.suppress(ShellError):  # there is no output to parse
            await kind.run(verb, options, ControlRunner(recorder, SudoOptions(), WITHIN))
    with contextlib.suppress(ShellError):
        await kind.read_state(options, ControlRunner(recorder, SudoOptions(), WITHIN))
    for step in inventory.remediation.for_service(service).steps:
        if step.recreate is not None and step.recreate.command:
            recorder.commands.append((tuple(step.recreate.command), b""))
