"""Commands on a host as its administrator: over ssh, with sudo."""

import os
import shlex
from collections.abc import Sequence

from fleet.inventory.model import Host, Inventory, find_connection_path
from fleet.shells import CompletedCommand, OutputCallback
from fleet.shells.local import LocalShell
from runtime.addresses import bracket
from runtime.errors import DefibError

CONNECT_TIMEOUT = 15  # seconds
_SYSTEM_WIDE = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")  # ssh's defaults


class AdministratorShell:
    """Runs commands on a host as root, for which ssh and sudo must not ask for a password."""

    wrapped = False

    def __init__(self, inventory: Inventory, host: Host, user: str) -> None:
        self._ssh = build_ssh_command(inventory, host, user, unattended=True)
        # ssh needs more variables than other commands, such as those of its agent.
        self._local = LocalShell(read_only=True, environ=os.environ)

    async def run(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", on_output: OutputCallback | None = None
    ) -> CompletedCommand:
        """Run `argv`, and end ssh after `timeout` seconds."""
        command = shlex.join(["sudo", "-n", "--", *argv])
        return await self._local.run([*self._ssh, command], timeout=timeout, stdin=stdin, on_output=on_output)

    async def close(self) -> None:
        """Do nothing: each command has a connection of its own."""


def check_user(option: str, user: str) -> None:
    """Check the name of the administrator, which is an argument of ssh. Raises DefibError."""
    if not user or user.startswith("-") or not user.isprintable() or " " in user:
        raise DefibError(f"argument {option}: {user!r} is not the name of a user")


def build_ssh_command(inventory: Inventory, host: Host, user: str, *, unattended: bool) -> list[str]:
    """Return `ssh USER@HOST`, through the same jump hosts as Defib; `unattended`: nothing is asked for.

    ssh trusts the host keys that Defib has pinned, too, but writes to no file of Defib.
    """
    path = [inventory.hosts[name] for name in find_connection_path(host.name, inventory.hosts)] or [host]
    command: list[str] = []  # which connects to the host before
    for each in reversed(path):
        ssh = each.ssh_for(control=False)
        options = ["-p", str(ssh.port)]
        if '"' not in str(ssh.known_hosts):  # there is no way to quote it
            trusted = " ".join(f'"{file}"' for file in (*_SYSTEM_WIDE, ssh.known_hosts))
            options += ["-o", f"GlobalKnownHostsFile={trusted}"]
        if unattended:
            options += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT}"]
        if command:
            # Not -J, which would not pass the options on. ssh replaces `%` sequences.
            proxy = [*command[:-2], "-W", f"{bracket(each.address)}:{ssh.port}", *command[-2:]]
            options += ["-o", f"ProxyCommand={shlex.join(proxy).replace('%', '%%')}"]
        command = ["ssh", *options, "--", f"{user}@{each.address}"]
    return command
