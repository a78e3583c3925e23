"""The kinds of probes: the options of each and the function that carries it out."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from exporter.probes.command import CommandOptions, probe_command
from exporter.probes.http import HttpOptions, probe_http
from exporter.probes.tcp import TcpOptions, probe_tcp
from exporter.results import Seen
from fleet.endpoints import Part
from fleet.shells import Shell

Options = TypeVar("Options", bound=Part)
ShellOf = Callable[[], Shell]


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of probe: `probe(options, timeout in seconds, seen, shell)` returns, or raises ProbeFailure."""

    options: type[Options]
    probe: Callable[[Options, float, Seen, ShellOf], Awaitable[None]]


PROBES: Mapping[str, Kind[Any]] = {
    "http": Kind(HttpOptions, probe_http),
    "tcp": Kind(TcpOptions, probe_tcp),
    "command": Kind(CommandOptions, probe_command),
}
