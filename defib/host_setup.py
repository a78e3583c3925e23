"""`defib host setup`: the steps that make a new host ready, as one script for its administrator."""

import asyncio
import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import asyncssh

from exporter.collectors import COLLECTORS
from exporter.probes.host import HostOptions
from fleet.host.reading import Section
from fleet.inventory.loading import Loaded
from fleet.inventory.model import Host, Inventory, Sudo
from fleet.shells import Completed, ShellError
from fleet.shells.ssh import digest
from fleet.wrapper import allowed, command_file, wrapper
from remediator.execution import evidence
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.context import VERBS, Hands
from runtime.errors import DefibError

ACCOUNT = "defib"
WRAPPER = "/usr/local/sbin/defib-shell"
COMMANDS = "/etc/defib/commands"
# sudo reads patterns, and has its own ideas of backslashes: what is not as plain as this cannot stand in sudoers.
WITHIN = 60.0  # seconds; nothing is run that could take any
_PLAIN = re.compile(r"[A-Za-z0-9_./@%+{},:=$'\"();&|<>-]+( [A-Za-z0-9_./@%+{},:=$'\"();&|<>-]+)*")
_PROGRAM = re.compile(r"/[A-Za-z0-9._+@/-]+|[A-Za-z0-9._+@-]+")
_USER = re.compile(r"[a-z_][a-z0-9_.-]*")  # in capitals it would be an alias of sudo's, or everybody
_SOURCES = re.compile(r"[0-9A-Za-z.:,/*!-]*")


def setup(load: Callable[[], Loaded], name: str, *, sources: str, apply: str | None) -> int:
    """Print the script, or run it with `apply` as `ssh USER@HOST sudo sh`. Raises DefibError."""
    inventory = load().inventory
    host = inventory.hosts.get(name)
    if host is None or host.ssh is None:
        raise DefibError(f"the inventory has no {'ssh of the host' if host else 'host'} {name!r}")
    script = script_for(inventory, host, sources)
    if apply is None:
        print(script, end="")
        return 0
    ssh = ["ssh", "-p", str(host.ssh.port), f"{apply}@{host.address}", "sudo", "sh", "-s"]
    print(f"running {shlex.join(ssh)}", file=sys.stderr)
    return subprocess.run(ssh, input=script, text=True, check=False).returncode


def script_for(inventory: Inventory, host: Host, sources: str) -> str:
    """The script: account, wrapper, allow-list, keys, sudoers, and how to pin the host's key."""
    read, control = host.ssh_for(control=False), host.ssh_for(control=True)
    account = read.user or ACCOUNT
    if _USER.fullmatch(account) is None or account == "root" or "\n" in str(read.known_hosts):
        raise DefibError(f"{account!r} cannot be the account: it is to be one of its own, for this alone")
    if _SOURCES.fullmatch(sources) is None:
        raise DefibError(f"--from {sources!r} is not a list of addresses (write 10.0.0.5,10.0.1.0/24)")
    if (control.user or ACCOUNT) != account:
        raise DefibError("control_ssh.user is another account than ssh.user: set that one up by hand")
    place = host.address if read.port == 22 else f"[{host.address}]:{read.port}"  # noqa: PLR2004
    modes = [mode for mode, ssh in (("read", read), ("control", control)) if ssh.wrapper]
    steps = [
        _ACCOUNT.format(account=account),
        *_wrapper(inventory, host, modes),
        _KEYS.format(account=account, keys="\n".join(_keys(inventory, host, sources))),
        *_rights(inventory, host, account, modes),
    ]
    return _HEAD.format(name=host.name, place=place, known_hosts=read.known_hosts) + "\n".join(steps)


def _wrapper(inventory: Inventory, host: Host, modes: Sequence[str]) -> Iterator[str]:
    """The wrapper and what it may do; what is not wanted any more goes."""
    if not modes:
        yield f"\n# It needs no wrapper.\nrm -rf {WRAPPER} /etc/defib/allowed {COMMANDS}\n"
        return
    yield _here(WRAPPER, wrapper(), "755")
    yield _here("/etc/defib/allowed", allowed(sections_of(inventory, host)) if "read" in modes else "", "644")
    yield _commands(commands_of(inventory, host) if "control" in modes else ())


