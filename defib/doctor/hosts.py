"""What the doctor looks at on each host: keys, login, collectors, the clock, sudo."""

import asyncio
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from defib.doctor.findings import Finding
from defib.host_setup import commands_of
from exporter.collectors import COLLECTORS
from exporter.collectors.collecting import CollectFailure, Every
from exporter.exposition.samples import Samples
from fleet.host.reading import Output, Section, read
from fleet.inventory.model import Host, Inventory, Ssh
from fleet.shells import (
    CommandNotRun,
    HostKeyRefused,
    LoginRefused,
    Shell,
    ShellError,
    WrapperOutdated,
    refused_by_wrapper,
)
from fleet.shells.pool import Shells
from fleet.shells.sudo import elevated
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.context import Hands

REACHED_WITHIN = 6.0  # seconds
READ_WITHIN = 10.0  # seconds for each collector, and each question to sudo
CLOCK = 1.0  # seconds that a clock may differ


async def check(host: Host, inventory: Inventory) -> list[Finding]:
    """All findings of one host."""
    if not host.has_shell:
        return [Finding(host.name, "a shell", "fail", "it has none", "give it `ssh:` or `shell: local`")]
    found = await asyncio.gather(_reading(host, inventory), _controlling(host, inventory))
    return [finding for part in found for finding in part]


async def _reading(host: Host, inventory: Inventory) -> list[Finding]:
    """What the exporter needs."""
    findings = _files(host, host.ssh_for(control=False), "reading") if host.shell == "ssh" else []
    shells = Shells(inventory.hosts)
    try:
        reached = await _reach(host, shells, "its shell answers")
        findings.append(reached)
        if reached.result == "pass":
            shell = shells.of(host.name)
            wanted = ((name, options) for name, options in host.collect if options is not None)
            findings += await asyncio.gather(*(_collector(host, name, options, shell) for name, options in wanted))
    finally:
        await shells.close()
    return findings


def _finding(host: Host, check: str, *, well: bool, seen: str = "", mend: str = "") -> Finding:
    return Finding(host.name, check, "pass" if well else "fail", seen, mend)


def _files(host: Host, ssh: Ssh, purpose: str) -> list[Finding]:
    found = []
    if ssh.key_file is not None:
        found.append(_key(host, ssh.key_file, purpose))
    pinned = ssh.known_hosts.is_file()
    mend = "pin the host's key there: `defib host setup` says how"
    seen = "" if pinned else "there is no such file"
    found.append(_finding(host, f"known hosts {ssh.known_hosts}", well=pinned, seen=seen, mend=mend))
    return found


def _key(host: Host, path: Path, purpose: str) -> Finding:
    what = f"the key for {purpose}, {path}"
    try:
        mode = path.stat().st_mode & 0o777
        path.open("rb").close()
    except FileNotFoundError as error:
        mend = f"ssh-keygen -t ed25519 -N '' -f {path}"
        return _finding(host, what, well=False, seen=str(error.strerror), mend=mend)
    except OSError as error:
        mend = f"run this as the user of the programs, or let that user read it: chown defib {path}"
        return _finding(host, what, well=False, seen=str(error.strerror), mend=mend)
    # Root may own it and let a group read it, which is then that of the programs.
    open_to = mode & (0o007 if path.stat().st_uid != os.geteuid() else 0o077)
    seen = f"others may read it ({mode:o})" if open_to else ""
    return _finding(host, what, well=not seen, seen=seen, mend=f"chmod 600 {path}")


async def _reach(host: Host, shells: Shells, what: str) -> Finding:
    ill = partial(_finding, host, what, well=False)
    try:
        shell = shells.of(host.name)
        # A wrapper takes no command of ours; that it refuses one is its answer.
        done = await shell.run(["true"], timeout=REACHED_WITHIN)
    except HostKeyRefused as error:
        mend = "find out why the host's key is another, then pin it" if error.changed else "pin the host's key"
        return ill(seen=str(error), mend=f"{mend} by hand: `defib host setup` says how")
    except (CommandNotRun, LoginRefused, WrapperOutdated) as error:
        return ill(seen=str(error), mend=f"let the key in, and run commands: defib host setup {host.name}")
    except ShellError as error:
        return ill(seen=str(error), mend="see that the host is up, and that its SSH port can be reached from here")
    if shell.wrapped and done.status == 0:
        return ill(seen="the key may run anything, not the wrapper alone", mend=f"defib host setup {host.name}")
    answered = done.status == 0 or bool(shell.wrapped and refused_by_wrapper(done))
    seen = "" if answered else done.why or done.output
    return _finding(host, what, well=answered, seen=seen, mend=f"defib host setup {host.name}")


