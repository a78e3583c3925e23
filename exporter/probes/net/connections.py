"""Resolving, connecting and securing, each a phase of its own, for every probe that opens a socket."""

import asyncio
import errno
import os
import socket
import ssl
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import aiohappyeyeballs
from pydantic import BeforeValidator, Field, IPvAnyAddress

from exporter.probes.net.certificates import alert_after_handshake, is_literal, note_chain, note_leaf
from exporter.results import ProbeFailure, Reason, Seen
from fleet.inventory.endpoints import ConfigModel, TlsSettings
from fleet.inventory.units import as_list

P = TypeVar("P", bound=asyncio.BaseProtocol)
ALERT_WITHIN = 2.0  # seconds that a server has to say why it ended a connection
# What this machine has no room for.
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN}
NEXT_ADDRESS_AFTER = 0.25  # seconds, of RFC 8305
_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}


class ProbeTls(TlsSettings):
    """TLS as a probe may ask for it."""

    min_version: Literal["1.0", "1.1", "1.2", "1.3"] | None = None


class Addresses(ConfigModel):
    """Which addresses are asked: `ip` is 4 or 6, or a list of both in order of preference.

    By default all that the resolver gives, in its order.
    """

    ip: Annotated[
        list[Literal[4, 6]],
        Field(max_length=2),
        BeforeValidator(as_list, json_schema_input_type=Literal[4, 6] | list[Literal[4, 6]]),
    ] = []


class Dial(Addresses):
    """And from which of ours."""

    source: IPvAnyAddress | None = None


ANY = Dial()


@lru_cache(maxsize=1024)
def tls_context(
    verify: bool, ca_file: Path | None, cert_file: Path | None, key_file: Path | None, min_version: str | None
) -> ssl.SSLContext:
    """A client context; one is shared by all probes with the same settings, and loads the system's roots once."""
    context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    if min_version:
        context.minimum_version = _VERSIONS[min_version]
    return context


def context_for(tls: TlsSettings) -> ssl.SSLContext:
    """The context of a probe's `tls` options. Raises ProbeFailure."""
    least = tls.min_version if isinstance(tls, ProbeTls) else None
    try:
        return tls_context(tls.verify, tls.ca_file, tls.cert_file, tls.key_file, least)
    except (OSError, ssl.SSLError) as error:
        raise ProbeFailure("error", f"the certificate files cannot be used: {error}") from error


async def resolve(host: str, port: int, seen: Seen, dial: Addresses = ANY) -> list[str]:
    """The addresses of `host` that `dial` allows, in order; literals take no time. Raises ProbeFailure."""
    if not dial.ip and is_literal(host):
        return [host]
    started = time.perf_counter()
    try:
        found = await _looked_up(host, port)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ProbeFailure("resolve", f"cannot resolve {host}: {why}") from error
    finally:
        if not is_literal(host):
            seen.phase("resolve", time.perf_counter() - started)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if dial.ip:
        addresses = [each for version in dial.ip for each in addresses if (":" in each) == (version == 6)]  # noqa: PLR2004
    if not addresses:
        raise ProbeFailure("resolve", f"{host} has no address of IP version {' or '.join(map(str, dial.ip))}")
    return addresses


_LOOKUPS: dict[tuple[asyncio.AbstractEventLoop, str, int], asyncio.Future[Any]] = {}


