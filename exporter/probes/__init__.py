"""The kinds of probes: the options of each and the function that carries it out."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from exporter.probes.context import Means
from exporter.results import Seen
from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.kinds import LazyTable

Options = TypeVar("Options", bound=ConfigModel)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of probe: `probe(options, means, seen)` returns, or raises ProbeFailure."""

    options: type[Options]
    probe: Callable[[Options, Means, Seen], Awaitable[None]]


PROBES: Mapping[str, Kind[Any]] = LazyTable(
    {
        "http": "exporter.probes.http:HTTP",
        "tcp": "exporter.probes.tcp:TCP",
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
        "command": "exporter.probes.command:COMMAND",
        "status": "exporter.probes.status:STATUS",
        "python": "exporter.probes.python:PYTHON",
    }
)
