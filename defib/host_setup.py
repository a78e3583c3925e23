"""`defib host setup`: a script that prepares a host, for its administrator."""

import asyncio
import contextlib
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import asyncssh

from defib.lookup import find_host
from defib.output import print_text
from defib.root_paths import SCRIPT, names_in
from exporter.collectors import COLLECTORS
from exporter.probes import PROBES
from exporter.probes.host import HostProbeOptions
from fleet.host.sections import Section
from fleet.inventory.loading import LoadedInventory
from fleet.inventory.model import Host, Inventory, SudoOptions
from fleet.shells import CompletedCommand, ShellError
from fleet.shells.ssh import command_digest
from fleet.wrapper import render_allow_list, render_command_file, render_wrapper
from remediator.execution import evidence
from remediator.execution.controls import CONTROLS
from remediator.execution.controls.runner import VERBS, ControlRunner
from runtime.errors import DefibError
from runtime.redaction import Redactor

ACCOUNT = "defib"
SSH_PORT = 22  # in known_hosts, other ports are written with the address
WRAPPER = "/usr/local/sbin/defib-shell"
COMMANDS = "/etc/defib/commands"
WITHIN = 60.0  # seconds; nothing is run
HostCommand = tuple[tuple[str, ...], bytes]  # its arguments and its stdin, without the password of sudo
# sudo has patterns and its own escapes: other arguments cannot be written in sudoers.
_PLAIN = re.compile(r"[A-Za-z0-9_./@%+{},:=$'\"();&|<>-]+( [A-Za-z0-9_./@%+{},:=$'\"();&|<>-]+)*")
_PROGRAM = re.compile(r"/[A-Za-z0-9._+@/-]+|[A-Za-z0-9._+@-]+")
_USER = re.compile(r"[a-z_][a-z0-9_.-]*")  # in capitals it would be an alias of sudo, or ALL
_SOURCES = re.compile(r"[0-9A-Za-z.:,/*!-]*")


def set_up_host(load: Callable[[], LoadedInventory], name: str, *, sources: str, apply_as: str | None) -> int:
    """Print the script, or run it with `apply_as` as `ssh USER@HOST sudo sh`. Raises DefibError."""
    loaded = load()
    inventory = loaded.inventory
    host = find_host(inventory, name)
    if host.ssh is None:
        raise DefibError(f"the host {name!r} has no SSH settings: set hosts.{name}.ssh")
    loaded.require_resolved(*_find_sections(inventory, host), ignore=[f"hosts.{name}.sudo"])
    script = script_for(inventory, host, sources)
    if apply_as is None:
        if _contains_secrets(inventory, host, Redactor(loaded.secrets)):
            _check_stdout_is_private()
            print_text("the script contains secrets: do not store it where other users can read it", sys.stderr)
        sys.stdout.write(script)
        return 0
    ssh = ["ssh", "-p", str(host.ssh.port), f"{apply_as}@{host.address}", "sudo", "sh", "-s"]
    print_text(f"running {shlex.join(ssh)}", sys.stderr)
    return subprocess.run(ssh, input=script, text=True, check=False).returncode


def _find_sections(inventory: Inventory, host: Host) -> Iterator[str]:
    """Yield the sections of the configuration that the script depends on."""
    yield f"hosts.{host.name}"
    for other in _hosts_behind(inventory, host):
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


def _needs_commands(host: Host) -> bool:
    """Whether the script has the commands of the controls."""
    return host.ssh_for(control=True).wrapper or host.sudo.mode != "none"


def _contains_secrets(inventory: Inventory, host: Host, redact: Redactor) -> bool:
    """Whether the script contains secrets: those in arguments, and for a wrapper all variables for containers."""
    if not _needs_commands(host):
        return False
    wrapped = host.ssh_for(control=True).wrapper
    return any(
        (wrapped and stdin) or redact.redact_all(argv) != list(argv) for argv, stdin in commands_of(inventory, host)
    )


