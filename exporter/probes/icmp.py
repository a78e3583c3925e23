"""The `icmp` probe: echo requests (RFC 792, RFC 4443) over an unprivileged socket where the system allows it."""

import asyncio
import secrets
import socket
import struct
import sys
import time

from pydantic import Field, model_validator

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.net.connections import Dial, resolve, unreachable
from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.units import PositiveDuration

INTERVAL = 0.2  # seconds between two requests
HEADER = struct.Struct("!BBHHH")
ECHO, ECHO_REPLY = {False: 8, True: 128}, {False: 0, True: 129}  # by whether it is IPv6
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2  # linux/in.h, which Python does not name


class IcmpExpect(ConfigModel):
    replies: int = Field(1, ge=0)
    faster_than: PositiveDuration | None = None


class IcmpOptions(Dial):
    address: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._:%-]+$")
    count: int = Field(1, ge=1, le=100)
    size: int = Field(56, ge=8, le=65000)
    ttl: int | None = Field(None, ge=1, le=255)
    dont_fragment: bool = False
    expect: IcmpExpect = IcmpExpect()

    @model_validator(mode="after")
    def _possible(self) -> "IcmpOptions":
        if self.expect.replies > self.count:
            raise ValueError(f"{self.expect.replies} replies are more than {self.count} requests")
        return self


async def probe_icmp(options: IcmpOptions, means: Means, seen: Seen) -> None:
    ends = time.perf_counter() + 0.9 * means.timeout  # the rest is for saying what came
    address = (await resolve(options.address, 0, seen, options))[0]
    times: list[float] = []
    try:
        with _socket(address, options) as sock:
            for number in range(options.count):
                # What is lost must leave time for the others.
                started = time.perf_counter()
                within = max(0.0, ends - started) / (options.count - number)
                took = await _echo(sock, address, number, options.size, within)
                ended = time.perf_counter()
                seen.phase("processing", ended - started)
                if took is not None:
                    times.append(took)
                if number + 1 < options.count:
                    await asyncio.sleep(min(INTERVAL, max(0.0, within - (ended - started)) / 2))
    except OSError as error:
        raise unreachable(error, f"cannot reach {address}") from error
    seen.evidence["replies"] = f"{len(times)} of {options.count}"
    wanted = options.expect.replies
    if len(times) < wanted:
        raise ProbeFailure("timeout", f"{len(times)} of {options.count} requests were answered, expected {wanted}")
    average = sum(times) / len(times) if times else 0.0
    if options.expect.faster_than is not None and average > options.expect.faster_than:
        most = options.expect.faster_than
        raise ProbeFailure("latency", f"replies took {average:.4f} s on average, expected less than {most:g} s")


def _socket(address: str, options: IcmpOptions) -> socket.socket:
    """A ping socket (net.ipv4.ping_group_range), or else a raw one, which wants CAP_NET_RAW. Raises ProbeFailure."""
    six = ":" in address
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        except PermissionError:
            continue
        try:
            _set_up(sock, options, six=six)
        except BaseException:
            sock.close()
            raise
        return sock
    raise ProbeFailure(
        "error", "no ICMP: sysctl net.ipv4.ping_group_range does not include our group, and CAP_NET_RAW is not ours"
    )


def _set_up(sock: socket.socket, options: IcmpOptions, *, six: bool) -> None:
    level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
    if options.source:
        sock.bind((str(options.source), 0))
    if options.ttl:
        sock.setsockopt(level, socket.IPV6_UNICAST_HOPS if six else socket.IP_TTL, options.ttl)
    if options.dont_fragment and sys.platform == "linux":
        sock.setsockopt(level, IPV6_MTU_DISCOVER if six else IP_MTU_DISCOVER, PMTUDISC_DO)


async def _echo(sock: socket.socket, address: str, number: int, size: int, within: float) -> float | None:
    """Seconds until the reply, or None where none came."""
    loop = asyncio.get_running_loop()
    six = ":" in address
    data = secrets.token_bytes(size)
    sent = time.perf_counter()
    try:
        sock.sendto(_request(data, number, six=six), (address, 0))
        async with asyncio.timeout(within):
            while True:
                packet = await loop.sock_recv(sock, 65536)
                # A raw socket hears every reply there is, with its IPv4 header; ours has our data.
                if sock.type == socket.SOCK_RAW and not six:
                    packet = packet[(packet[0] & 15) * 4 :]
                if packet[:1] == bytes([ECHO_REPLY[six]]) and packet[HEADER.size :] == data:
                    return time.perf_counter() - sent
    except TimeoutError:
        return None


def _request(data: bytes, number: int, *, six: bool) -> bytes:
    """An echo request; the kernel fills in a ping socket's identifier, and the checksum of ICMPv6."""
    identifier = 0xDEF1
    without = HEADER.pack(ECHO[six], 0, 0, identifier, number) + data
    return HEADER.pack(ECHO[six], 0, 0 if six else checksum(without), identifier, number) + data


def checksum(packet: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(packet) % 2:
        packet += b"\0"
    total: int = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


ICMP = Kind(IcmpOptions, probe_icmp)
