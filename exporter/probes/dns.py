"""The `dns` probe: one query to one server, and checks of the response code and the records."""

import re
import ssl
import time
from typing import Annotated, Any, Literal

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
from pydantic import AfterValidator, BeforeValidator, Field

from exporter.probes import ProbeContext, ProbeKind
from exporter.probes.expectations import compile_cached
from exporter.probes.net.connections import (
    DialOptions,
    connection_failure,
    describe_tls_error,
    record_ip_protocol,
    resolve,
    server_name_of,
)
from exporter.probes.net.name_servers import LONG_RESPONSE, query_tcp, query_udp
from exporter.probes.net.tls_contexts import ProbeTls, ssl_context_for
from exporter.probes.peer_work import run_in_thread
from exporter.results import ProbeDetails, ProbeFailure
from fleet.inventory.endpoints import ConfigModel, split_address
from fleet.inventory.units import Patterns, PositiveDuration, as_list
from runtime.addresses import NAME_LIMIT

PORTS = {"udp": 53, "tcp": 53, "tls": 853}
RECORDS_SHOWN = 300  # characters


def _check_server(address: str) -> str:
    """Accept `host`, `host:port`, `[v6]` or `[v6]:port`."""
    match = re.fullmatch(r"(?:\[[0-9a-fA-F:.%]+\]|[^\s:\[\]{}]+)(?::(\d+))?", address)
    if match is None or len(address) > NAME_LIMIT or not 0 < int(match[1] or 53) < 65536:  # noqa: PLR2004 - the range of ports
        raise ValueError("must be the address of a server (write host or host:port)")
    return address


def _check_name(name: str) -> str:
    if len(name) > NAME_LIMIT + 1:  # with a dot at the end
        raise ValueError(f"must be a DNS name: it has more than {NAME_LIMIT} characters")
    try:
        dns.name.from_text(name)
    except (dns.exception.DNSException, UnicodeError) as error:
        raise ValueError(f"must be a DNS name: {error}") from None
    return name


def _enum_validator(enum: Any, description: str) -> Any:
    def check(value: object) -> str:
        try:
            return str(enum.to_text(enum.from_text(str(value))))
        except (dns.exception.DNSException, ValueError):
            raise ValueError(f"must be {description}") from None

    return BeforeValidator(check, json_schema_input_type=str)


class RecordsExpect(ConfigModel):
    """Expectations of the records in a section, each in the form `name ttl class type data`."""

    matches: Patterns = []  # at least one record
    lacks: Patterns = []  # no record
    all_match: Patterns = []  # every record
    not_all_match: Patterns = []  # not every record


def _expand_records(value: object) -> object:
    return {"matches": value} if isinstance(value, str | list) else value


Records = Annotated[
    RecordsExpect, BeforeValidator(_expand_records, json_schema_input_type=str | list[str] | RecordsExpect)
]


class DnsExpect(ConfigModel):
    rcode: Annotated[
        list[Annotated[str, _enum_validator(dns.rcode, "a DNS response code")]],
        Field(min_length=1),
        BeforeValidator(as_list, json_schema_input_type=str | list[str]),
    ] = ["NOERROR"]
    answer: Records = RecordsExpect()
    authority: Records = RecordsExpect()
    additional: Records = RecordsExpect()
    faster_than: PositiveDuration | None = None


