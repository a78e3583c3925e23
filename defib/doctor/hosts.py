"""The doctor's checks of each host: keys, login, collectors, clock, controls, sudo."""

import asyncio
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from defib.doctor.files import finding_of
from defib.doctor.findings import Finding
from defib.doctor.sudo import check_root_paths
from defib.host_setup.recorded import commands_of
from defib.output import format_count, parenthesized
from defib.permissions import check_content, check_key
from exporter.collectors import COLLECTORS
from exporter.collectors.base import CollectorFailure, CollectorOptions, record_truncation
from exporter.exposition.collector_samples import CollectorSamples
from fleet.host.sections import Section, SectionOutput, read_sections
from fleet.inventory.model import Host, Inventory, Ssh
from fleet.inventory.references import Program
from fleet.shells import (
    CommandNotRunError,
    HostKeyError,
    LoginError,
    Shell,
    ShellError,
    WrapperOutdatedError,
    get_wrapper_refusal,
)
from fleet.shells.host_keys import read_known_hosts
from fleet.shells.pool import Shells
from fleet.shells.sudo import build_sudo_command
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.runner import ControlRunner

LOGIN_TIMEOUT = 6.0  # seconds
COMMAND_TIMEOUT = 10.0  # seconds for each collector, control and sudo command
CLOCK_TOLERANCE = 1.0  # seconds


async def check_host(host: Host, inventory: Inventory, programs: Collection[Program]) -> list[Finding]:
    """Check everything that the exporter or the remediator needs on a host, or both."""
    if not host.has_shell:
        fix = f"set hosts.{host.name}.ssh or `shell: local`"
        return [Finding(host.name, "shell", "fail", "no shell is configured", fix)]
    checks = {"exporter": _check_reading, "remediator": _check_controlling}
    parts = await asyncio.gather(*(check(host, inventory) for name, check in checks.items() if name in programs))
    return [finding for findings in parts for finding in findings]


async def _check_reading(host: Host, inventory: Inventory) -> list[Finding]:
    """Check what the exporter needs: files, login, collectors."""
    findings = _check_files(host, host.ssh_for(control=False)) if host.shell == "ssh" else []
    shells = Shells(inventory.hosts)
    try:
        login = await _check_shell(host, shells, "shell for reading")
        findings.append(login)
        if login.result == "pass":
            shell = shells.get(host.name)
            collectors = ((name, options) for name, options in host.collect if options is not None)
            checks = (_check_collector(host, name, options, shell) for name, options in collectors)
            findings += await asyncio.gather(*checks)
    finally:
        await shells.close()
    return findings


def _finding(host: Host, check: str, *, passed: bool, detail: str = "", fix: str = "") -> Finding:
    return Finding(host.name, check, "pass" if passed else "fail", detail, fix)


def _check_files(host: Host, ssh: Ssh) -> list[Finding]:
    findings = []
    if ssh.key_file is not None:
        findings.append(_check_key(host, ssh.key_file, "reading"))
    findings.append(_check_known_hosts(host, ssh.known_hosts))
    return findings


def _check_known_hosts(host: Host, path: Path) -> Finding:
    fail = partial(_finding, host, f"known hosts {path}", passed=False)
    try:
        path.open("rb").close()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        fix = f"pin the host's key in that file: defib discover --known-hosts {host.name}"
        return fail(detail="there is no such file" if isinstance(error, FileNotFoundError) else str(error), fix=fix)
    except OSError as error:
        return fail(detail=str(error.strerror), fix="run this as the user of the programs, or make the file readable")
    if exposure := check_content(path):
        return finding_of(host.name, f"known hosts {path}", exposure)
    if ignored := read_known_hosts(path)[1]:
        more = f", and {len(ignored) - 1} more" if len(ignored) > 1 else ""
        detail = f"line {ignored[0].number} is ignored: {ignored[0].reason}{more}"
        return Finding(host.name, f"known hosts {path}", "warn", detail, "correct or remove the line")
    return _finding(host, f"known hosts {path}", passed=True)


def _check_key(host: Host, path: Path, purpose: str) -> Finding:
    check = f"SSH key for {purpose}, {path}"
    program = "exporter" if purpose == "reading" else "remediator"
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        fix = f"ssh-keygen -t ed25519 -N '' -f {path}"
        return _finding(host, check, passed=False, detail=str(error.strerror), fix=fix)
    except OSError as error:
        fix = f"run this as the {program}'s user with `--for {program}`, or make that user the owner of the file"
        return _finding(host, check, passed=False, detail=str(error.strerror), fix=fix)
    if exposure := check_key(path):
        return finding_of(host.name, check, exposure)
    return _finding(host, check, passed=True)


async def _check_shell(host: Host, shells: Shells, check: str) -> Finding:
    fail = partial(_finding, host, check, passed=False)
    setup = f"defib host setup {host.name}"
    try:
        shell = shells.get(host.name)
        # A wrapper refuses this command, which shows that it works.
        completed = await shell.run(["true"], timeout=LOGIN_TIMEOUT)
    except HostKeyError as error:
        fix = "find out why the host's key has changed, then pin it" if error.changed else "pin the host's key"
        return fail(detail=str(error), fix=f"{fix}: defib discover --known-hosts {host.name}")
    except (CommandNotRunError, LoginError, WrapperOutdatedError) as error:
        return fail(detail=str(error), fix=f"set up the account and its keys: {setup}")
    except ShellError as error:
        return fail(detail=str(error), fix="check that the host is up, and that its SSH port is reachable from here")
    if shell.wrapped and completed.status == 0:
        return fail(detail="the key is not restricted to the wrapper", fix=setup)
    passed = completed.status == 0 or bool(shell.wrapped and get_wrapper_refusal(completed))
    detail = "" if passed else completed.why or completed.output
    return _finding(host, check, passed=passed, detail=detail, fix=setup)


