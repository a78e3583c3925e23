"""How SSH connections are opened: what they negotiate, in which parts data are read, and the texts of errors."""

import asyncio
from collections.abc import Callable
from typing import Any

import asyncssh

from runtime.pacing import PacedProtocol

# asyncssh prefers ChaCha20, which takes twice the CPU time of AES-GCM.
CIPHERS = (
    "aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes256-ctr", "aes192-ctr",
    "aes128-ctr",
)  # fmt: skip
# Without group exchange: the host would choose a prime, before its key is checked, whose size blocks the event loop for
# minutes.
KEY_EXCHANGES = (
    "curve25519-sha256", "curve25519-sha256@libssh.org", "ecdh-sha2-nistp256", "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521", "diffie-hellman-group14-sha256", "diffie-hellman-group16-sha512",
    "diffie-hellman-group14-sha1",
)  # fmt: skip
# With `ssh.legacy`, for servers that have nothing newer; neither has a known attack without a large effort, or without
# the private key of a host.
LEGACY_CIPHERS = (*CIPHERS, "aes256-cbc", "aes192-cbc", "aes128-cbc", "3des-cbc")
LEGACY_KEY_EXCHANGES = (*KEY_EXCHANGES, "diffie-hellman-group1-sha1")
LEGACY_MACS = ("hmac-sha2-256", "hmac-sha2-512", "hmac-sha1", "hmac-sha1-96", "hmac-md5", "hmac-md5-96")


def list_algorithms(*, legacy: bool) -> dict[str, list[str]]:
    """Return the options of asyncssh for key exchanges and ciphers."""
    if not legacy:
        return {"kex_algs": [*KEY_EXCHANGES], "encryption_algs": [*CIPHERS]}
    return {
        "kex_algs": [*LEGACY_KEY_EXCHANGES], "encryption_algs": [*LEGACY_CIPHERS], "mac_algs": [*LEGACY_MACS],
    }  # fmt: skip


class Connector:
    """Opens paced connections for asyncssh, in the place of a tunnel."""

    async def create_connection(self, factory: Callable[[], Any], host: str, port: int) -> tuple[Any, Any]:
        loop = asyncio.get_running_loop()
        transport, paced = await loop.create_connection(lambda: PacedProtocol(factory()), host, port)
        return transport, paced.protocol


def format_error(error: BaseException) -> str:
    """Return the text of an error of asyncssh or the operating system."""
    if isinstance(error, asyncssh.Error):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
