"""Connections of probes: DNS lookup, TCP connection and TLS handshake, each timed as a phase."""

import asyncio
import errno
import os
import re
import socket
import ssl
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

import aiohappyeyeballs
from pydantic import AfterValidator, BeforeValidator, Field, IPvAnyAddress, model_validator

from exporter.probes.net.certificates import is_ip_address, read_tls_alert, record_certificates, record_chain
from exporter.probes.net.handshake import perform_handshake
from exporter.probes.net.tls_contexts import ssl_context_for
from exporter.results import FailureReason, ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import MAX_PORT, ConfigModel, TlsSettings
from fleet.inventory.units import as_list
from runtime.addresses import NAME_LIMIT, bracket
from runtime.lookups import look_up

P = TypeVar("P", bound=asyncio.BaseProtocol)
D = TypeVar("D", bound=asyncio.DatagramProtocol)
DNS_PORT = 53
ALERT_TIMEOUT = 2.0  # seconds for reading a TLS alert
# Errors of this machine: exhausted resources, and a local address that it has not, or of the other version of IP.
_OWN_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN}
_OWN_ERRORS |= {errno.EINVAL, errno.EAFNOSUPPORT, socket.EAI_ADDRFAMILY, socket.EAI_FAMILY}
UNREACHABLE_SHARE = 0.8  # of a probe's timeout, in which nothing may answer
NEXT_ADDRESS_DELAY = 0.25  # seconds (RFC 8305)


def _check_resolver(address: str) -> str:
    """Accept an IP address, in brackets or not, or one with a port; return `host:port` or `[v6]:port`."""
    match = re.fullmatch(r"\[(.+)\](?::(\d+))?|([^:]+)(?::(\d+))?|(.+)", address)
    host = (match[1] or match[3] or match[5]) if match else ""
    port = int((match[2] or match[4] or DNS_PORT) if match else 0)
    if not is_ip_address(host) or not 0 < port <= MAX_PORT:
        raise ValueError("must be the IP address of a DNS server (write 192.0.2.53 or 192.0.2.53:5353)")
    return f"{bracket(host)}:{port}"


Resolver = Annotated[str, Field(max_length=100), AfterValidator(_check_resolver)]


class AddressOptions(ConfigModel):
    """Which addresses are used: `ip` is 4 or 6, or a list of both in order of preference.

    By default all addresses that the resolver returns, in its order. `resolver` is a DNS server that resolves names
    instead of the system's resolver.
    """

    ip: Annotated[
        list[Literal[4, 6]],
        Field(max_length=2),
        BeforeValidator(as_list, json_schema_input_type=Literal[4, 6] | list[Literal[4, 6]]),
    ] = []
    resolver: Resolver | None = None


Unreachable = Literal["unreachable"]


def expand_unreachable(value: object) -> object:
    """Expand `expect: unreachable`."""
    return {"unreachable": True} if value == "unreachable" else value


class UnreachableExpect(ConfigModel):
    """Expectations of a probe, which may be that nothing answers it."""

    unreachable: Literal[True] | None = None

    @model_validator(mode="after")
    def _check_unreachable(self) -> Self:
        if self.unreachable and len(self.model_fields_set) > 1:
            raise ValueError("unreachable excludes all other expectations")
        return self


class DialOptions(AddressOptions):
    """Which addresses are used, and which local address the connection is made from."""

    source: IPvAnyAddress | None = None


DEFAULT_DIAL = DialOptions()


def server_name_of(tls: TlsSettings, host: str) -> str:
    """Return the name that TLS sends and verifies: no root's dot at its end, and no zone of an IPv6 address."""
    return (tls.server_name or host).partition("%")[0].removesuffix(".")


async def resolve(host: str, port: int, details: ProbeDetails, dial: AddressOptions = DEFAULT_DIAL) -> list[str]:
    """Return the addresses of `host` that `dial` allows, in order of preference. Raises ProbeFailure."""
    if len(host) > NAME_LIMIT:
        raise ProbeFailure("resolve", f"the name of the host is longer than {NAME_LIMIT} characters")
    if not dial.ip and is_ip_address(host):
        return [host]
    started = time.perf_counter()
    try:
        if dial.resolver is None or is_ip_address(host):
            addresses = await _resolve_by_system(host, port)
        else:
            addresses = await _resolve_by_server(dial.resolver, host, dial, details)
    finally:
        if not is_ip_address(host):
            details.add_phase("resolve", time.perf_counter() - started)
    if dial.ip:
        addresses = [each for version in dial.ip for each in addresses if (":" in each) == (version == 6)]  # noqa: PLR2004 - IPv6
    if not addresses:
        raise ProbeFailure("resolve", f"{host} has no address of IP version {' or '.join(map(str, dial.ip))}")
    return addresses


