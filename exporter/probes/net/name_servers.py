"""Queries to DNS servers, and names that such a server resolves."""

import asyncio
import ssl
from collections.abc import Sequence

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype

from exporter.probes.net.certificates import record_certificates
from exporter.probes.net.connections import DEFAULT_DIAL, DialOptions, connect_datagrams, describe_os_error
from exporter.probes.net.dns_names import count_labels, count_records
from exporter.probes.net.handshake import perform_handshake
from exporter.probes.peer_work import run_in_thread
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import split_address

RECORDS_LIMIT = 1000  # of a response, with its questions
LABELS_LIMIT = 20_000  # of all names of a response
LONG_RESPONSE, MANY_LABELS = 4096, 500  # bytes, and labels; a longer response is parsed in a thread
RESEND_AFTER = 1.0  # seconds until a query for an address is sent again
OTHER_VERSION_DELAY = 1.0  # seconds for which the addresses of one IP version wait for those of the other
_TYPES = {4: dns.rdatatype.A, 6: dns.rdatatype.AAAA}
_TRUNCATED = 0x02  # of the third byte (RFC 1035, 4.1.1)


class _DnsDatagramProtocol(asyncio.DatagramProtocol):
    """Waits for the response to one query: None if it is truncated. Responses to other queries are ignored."""

    def __init__(self, query: dns.message.Message) -> None:
        self._query = query
        self.response: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, _address: object) -> None:
        if self.response.done() or data[:2] != self._query.id.to_bytes(2):
            return
        if data[2:3] and data[2] & _TRUNCATED:
            self.response.set_result(None)
        else:
            self.response.set_result(data)

    def error_received(self, error: Exception) -> None:
        if not self.response.done():
            self.response.set_exception(error)


async def query_udp(
    query: dns.message.Message,
    address: str,
    port: int,
    dial: DialOptions = DEFAULT_DIAL,
    *,
    resend_after: float | None = None,
) -> dns.message.Message | None:
    """Return the response, or None if it is truncated. Raises OSError and ValueError.

    With `resend_after`, the query is sent again whenever so many seconds have passed.
    """
    transport, datagrams = await connect_datagrams(address, port, lambda: _DnsDatagramProtocol(query), dial)
    try:
        done: set[asyncio.Future[bytes | None]] = set()
        while not done:
            transport.sendto(query.to_wire())
            done, _ = await asyncio.wait({datagrams.response}, timeout=resend_after)
        response = datagrams.response.result()
    finally:
        transport.abort()
    return None if response is None else await _parse_response(query, response, address)


async def query_tcp(
    query: dns.message.Message,
    address: str,
    port: int,
    dial: DialOptions = DEFAULT_DIAL,
    context: ssl.SSLContext | None = None,
    server_name: str = "",
    details: ProbeDetails | None = None,
) -> dns.message.Message:
    """Return the response, over TLS if there is a context. Raises OSError, EOFError and ValueError.

    The certificate is recorded in `details`.
    """
    reader = asyncio.StreamReader()
    source = str(dial.source) if dial.source else None
    transport, protocol = await asyncio.get_running_loop().create_connection(
        lambda: asyncio.StreamReaderProtocol(reader), address, port, local_addr=(source, 0) if source else None
    )
    try:
        secured = transport if context is None else await perform_handshake(transport, protocol, context, server_name)
        if secured is None:
            raise ConnectionResetError("the connection was closed")
        if context is not None and details is not None:
            record_certificates(secured.get_extra_info("ssl_object"), details)
        wire = query.to_wire()
        secured.write(len(wire).to_bytes(2) + wire)
        size = int.from_bytes(await reader.readexactly(2))
        response = await reader.readexactly(size)
    finally:
        transport.abort()
    return await _parse_response(query, response, address)


async def _parse_response(query: dns.message.Message, wire: bytes, address: str) -> dns.message.Message:
    """Parse a response, in a thread if it is long. Raises ValueError if it is invalid, too long or of another query."""
    if count_records(wire) > RECORDS_LIMIT:
        raise ValueError(f"it has more than {RECORDS_LIMIT} records")
    is_short = len(wire) <= LONG_RESPONSE and count_labels(wire) <= MANY_LABELS
    try:
        response = _from_wire(wire) if is_short else await run_in_thread(address, _from_long_wire, wire)
    except Exception as error:
        # The data is untrusted, and the parser raises many types.
        raise ValueError(str(error) or type(error).__name__) from error
    if not query.is_response(response):
        raise ValueError("the response belongs to another query")
    return response


def _from_wire(wire: bytes) -> dns.message.Message:
    return dns.message.from_wire(wire, ignore_trailing=True)


def _from_long_wire(wire: bytes) -> dns.message.Message:
    if count_labels(wire) > LABELS_LIMIT:
        raise ValueError(f"its names have more than {LABELS_LIMIT} labels")
    return _from_wire(wire)


async def look_up(server: str, host: str, versions: Sequence[int]) -> list[str]:
    """Return the addresses of `host` that the DNS server at `server` knows, of these IP versions. Raises ProbeFailure.

    The queries for all versions are sent at once, and repeated until the probe ends. IPv4 addresses come first.
    """
    address, port = split_address(server)
    try:
        name = dns.name.from_text(host)
    except (dns.exception.DNSException, UnicodeError) as error:
        raise ProbeFailure("resolve", f"cannot resolve {host}: {error}") from error
    lookups = [asyncio.create_task(_look_up_version(name, _TYPES[each], address, port)) for each in sorted(versions)]
    try:
        await _wait_for_addresses(lookups)
    finally:
        for each in lookups:
            each.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
    failures = {lookup: lookup.exception() for lookup in lookups if not lookup.cancelled()}
    addresses = [each for lookup, failure in failures.items() if failure is None for each in lookup.result()]
    if not addresses:
        causes = " and ".join(sorted(set(map(str, failures.values()))))
        raise ProbeFailure("resolve", f"cannot resolve {host}: {server} {causes}")
    return addresses


async def _wait_for_addresses(lookups: Sequence[asyncio.Task[list[str]]]) -> None:
    """Wait for all lookups; once one has found addresses, only a little longer."""
    pending: set[asyncio.Task[list[str]]] = set(lookups)
    timeout: float | None = None
    while pending:
        done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return
        if any(each.exception() is None for each in done):
            timeout = OTHER_VERSION_DELAY


async def _look_up_version(name: dns.name.Name, kind: dns.rdatatype.RdataType, address: str, port: int) -> list[str]:
    """Return the addresses of one IP version, at least one. Raises ProbeFailure, which says what the server did."""
    query = dns.message.make_query(name, kind)
    try:
        response = await query_udp(query, address, port, resend_after=RESEND_AFTER)
        if response is None:
            response = await query_tcp(query, address, port)
        if not isinstance(response, dns.message.QueryMessage):
            raise ProbeFailure("resolve", "sent an answer that is not one to a query")
        records = response.resolve_chaining().answer  # follows the aliases in the response
    except OSError as error:
        raise ProbeFailure("resolve", f"cannot be asked: {describe_os_error(error)}") from error
    except (dns.exception.DNSException, EOFError, ValueError) as error:
        raise ProbeFailure("resolve", f"sent an invalid answer: {str(error) or type(error).__name__}") from error
    if not records:
        code = dns.rcode.to_text(response.rcode())
        raise ProbeFailure("resolve", f"answered {'without an address' if code == 'NOERROR' else code}")
    return [each.address for each in records]