async def _check_collector(host: Host, name: str, options: CollectorOptions, shell: Shell) -> Finding:
    check = f"collector {name}"
    samples = CollectorSamples(host.name)
    collector = COLLECTORS[name].create(options, host.name)

    async def ask(sections: Sequence[Section]) -> Mapping[str, SectionOutput]:
        outputs: dict[str, SectionOutput] = {}
        limit = max(COMMAND_TIMEOUT, collector.deadline)
        limited = [replace(section, timeout=limit) for section in sections]
        error = await read_sections(shell, limited, timeout=limit, on_section=outputs.__setitem__)
        if not outputs:
            raise error
        record_truncation(outputs, samples)
        return outputs

    started = time.perf_counter()
    try:
        await collector.collect(ask, samples)
    except (CollectorFailure, ShellError) as error:
        fix = "see docs/hosts.md for the requirements of this collector"
        if shell.wrapped:
            fix += f"; `defib host setup {host.name}` updates the allow-list of the wrapper"
        return _finding(host, check, passed=False, detail=str(error), fix=fix)
    if samples.fault is not None:
        return _finding(host, check, passed=False, detail=samples.fault, fix="see docs/hosts.md for the limits")
    offset = samples.lines.get("host_clock_offset_seconds", "").strip().rpartition(" ")[2]
    if offset and abs(float(offset)) > CLOCK_TOLERANCE:
        detail = f"the host's clock is off by {float(offset):+.1f} s"
        return _finding(host, check, passed=False, detail=detail, fix="run NTP on both machines")
    detail = f"{time.perf_counter() - started:.2f} s, {format_count(len(samples.lines), 'metric')}"
    return _finding(host, check, passed=True, detail=detail)


def _check_rights(host: Host, inventory: Inventory) -> list[Finding]:
    """Warn of controls that need the rights of root and do not have them; only a rule of polkit could permit them."""
    control = host.ssh_for(control=True)
    if host.sudo.mode != "none" or control.wrapper or control.user == "root" or host.shell == "local":
        return []
    return [
        Finding(
            host.name, f"rights of the control of {name}", "warn", "it acts without the rights of root",
            f"set `sudo: passwordless` or `control_ssh: {{wrapper: true}}`, then run: defib host setup {host.name}",
        )
        for name, service in inventory.services.items()
        if service.host == host.name and service.control and getattr(service.control.options, "needs_root", False)
    ]  # fmt: skip


async def _check_controlling(host: Host, inventory: Inventory) -> list[Finding]:
    """Check what the remediator needs: its own keys and sudo rights, and the status of each controlled service."""
    control = host.ssh_for(control=True)
    findings = [_check_key(host, control.key_file, "controlling")] if host.control_ssh and control.key_file else []
    shells = Shells(inventory.hosts, control=True)
    try:
        login = await _check_shell(host, shells, "shell for controlling")
        if host.control_ssh is not None or host.sudo.mode != "none":
            findings.append(login)
        if login.result == "pass":
            shell = shells.get(host.name)
            if host.sudo.mode != "none" and not control.wrapper:
                commands = [argv for argv, _stdin in await asyncio.to_thread(commands_of, inventory, host)]
                findings.append(await _check_sudo(host, commands, shell))
                findings += await check_root_paths(host.name, shell, host.sudo, commands)
            findings += await _check_controls(host, inventory, shell)
            findings += _check_rights(host, inventory)
    finally:
        await shells.close()
    return findings


async def _check_controls(host: Host, inventory: Inventory, shell: Shell) -> list[Finding]:
    """Check that docker, systemd and supervisor report a status for what the controls restart, whatever it is."""
    findings = []
    for service in inventory.services.values():
        if service.host != host.name or service.control is None or "status" not in service.control.options.verbs:
            continue
        kind, options = CONTROLS[service.control.kind], service.control.options
        if not kind.options.needs_host or service.control.kind == "command":
            continue
        runner = ControlRunner(shell, host.sudo, COMMAND_TIMEOUT, host.name)
        try:
            facts = await kind.read_state(options, runner)
            detail = (
                f"{facts.state}{parenthesized(facts.selected)}"
                if facts
                else (await kind.run("status", options, runner)).output
            )
        except ShellError as error:
            facts, detail = None, str(error)
        name = service.control.kind
        fix = f"check the name in {name}, and that the account may use {name}: docs/remediation.md"
        check = f"control of {service.id}"
        findings.append(_finding(host, check, passed=facts is not None, detail=detail, fix=fix))
    return findings


async def _check_sudo(host: Host, commands: Sequence[Sequence[str]], shell: Shell) -> Finding:
    """Check with `sudo -l` that each command of the controls is allowed; none is run."""
    refused: list[str] = []
    for command in commands:
        argv, stdin = build_sudo_command(command, host.sudo)
        at = argv.index("--")
        completed = await shell.run([*argv[:at], "-l", *argv[at:]], timeout=COMMAND_TIMEOUT, stdin=stdin)
        if completed.status != 0:
            reason = (completed.output or completed.why or "not allowed").splitlines()[-1]
            refused.append(f"{shlex.join(command)}: {reason}")
    more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
    fix = "allow it for the account in sudoers" if host.shell == "local" else f"defib host setup {host.name}"
    return _finding(host, "sudo", passed=not refused, detail=f"{refused[0]}{more}" if refused else "", fix=fix)