def _keys(inventory: Inventory, host: Host, sources: str) -> Iterator[str]:
    """The lines of authorized_keys."""
    read, control = host.ssh_for(control=False), host.ssh_for(control=True)
    limits = ",".join(["restrict", *([f'from="{sources}"'] if sources else []), *_forwarding(inventory, host)])
    for mode, ssh in (("read", read), ("control", control)):
        if mode == "control" and (host.control_ssh is None or control.key_file == read.key_file):
            continue
        # As root it may ask docker and read the kernel's log, which would otherwise want far more than this.
        forced = f',command="sudo -n {WRAPPER} {mode}"' if ssh.wrapper else ""
        yield f"{limits}{forced} {_public(ssh.key_file)}"


def _rights(inventory: Inventory, host: Host, account: str, modes: Sequence[str]) -> Iterator[str]:
    """What the account may do as root; what it may not any more goes."""
    lines = [_WRAPPER_SUDO.format(wrapper=WRAPPER)] if modes else []
    lines += [f"echo '{account} ALL=(root) NOPASSWD: {WRAPPER} {mode}'" for mode in modes]
    by_sudo = host.sudo.mode != "none" and "control" not in modes
    if by_sudo:
        lines += [_sudoers_line(argv) for argv in commands_of(inventory, host)]
    if by_sudo and host.sudo.mode == "password":
        yield _ASKS.format(account=account)
    if lines:
        tag = "PASSWD:" if host.sudo.mode == "password" else "NOPASSWD:"
        yield _SUDOERS.format(account=account, tag=tag, lines="\n".join(lines))
    else:
        yield "\n# It may do nothing as root.\nrm -f /etc/sudoers.d/defib\n"


def _forwarding(inventory: Inventory, host: Host) -> list[str]:
    """What the keys of a host may forward to, which others are reached through."""
    behind = [other for other in inventory.hosts.values() if other.ssh is not None and other.ssh.via == host.name]
    opens = sorted({f'permitopen="{other.address}:{other.ssh.port}"' for other in behind if other.ssh is not None})
    return ["port-forwarding", *opens] if opens else []


def sections_of(inventory: Inventory, host: Host) -> list[Section]:
    """All that is read of a host, by collectors and by probes."""
    found: list[Section] = []
    for name, options in host.collect:
        if options is not None:
            found += COLLECTORS[name].make(options, host.name).sections()
    for service in inventory.services.values():
        if service.host == host.name and isinstance(service.probe.options, HostOptions):
            found.append(service.probe.options.section)
    return found


class _Recorder:
    """A shell that runs nothing, and remembers what it was asked to."""

    wrapped = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    async def run(self, argv: Sequence[str], **_: object) -> Completed:
        self.asked.append(tuple(argv))
        return Completed(0, "", "")

    async def close(self) -> None:
        """Nothing is held."""


def commands_of(inventory: Inventory, host: Host) -> list[tuple[str, ...]]:
    """Every command that the controls of a host's services would run, each once."""
    recorder = _Recorder()

    async def rehearse() -> None:
        for service in inventory.services.values():
            if service.host != host.name or service.control is None:
                continue
            kind, options = CONTROLS[service.control.kind], service.control.options
            if not kind.options.needs_host:
                continue
            for verb in sorted(VERBS & options.verbs):
                with contextlib.suppress(ShellError):  # nothing is said by what is not run
                    await kind.control(verb, options, Hands(recorder, Sudo(), WITHIN))
            with contextlib.suppress(ShellError):
                await kind.facts(options, Hands(recorder, Sudo(), WITHIN))
            for step in inventory.remediation.of(service).steps:
                if step.recreate is not None and step.recreate.command:
                    recorder.asked.append(tuple(step.recreate.command))
            if recorder.asked and host.ssh_for(control=True).wrapper:
                recorder.asked += [tuple(argv) for argv in evidence.OF_THE_HOST.values()]

    asyncio.run(rehearse())
    return sorted(set(recorder.asked))


def _public(key_file: Path | None) -> str:
    if key_file is None:
        raise DefibError("the host has no ssh.key_file: make one with ssh-keygen -t ed25519")
    try:
        return asyncssh.read_private_key(str(key_file)).export_public_key().decode().strip()
    except (OSError, asyncssh.KeyImportError) as error:
        raise DefibError(f"{key_file}: {error}") from error


