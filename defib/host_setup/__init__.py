"""`defib host setup`: prints the scripts that prepare hosts, writes them to a directory, or runs them over SSH."""

import asyncio
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from defib.administrator import build_ssh_command, check_user
from defib.host_setup.results import HostResult
from defib.host_setup.runs import Run, run_all
from defib.host_setup.script import check_sources
from defib.host_setup.scripts import print_script, render, write_scripts
from defib.lookup import HostSelection
from defib.output import print_text
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Host
from runtime.addresses import bracket
from runtime.errors import DefibError

LINE_LIMIT = 64 * 1024  # bytes; the output of a host is not trusted


@dataclass(frozen=True)
class Options:
    """What to do with the scripts: run them with `apply_as`, write them to `output`, or print one.

    `sources` are the addresses from which hosts accept logins. At most `parallel` scripts run at the same time, each
    for at most `timeout` seconds.
    """

    sources: str = ""
    apply_as: str | None = None
    output: Path | None = None
    parallel: int = 10
    timeout: float = 120.0


def set_up_hosts(load: Callable[[], LoadedInventory], selection: HostSelection, options: Options) -> int:
    """Prepare the selected hosts; returns 1 if one failed. Raises DefibError."""
    check_sources(options.sources)
    if options.apply_as is not None:
        check_user("--apply", options.apply_as)
    loaded = load()
    hosts, others = selection.find_ssh_hosts(loaded.inventory)
    for host in others:
        print_text(f"{host.name}: skipped, it has no SSH settings", sys.stderr)
    if options.output is not None:
        return write_scripts(loaded, hosts, options.sources, options.output)
    if options.apply_as is not None:
        if not options.sources:
            print_text("logins are accepted from all addresses; --from ADDRESSES limits them", sys.stderr)
        attended = len(hosts) == 1 and sys.stdin.isatty()
        run = _run_attended if attended else _run_unattended
        return run(loaded, hosts, options, options.apply_as)
    if len(hosts) > 1:
        raise DefibError("several hosts: run the scripts with --apply USER, or write them with --output DIR")
    return print_script(loaded, hosts[0], options.sources)


def _run_attended(loaded: LoadedInventory, hosts: Sequence[Host], options: Options, user: str) -> int:
    """Run the script of one host; ssh may ask on the terminal for passwords, and about an unknown host key."""
    (host,) = hosts
    script = render(loaded, host, options.sources)
    ssh = _build_command(loaded, host, user, unattended=False)
    print_text(f"running {shlex.join(ssh)}", sys.stderr)
    with tempfile.TemporaryFile() as stdin:
        stdin.write(script.encode())
        stdin.seek(0)
        with subprocess.Popen(ssh, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            output = cast("IO[bytes]", process.stdout)
            while line := output.readline(LINE_LIMIT):
                print_text(line.decode(errors="replace").rstrip("\r\n"))
    return process.returncode


def _run_unattended(loaded: LoadedInventory, hosts: Sequence[Host], options: Options, user: str) -> int:
    """Run the scripts of hosts side by side; a host whose script cannot be rendered does not keep the others."""
    _check_addresses(hosts)
    runs: list[Run] = []
    failed: list[HostResult] = []
    for host in hosts:
        try:
            script = render(loaded, host, options.sources)
            runs.append(Run(host.name, _build_command(loaded, host, user, unattended=True), script))
        except DefibError as error:
            failed.append(HostResult(host.name, "failed", str(error)))
    results = asyncio.run(run_all(runs, failed, parallel=options.parallel, timeout=options.timeout))
    return int(any(each.outcome == "failed" for each in results))


def _build_command(loaded: LoadedInventory, host: Host, user: str, *, unattended: bool) -> list[str]:
    loaded.require_resolved(*loaded.connection_sections(host.name), ignore=[f"hosts.{host.name}.sudo"])
    sudo = ["sudo", "-n"] if unattended else ["sudo"]
    return [*build_ssh_command(loaded.inventory, host, user, unattended=unattended), *sudo, "sh", "-s"]


def _check_addresses(hosts: Sequence[Host]) -> None:
    """Check that no two scripts would change the same machine at the same time. Raises DefibError."""
    names: dict[tuple[str, int, str | None], list[str]] = {}
    for host in hosts:
        ssh = host.ssh_for(control=False)
        names.setdefault((host.address, ssh.port, ssh.via), []).append(host.name)
    for (address, port, _via), those in names.items():
        if len(those) > 1:
            raise DefibError(
                f"{' and '.join(those)} have the same address, {bracket(address)}:{port}; each script would replace "
                "what the other has set up: name only one of them"
            )
