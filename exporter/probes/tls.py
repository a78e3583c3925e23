"""The `tls` probe: a handshake, and all that the certificates which are served say."""

import asyncio
import time

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.net.connections import Dial, ProbeTls, connect, note_served
from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import Address, ConfigModel, ServerName, split_address
from fleet.inventory.units import Duration


class TlsExpect(ConfigModel):
    valid_for: Duration = 0.0


class TlsOptions(Dial):
    address: Address
    server_name: ServerName | None = None
    tls: ProbeTls = ProbeTls()
    expect: TlsExpect = TlsExpect()


async def probe_tls(options: TlsOptions, _means: Means, seen: Seen) -> None:
    host, port = split_address(options.address)
    tls = options.tls
    if options.server_name:
        tls = tls.model_copy(update={"server_name": options.server_name})
    transport, _ = await connect(host, port, asyncio.Protocol, seen, dial=options, tls=tls)
    address = transport.get_extra_info("peername")[0]
    transport.abort()
    # What Python's own TLS shows of a connection is the leaf alone.
    await note_served(address, port, tls.server_name or host, seen, dial=options, tls=tls)
    expiry = seen.gauges.get("service_tls_certificate_expiry_timestamp_seconds")
    if expiry is None:
        raise ProbeFailure("tls", "the certificate cannot be read")
    left = expiry - time.time()
    if left < options.expect.valid_for:
        days, expected = left / 86400, options.expect.valid_for / 86400
        raise ProbeFailure("tls", f"the certificate is valid for {days:.1f} days more, expected {expected:.1f}")


TLS = Kind(TlsOptions, probe_tls)
