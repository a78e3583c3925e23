"""The script that prepares a host: account, keys, wrapper, allow-list and sudoers.

Run again, it changes nothing that is as it should be. Its last line is `CHANGED` or `UNCHANGED`.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import asyncssh

from defib.host_setup.recorded import HostCommand, commands_of, sections_of
from defib.root_paths import SCRIPT, names_in
from fleet.inventory.model import Host, Inventory, Ssh
from fleet.shells.host_keys import known_hosts_name
from fleet.shells.ssh import command_digest
from fleet.shells.sudo import enclose
from fleet.wrapper import render_allow_list, render_command_file, render_wrapper
from runtime.addresses import bracket
from runtime.errors import DefibError

ACCOUNT = "defib"
WRAPPER = "/usr/local/sbin/defib-shell"
COMMANDS = "/etc/defib/commands"
CHANGED, UNCHANGED = "defib-setup: changed", "defib-setup: unchanged"
# sudo has patterns and its own escapes: other arguments cannot be written in sudoers.
_PLAIN = re.compile(r"[A-Za-z0-9_./@%+{},:=$'\"();&|<>-]+( [A-Za-z0-9_./@%+{},:=$'\"();&|<>-]+)*")
_SECURE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAM = re.compile(r"/[A-Za-z0-9._+@/-]+|[A-Za-z0-9._+@-]+")
_USER = re.compile(r"[a-z_][a-z0-9_.-]*")  # in capitals it would be an alias of sudo, or ALL
_SOURCES = re.compile(r"[0-9A-Za-z.:,/*!-]*")


def check_sources(sources: str) -> None:
    """Check the addresses from which logins are accepted. Raises DefibError."""
    if _SOURCES.fullmatch(sources) is None:
        raise DefibError(f"argument --from: {sources!r} is not a list of addresses (write 10.0.0.5,10.0.1.0/24)")


def script_for(inventory: Inventory, host: Host, sources: str) -> str:
    """Return the script: account, wrapper, allow-list, keys, sudoers, and how to pin the host's key."""
    read, control = host.ssh_for(control=False), host.ssh_for(control=True)
    account = read.user or ACCOUNT
    if _USER.fullmatch(account) is None or account == "root" or "\n" in str(read.known_hosts):
        raise DefibError(
            f"ssh.user: {account!r} cannot be the account of Defib: it must be a separate account, not root"
        )
    if (control.user or ACCOUNT) != account:
        raise DefibError(
            "control_ssh.user differs from ssh.user: this command sets up one account; "
            f"set up {control.user or ACCOUNT} by hand"
        )
    place = known_hosts_name(host.address, read.port)
    modes = [mode for mode, ssh in (("read", read), ("control", control)) if ssh.wrapper]
    steps = [
        _ACCOUNT.format(account=account),
        *_wrapper(inventory, host, modes),
        _KEYS.format(account=account, keys="\n".join(_keys(inventory, host, sources))),
        *_rights(inventory, host, account, modes),
        *_root_paths(inventory, host, account, modes),
    ]
    head = _HEAD.format(name=host.name, place=place, known_hosts=read.known_hosts)
    return "\n".join([head, *steps, _END.format(changed=CHANGED, unchanged=UNCHANGED)])


def _wrapper(inventory: Inventory, host: Host, modes: Sequence[str]) -> Iterator[str]:
    """Return the steps that install the wrapper and its allow-lists, or remove what is no longer needed."""
    if not modes:
        yield f"\n# No wrapper is needed.\nremove {WRAPPER} /etc/defib/allowed {COMMANDS}\n"
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
        yield f"{limits}{forced} {_read_public_key(ssh)}"


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
        yield _SUDOERS.format(account=account, tag=tag, lines="\n".join(lines), secure_path=_SECURE_PATH)
    else:
        yield "\n# The account has no sudo rights.\nremove /etc/sudoers.d/defib\n"


def _root_paths(inventory: Inventory, host: Host, account: str, modes: Sequence[str]) -> Iterator[str]:
    """Return the step that warns about what root runs and the account can replace."""
    if host.sudo.mode != "none" or "control" in modes:
        names = shlex.join(sorted(names_in([argv for argv, _stdin in commands_of(inventory, host)])))
        yield _CHANGEABLE.format(account=account, script=shlex.quote(SCRIPT), names=names)


def _forwarding(inventory: Inventory, host: Host) -> list[str]:
    """Return the key options that let Defib reach other hosts through this one (`via`)."""
    behind = hosts_behind(inventory, host)
    opens = sorted(
        {f'permitopen="{bracket(other.address)}:{other.ssh.port}"' for other in behind if other.ssh is not None}
    )
    return ["port-forwarding", *opens] if opens else []


def hosts_behind(inventory: Inventory, host: Host) -> list[Host]:
    """Return the hosts that are reached through this one."""
    return [other for other in inventory.hosts.values() if other.ssh is not None and other.ssh.via == host.name]


