"""The `dns` probe: one question to one server, its answer's code and records held against what is expected."""

import asyncio
import re
import socket
import ssl
import time
from typing import Annotated, Any, Literal

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdataclass
import dns.rdatatype
from pydantic import AfterValidator, BeforeValidator, Field

from exporter.probes import Kind
from exporter.probes.context import Means
from exporter.probes.expectations import compiled
from exporter.probes.net.connections import Dial, ProbeTls, context_for, resolve, tls_why, unreachable
from exporter.results import ProbeFailure, Seen
from fleet.inventory.endpoints import ConfigModel, split_address
from fleet.inventory.units import Patterns, PositiveDuration, as_list

PORTS = {"udp": 53, "tcp": 53, "tls": 853}
SHOWN = 300
_TRUNCATED = 0x02  # of the third byte (RFC 1035, 4.1.1)


def _server(address: str) -> str:
    """`host`, `host:port`, `[v6]` or `[v6]:port`."""
    found = re.fullmatch(r"(?:\[[0-9a-fA-F:.%]+\]|[^\s:\[\]{}]+)(?::(\d+))?", address)
    if found is None or not 0 < int(found[1] or 53) < 65536:  # noqa: PLR2004
        raise ValueError("is not the address of a server (write host or host:port)")
    return address


def _name(name: str) -> str:
    try:
        dns.name.from_text(name)
    except (dns.exception.DNSException, UnicodeError) as error:
        raise ValueError(f"is not a name of DNS: {error}") from None
    return name


def _of(kind: Any, what: str) -> Any:
    def check(value: object) -> str:
        try:
            return str(kind.to_text(kind.from_text(str(value))))
        except (dns.exception.DNSException, ValueError):
            raise ValueError(f"is not {what} of DNS") from None

    return BeforeValidator(check, json_schema_input_type=str)


class RecordsExpect(ConfigModel):
    """What the records of a section must be, each as `name ttl class type data`."""

    matches: Patterns = []  # some record
    lacks: Patterns = []  # no record
    all_match: Patterns = []  # every record
    not_all_match: Patterns = []  # not every record


def _records(value: object) -> object:
    return {"matches": value} if isinstance(value, str | list) else value


Records = Annotated[RecordsExpect, BeforeValidator(_records, json_schema_input_type=str | list[str] | RecordsExpect)]


class DnsExpect(ConfigModel):
    rcode: Annotated[
        list[Annotated[str, _of(dns.rcode, "a response code")]],
        Field(min_length=1),
        BeforeValidator(as_list, json_schema_input_type=str | list[str]),
    ] = ["NOERROR"]
    answer: Records = RecordsExpect()
    authority: Records = RecordsExpect()
    additional: Records = RecordsExpect()
    faster_than: PositiveDuration | None = None


class DnsOptions(Dial):
    server: Annotated[str, AfterValidator(_server)]
    name: Annotated[str, AfterValidator(_name)]
    type: Annotated[str, _of(dns.rdatatype, "a record type")] = "A"
    class_: Annotated[str, _of(dns.rdataclass, "a class")] = Field("IN", alias="class")
    transport: Literal["udp", "tcp", "tls"] = "udp"
    recursion: bool = True
    tls: ProbeTls = ProbeTls()
    expect: DnsExpect = DnsExpect()


async def probe_dns(options: DnsOptions, _means: Means, seen: Seen) -> None:
    host, port = _host_and_port(options)
    query = dns.message.make_query(options.name, options.type, options.class_)
    if not options.recursion:
        query.flags &= ~dns.flags.RD
    addresses = await resolve(host, port, seen, options)
    started = time.perf_counter()
    try:
        response = await _ask_any(options, query, addresses, port, host, seen)
    finally:
        seen.phase("processing", time.perf_counter() - started)
    seen.evidence["answer"] = response.to_text()
    _judge(options.expect, response, time.perf_counter() - started)


def _host_and_port(options: DnsOptions) -> tuple[str, int]:
    server = options.server
    if server.endswith("]") or ":" not in server:
        return server.strip("[]"), PORTS[options.transport]
    return split_address(server)


async def _ask_any(
    options: DnsOptions, query: dns.message.Message, addresses: list[str], port: int, host: str, seen: Seen
) -> dns.message.Message:
    """The answer of the first address that is not refused. Raises ProbeFailure."""
    for address in addresses[:-1]:
        try:
            return await _ask(options, query, address, port, host, seen)
        except ProbeFailure as failure:
            if failure.reason != "connect":
                raise
    return await _ask(options, query, addresses[-1], port, host, seen)


