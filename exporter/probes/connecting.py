"""Resolving, connecting and securing, each a phase of its own, for every probe that opens a socket."""

import asyncio
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509

from exporter.results import ProbeFailure, Seen
from fleet.endpoints import Tls

P = TypeVar("P", bound=asyncio.BaseProtocol)


@lru_cache(maxsize=1024)
def tls_context(verify: bool, ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """A client context; one is shared by all probes with the same settings, and loads the system's roots once."""
    context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context


def context_for(tls: Tls) -> ssl.SSLContext:
    """The context of a probe's `tls` options. Raises ProbeFailure."""
    try:
        return tls_context(tls.verify, tls.ca_file, tls.cert_file, tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ProbeFailure("error", f"the certificate files cannot be used: {error}") from error


async def resolve(host: str, port: int, seen: Seen) -> list[str]:
    """The addresses of `host`, at least one; literals take no time. Raises ProbeFailure."""
    if is_literal(host):
        return [host]
    started = time.perf_counter()
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ProbeFailure("resolve", f"cannot resolve {host}: {why}") from error
    finally:
        _add(seen, "resolve", started)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@lru_cache(maxsize=50_000)
def is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


async def connect(
    host: str, port: int, protocol: Callable[[], P], seen: Seen, context: ssl.SSLContext | None, server_name: str
) -> tuple[asyncio.Transport, P]:
    """Resolve, connect, and with `context` secure; times each phase and reads the certificate.

    Addresses are tried in the order the resolver gave them. Raises ProbeFailure.
    """
    addresses = await resolve(host, port, seen)
    transport, made = await _connect_any(addresses, port, protocol, seen)
    if context is not None:
        transport = await secure(transport, made, context, server_name, seen)
    return transport, made


async def _connect_any(
    addresses: list[str], port: int, protocol: Callable[[], P], seen: Seen
) -> tuple[asyncio.Transport, P]:
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    refusals = []
    try:
        for address in addresses:
            try:
                transport, made = await loop.create_connection(protocol, address, port)
            except OSError as error:
                refusals.append(f"{address}:{port}: {_why(error)}")
            else:
                return transport, made
    finally:
        _add(seen, "connect", started)
    raise ProbeFailure("connect", f"cannot connect to {'; '.join(refusals)}")


async def secure(
    transport: asyncio.Transport, protocol: asyncio.BaseProtocol, context: ssl.SSLContext, server_name: str, seen: Seen
) -> asyncio.Transport:
    """Make a connection a TLS one. Raises ProbeFailure."""
    started = time.perf_counter()
    try:
        # The probe's own deadline ends a handshake that hangs.
        secured = await asyncio.get_running_loop().start_tls(
            transport, protocol, context, server_hostname=server_name, ssl_handshake_timeout=3600.0
        )
    except (ssl.SSLError, OSError, ValueError) as error:
        transport.abort()
        raise ProbeFailure("tls", f"no TLS with {server_name}: {_tls_why(error)}") from error
    finally:
        _add(seen, "tls", started)
    if secured is None:
        raise ProbeFailure("tls", f"no TLS with {server_name}: the connection was closed")
    seen.certificate_expiry = expiry_of(secured)
    return secured


def expiry_of(transport: asyncio.BaseTransport) -> float | None:
    """Unix time at which the peer's certificate ends."""
    peer: Any = transport.get_extra_info("ssl_object")
    der = peer.getpeercert(binary_form=True) if peer else None
    return _expiry(der) if der else None


@lru_cache(maxsize=4096)
def _expiry(der: bytes) -> float:
    return x509.load_der_x509_certificate(der).not_valid_after_utc.timestamp()


def _add(seen: Seen, phase: str, started: float) -> None:
    """A phase that happens again, after a redirect, takes its time again."""
    seen.phases[phase] = seen.phases.get(phase, 0.0) + time.perf_counter() - started


def _why(error: OSError) -> str:
    # uvloop and asyncio word the same error differently; the system's own words are the same everywhere.
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__


def _tls_why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return str(error) or "the connection was closed during the handshake"
