"""The kinds of probes: the options of each and the function that carries it out."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from exporter.means import Means
from exporter.probes.command import CommandOptions, probe_command
from exporter.probes.dns import DnsOptions, probe_dns
from exporter.probes.grpc import GrpcOptions, probe_grpc
from exporter.probes.host import (
    ContainerOptions,
    PortOptions,
    ProgramOptions,
    UnitOptions,
    probe_container,
    probe_port,
    probe_program,
    probe_unit,
)
from exporter.probes.http import HttpOptions, probe_http
from exporter.probes.icmp import IcmpOptions, probe_icmp
from exporter.probes.openai import OpenaiOptions, probe_openai
from exporter.probes.python import PythonOptions, probe_python
from exporter.probes.status import StatusOptions, probe_status
from exporter.probes.tcp import TcpOptions, probe_tcp
from exporter.probes.tls import TlsOptions, probe_tls
from exporter.probes.websocket import WebsocketOptions, probe_websocket
from exporter.results import Seen
from fleet.endpoints import Part

Options = TypeVar("Options", bound=Part)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of probe: `probe(options, means, seen)` returns, or raises ProbeFailure."""

    options: type[Options]
    probe: Callable[[Options, Means, Seen], Awaitable[None]]


PROBES: Mapping[str, Kind[Any]] = {
    "http": Kind(HttpOptions, probe_http),
    "tcp": Kind(TcpOptions, probe_tcp),
    "tls": Kind(TlsOptions, probe_tls),
    "dns": Kind(DnsOptions, probe_dns),
    "icmp": Kind(IcmpOptions, probe_icmp),
    "grpc": Kind(GrpcOptions, probe_grpc),
    "websocket": Kind(WebsocketOptions, probe_websocket),
    "openai": Kind(OpenaiOptions, probe_openai),
    "container": Kind(ContainerOptions, probe_container),
    "unit": Kind(UnitOptions, probe_unit),
    "program": Kind(ProgramOptions, probe_program),
    "port": Kind(PortOptions, probe_port),
    "command": Kind(CommandOptions, probe_command),
    "status": Kind(StatusOptions, probe_status),
    "python": Kind(PythonOptions, probe_python),
}
