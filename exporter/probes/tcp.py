"""The `tcp` probe: a connection, perhaps TLS, perhaps a dialogue line by line."""

import asyncio
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.expectations import excerpt
from exporter.probes.net.connections import Dial, ProbeTls, connect, context_for, refused_after_handshake, secure
from exporter.probes.net.dialogue import Dialogue, Lines, Step
from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import Address, split_address


class TcpStep(Step):
    choices: ClassVar[tuple[str, ...]] = ("expect", "send", "starttls")
    starttls: Literal[True] | None = None


def shortened(value: Any) -> Any:
    """`tls: true` asks for TLS with nothing special."""
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


OptionalTls = Annotated[ProbeTls | None, BeforeValidator(shortened, json_schema_input_type=bool | ProbeTls | None)]


class TcpOptions(Dial):
    address: Address
    tls: OptionalTls = None
    dialogue: list[TcpStep] = []


async def probe_tcp(options: TcpOptions, _means: Means, seen: Seen) -> None:
    host, port = split_address(options.address)
    # What a dialogue turns to TLS later is not TLS at first.
    later = any(step.starttls for step in options.dialogue)
    transport, lines = await connect(host, port, Lines, seen, dial=options, tls=None if later else options.tls)
    address = str(transport.get_extra_info("peername")[0])
    try:
        await _converse(options, transport, lines, seen)
    except ProbeFailure as failure:
        tls = options.tls
        if tls is None or later or not lines.ended_silently or failure.reason != "protocol":
            raise
        refused = await refused_after_handshake(address, port, tls.server_name or host, tls, options)
        raise refused or failure from failure


async def _converse(options: TcpOptions, transport: asyncio.Transport, lines: Lines, seen: Seen) -> None:
    dialogue = Dialogue(lines.next, seen)
    try:
        for step in options.dialogue:
            where = dialogue.next()
            if step.expect is not None:
                await dialogue.expect(step.expect)
            elif step.send is not None:
                if transport.is_closing():
                    raise ProbeFailure("protocol", f"{where}: the peer closed the connection")
                transport.write(dialogue.filled(step.send))
            elif step.starttls:
                transport = await _secured(options, transport, lines, where, seen)
    finally:
        transport.abort()


async def _secured(
    options: TcpOptions, transport: asyncio.Transport, lines: Lines, where: str, seen: Seen
) -> asyncio.Transport:
    """The connection with TLS from here on. Raises ProbeFailure."""
    if lines.unread:
        # Taken for what was said over TLS later, it would let others put words in the peer's mouth.
        came = excerpt(lines.unread, seen)
        raise ProbeFailure("protocol", f"{where}: before TLS, the peer went on in plain text: {came}")
    tls = options.tls or ProbeTls()
    name = tls.server_name or split_address(options.address)[0]
    seen.overdue = ProbeFailure("timeout", f"{where}: no TLS in time")
    try:
        secured = await secure(transport, lines, context_for(tls), name, seen)
    except ProbeFailure as failure:
        raise ProbeFailure(failure.reason, f"{where}: {failure.message}") from failure
    lines.connection_made(secured)
    seen.overdue = None
    return secured


TCP = Kind(TcpOptions, probe_tcp)