async def _looked_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """What the system's resolver says; one that hangs holds a thread, so a name is asked for once at a time.

    Raises OSError and UnicodeError.
    """
    loop = asyncio.get_running_loop()
    key = loop, host, port
    if key not in _LOOKUPS:
        lookup = asyncio.ensure_future(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        lookup.add_done_callback(lambda done: (_LOOKUPS.pop(key, None), done.cancelled() or done.exception()))
        _LOOKUPS[key] = lookup
    return list(await asyncio.shield(_LOOKUPS[key]))


async def connect(
    host: str,
    port: int,
    protocol: Callable[[], P],
    seen: Seen,
    *,
    dial: Dial = ANY,
    tls: TlsSettings | None = None,
    allowed: Callable[[list[str]], list[str]] | None = None,
) -> tuple[asyncio.Transport, P]:
    """Resolve, connect, and with `tls` secure; times each phase and reads the certificate. Raises ProbeFailure.

    `allowed` chooses those of the addresses that may be connected to.
    """
    context = context_for(tls) if tls else None
    addresses = await resolve(host, port, seen, dial)
    if allowed is not None:
        addresses = allowed(addresses)
    transport, made = await _connect_any(addresses, port, protocol, seen, dial)
    if context is None or tls is None:
        return transport, made
    name = tls.server_name or host
    peer = transport.get_extra_info("peername")
    try:
        return await secure(transport, made, context, name, seen), made
    except ProbeFailure as failure:
        if isinstance(failure.__cause__, ssl.SSLCertVerificationError):
            # Python lets go of a certificate that it refuses; what is wrong with it is worth another connection.
            seen.overdue = failure
            await note_served(peer[0], port, name, seen, dial=dial, tls=tls)
        raise


async def _connect_any(
    addresses: list[str], port: int, protocol: Callable[[], P], seen: Seen, dial: Dial
) -> tuple[asyncio.Transport, P]:
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    source = str(dial.source) if dial.source else None
    try:
        if len(addresses) == 1:
            local = (source, 0) if source else None
            return await loop.create_connection(protocol, addresses[0], port, local_addr=local)
        # One address that swallows packets must not use up the time of the others.
        sock = await aiohappyeyeballs.start_connection(
            [_address_info(each, port) for each in addresses],
            local_addr_infos=[_address_info(source, 0)] if source else None,
            happy_eyeballs_delay=NEXT_ADDRESS_AFTER,
        )
        return await loop.create_connection(protocol, sock=sock)
    except OSError as error:
        where = " or ".join(f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in addresses)
        raise unreachable(error, f"cannot connect to {where}") from error
    finally:
        seen.phase("connect", time.perf_counter() - started)


def _address_info(address: str, port: int) -> tuple[int, int, int, str, Any]:
    if ":" in address:
        return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0)
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)


async def secure(
    transport: asyncio.Transport, protocol: asyncio.BaseProtocol, context: ssl.SSLContext, server_name: str, seen: Seen
) -> asyncio.Transport:
    """Make a connection a TLS one, and note its certificate. Raises ProbeFailure."""
    started = time.perf_counter()
    try:
        # The probe's own deadline ends a handshake that hangs.
        secured = await asyncio.get_running_loop().start_tls(
            transport, protocol, context, server_hostname=server_name, ssl_handshake_timeout=3600.0
        )
    except (ssl.SSLError, OSError, ValueError) as error:
        transport.abort()
        raise ProbeFailure("tls", f"no TLS with {server_name}: {tls_why(error)}") from error
    finally:
        seen.phase("tls", time.perf_counter() - started)
    if secured is None:
        raise ProbeFailure("tls", f"no TLS with {server_name}: the connection was closed")
    peer: Any = secured.get_extra_info("ssl_object")
    note_leaf(peer.getpeercert(binary_form=True), peer.version(), seen)
    return secured


async def refused_after_handshake(
    address: str, port: int, server_name: str, tls: TlsSettings, dial: Dial
) -> ProbeFailure | None:
    """Why a server ended a TLS connection before it said anything, where that is TLS' own matter.

    The event loop does not tell; another connection does.
    """
    reader = asyncio.StreamReader()
    try:
        async with asyncio.timeout(ALERT_WITHIN):
            again, _ = await _connect_any([address], port, lambda: asyncio.StreamReaderProtocol(reader), Seen(), dial)
            try:
                said = await alert_after_handshake(reader, again, server_name, tls)
            finally:
                again.abort()
    except (ProbeFailure, TimeoutError):
        return None
    return ProbeFailure("tls", f"no TLS with {server_name}: {said}") if said else None


async def note_served(host: str, port: int, server_name: str, seen: Seen, *, dial: Dial, tls: TlsSettings) -> None:
    """Note the whole chain that a server serves, whether or not it can be verified, over a connection of its own."""
    reader = asyncio.StreamReader()
    try:
        transport, _ = await _connect_any([host], port, lambda: asyncio.StreamReaderProtocol(reader), Seen(), dial)
    except ProbeFailure:
        return  # the first connection has its own failure to tell
    try:
        await note_chain(reader, transport, server_name, tls, seen)
    finally:
        transport.abort()


def unreachable(error: OSError, what: str) -> ProbeFailure:
    """The failure to reach a peer: `connect`, or `error` where this machine had no room, which says nothing of it."""
    causes = getattr(error, "exceptions", None) or (error,)
    reason: Reason = "error" if all(each.errno in _NO_ROOM for each in causes) else "connect"
    return ProbeFailure(reason, f"{what}: {why(error)}")


def why(error: OSError) -> str:
    """What the system says; uvloop and asyncio word the same error differently."""
    nested = getattr(error, "exceptions", ())
    if nested:
        return "; ".join(dict.fromkeys(map(why, nested)))
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__


def tls_why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return str(error) or "the connection was closed during the handshake"