async def _resolve_by_system(host: str, port: int) -> list[str]:
    try:
        address_infos = await look_up(host, port)
    except (OSError, UnicodeError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ProbeFailure("resolve", f"cannot resolve {host}: {cause}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in address_infos))


async def _resolve_by_server(server: str, host: str, dial: AddressOptions, details: ProbeDetails) -> list[str]:
    from exporter.probes.net.name_servers import look_up  # dnspython, which few probes need

    before = details.timeout_failure
    details.timeout_failure = ProbeFailure("resolve", f"cannot resolve {host}: {server} did not answer in time")
    addresses = await look_up(server, host, dial.ip or [4, 6])
    details.timeout_failure = before
    return addresses


async def connect(
    host: str,
    port: int,
    protocol: Callable[[], P],
    details: ProbeDetails,
    *,
    dial: DialOptions = DEFAULT_DIAL,
    tls: TlsSettings | None = None,
    alpn: tuple[str, ...] = (),
    filter_addresses: Callable[[list[str]], list[str]] | None = None,
) -> tuple[asyncio.Transport, P, str]:
    """Resolve, connect, and with `tls` perform the TLS handshake; record phases and certificate. Raises ProbeFailure.

    Also return the address of the peer. TLS offers the protocols `alpn`. `filter_addresses` returns those of the
    resolved addresses that may be used, or raises ProbeFailure.
    """
    context = ssl_context_for(tls, alpn) if tls else None
    addresses = await resolve(host, port, details, dial)
    if filter_addresses is not None:
        addresses = filter_addresses(addresses)
    transport, instance, address = await _connect_any(addresses, port, protocol, details, dial)
    record_ip_protocol(address, details)
    if context is None or tls is None:
        return transport, instance, address
    name = server_name_of(tls, host)
    try:
        return await start_tls(transport, instance, context, name, details), instance, address
    except ProbeFailure as failure:
        if isinstance(failure.__cause__, ssl.SSLCertVerificationError):
            # Python gives no access to a certificate that it refused; read it over another connection.
            details.timeout_failure = failure
            await record_served_chain(address, port, name, details, dial=dial, tls=tls)
        raise


def record_ip_protocol(address: str, details: ProbeDetails) -> None:
    details.gauges["service_ip_protocol"] = 6 if ":" in address else 4


async def _connect_any(
    addresses: list[str], port: int, protocol: Callable[[], P], details: ProbeDetails, dial: DialOptions
) -> tuple[asyncio.Transport, P, str]:
    """Connect to one of several addresses; return it, too. Raises ProbeFailure."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    source = str(dial.source) if dial.source else None
    try:
        if len(addresses) == 1:
            local_address = (source, 0) if source else None
            created = await loop.create_connection(protocol, addresses[0], port, local_addr=local_address)
            return *created, addresses[0]
        # An address that drops packets must not use up the time of the others.
        sock = await aiohappyeyeballs.start_connection(
            [_address_info(each, port) for each in addresses],
            local_addr_infos=[_address_info(source, 0)] if source else None,
            happy_eyeballs_delay=NEXT_ADDRESS_DELAY,
        )
        peer = sock.getpeername()[0]
        return *await loop.create_connection(protocol, sock=sock), peer
    except OSError as error:
        peers = " or ".join(f"{bracket(each)}:{port}" for each in addresses)
        raise connection_failure(error, f"cannot connect to {peers}") from error
    finally:
        details.add_phase("connect", time.perf_counter() - started)


def _address_info(address: str, port: int) -> tuple[int, int, int, str, Any]:
    if ":" in address:
        return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0)
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)


async def check_unreachable(
    host: str, port: int, timeout: float, details: ProbeDetails, dial: DialOptions = DEFAULT_DIAL
) -> None:
    """Raise ProbeFailure if a TCP connection can be made within most of the probe's `timeout`, in seconds."""
    addresses = await resolve(host, port, details, dial)
    try:
        async with asyncio.timeout(UNREACHABLE_SHARE * timeout):
            transport, _, address = await _connect_any(addresses, port, asyncio.Protocol, details, dial)
    except TimeoutError:
        details.evidence["unreachable"] = "no answer"
        return
    except ProbeFailure as failure:
        if failure.reason != "connect":
            raise
        details.evidence["unreachable"] = failure.message
        return
    transport.abort()
    raise ProbeFailure("state", f"{bracket(address)}:{port} accepts connections, expected unreachable")


async def connect_datagrams(
    address: str, port: int, protocol: Callable[[], D], dial: DialOptions = DEFAULT_DIAL
) -> tuple[asyncio.DatagramTransport, D]:
    """Open a connected UDP socket: it receives from its peer only, and reports a closed port. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if dial.source:
            sock.bind((str(dial.source), 0))
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    return await asyncio.get_running_loop().create_datagram_endpoint(protocol, sock=sock)


async def start_tls(
    transport: asyncio.Transport,
    protocol: asyncio.BaseProtocol,
    context: ssl.SSLContext,
    server_name: str,
    details: ProbeDetails,
) -> asyncio.Transport:
    """Perform a TLS handshake over a connection, and record the certificate. Raises ProbeFailure."""
    started = time.perf_counter()
    try:
        # A handshake that hangs is ended by the deadline of the probe.
        secured = await perform_handshake(transport, protocol, context, server_name)
    except (ssl.SSLError, OSError, ValueError) as error:
        transport.abort()
        raise ProbeFailure("tls", f"TLS handshake with {server_name} failed: {describe_tls_error(error)}") from error
    finally:
        details.add_phase("tls", time.perf_counter() - started)
    if secured is None:
        raise ProbeFailure("tls", f"TLS handshake with {server_name} failed: the connection was closed")
    peer: Any = secured.get_extra_info("ssl_object")
    record_certificates(peer, details)
    return secured


async def find_handshake_alert(
    address: str, port: int, server_name: str, tls: TlsSettings, dial: DialOptions
) -> ProbeFailure | None:
    """Return the TLS alert with which a server closed a connection after the handshake, as a failure, or None.

    The event loop does not report the alert, so the handshake is repeated over another connection.
    """
    reader = asyncio.StreamReader()
    try:
        async with asyncio.timeout(ALERT_TIMEOUT):
            transport, _, _ = await _connect_any(
                [address], port, lambda: asyncio.StreamReaderProtocol(reader), ProbeDetails(), dial
            )
            try:
                alert = await read_tls_alert(reader, transport, server_name, tls)
            finally:
                transport.abort()
    except (ProbeFailure, TimeoutError):
        return None
    return ProbeFailure("tls", f"TLS with {server_name} was refused: {alert}") if alert else None


async def record_served_chain(
    host: str, port: int, server_name: str, details: ProbeDetails, *, dial: DialOptions, tls: TlsSettings
) -> None:
    """Record the certificate chain that a server sends, over a separate connection and without verifying it."""
    reader = asyncio.StreamReader()
    try:
        transport, _, _ = await _connect_any(
            [host], port, lambda: asyncio.StreamReaderProtocol(reader), ProbeDetails(), dial
        )
    except ProbeFailure:
        return  # the probe reports the failure of its own connection
    try:
        await record_chain(reader, transport, server_name, tls, details)
    finally:
        transport.abort()


def connection_failure(error: OSError, message: str) -> ProbeFailure:
    """Return a failure with the reason `connect`, or `error` if this machine lacks resources such as sockets."""
    causes = getattr(error, "exceptions", None) or (error,)
    reason: FailureReason = "error" if all(each.errno in _OWN_ERRORS for each in causes) else "connect"
    return ProbeFailure(reason, f"{message}: {describe_os_error(error)}")


def describe_os_error(error: OSError) -> str:
    """Return the system's text of an error, since uvloop and asyncio format the same error differently."""
    nested = getattr(error, "exceptions", ())
    if nested:
        return "; ".join(dict.fromkeys(map(describe_os_error, nested)))
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__


def describe_tls_error(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return str(error) or "the connection was closed during the handshake"