def _check_stdout_is_private() -> None:
    """Raise DefibError where other users can read the file that stdout is written to."""
    status = os.fstat(sys.stdout.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise DefibError(
            "the script contains secrets, and other users may open the file that it is written to: "
            "write it to a new file after `umask 077`, or use --apply"
        )


def script_for(inventory: Inventory, host: Host, sources: str) -> str:
    """Return the script: account, wrapper, allow-list, keys, sudoers, and how to pin the host's key."""
    read, control = host.ssh_for(control=False), host.ssh_for(control=True)
    account = read.user or ACCOUNT
    if _USER.fullmatch(account) is None or account == "root" or "\n" in str(read.known_hosts):
        raise DefibError(
            f"ssh.user: {account!r} cannot be the account of Defib: it must be a separate account, not root"
        )
    if _SOURCES.fullmatch(sources) is None:
        raise DefibError(f"argument --from: {sources!r} is not a list of addresses (write 10.0.0.5,10.0.1.0/24)")
    if (control.user or ACCOUNT) != account:
        raise DefibError(
            "control_ssh.user differs from ssh.user: this command sets up one account; "
            f"set up {control.user or ACCOUNT} by hand"
        )
    place = host.address if read.port == SSH_PORT else f"[{host.address}]:{read.port}"
    modes = [mode for mode, ssh in (("read", read), ("control", control)) if ssh.wrapper]
    steps = [
        _ACCOUNT.format(account=account),
        *_wrapper(inventory, host, modes),
        _KEYS.format(account=account, keys="\n".join(_keys(inventory, host, sources))),
        *_rights(inventory, host, account, modes),
        *_root_paths(inventory, host, account, modes),
    ]
    return _HEAD.format(name=host.name, place=place, known_hosts=read.known_hosts) + "\n".join(steps)


def _wrapper(inventory: Inventory, host: Host, modes: Sequence[str]) -> Iterator[str]:
    """Return the steps that install the wrapper and its allow-lists, or remove what is no longer needed."""
    if not modes:
        yield f"\n# No wrapper is needed.\nrm -rf {WRAPPER} /etc/defib/allowed {COMMANDS}\n"
        return
    yield _write_file(WRAPPER, render_wrapper(), "755")
    yield _write_file(
        "/etc/defib/allowed", render_allow_list(sections_of(inventory, host)) if "read" in modes else "", "644"
    )
    yield _commands(commands_of(inventory, host) if "control" in modes else ())


def _keys(inventory: Inventory, host: Host, sources: str) -> Iterator[str]:
    """Return the lines of authorized_keys."""
    read, control = host.ssh_for(control=False), host.ssh_for(control=True)
    limits = ",".join(["restrict", *([f'from="{sources}"'] if sources else []), *_forwarding(inventory, host)])
    for mode, ssh in (("read", read), ("control", control)):
        if mode == "control" and (host.control_ssh is None or control.key_file == read.key_file):
            continue
        # The wrapper runs as root, to query docker and read the kernel log; the account itself has no such rights.
        forced = f',command="sudo -n {WRAPPER} {mode}"' if ssh.wrapper else ""
        yield f"{limits}{forced} {_read_public_key(ssh.key_file)}"


def _rights(inventory: Inventory, host: Host, account: str, modes: Sequence[str]) -> Iterator[str]:
    """Return the steps that set the sudo rights of the account, or remove those no longer needed."""
    lines = [_WRAPPER_SUDO.format(wrapper=WRAPPER)] if modes else []
    lines += [f"echo '{account} ALL=(root) NOPASSWD: {WRAPPER} {mode}'" for mode in modes]
    by_sudo = host.sudo.mode != "none" and "control" not in modes
    if by_sudo:
        lines += dict.fromkeys(_sudoers_line(argv) for argv, _stdin in commands_of(inventory, host))
    if by_sudo and host.sudo.mode == "password":
        yield _SET_SUDO_PW.format(account=account)
    if lines:
        tag = "PASSWD:" if host.sudo.mode == "password" else "NOPASSWD:"
        yield _SUDOERS.format(account=account, tag=tag, lines="\n".join(lines))
    else:
        yield "\n# The account has no sudo rights.\nrm -f /etc/sudoers.d/defib\n"


def _root_paths(inventory: Inventory, host: Host, account: str, modes: Sequence[str]) -> Iterator[str]:
    """Return the step that warns about what root runs and the account can replace."""
    if host.sudo.mode != "none" or "control" in modes:
        names = shlex.join(sorted(names_in([argv for argv, _stdin in commands_of(inventory, host)])))
        yield _CHANGEABLE.format(account=account, script=shlex.quote(SCRIPT), names=names)


def _forwarding(inventory: Inventory, host: Host) -> list[str]:
    """Return the key options that let Defib reach other hosts through this one (`via`)."""
    behind = _hosts_behind(inventory, host)
    opens = sorted({f'permitopen="{other.address}:{other.ssh.port}"' for other in behind if other.ssh is not None})
    return ["port-forwarding", *opens] if opens else []


def _hosts_behind(inventory: Inventory, host: Host) -> list[Host]:
    """Return the hosts that are reached through this one."""
    return [other for other in inventory.hosts.values() if other.ssh is not None and other.ssh.via == host.name]


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
    """Return every command that the controls of a host's services can run, each once."""
    recorder = _Recorder()

    async def record_all() -> None:
        for service in inventory.services.values():
            if service.host != host.name or service.control is None:
                continue
            kind, options = CONTROLS[service.control.kind], service.control.options
            if not kind.options.needs_host:
                continue
            for verb in sorted(VERBS & options.verbs):
                with contextlib.suppress(ShellError):  # there is no output to parse
                    await kind.run(verb, options, ControlRunner(recorder, SudoOptions(), WITHIN))
            with contextlib.suppress(ShellError):
                await kind.read_state(options, ControlRunner(recorder, SudoOptions(), WITHIN))
            for step in inventory.remediation.for_service(service).steps:
                if step.recreate is not None and step.recreate.command:
                    recorder.commands.append((tuple(step.recreate.command), b""))
            if recorder.commands and host.ssh_for(control=True).wrapper:
                recorder.commands += [(tuple(argv), b"") for argv in evidence.HOST_COMMANDS.values()]

    asyncio.run(record_all())
    return sorted(set(recorder.commands))


def _read_public_key(key_file: Path | None) -> str:
    if key_file is None:
        raise DefibError("ssh.key_file is not set: create a key with ssh-keygen -t ed25519")
    try:
        return asyncssh.read_private_key(str(key_file)).export_public_key().decode().strip()
    except (OSError, asyncssh.KeyImportError) as error:
        raise DefibError(f"{key_file}: {error}") from error


def _write_file(path: str, text: str, mode: str) -> str:
    return (
        f"install -d -m 755 {shlex.quote(str(Path(path).parent))}\n"
        f"cat > {path}.new <<'END_OF_FILE'\n{text}END_OF_FILE\n"
        f"chown root:root {path}.new && chmod {mode} {path}.new && mv {path}.new {path}\n"
    )


def _commands(commands: Iterable[HostCommand]) -> str:
    """Replace the commands that the wrapper may run; they may contain secrets."""
    named = {command_digest(*command): render_command_file(*command) for command in commands}
    files = "".join(f"cat > {COMMANDS}.new/{name} <<'{name}'\n{text}{name}\n" for name, text in named.items())
    return (
        f"\n# The commands of the controls, one file each.\n"
        f"rm -rf {COMMANDS}.new\ninstall -d -m 700 {COMMANDS}.new\n(\numask 077\n{files})\n"
        f"rm -rf {COMMANDS} && mv {COMMANDS}.new {COMMANDS}\n"
    )


def _sudoers_line(argv: Sequence[str]) -> str:
    """Return a call of `allow` in the script; sudo compares all arguments as one escaped string."""
    if _PROGRAM.fullmatch(argv[0]) is None or not all(map(_PLAIN.fullmatch, argv[1:])):
        return f"# cannot be written in sudoers, add it by hand: {shlex.join(argv)!r}"
    arguments = " ".join(re.sub("([,:= ])", r"\\\1", argument) for argument in argv[1:]) or '""'
    return shlex.join(["allow", argv[0], arguments])


_HEAD = """\
#!/bin/sh
# Prepares {name} for Defib; run it on that host as root. It can be run again at any time.
#
# First pin the host's key on the machine of the exporter and the remediator: compare it with the output of
# `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the host's console, then add it to {known_hosts}:
#     {place} ssh-ed25519 AAAA…
set -eu
umask 022
"""
_ACCOUNT = """
# The account: no password, and no group except its own.
install -d -m 755 /etc/defib
if id {account} >/dev/null 2>&1; then
    [ "$(cat /etc/defib/account 2>/dev/null)" = {account} ] || {{
        echo "the account {account} exists and was not created by this script; use another name in ssh.user" >&2
        exit 1
    }}
else
    echo {account} > /etc/defib/account
    useradd --system --create-home --shell /bin/sh {account}
fi
home=$(getent passwd {account} | cut -d: -f6)
"""
_KEYS = """
# Its keys belong to root, as does its home, so that the account cannot add any.
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
_CHANGEABLE = """
# Root must not run what the account can replace.
su -s /bin/sh {account} -c {script} sh {names} | while IFS="$(printf '\t')" read -r name place; do
    echo "warning: root runs $name, but the account can change $place: chown root and chmod go-w" >&2
done
"""
_SET_SUDO_PW = """
[ "$(passwd -S {account} | cut -d' ' -f2)" = P ] ||
    echo "sudo needs a password: set the one from the configuration with: passwd {account}" >&2
"""
_WRAPPER_SUDO = """echo 'Defaults!{wrapper} env_keep += "SSH_ORIGINAL_COMMAND"'"""
_SUDOERS = """
# What it may run as root: exactly these commands.
allow() {{
    case $1 in
    /*) path=$1 ;;
    *) path=$(IFS=:; for folder in $PATH; do [ -x "$folder/$1" ] && echo "$folder/$1" && break; done) || : ;;
    esac
    case $path in
    '' | *[!A-Za-z0-9._+@/-]*) echo "skipped in sudoers: $1 is not on this host, or has an unusual path" >&2; return ;;
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
