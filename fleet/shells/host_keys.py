"""The keys of hosts: those that are pinned in known_hosts, and those that hosts present."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import asyncssh

from fleet.shells import CONNECT_TIMEOUT, ShellError
from fleet.shells.connecting import Connector, format_error, list_algorithms

SSH_PORT = 22
# In the order in which ssh prefers them.
ALGORITHMS = (
    "ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "rsa-sha2-512", "rsa-sha2-256",
    "ssh-rsa",
)  # fmt: skip
LEGACY_ALGORITHMS = (*ALGORITHMS, "ssh-dss")
KeyState = Literal["pinned", "new", "changed", "revoked"]


def known_hosts_name(address: str, port: int) -> str:
    """Return how known_hosts names an address and a port."""
    return address if port == SSH_PORT else f"[{address}]:{port}"


@dataclass(frozen=True)
class BadLine:
    """A line of known_hosts that cannot be understood, and why."""

    number: int
    reason: str


def parse_known_hosts(text: str) -> tuple[asyncssh.SSHKnownHosts, list[BadLine]]:
    """Parse the text of a file of pinned keys. As ssh does, ignore lines that are invalid, and comments after keys."""
    known, bad = asyncssh.SSHKnownHosts(), []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        length = _WORDS + words[0].startswith("@")
        try:
            if len(words) < length:
                raise ValueError("it has no key")  # noqa: TRY301 - as the errors of load()
            if "" in words[length - _WORDS].split(","):  # asyncssh would take it for every host
                raise ValueError("it has an empty name")  # noqa: TRY301 - as above
            known.load(" ".join(words[:length]))
            if words[length - 2] in LEGACY_ALGORITHMS:
                asyncssh.import_public_key(
                    " ".join(words[length - 2 : length])
                )  # load() ignores those that are invalid
        except ValueError as error:
            bad.append(BadLine(number, _explain(error)))
    return known, bad


_WORDS = len(("host", "algorithm", "key"))


def _explain(error: ValueError) -> str:
    """Return what is wrong with a line, without the line itself."""
    if isinstance(error, asyncssh.KeyImportError):
        return "its key is invalid"
    what = str(error).partition(":")[0]
    return "it has no key" if what == "Invalid known hosts entry" else what


def read_known_hosts(path: Path) -> tuple[asyncssh.SSHKnownHosts, list[BadLine]]:
    """Read a file of pinned keys, with the lines of it that are ignored. Raises OSError."""
    return parse_known_hosts(path.read_bytes().decode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Pins:
    """The entries of known_hosts for an address and a port."""

    keys: tuple[asyncssh.SSHKey, ...]
    # Of the address without a port: ssh accepts them at ports that have no entry of their own.
    keys_of_address: tuple[asyncssh.SSHKey, ...] = ()
    revoked: tuple[asyncssh.SSHKey, ...] = ()
    authorities: tuple[asyncssh.SSHKey, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.keys_of_address or self.revoked or self.authorities)

    @property
    def known_hosts(self) -> tuple[list[asyncssh.SSHKey], list[asyncssh.SSHKey], list[asyncssh.SSHKey]]:
        """What asyncssh accepts: keys, keys of authorities, and those that it refuses."""
        return [*self.keys, *self.keys_of_address], [*self.authorities], [*self.revoked]

    def judge(self, key: asyncssh.SSHKey) -> KeyState:
        """Return the state of the key that the host presents."""
        if _contains(self.revoked, key):
            return "revoked"
        if self.authorities or _contains(self.keys or self.keys_of_address, key):
            return "pinned"
        return "changed" if self.keys else "new"


def _contains(keys: tuple[asyncssh.SSHKey, ...], key: asyncssh.SSHKey) -> bool:
    return any(each.public_data == key.public_data for each in keys)


def find_pins(known_hosts: asyncssh.SSHKnownHosts, address: str, port: int) -> Pins:
    """Return the entries for an address, as it is configured, and a port.

    Those of the IP address to which a name resolves do not count: another host may be pinned under it.
    """
    keys, authorities, revoked, *_ = known_hosts.match(known_hosts_name(address, port), "", None)
    if port == SSH_PORT or keys or authorities:
        return Pins(tuple(keys), (), tuple(revoked), tuple(authorities))
    of_address, authorities, more, *_ = known_hosts.match(address, "", None)
    return Pins((), tuple(of_address), (*revoked, *more), tuple(authorities))


async def fetch_host_key(
    address: str,
    port: int,
    pins: Pins,
    tunnel: Callable[[], Awaitable[asyncssh.SSHClientConnection]] | None = None,
    *,
    legacy: bool = False,
) -> asyncssh.SSHKey:
    """Return the key that a host presents, without logging in; if it can, one of a pinned type. Raises ShellError."""
    where = f"{address}:{port}"
    algorithms = list_algorithms(legacy=legacy)
    options = asyncssh.SSHClientConnectionOptions(
        config=None, agent_path=None, client_keys=None, compression_algs=["none"], **algorithms
    )
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            through: Any = await tunnel() if tunnel else Connector()
            key = await asyncssh.get_server_host_key(
                address, port, tunnel=through, config=None, options=options, kex_algs=algorithms["kex_algs"],
                server_host_key_algs=list(_order_algorithms(pins, LEGACY_ALGORITHMS if legacy else ALGORITHMS)),
            )  # fmt: skip
    except TimeoutError:
        raise ShellError(f"{where}: no host key within {CONNECT_TIMEOUT:g} s") from None
    except (asyncssh.Error, OSError, ValueError) as error:
        raise ShellError(f"{where}: {format_error(error)}") from error
    if key is None:
        raise ShellError(f"{where}: the host presented no key")
    return key


def _order_algorithms(pins: Pins, algorithms: Sequence[str]) -> Iterator[str]:
    """Yield the algorithms, those of pinned keys first: a host may have keys of several types."""
    pinned = {name.decode() for key in (*pins.keys, *pins.keys_of_address) for name in key.sig_algorithms}
    yield from (name for name in algorithms if name in pinned)
    yield from (name for name in algorithms if name not in pinned)
