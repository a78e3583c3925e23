"""The `tcp` probe: a connection, perhaps TLS, perhaps a dialogue line by line."""

import asyncio
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from exporter.probes import ProbeKind
from exporter.probes.context import ProbeContext
from exporter.probes.expectations import quote_excerpt
from exporter.probes.net.connections import (
    DialOptions,
    ProbeTls,
    connect,
    find_handshake_alert,
    secure,
    ssl_context_for,
)
from exporter.probes.net.dialogue import Dialogue, DialogueStep, LineReader
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import Address, split_address


class TcpDialogueStep(DialogueStep):
    choices: ClassVar[tuple[str, ...]] = ("expect", "send", "starttls")
    starttls: Literal[True] | None = None


def shortened(value: Any) -> Any:
    """`tls: true` asks for TLS with nothing special."""
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


OptionalTls = Annotated[ProbeTls | None, BeforeValidator(shortened, json_schema_input_type=bool | ProbeTls | None)]


class TcpProbeOptions(DialOptions):
    address: Address
    tls: OptionalTls = None
    dialogue: list[TcpDialogueStep] = []


async def probe_tcp(options: TcpProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    host, port = split_address(options.address)
    # What a dialogue turns to TLS later is not TLS at first.
    later = any(step.starttls for step in options.dialogue)
    transport, lines = await connect(host, port, LineReader, details, dial=options, tls=None if later else options.tls)
    address = str(transport.get_extra_info("peername")[0])
    try:
        await _converse(options, transport, lines, details)
    except ProbeFailure as failure:
        tls = options.tls
        if tls is None or later or not lines.ended_silently or failure.reason != "protocol":
            raise
        refused = await find_handshake_alert(address, port, tls.server_name or host, tls, options)
        raise refused or failure from failure


async def _converse(
    options: TcpProbeOptions, transport: asyncio.Transport, lines: LineReader, details: ProbeDetails
) -> None:
    dialogue = Dialogue(lines.next, details)
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
                transport = await _start_tls(options, transport, lines, where, details)
    finally:
        transport.abort()


async def _start_tls(
    options: TcpProbeOptions, transport: asyncio.Transport, lines: LineReader, where: str, details: ProbeDetails
) -> asyncio.Transport:
    """The connection with TLS from here on. Raises ProbeFailure."""
    if lines.unread:
        # Taken for what was said over TLS later, it would let others put words in the peer's mouth.
        came = quote_excerpt(lines.unread, details)
        raise ProbeFailure("protocol", f"{where}: before TLS, the peer went on in plain text: {came}")
    tls = options.tls or ProbeTls()
    name = tls.server_name or split_address(options.address)[0]
    details.timeout_failure = ProbeFailure("timeout", f"{where}: no TLS in time")
    try:
        secured = await secure(transport, lines, ssl_context_for(tls), name, details)
    except ProbeFailure as failure:
        raise ProbeFailure(failure.reason, f"{where}: {failure.message}") from failure
    lines.connection_made(secured)
    details.timeout_failure = None
    return secured


TCP = ProbeKind(TcpProbeOptions, probe_tcp)
