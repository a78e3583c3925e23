"""The `tls` probe: a handshake, and the certificates that the server sends."""

import asyncio
import time

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.net.connections import DialOptions, connect, record_served_chain, server_name_of
from exporter.probes.net.tls_contexts import ProbeTls
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import Address, ConfigModel, ServerName, split_address
from fleet.inventory.units import Duration


class TlsExpect(ConfigModel):
    valid_for: Duration = 0.0


class TlsProbeOptions(DialOptions):
    address: Address
    server_name: ServerName | None = None
    tls: ProbeTls = ProbeTls()
    expect: TlsExpect = TlsExpect()


async def probe_tls(options: TlsProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    host, port = split_address(options.address)
    tls = options.tls
    if options.server_name:
        tls = tls.model_copy(update={"server_name": options.server_name})
    transport, _, address = await connect(host, port, asyncio.Protocol, details, dial=options, tls=tls)
    transport.abort()
    # Python's ssl module gives access to the leaf certificate only.
    await record_served_chain(address, port, server_name_of(tls, host), details, dial=options, tls=tls)
    expiry = details.gauges.get("service_tls_certificate_expiry_timestamp_seconds")
    if expiry is None:
        raise ProbeFailure("tls", "cannot parse the certificate")
    left = expiry - time.time()
    if left < options.expect.valid_for:
        days, expected = left / 86400, options.expect.valid_for / 86400
        expires = f"expires in {days:.1f} days" if left > 0 else f"expired {-days:.1f} days ago"
        raise ProbeFailure("tls", f"the certificate {expires}, expected at least {expected:.1f} days")


TLS = ProbeKind(TlsProbeOptions, probe_tls)
