"""`defib doctor`: what an installation needs of its hosts, what is missing, and how to mend it."""

import asyncio
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from defib.host import commands_of
from exporter.collectors import COLLECTORS
from exporter.collectors.collecting import CollectFailure, Every
from exporter.samples import Samples
from fleet.loading import Loaded
from fleet.model import Host, Inventory, Ssh
from fleet.readings import Output, Section, read
from fleet.shells import HostKeyRefused, LoginRefused, Shell, ShellError
from fleet.shells.pool import Shells
from fleet.shells.ssh import refused_by_wrapper
from fleet.sudo import elevated
from runtime.errors import DefibError
from runtime.redaction import Redactor

WITHIN = 10.0  # seconds for each check
CLOCK = 1.0  # seconds that a clock may differ
AT_ONCE = 20  # hosts


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is well, what was seen, and what to do where it is not."""

    what: str
    well: bool
    seen: str = ""
    mend: str = ""


async def doctor(load: Callable[[], Loaded], names: Sequence[str]) -> int:
    """Check the hosts named, or all that have a shell, and print what was found; 1 where something is not well."""
    loaded = load()
    hosts = loaded.inventory.hosts
    unknown = [name for name in names if name not in hosts]
    if unknown:
        raise DefibError(f"the inventory has no host {', '.join(unknown)}")
    chosen = [hosts[name] for name in names] or [host for host in hosts.values() if host.has_shell]
    redact = Redactor(loaded.secrets)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(host: Host) -> list[Finding]:
        async with gate:
            return await check(host, loaded.inventory)

    well = True
    for host, findings in zip(chosen, await asyncio.gather(*map(one, chosen)), strict=True):
        print(host.name)
        for each in findings:
            well = well and each.well
            print(redact(f"  {'ok ' if each.well else 'BAD'} {each.what}{f': {each.seen}' if each.seen else ''}"))
            if not each.well and each.mend:
                print(f"      → {each.mend}")
    return 0 if well else 1


async def check(host: Host, inventory: Inventory) -> list[Finding]:
    """All findings of one host."""
    findings: list[Finding] = []
    if not host.has_shell:
        return [Finding("a shell", False, "it has none", "give it `ssh:` or `shell: local`")]
    if host.shell == "ssh":
        findings += _files(host.ssh_for(control=False), "reading")
    shells = Shells(inventory.hosts)
    try:
        reached = await _reach(host, shells, "its shell answers")
        findings.append(reached)
        if reached.well:
            for name, options in host.collect:
                if options is not None:
                    findings.append(await _collector(host, name, options, shells.of(host.name)))
    finally:
        await shells.close()
    return findings + await _control(host, inventory)


def _files(ssh: Ssh, purpose: str) -> list[Finding]:
    found = []
    if ssh.key_file is not None:
        found.append(_key(ssh.key_file, purpose))
    pinned = ssh.known_hosts.is_file()
    mend = "pin the host's key there: `defib host setup` says how"
    found.append(Finding(f"known hosts {ssh.known_hosts}", pinned, "" if pinned else "there is no such file", mend))
    return found


def _key(path: Path, purpose: str) -> Finding:
    what = f"the key for {purpose}, {path}"
    try:
        mode = path.stat().st_mode & 0o777
        path.open("rb").close()
    except OSError as error:
        return Finding(what, False, str(error.strerror), f"ssh-keygen -t ed25519 -N '' -f {path}")
    return Finding(
        what, not mode & 0o077, f"others may read it ({mode:o})" if mode & 0o077 else "", f"chmod 600 {path}"
    )


async def _reach(host: Host, shells: Shells, what: str) -> Finding:
    try:
        shell = shells.of(host.name)
        # A wrapper takes no command of ours; that it refuses one is its answer.
        done = await shell.run(["true"], timeout=WITHIN)
    except HostKeyRefused as error:
        mend = "find out why the host's key is another, then pin it" if error.changed else "pin the host's key"
        return Finding(what, False, str(error), f"{mend} by hand: `defib host setup` says how")
    except LoginRefused as error:
        return Finding(what, False, str(error), f"let the key in: defib host setup {host.name}")
    except ShellError as error:
        return Finding(
            what, False, str(error), "see that the host is up, and that its SSH port can be reached from here"
        )
    if shell.wrapped and done.status == 0:
        open_ = "the key may run anything, not the wrapper alone"
        return Finding(what, False, open_, f"defib host setup {host.name}")
    answered = done.status == 0 or bool(shell.wrapped and refused_by_wrapper(done))
    return Finding(what, answered, "" if answered else done.why or done.output, f"defib host setup {host.name}")


async def _collector(host: Host, name: str, options: Every, shell: Shell) -> Finding:
    samples = Samples(host.name)
    collector = COLLECTORS[name].make(options, host.name)

    async def ask(sections: Sequence[Section]) -> Mapping[str, Output]:
        found: dict[str, Output] = {}
        error = await read(shell, sections, timeout=WITHIN, tell=found.__setitem__)
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
        return Finding(f"collector {name}", False, str(error), mend)
    took = f"{time.perf_counter() - started:.2f} s, {len(samples.lines)} metrics"
    offset = samples.lines.get("host_clock_offset_seconds", "").strip().rpartition(" ")[2]
    if offset and abs(float(offset)) > CLOCK:
        return Finding(f"collector {name}", False, f"its clock is {float(offset):+.1f} s off", "run NTP on both")
    return Finding(f"collector {name}", True, took)


async def _control(host: Host, inventory: Inventory) -> list[Finding]:
    """What the remediator needs, where it uses other keys or sudo."""
    if host.control_ssh is None and host.sudo.mode == "none":
        return []
    control = host.ssh_for(control=True)
    findings = [_key(control.key_file, "controlling")] if host.control_ssh is not None and control.key_file else []
    shells = Shells(inventory.hosts, control=True)
    try:
        findings.append(await _reach(host, shells, "its shell answers to the controls"))
        if findings[-1].well and host.sudo.mode != "none" and not control.wrapper:
            findings.append(await _sudo(host, inventory, shells.of(host.name)))
    finally:
        await shells.close()
    return findings


async def _sudo(host: Host, inventory: Inventory, shell: Shell) -> Finding:
    """Whether sudo allows each command of the controls; it is asked, and runs none."""
    refused: list[str] = []
    for command in await asyncio.to_thread(commands_of, inventory, host):
        argv, stdin = elevated(command, host.sudo)
        at = argv.index("--")
        done = await shell.run([*argv[:at], "-l", *argv[at:]], timeout=WITHIN, stdin=stdin)
        if done.status != 0:
            said = (done.output or done.why or "it is not allowed").splitlines()[-1]
            refused.append(f"{shlex.join(command)}: {said}")
    more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
    mend = "allow its account that in sudoers" if host.shell == "local" else f"defib host setup {host.name}"
    return Finding("sudo", not refused, f"{refused[0]}{more}" if refused else "", mend)