async def _collector(host: Host, name: str, options: Every, shell: Shell) -> Finding:
    samples = Samples(host.name)
    collector = COLLECTORS[name].make(options, host.name)

    async def ask(sections: Sequence[Section]) -> Mapping[str, Output]:
        found: dict[str, Output] = {}
        error = await read(shell, sections, timeout=READ_WITHIN, tell=found.__setitem__)
        if not found:
            raise error
        return found

    started = time.perf_counter()
    try:
        await collector.collect(ask, samples)
    except (CollectFailure, ShellError) as error:
        mend = "see docs/hosts.md for what this collector wants on the host"
        if shell.wrapped:
            mend += f"; its allow-list is written by defib host setup {host.name}"
        return _finding(host, f"collector {name}", well=False, seen=str(error), mend=mend)
    if samples.fault is not None:
        mend = "see docs/hosts.md for what is taken of a host"
        return _finding(host, f"collector {name}", well=False, seen=samples.fault, mend=mend)
    took = f"{time.perf_counter() - started:.2f} s, {len(samples.lines)} metrics"
    offset = samples.lines.get("host_clock_offset_seconds", "").strip().rpartition(" ")[2]
    if offset and abs(float(offset)) > CLOCK:
        seen = f"its clock is {float(offset):+.1f} s off"
        return _finding(host, f"collector {name}", well=False, seen=seen, mend="run NTP on both")
    return _finding(host, f"collector {name}", well=True, seen=took)


async def _controlling(host: Host, inventory: Inventory) -> list[Finding]:
    """What the remediator needs: its keys and its sudo, where it has others, and an answer to each control."""
    control = host.ssh_for(control=True)
    findings = [_key(host, control.key_file, "controlling")] if host.control_ssh and control.key_file else []
    shells = Shells(inventory.hosts, control=True)
    try:
        reached = await _reach(host, shells, "its shell answers to the controls")
        if host.control_ssh is not None or host.sudo.mode != "none":
            findings.append(reached)
        if reached.result == "pass":
            shell = shells.of(host.name)
            if host.sudo.mode != "none" and not control.wrapper:
                findings.append(await _sudo(host, inventory, shell))
            findings += await _controls(host, inventory, shell)
    finally:
        await shells.close()
    return findings


async def _controls(host: Host, inventory: Inventory, shell: Shell) -> list[Finding]:
    """Whether docker, systemd and the like tell of what the services' controls restart; however that is."""
    findings = []
    for service in inventory.services.values():
        if service.host != host.name or service.control is None or "status" not in service.control.options.verbs:
            continue
        kind, options = CONTROLS[service.control.kind], service.control.options
        if not kind.options.needs_host or service.control.kind == "command":
            continue
        hands = Hands(shell, host.sudo, READ_WITHIN, host.name)
        try:
            facts = await kind.facts(options, hands)
            seen = facts.state if facts else (await kind.control("status", options, hands)).output
        except ShellError as error:
            facts, seen = None, str(error)
        mend = f"see that {service.control.kind} has it, and that the host's account may ask: docs/remediation.md"
        findings.append(_finding(host, f"the control of {service.id}", well=facts is not None, seen=seen, mend=mend))
    return findings


async def _sudo(host: Host, inventory: Inventory, shell: Shell) -> Finding:
    """Whether sudo allows each command of the controls; it is asked, and runs none."""
    refused: list[str] = []
    for command in await asyncio.to_thread(commands_of, inventory, host):
        argv, stdin = elevated(command, host.sudo)
        at = argv.index("--")
        done = await shell.run([*argv[:at], "-l", *argv[at:]], timeout=READ_WITHIN, stdin=stdin)
        if done.status != 0:
            said = (done.output or done.why or "it is not allowed").splitlines()[-1]
            refused.append(f"{shlex.join(command)}: {said}")
    more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
    mend = "allow its account that in sudoers" if host.shell == "local" else f"defib host setup {host.name}"
    return _finding(host, "sudo", well=not refused, seen=f"{refused[0]}{more}" if refused else "", mend=mend)
