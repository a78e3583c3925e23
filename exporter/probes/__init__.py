"""The table of probes: the options of each kind, and the function that carries it out."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from exporter.results import ProbeDetails
from fleet.host.sections import HostReading
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.kinds import LazyTable
from fleet.shells import Shell

ProbeOptionsT = TypeVar("ProbeOptionsT", bound=ConfigModel)


@dataclass(frozen=True, slots=True)
class ProbeContext:
    """What a probe receives besides its options: service, host, timeout in seconds, and access to the host.

    `shell` and `reading` raise ShellError. `check_heartbeat` raises ProbeFailure unless the service's pings arrive.
    """

    service: str
    host: str
    timeout: float
    shell: Callable[[], Shell]
    reading: Callable[[], HostReading]
    check_heartbeat: Callable[[], None]


@dataclass(frozen=True)
class ProbeKind(Generic[ProbeOptionsT]):
    """A kind of probe; `probe(options, context, details)` returns on success and raises ProbeFailure otherwise."""

    options: type[ProbeOptionsT]
    probe: Callable[[ProbeOptionsT, ProbeContext, ProbeDetails], Awaitable[None]]


PROBES: Mapping[str, ProbeKind[Any]] = LazyTable(
    {
        "http": "exporter.probes.http:HTTP",
        "tcp": "exporter.probes.tcp:TCP",
        "udp": "exporter.probes.udp:UDP",
        "tls": "exporter.probes.tls:TLS",
        "dns": "exporter.probes.dns:DNS",
        "icmp": "exporter.probes.icmp:ICMP",
        "grpc": "exporter.probes.grpc:GRPC",
        "websocket": "exporter.probes.websocket:WEBSOCKET",
        "openai": "exporter.probes.openai:OPENAI",
        "container": "exporter.probes.host:CONTAINER",
        "unit": "exporter.probes.host:UNIT",
        "program": "exporter.probes.host:PROGRAM",
        "port": "exporter.probes.host:PORT",
        "file": "exporter.probes.host:FILE",
        "command": "exporter.probes.command:COMMAND",
        "status": "exporter.probes.status:STATUS",
        "python": "exporter.probes.python:PYTHON",
        "heartbeat": "exporter.probes.heartbeat:HEARTBEAT",
    }
)
