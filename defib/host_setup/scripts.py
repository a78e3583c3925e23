"""The scripts of hosts: with resolved references, printed or written to where only their owner can read secrets."""

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from defib.host_setup.recorded import commands_of
from defib.host_setup.script import hosts_behind, script_for
from defib.output import print_text
from exporter.probes import PROBES
from exporter.probes.host import HostProbeOptions
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Host, Inventory
from runtime.errors import DefibError
from runtime.files import replace_file
from runtime.redaction import Redactor


def render(loaded: LoadedInventory, host: Host, sources: str) -> str:
    """Return the script of a host, with its references resolved. Raises DefibError."""
    loaded.require_resolved(*_find_sections(loaded.inventory, host), ignore=[f"hosts.{host.name}.sudo"])
    return script_for(loaded.inventory, host, sources)


def print_script(loaded: LoadedInventory, host: Host, sources: str) -> int:
    """Print the script of a host. Raises DefibError."""
    script = render(loaded, host, sources)
    if _contains_secrets(loaded.inventory, host, Redactor(loaded.secrets)):
        _check_stdout_is_private()
        print_text("the script contains secrets: do not store it where other users can read it", sys.stderr)
    sys.stdout.write(script)
    return 0


def write_scripts(loaded: LoadedInventory, hosts: Sequence[Host], sources: str, directory: Path) -> int:
    """Write a script for each host, readable by its owner only; returns 1 if a host has none."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = 0
    for host in hosts:
        try:
            script = render(loaded, host, sources)
        except DefibError as error:
            print_text(f"{host.name}: failed: {error}", sys.stderr)
            status = 1
        else:
            path = directory / f"{host.name}.sh"
            replace_file(path, script.encode())  # other users may have been able to read an earlier one
            print_text(f"{host.name}: {path}")
    return status


def _find_sections(inventory: Inventory, host: Host) -> Iterator[str]:
    """Yield the sections of the configuration that the script depends on."""
    yield f"hosts.{host.name}"
    for other in hosts_behind(inventory, host):
        yield from (f"hosts.{other.name}.address", f"hosts.{other.name}.ssh")
    if _needs_commands(host):
        yield "remediation.steps"
    for name, service in inventory.services.items():
        if service.host != host.name:
            continue
        if host.ssh_for(control=False).wrapper and issubclass(PROBES[service.probe.kind].options, HostProbeOptions):
            yield f"services.{name}.probe"
        if _needs_commands(host):
            yield from (f"services.{name}.control", f"services.{name}.remediation")
    for name, runbook in inventory.runbooks.items():
        if _needs_commands(host) and host in inventory.hosts_of_runbook(runbook):
            yield f"runbooks.{name}"


def _needs_commands(host: Host) -> bool:
    """Whether the script has the commands of the controls."""
    return host.ssh_for(control=True).wrapper or host.sudo.mode != "none"


def _contains_secrets(inventory: Inventory, host: Host, redact: Redactor) -> bool:
    """Whether the script contains secrets: those in arguments, and for a wrapper all variables for containers."""
    if not _needs_commands(host):
        return False
    wrapped = host.ssh_for(control=True).wrapper
    return any(
        (wrapped and stdin) or list(redact.redact_all(argv)) != list(argv)
        for argv, stdin in commands_of(inventory, host)
    )


def _check_stdout_is_private() -> None:
    """Raise DefibError where other users can read the file that stdout is written to."""
    status = os.fstat(sys.stdout.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise DefibError(
            "the script contains secrets, and other users may open the file that it is written to: "
            "write it to a new file after `umask 077`, or use --apply"
        )
