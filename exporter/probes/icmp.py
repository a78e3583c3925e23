"""The `icmp` probe: echo requests (RFC 792, RFC 4443), over an unprivileged socket if the system allows it."""

import asyncio
import secrets
import socket
import struct
import sys
import time
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.net.connections import (
    DialOptions,
    Unreachable,
    UnreachableExpect,
    connection_failure,
    expand_unreachable,
    record_ip_protocol,
    resolve,
)
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.units import PositiveDuration

INTERVAL = 0.2  # seconds between two requests
HEADER = struct.Struct("!BBHHH")
ECHO, ECHO_REPLY = {False: 8, True: 128}, {False: 0, True: 129}  # by whether IPv6 is used
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2  # linux/in.h; Python has no names for them


class IcmpExpect(UnreachableExpect):
    replies: int = Field(1, ge=0)
    faster_than: PositiveDuration | None = None


class IcmpProbeOptions(DialOptions):
    address: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._:%-]+$")
    count: int = Field(1, ge=1, le=100)
    size: int = Field(56, ge=8, le=65507)
    ttl: int | None = Field(None, ge=1, le=255)
    dont_fragment: bool = False
    expect: Annotated[
        IcmpExpect, BeforeValidator(expand_unreachable, json_schema_input_type=Unreachable | IcmpExpect)
    ] = IcmpExpect()

    @model_validator(mode="after")
    def _check_replies(self) -> "IcmpProbeOptions":
        if self.expect.replies > self.count:
            raise ValueError(f"expect.replies ({self.expect.replies}) must not be greater than count ({self.count})")
        return self


async def probe_icmp(options: IcmpProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    ends = time.perf_counter() + 0.9 * context.timeout  # the rest is for reporting the replies
    address = (await resolve(options.address, 0, details, options))[0]
    record_ip_protocol(address, details)
    durations: list[float] = []
    try:
        with _open_socket(address, options) as sock:
            for number in range(options.count):
                # A lost reply must leave time for the other requests.
                started = time.perf_counter()
                timeout = max(0.0, ends - started) / (options.count - number)
                duration = await _send_echo(sock, address, number, options.size, timeout)
                ended = time.perf_counter()
                details.add_phase("processing", ended - started)
                if duration is not None:
                    durations.append(duration)
                if number + 1 < options.count:
                    await asyncio.sleep(min(INTERVAL, max(0.0, timeout - (ended - started)) / 2))
    except OSError as error:
        failure = connection_failure(error, f"cannot reach {address}")
        if failure.reason == "error" or not options.expect.unreachable:
            raise failure from error
    details.evidence["replies"] = f"{len(durations)} of {options.count}"
    if options.expect.unreachable:
        if durations:
            raise ProbeFailure("state", f"{address} answers echo requests, expected unreachable")
        return
    expected = options.expect.replies
    if len(durations) < expected:
        raise ProbeFailure(
            "timeout", f"{len(durations)} of {options.count} requests were answered, expected at least {expected}"
        )
    average = sum(durations) / len(durations) if durations else 0.0
    if options.expect.faster_than is not None and average > options.expect.faster_than:
        limit = options.expect.faster_than
        raise ProbeFailure("latency", f"the replies took {average:.4f} s on average, expected less than {limit:g} s")


def _open_socket(address: str, options: IcmpProbeOptions) -> socket.socket:
    """Open a ping socket, or else a raw socket, which requires CAP_NET_RAW. Raises ProbeFailure."""
    ipv6 = ":" in address
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if ipv6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        except PermissionError:
            continue
        try:
            _configure_socket(sock, options, ipv6=ipv6)
        except BaseException:
            sock.close()
            raise
        return sock
    raise ProbeFailure(
        "error",
        "no permission for ICMP: add the exporter's group to sysctl net.ipv4.ping_group_range, or grant CAP_NET_RAW",
    )


def _configure_socket(sock: socket.socket, options: IcmpProbeOptions, *, ipv6: bool) -> None:
    level = socket.IPPROTO_IPV6 if ipv6 else socket.IPPROTO_IP
    if options.source:
        sock.bind((str(options.source), 0))
    if options.ttl:
        sock.setsockopt(level, socket.IPV6_UNICAST_HOPS if ipv6 else socket.IP_TTL, options.ttl)
    if options.dont_fragment and sys.platform == "linux":
        sock.setsockopt(level, IPV6_MTU_DISCOVER if ipv6 else IP_MTU_DISCOVER, PMTUDISC_DO)


async def _send_echo(sock: socket.socket, address: str, number: int, size: int, timeout: float) -> float | None:
    """Send an echo request; return the seconds until its reply, or None if there was none."""
    loop = asyncio.get_running_loop()
    ipv6 = ":" in address
    data = secrets.token_bytes(size)
    sent = time.perf_counter()
    try:
        sock.sendto(_build_request(data, number, ipv6=ipv6), (address, 0))
        async with asyncio.timeout(timeout):
            while True:
                packet = await loop.sock_recv(sock, 65536)
                # A raw socket receives the replies to all processes, with the IPv4 header; the data identifies ours.
                if sock.type == socket.SOCK_RAW and not ipv6:
                    packet = packet[(packet[0] & 15) * 4 :]
                if packet[:1] == bytes([ECHO_REPLY[ipv6]]) and packet[HEADER.size :] == data:
                    return time.perf_counter() - sent
    except TimeoutError:
        return None


def _build_request(data: bytes, number: int, *, ipv6: bool) -> bytes:
    """Build an echo request; the kernel sets the identifier of a ping socket, and the checksum of ICMPv6."""
    identifier = 0xDEF1
    without_checksum = HEADER.pack(ECHO[ipv6], 0, 0, identifier, number) + data
    return HEADER.pack(ECHO[ipv6], 0, 0 if ipv6 else checksum(without_checksum), identifier, number) + data


def checksum(packet: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    if len(packet) % 2:
        packet += b"\0"
    total: int = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


ICMP = ProbeKind(IcmpProbeOptions, probe_icmp)
