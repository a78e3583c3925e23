"""The `udp` probe: a dialogue of datagrams."""

import asyncio
import time
from collections import deque
from typing import Annotated

from pydantic import AfterValidator, Field

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.net.connections import (
    DialOptions,
    connect_datagrams,
    connection_failure,
    record_ip_protocol,
    resolve,
)
from exporter.probes.net.dialogue import MESSAGES_PER_STEP, Dialogue, DialogueStep
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import Address, split_address
from runtime.addresses import bracket

DATAGRAM_LIMIT = 65_507  # bytes that a datagram over IPv4 can have
UNREAD_LIMIT = 1024 * 1024  # bytes of datagrams that have arrived; further ones are dropped


def _check_dialogue(steps: list[DialogueStep]) -> list[DialogueStep]:
    if steps[0].send is None and steps[0].send_bytes is None:
        raise ValueError(
            "must begin with send or send_bytes: a server learns the address of a client from its datagram"
        )
    if all(step.expect is None and step.expect_bytes is None for step in steps):
        raise ValueError("can never fail: add a step with expect or expect_bytes")
    return steps


class UdpProbeOptions(DialOptions):
    address: Address
    dialogue: Annotated[list[DialogueStep], Field(min_length=1), AfterValidator(_check_dialogue)]


class _Datagrams(asyncio.DatagramProtocol):
    """Keeps the datagrams of the peer, up to a limit, until they are read."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._unread: deque[bytes] = deque(maxlen=MESSAGES_PER_STEP)
        self._size = 0
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def datagram_received(self, data: bytes, _address: object) -> None:
        if self._size + len(data) <= UNREAD_LIMIT and len(self._unread) < MESSAGES_PER_STEP:
            self._unread.append(data)
            self._size += len(data)
            self._changed.set()

    def error_received(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    async def next(self, _on_partial: object) -> bytes:
        """Return the next datagram. Raises ProbeFailure."""
        while not self._unread:
            self.check()
            self._changed.clear()
            await self._changed.wait()
        data = self._unread.popleft()
        self._size -= len(data)
        return data

    def check(self) -> None:
        """Raise ProbeFailure if the port of the peer is closed, or it cannot be reached."""
        if isinstance(self._error, OSError):
            raise connection_failure(self._error, f"cannot exchange datagrams with {self._peer}")


async def probe_udp(options: UdpProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    host, port = split_address(options.address)
    addresses = await resolve(host, port, details, options)
    started = time.perf_counter()
    try:
        for address in addresses[:-1]:
            try:
                return await _converse(options, address, port, details)
            except ProbeFailure as failure:
                if failure.reason != "connect":
                    raise
        await _converse(options, addresses[-1], port, details)
    finally:
        details.add_phase("processing", time.perf_counter() - started)


async def _converse(options: UdpProbeOptions, address: str, port: int, details: ProbeDetails) -> None:
    record_ip_protocol(address, details)
    peer = f"{bracket(address)}:{port}"
    try:
        transport, datagrams = await connect_datagrams(address, port, lambda: _Datagrams(peer), options)
    except OSError as error:
        raise connection_failure(error, f"cannot exchange datagrams with {peer}") from error
    dialogue = Dialogue(datagrams.next, details)
    try:
        for step in options.dialogue:
            step_name = dialogue.next_step()
            data = dialogue.data_of(step)
            if data is None:
                await dialogue.await_step(step)
            elif len(data) > DATAGRAM_LIMIT:
                raise ProbeFailure("error", f"{step_name}: a datagram has at most {DATAGRAM_LIMIT} bytes")
            else:
                transport.sendto(data)
    finally:
        transport.abort()


UDP = ProbeKind(UdpProbeOptions, probe_udp)