class DnsProbeOptions(DialOptions):
    server: Annotated[str, AfterValidator(_check_server)]
    name: Annotated[str, AfterValidator(_check_name)]
    type: Annotated[str, _enum_validator(dns.rdatatype, "a DNS record type")] = "A"
    class_: Annotated[str, _enum_validator(dns.rdataclass, "a DNS class")] = Field("IN", alias="class")
    transport: Literal["udp", "tcp", "tls"] = "udp"
    recursion: bool = True
    tls: ProbeTls = ProbeTls()
    expect: DnsExpect = DnsExpect()

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The host and the port of the server."""
        if self.server.endswith("]") or ":" not in self.server:
            return self.server.strip("[]"), PORTS[self.transport]
        return split_address(self.server)


async def probe_dns(options: DnsProbeOptions, _context: ProbeContext, details: ProbeDetails) -> None:
    host, port = options.host_and_port
    query = dns.message.make_query(options.name, options.type, options.class_)
    if not options.recursion:
        query.flags &= ~dns.flags.RD
    addresses = await resolve(host, port, details, options)
    started = time.perf_counter()
    try:
        response = await _query_any(options, query, addresses, port, host, details)
    finally:
        details.add_phase("processing", time.perf_counter() - started)
    duration = time.perf_counter() - started
    serial = next((rrset[0].serial for rrset in response.answer if rrset.rdtype == dns.rdatatype.SOA), None)
    if serial is not None:
        details.gauges["service_dns_soa_serial"] = serial
    details.evidence["answer"] = text = response.to_text()
    for section in ("answer", "authority", "additional"):
        details.evidence[f"{section} records"] = sum(map(len, getattr(response, section)))
    if len(text) > LONG_RESPONSE:
        await run_in_thread(host, _check, options.expect, response, duration)
    else:
        _check(options.expect, response, duration)


async def _query_any(
    options: DnsProbeOptions,
    query: dns.message.Message,
    addresses: list[str],
    port: int,
    host: str,
    details: ProbeDetails,
) -> dns.message.Message:
    """Return the response of the first address that does not refuse the connection. Raises ProbeFailure."""
    for address in addresses[:-1]:
        try:
            return await _query(options, query, address, port, host, details)
        except ProbeFailure as failure:
            if failure.reason != "connect":
                raise
    return await _query(options, query, addresses[-1], port, host, details)


async def _query(
    options: DnsProbeOptions, query: dns.message.Message, address: str, port: int, host: str, details: ProbeDetails
) -> dns.message.Message:
    """Return the response. If it is truncated over UDP, repeat the query over TCP. Raises ProbeFailure."""
    record_ip_protocol(address, details)
    peer = f"{address}:{port}"
    transport = options.transport
    try:
        if transport == "udp":
            response = await query_udp(query, address, port, options)
            if response is not None:
                return response
            details.evidence["truncated"] = "over UDP; query repeated over TCP"
            return await _retry_over_tcp(query, address, port, options)
        if transport == "tcp":
            return await query_tcp(query, address, port, options)
        name = server_name_of(options.tls, host)
        return await query_tcp(query, address, port, options, ssl_context_for(options.tls), name, details)
    except ssl.SSLError as error:
        raise ProbeFailure("tls", f"TLS handshake with {peer} failed: {describe_tls_error(error)}") from error
    except (dns.exception.DNSException, EOFError, ValueError) as error:
        raise ProbeFailure("protocol", f"invalid answer from {peer}: {str(error) or type(error).__name__}") from error
    except OSError as error:
        raise connection_failure(error, f"cannot query {peer} over {transport}") from error


async def _retry_over_tcp(
    query: dns.message.Message, address: str, port: int, dial: DialOptions
) -> dns.message.Message:
    try:
        return await query_tcp(query, address, port, dial)
    except OSError as error:
        failure = connection_failure(error, "the answer over UDP is truncated; cannot repeat the query over TCP")
        raise failure if failure.reason == "error" else ProbeFailure("protocol", failure.message) from error


def _check(expect: DnsExpect, response: dns.message.Message, duration: float) -> None:
    code = dns.rcode.to_text(response.rcode())
    if code not in expect.rcode:
        raise ProbeFailure("status", f"answered {code}, expected {' or '.join(expect.rcode)}")
    for section, records_expect, rrsets in (
        ("answer", expect.answer, response.answer),
        ("authority", expect.authority, response.authority),
        ("additional", expect.additional, response.additional),
    ):
        records = [line for rrset in rrsets for line in rrset.to_text().splitlines()]
        _check_records(section, records_expect, records)
    if expect.faster_than is not None and duration > expect.faster_than:
        raise ProbeFailure("latency", f"took {duration:.3f} s, expected less than {expect.faster_than:g} s")


def _check_records(section: str, expect: RecordsExpect, records: list[str]) -> None:
    shown = f"; it has {'; '.join(records)[:RECORDS_SHOWN] or 'no records'}"

    def matching(pattern: str) -> list[str]:
        return [record for record in records if compile_cached(pattern).search(record.encode())]

    for pattern in expect.matches:
        if not matching(pattern):
            raise ProbeFailure("body", f"no record in the {section} section matches {pattern!r}{shown}")
    for pattern in expect.lacks:
        if matching(pattern):
            raise ProbeFailure("body", f"a record in the {section} section matches {pattern!r}, expected none{shown}")
    for pattern in expect.all_match:
        if not records or len(matching(pattern)) < len(records):
            raise ProbeFailure("body", f"not all records in the {section} section match {pattern!r}{shown}")
    for pattern in expect.not_all_match:
        if records and len(matching(pattern)) == len(records):
            raise ProbeFailure(
                "body", f"all records in the {section} section match {pattern!r}, expected that not all do{shown}"
            )


DNS = ProbeKind(DnsProbeOptions, probe_dns)