def _here(path: str, text: str, mode: str) -> str:
    return (
        f"install -d -m 755 {shlex.quote(str(Path(path).parent))}\n"
        f"cat > {path}.new <<'END_OF_FILE'\n{text}END_OF_FILE\n"
        f"chown root:root {path}.new && chmod {mode} {path}.new && mv {path}.new {path}\n"
    )


def _commands(commands: Iterable[Sequence[str]]) -> str:
    """Have these commands, and no others, stand in the wrapper's folder; they may hold secrets."""
    named = {digest(argv): command_file(argv) for argv in commands}
    files = "".join(f"cat > {COMMANDS}.new/{name} <<'{name}'\n{text}{name}\n" for name, text in named.items())
    return (
        f"\n# What the controls may run: a file for each command.\n"
        f"rm -rf {COMMANDS}.new\ninstall -d -m 700 {COMMANDS}.new\n(\numask 077\n{files})\n"
        f"rm -rf {COMMANDS} && mv {COMMANDS}.new {COMMANDS}\n"
    )


def _sudoers_line(argv: Sequence[str]) -> str:
    """A call of `allow` in the script; sudo compares the arguments as one text, with these characters escaped."""
    if _PROGRAM.fullmatch(argv[0]) is None or not all(map(_PLAIN.fullmatch, argv[1:])):
        return f"# cannot stand in sudoers, write it by hand: {shlex.join(argv)!r}"
    arguments = " ".join(re.sub("([,:= ])", r"\\\1", argument) for argument in argv[1:]) or '""'
    return shlex.join(["allow", argv[0], arguments])


_HEAD = """\
#!/bin/sh
# What makes {name} ready for Defib; run it there as root. It may be run again.
#
# First, where the exporter and the remediator run, pin the host's key: compare it with what the host's console prints
# for `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub`, then add it to {known_hosts}, as
#     {place} ssh-ed25519 AAAA…
set -eu
umask 022
"""
_ACCOUNT = """
# The account: it has no password, and belongs to no group but its own.
install -d -m 755 /etc/defib
if id {account} >/dev/null 2>&1; then
    [ "$(cat /etc/defib/account 2>/dev/null)" = {account} ] || {{
        echo "there is an account {account} that this script has not made; it would be changed beyond repair" >&2
        exit 1
    }}
else
    echo {account} > /etc/defib/account
    useradd --system --create-home --shell /bin/sh {account}
fi
home=$(getent passwd {account} | cut -d: -f6)
"""
_KEYS = """
# Its keys: root's, as is its home, so that whoever has the account cannot add any.
chown root:root "$home"
chmod 755 "$home"
[ ! -L "$home/.ssh" ] || exit 1
install -d -m 755 -o root -g root "$home/.ssh"
rm -f "$home/.ssh/authorized_keys.new"
cat > "$home/.ssh/authorized_keys.new" <<'END_OF_FILE'
{keys}
END_OF_FILE
chown root:root "$home/.ssh/authorized_keys.new" && chmod 644 "$home/.ssh/authorized_keys.new"
mv "$home/.ssh/authorized_keys.new" "$home/.ssh/authorized_keys"
"""
_ASKS = """
[ "$(passwd -S {account} | cut -d' ' -f2)" = P ] ||
    echo "sudo asks for a password: give it the one of the inventory with: passwd {account}" >&2
"""
_WRAPPER_SUDO = """echo 'Defaults!{wrapper} env_keep += "SSH_ORIGINAL_COMMAND"'"""
_SUDOERS = """
# What it may do as root: these commands, as they stand here.
allow() {{
    case $1 in
    /*) path=$1 ;;
    *) path=$(IFS=:; for folder in $PATH; do [ -x "$folder/$1" ] && echo "$folder/$1" && break; done) || : ;;
    esac
    case $path in
    '' | *[!A-Za-z0-9._+@/-]*) echo "there is no $1 on this host that could stand in sudoers" >&2; return ;;
    esac
    printf '%s ALL=(root) {tag} %s %s\\n' {account} "$path" "$2"
}}
{{
:
{lines}
}} > /etc/sudoers.d/.defib.new
visudo -cf /etc/sudoers.d/.defib.new
chmod 440 /etc/sudoers.d/.defib.new && mv /etc/sudoers.d/.defib.new /etc/sudoers.d/defib
"""