async def _ask(
    options: DnsOptions, query: dns.message.Message, address: str, port: int, host: str, seen: Seen
) -> dns.message.Message:
    """The answer; one that UDP truncated is asked for again over TCP, as resolvers do. Raises ProbeFailure."""
    where = f"{address}:{port}"
    source = str(options.source) if options.source else None
    transport = options.transport
    try:
        if transport == "udp":
            response = await _over_udp(query, address, port, source)
            if response is not None:
                return response
            seen.evidence["truncated"] = "over UDP; asked again over TCP"
            return await _over_tcp_instead(query, address, port, source)
        if transport == "tcp":
            return await dns.asyncquery.tcp(query, address, port=port, source=source)
        name = options.tls.server_name or host
        return await dns.asyncquery.tls(
            query, address, port=port, source=source, ssl_context=context_for(options.tls), server_hostname=name
        )
    except ssl.SSLError as error:
        raise ProbeFailure("tls", f"no TLS with {where}: {tls_why(error)}") from error
    except (dns.exception.DNSException, EOFError, ValueError) as error:
        raise ProbeFailure("protocol", f"{where} answered what is no answer: {_text(error)}") from error
    except OSError as error:
        raise unreachable(error, f"cannot ask {where} over {transport}") from error


class _Datagrams(asyncio.DatagramProtocol):
    """Waits for the answer to one question, None for one that is truncated; what answers another is not ours."""

    def __init__(self, query: dns.message.Message) -> None:
        self._query = query
        self.answer: asyncio.Future[dns.message.Message | None] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, _address: object) -> None:
        if self.answer.done() or data[:2] != self._query.id.to_bytes(2):
            return
        if data[2:3] and data[2] & _TRUNCATED:
            self.answer.set_result(None)
            return
        try:
            response = dns.message.from_wire(data, ignore_trailing=True)
        except Exception as error:  # noqa: BLE001 - whatever a stranger sent
            self.answer.set_exception(ValueError(str(error) or type(error).__name__))
        else:
            self.answer.set_result(response)

    def error_received(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


async def _over_udp(
    query: dns.message.Message, address: str, port: int, source: str | None
) -> dns.message.Message | None:
    """The answer, None where it is truncated, over a connected socket, which hears at once that nobody listens.

    Raises OSError and ValueError.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if source:
            sock.bind((source, 0))
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    loop = asyncio.get_running_loop()
    transport, datagrams = await loop.create_datagram_endpoint(lambda: _Datagrams(query), sock=sock)
    try:
        transport.sendto(query.to_wire())
        response = await datagrams.answer
    finally:
        transport.abort()
    if response is not None and not query.is_response(response):
        raise ValueError("it answers another question")
    return response


async def _over_tcp_instead(
    query: dns.message.Message, address: str, port: int, source: str | None
) -> dns.message.Message:
    try:
        return await dns.asyncquery.tcp(query, address, port=port, source=source)
    except OSError as error:
        failure = unreachable(error, "the answer over UDP is truncated, and over TCP")
        raise failure if failure.reason == "error" else ProbeFailure("protocol", failure.message) from error


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _judge(expect: DnsExpect, response: dns.message.Message, took: float) -> None:
    code = dns.rcode.to_text(response.rcode())
    if code not in expect.rcode:
        raise ProbeFailure("status", f"answered {code}, expected {' or '.join(expect.rcode)}")
    for section, wanted, rrsets in (
        ("answer", expect.answer, response.answer),
        ("authority", expect.authority, response.authority),
        ("additional", expect.additional, response.additional),
    ):
        records = [line for rrset in rrsets for line in rrset.to_text().splitlines()]
        _judge_records(section, wanted, records)
    if expect.faster_than is not None and took > expect.faster_than:
        raise ProbeFailure("latency", f"took {took:.3f} s, expected less than {expect.faster_than:g} s")


def _judge_records(section: str, wanted: RecordsExpect, records: list[str]) -> None:
    shown = f"; it holds {'; '.join(records)[:SHOWN] or 'nothing'}"

    def matching(pattern: str) -> list[str]:
        return [record for record in records if compiled(pattern).search(record.encode())]

    for pattern in wanted.matches:
        if not matching(pattern):
            raise ProbeFailure("body", f"no record of the {section} matches {pattern!r}{shown}")
    for pattern in wanted.lacks:
        if matching(pattern):
            raise ProbeFailure("body", f"a record of the {section} matches {pattern!r}, which none must{shown}")
    for pattern in wanted.all_match:
        if not records or len(matching(pattern)) < len(records):
            raise ProbeFailure("body", f"not every record of the {section} matches {pattern!r}{shown}")
    for pattern in wanted.not_all_match:
        if records and len(matching(pattern)) == len(records):
            raise ProbeFailure("body", f"every record of the {section} matches {pattern!r}{shown}")


DNS = Kind(DnsOptions, probe_dns)
