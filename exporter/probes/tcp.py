"""The `tcp` probe: a connection, optionally with TLS and a dialogue."""

import asyncio
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.expectations import quote_excerpt
from exporter.probes.net.connections import (
    DialOptions,
    Unreachable,
    check_unreachable,
    connect,
    find_handshake_alert,
    server_name_of,
    start_tls,
)
from exporter.probes.net.dialogue import DialogueStep, LineReader, StreamDialogue
from exporter.probes.net.tls_contexts import ProbeTls, ssl_context_for
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import Address, split_address
from fleet.inventory.units import Pattern


class TcpDialogueStep(DialogueStep):
    choices: ClassVar[tuple[str, ...]] = (*DialogueStep.choices, "prompt", "starttls")
    prompt: Pattern | None = None
    starttls: Literal[True] | None = None


def expand_tls(value: Any) -> Any:
    """Expand `tls: true` to TLS with default options, and `tls: false` to none."""
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


OptionalTls = Annotated[ProbeTls | None, BeforeValidator(expand_tls, json_schema_input_type=bool | ProbeTls | None)]


class TcpProbeOptions(DialOptions):
    address: Address
    tls: OptionalTls = None
    dialogue: list[TcpDialogueStep] = []
    expect: Unreachable | None = None

    @model_validator(mode="after")
    def _check_unreachable(self) -> "TcpProbeOptions":
        if self.expect is not None and (self.dialogue or self.tls is not None):
            raise ValueError("`expect: unreachable` excludes tls and dialogue")
        return self


async def probe_tcp(options: TcpProbeOptions, context: ProbeContext, details: ProbeDetails) -> None:
    host, port = split_address(options.address)
    if options.expect is not None:
        await check_unreachable(host, port, context.timeout, details, options)
        return
    uses_starttls = any(step.starttls for step in options.dialogue)
    transport, lines, address = await connect(
        host, port, LineReader, details, dial=options, tls=None if uses_starttls else options.tls
    )
    try:
        await _converse(options, transport, lines, details)
    except ProbeFailure as failure:
        tls = options.tls
        if tls is None or uses_starttls or not lines.ended_silently or failure.reason != "protocol":
            raise
        alert = await find_handshake_alert(address, port, server_name_of(tls, host), tls, options)
        raise alert or failure from failure


async def _converse(
    options: TcpProbeOptions, transport: asyncio.Transport, lines: LineReader, details: ProbeDetails
) -> None:
    dialogue = StreamDialogue(lines, details)
    try:
        for step in options.dialogue:
            step_name = dialogue.next_step()
            data = dialogue.data_of(step)
            if data is not None:
                if transport.is_closing():
                    raise ProbeFailure("protocol", f"{step_name}: the peer closed the connection")
                transport.write(data)
            elif step.prompt is not None:
                await dialogue.prompt(step.prompt)
            elif step.starttls:
                transport = await _start_tls(options, transport, lines, step_name, details)
            else:
                await dialogue.await_step(step)
    finally:
        transport.abort()


async def _start_tls(
    options: TcpProbeOptions, transport: asyncio.Transport, lines: LineReader, step_name: str, details: ProbeDetails
) -> asyncio.Transport:
    """Continue the dialogue over TLS. Raises ProbeFailure."""
    if lines.unread:
        # If unencrypted data were read as part of the TLS session, an attacker could inject responses.
        unread = quote_excerpt(lines.unread, details)
        raise ProbeFailure("protocol", f"{step_name}: unexpected plain text before TLS: {unread}")
    tls = options.tls or ProbeTls()
    server_name = server_name_of(tls, split_address(options.address)[0])
    details.timeout_failure = ProbeFailure("timeout", f"{step_name}: the TLS handshake timed out")
    try:
        secured = await start_tls(transport, lines, ssl_context_for(tls), server_name, details)
    except ProbeFailure as failure:
        raise ProbeFailure(failure.reason, f"{step_name}: {failure.message}") from failure
    lines.connection_made(secured)
    details.timeout_failure = None
    return secured


TCP = ProbeKind(TcpProbeOptions, probe_tcp)
