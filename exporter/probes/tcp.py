"""The `tcp` probe: a connection, perhaps TLS, perhaps a dialogue line by line."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from exporter.probes.connecting import connect, context_for, secure
from exporter.probes.matching import compiled, excerpt
from exporter.results import ProbeFailure, Seen
from fleet.endpoints import Address, OneOf, Part, Tls, split_address
from fleet.shells import Shell
from fleet.units import Pattern

LINE_LIMIT = 64 * 1024
LINES_LIMIT = 1000


class Step(OneOf):
    """One step of a dialogue."""

    choices: ClassVar[tuple[str, ...]] = ("expect", "send", "starttls")
    expect: Pattern | None = None
    send: str | None = None
    starttls: bool | None = None


def _tls(value: Any) -> Any:
    """`tls: true` asks for TLS with nothing special."""
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


class TcpOptions(Part):
    address: Address
    tls: Annotated[Tls | None, BeforeValidator(_tls, json_schema_input_type=bool | Tls | None)] = None
    dialogue: list[Step] = []


async def probe_tcp(options: TcpOptions, _timeout: float, seen: Seen, _shell: Callable[[], Shell]) -> None:
    host, port = split_address(options.address)
    tls = options.tls or Tls()
    server_name = tls.server_name or host
    context = context_for(tls) if options.tls else None
    reader = asyncio.StreamReader(limit=LINE_LIMIT)
    transport, protocol = await connect(
        host, port, lambda: asyncio.StreamReaderProtocol(reader), seen, context, server_name
    )
    try:
        for number, step in enumerate(options.dialogue, 1):
            where = f"step {number} of the dialogue"
            if step.expect is not None:
                await _expect(reader, step.expect, where, seen)
            elif step.send is not None:
                if transport.is_closing():
                    raise ProbeFailure("protocol", f"{where}: the peer closed the connection")
                transport.write(step.send.encode())
            elif step.starttls:
                transport = await secure(transport, protocol, context_for(tls), server_name, seen)
    finally:
        transport.abort()


async def _expect(reader: asyncio.StreamReader, pattern: str, where: str, seen: Seen) -> None:
    """Wait for a line that matches; others may come first, as in a greeting of many lines."""
    last = b""
    for _ in range(LINES_LIMIT):
        try:
            line = await reader.readline()
        except (ValueError, OSError) as error:
            raise ProbeFailure("protocol", f"{where}: expected {pattern!r}: {error}") from error
        if not line:
            break
        last = line.rstrip(b"\r\n")
        seen.evidence["received"] = excerpt(last, seen)
        if compiled(pattern).search(last):
            seen.overdue = None
            return
        # A peer that said something else and now waits has answered wrongly; it is not silent.
        seen.overdue = ProbeFailure("protocol", f"{where}: expected {pattern!r}, got {excerpt(last, seen)}")
    came = excerpt(last, seen) if last else "a closed connection"
    raise ProbeFailure("protocol", f"{where}: expected {pattern!r}, got {came}")
