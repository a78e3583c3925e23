"""The shells of all hosts, each created at its first use."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from pydantic import SecretStr

from fleet.inventory.model import Host
from fleet.shells import Shell, ShellError
from fleet.shells.local import LocalShell

# The SSH client is slow to import, and many commands need none.
if TYPE_CHECKING:
    import asyncssh

    from fleet.shells.host_keys import BadLine
    from fleet.shells.ssh import SshShell

log = structlog.get_logger()


class Shells:
    """One shell per host, with the keys for reading (`ssh`) or those for controls (`control_ssh`)."""

    def __init__(self, hosts: Mapping[str, Host], *, control: bool = False) -> None:
        self._hosts = hosts
        self._control = control
        self._shells: dict[str, tuple[Host, LocalShell | SshShell]] = {}
        self._bad_lines: dict[Path, set[BadLine]] = {}

    def get(self, name: str) -> Shell:
        """Return the shell of a host. Raises ShellError where it has none."""
        return self._get(name)

    def _get(self, name: str) -> "LocalShell | SshShell":
        host = self._hosts.get(name)
        if host is None or not host.has_shell:
            raise ShellError(f"the inventory has no shell for the host {name!r}" if name else "the service has no host")
        entry = self._shells.get(name)
        if entry is None:
            entry = self._shells[name] = (host, self._create(host))
        return entry[1]

    def _create(self, host: Host) -> "LocalShell | SshShell":
        if host.shell == "local":
            return LocalShell(read_only=not self._control)
        from fleet.shells.ssh import Login, SshShell, WrapperMode

        ssh = host.ssh_for(control=self._control)
        mode: WrapperMode = "control" if self._control else "read"
        wrapper = mode if ssh.wrapper else None
        login = Login(
            host.address, ssh.port, ssh.user, ssh.key_file, ssh.known_hosts, wrapper, ssh.certificate_file,
            _reveal("passphrase", ssh.passphrase), _reveal("password", ssh.password), ssh.legacy,
        )  # fmt: skip
        tunnel = self.tunnel(ssh.via) if ssh.via else None
        return SshShell(login, tunnel, control=self._control, on_bad_lines=self._report_bad_lines)

    def _report_bad_lines(self, path: Path, lines: "Sequence[BadLine]") -> None:
        """Log each line of known_hosts that is ignored, once while it is."""
        for line in set(lines) - self._bad_lines.get(path, set()):
            log.warning("known_hosts_line_ignored", file=str(path), line=line.number, reason=line.reason)
        self._bad_lines[path] = set(lines)

    def tunnel(self, via: str) -> Callable[[], "Awaitable[asyncssh.SSHClientConnection]"]:
        """Return a function that connects to a jump host, for connections through it. It raises ShellError."""

        async def open_tunnel() -> "asyncssh.SSHClientConnection":
            shell = self._get(via)
            if isinstance(shell, LocalShell):
                raise ShellError(f"{via}: `via` must be a host that is reached over SSH")
            return await shell.connection()

        return open_tunnel

    async def reload(self, hosts: Mapping[str, Host]) -> None:
        """Replace the hosts; the shells of hosts that changed or were removed are closed."""
        self._hosts = hosts
        settings = {name: host.connection_settings for name, host in hosts.items()}
        changed = [name for name, (host, _) in self._shells.items() if settings.get(name) != host.connection_settings]
        # Connections through a changed jump host still go through the old one.
        behind = [name for name in self._shells if name not in changed and self._via(name) in changed]
        await asyncio.gather(*(self._shells.pop(name)[1].close() for name in [*changed, *behind]))

    def _via(self, name: str) -> str | None:
        return self._shells[name][0].ssh_for(control=self._control).via

    def connections(self) -> Counter[str]:
        """Return the number of SSH connections by state: connecting, connected, closed."""
        return Counter(shell.state for _, shell in self._shells.values() if not isinstance(shell, LocalShell))

    async def close(self) -> None:
        shells, self._shells = self._shells, {}
        await asyncio.gather(*(shell.close() for _, shell in shells.values()))


def _reveal(name: str, secret: SecretStr | None) -> str | None:
    """Return a secret of `ssh`. Raises ShellError where this program could not resolve the reference to it."""
    if secret is None or isinstance(secret, SecretStr):
        return secret.get_secret_value() if secret is not None else None
    raise ShellError(f"ssh.{name} is a reference that this program cannot resolve")
