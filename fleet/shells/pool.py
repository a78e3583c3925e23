"""The shells of all hosts, each made when first asked for."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from fleet.inventory.model import Host
from fleet.shells import Shell, ShellError
from fleet.shells.local import LocalShell

# The SSH client takes long to load: a command that reaches no host over SSH does without it.
if TYPE_CHECKING:
    import asyncssh

    from fleet.shells.ssh import SshShell


class Shells:
    """One shell per host, with the keys that read (`ssh`) or the keys that control (`control_ssh`)."""

    def __init__(self, hosts: Mapping[str, Host], *, control: bool = False) -> None:
        self._hosts = hosts
        self._control = control
        self._shells: dict[str, tuple[Host, LocalShell | SshShell]] = {}

    def get(self, name: str) -> Shell:
        """The shell of a host. Raises ShellError where the host has none."""
        return self._get(name)

    def _get(self, name: str) -> "LocalShell | SshShell":
        host = self._hosts.get(name)
        if host is None or not host.has_shell:
            raise ShellError(f"{name or 'no host'}: the inventory has no shell for it")
        made = self._shells.get(name)
        if made is None:
            made = self._shells[name] = (host, self._make(host))
        return made[1]

    def _make(self, host: Host) -> "LocalShell | SshShell":
        if host.shell == "local":
            return LocalShell(read_only=not self._control)
        from fleet.shells.ssh import Login, SshShell, WrapperMode

        ssh = host.ssh_for(control=self._control)
        end: WrapperMode = "control" if self._control else "read"
        wrapper = end if ssh.wrapper else None
        login = Login(host.address, ssh.port, ssh.user, ssh.key_file, ssh.known_hosts, wrapper)
        return SshShell(login, self._tunnel(ssh.via) if ssh.via else None, control=self._control)

    def _tunnel(self, via: str) -> Callable[[], "Awaitable[asyncssh.SSHClientConnection]"]:
        async def open_tunnel() -> "asyncssh.SSHClientConnection":
            shell = self._get(via)
            if isinstance(shell, LocalShell):
                raise ShellError(f"{via}: `via` needs a host that is reached over SSH")
            return await shell.connection()

        return open_tunnel

    async def reload(self, hosts: Mapping[str, Host]) -> None:
        """Take a new inventory's hosts; the shells of hosts that changed or went are closed."""
        self._hosts = hosts
        reaches = {name: host.connection_settings for name, host in hosts.items()}
        gone = [name for name, (host, _) in self._shells.items() if reaches.get(name) != host.connection_settings]
        # A changed jump host would leave its passengers on the old one.
        riders = [name for name in self._shells if name not in gone and self._rides(name, gone)]
        await asyncio.gather(*(self._shells.pop(name)[1].close() for name in [*gone, *riders]))

    def _rides(self, name: str, gone: list[str]) -> bool:
        via = self._shells[name][0].ssh_for(control=self._control).via
        return via in gone

    def connections(self) -> Counter[str]:
        """How many SSH connections there are, by state: connecting, connected."""
        return Counter(shell.state for _, shell in self._shells.values() if not isinstance(shell, LocalShell))

    async def close(self) -> None:
        shells, self._shells = self._shells, {}
        await asyncio.gather(*(shell.close() for _, shell in shells.values()))