def _read_public_key(ssh: Ssh) -> str:
    key_file = ssh.key_file
    if key_file is None:
        raise DefibError("ssh.key_file is not set: create a key with ssh-keygen -t ed25519")
    public = key_file.with_name(f"{key_file.name}.pub")  # the private key may be readable for another user only
    try:
        if public.exists():
            return asyncssh.read_public_key(str(public)).export_public_key().decode().strip()
        passphrase = ssh.passphrase.get_secret_value() if ssh.passphrase is not None else None
        return asyncssh.read_private_key(str(key_file), passphrase).export_public_key().decode().strip()
    except (OSError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        raise DefibError(f"{key_file}: {error}") from error


def _write_file(path: str, text: str, mode: str) -> str:
    return (
        f"directory {shlex.quote(str(Path(path).parent))} 755\n"
        f"cat > {path}.new <<'END_OF_FILE'\n{text}END_OF_FILE\n"
        f"replace {path}.new {path} {mode}\n"
    )


def _commands(commands: Iterable[HostCommand]) -> str:
    """Replace the commands that the wrapper may run; they may contain secrets."""
    named = {command_digest(*command): render_command_file(*command) for command in commands}
    files = "".join(f"cat > {COMMANDS}.new/{name} <<'{name}'\n{text}{name}\n" for name, text in named.items())
    return (
        f"\n# The commands of the controls, one file each.\n"
        f"rm -rf {COMMANDS}.new\ninstall -d -m 700 {COMMANDS}.new\n(\numask 077\n{files})\n"
        f"replace_directory {COMMANDS}.new {COMMANDS}\n"
    )


def _sudoers_line(argv: Sequence[str]) -> str:
    """Return a call of `allow` in the script; sudo compares all arguments as one escaped string."""
    command, argv = argv, enclose(argv)
    if _PROGRAM.fullmatch(argv[0]) is None or not all(map(_PLAIN.fullmatch, argv[1:])):
        return f"# cannot be written in sudoers, use a script on the host instead: {shlex.join(command)!r}"
    arguments = " ".join(re.sub("([,:= ])", r"\\\1", argument) for argument in argv[1:]) or '""'
    return shlex.join(["allow", argv[0], arguments])


_HEAD = """\
#!/bin/sh
# Prepares {name} for Defib; run it on that host as root. Run again, it changes only what differs.
#
# First pin the host's key on the machine of the exporter and the remediator, in {known_hosts}:
# `defib discover --known-hosts {name}` shows the key. Compare it with the output of
# `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the host's console. It adds a line such as
#     {place} ssh-ed25519 AAAA…
set -eu
umask 022

# In braces, so that the shell reads everything before it runs anything: a part of the script does nothing.
{{
changed=
# Print owner, mode and kind of a file.
describe() {{
    stat -c '%u:%g %a %F' -- "$1" 2>/dev/null || :
}}
# Move a new file to its place, unless the same is there.
replace() {{
    chown root:root "$1"
    chmod "$3" "$1"
    if [ "$(describe "$1")" = "$(describe "$2")" ] && cmp -s "$1" "$2"; then
        rm -f "$1"
    else
        mv "$1" "$2"
        changed=yes
    fi
}}
# The same for a directory of files.
replace_directory() {{
    if [ "$(describe "$1")" = "$(describe "$2")" ] && diff -r "$1" "$2" >/dev/null 2>&1; then
        rm -rf "$1"
    else
        rm -rf "$2"
        mv "$1" "$2"
        changed=yes
    fi
}}
# Create a directory of root, or correct its owner and mode; it may inherit its group.
directory() {{
    case $(stat -L -c '%u:%g %a %F' -- "$1" 2>/dev/null || :) in
    "0:0 $2 directory" | "0:"*" 2$2 directory") return ;;
    esac
    install -d -m "$2" -o root -g root "$1"
    changed=yes
}}
remove() {{
    for path; do
        if [ -e "$path" ] || [ -L "$path" ]; then
            rm -rf "$path"
            changed=yes
        fi
    done
}}
"""
_ACCOUNT = """
# The account: no password, and no group except its own.
directory /etc/defib 755
if id {account} >/dev/null 2>&1; then
    [ "$(cat /etc/defib/account 2>/dev/null)" = {account} ] || {{
        echo "the account {account} exists and was not created by this script; use another name in ssh.user" >&2
        exit 1
    }}
else
    echo {account} > /etc/defib/account
    useradd --system --create-home --shell /bin/sh {account}
    changed=yes
fi
home=$(getent passwd {account} | cut -d: -f6)
"""
_KEYS = """
# Its keys belong to root, as does its home, so that the account cannot add any.
directory "$home" 755
[ ! -L "$home/.ssh" ] || {{
    echo "$home/.ssh is a symbolic link: remove it" >&2
    exit 1
}}
directory "$home/.ssh" 755
rm -f "$home/.ssh/authorized_keys.new"
cat > "$home/.ssh/authorized_keys.new" <<'END_OF_FILE'
{keys}
END_OF_FILE
replace "$home/.ssh/authorized_keys.new" "$home/.ssh/authorized_keys" 644
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
# What it may run as root: exactly these commands, with a PATH and in a directory that the account does not choose.
secure_path={secure_path}
allow() {{
    case $1 in
    /*) path=$1 ;;
    *) path=$(IFS=:; for folder in $secure_path; do [ -x "$folder/$1" ] && echo "$folder/$1" && break; done) || : ;;
    esac
    case $path in
    '' | *[!A-Za-z0-9._+@/-]*) echo "skipped in sudoers: $1 is not on this host, or has an unusual path" >&2; return ;;
    esac
    printf '%s ALL=(root) {tag} %s %s\\n' {account} "$path" "$2"
}}
umask 077
rm -f /etc/sudoers.d/.defib.new
{{
echo 'Defaults:{account} env_reset, !setenv, secure_path="{secure_path}"'
echo 'Defaults:{account} runcwd=/'
{lines}
}} > /etc/sudoers.d/.defib.new
if ! visudo -cf /etc/sudoers.d/.defib.new >/dev/null 2>&1; then
    echo "warning: sudo before 1.9.3 runs commands in the caller's directory: use absolute paths" >&2
    sed -i '/^Defaults:{account} runcwd=/d' /etc/sudoers.d/.defib.new
fi
umask 022
visudo -cf /etc/sudoers.d/.defib.new >/dev/null
replace /etc/sudoers.d/.defib.new /etc/sudoers.d/defib 440
"""
_END = """
if [ "$changed" ]; then echo '{changed}'; else echo '{unchanged}'; fi
exit 0
}}
"""
