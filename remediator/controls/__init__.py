"""The kinds of controls: the options of each, the function that carries out a verb, and the one that tells facts."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fleet.endpoints import Part
from fleet.shells import Completed
from remediator.controls.command import CommandOptions, control_command, facts_command
from remediator.controls.compose import ComposeOptions, control_compose, facts_compose
from remediator.controls.docker import DockerOptions, control_docker, facts_docker
from remediator.controls.hands import Facts, Hands, Verb
from remediator.controls.http import HttpOptions, control_http, facts_http
from remediator.controls.supervisor import SupervisorOptions, control_supervisor, facts_supervisor
from remediator.controls.systemd import SystemdOptions, control_systemd, facts_systemd

Options = TypeVar("Options", bound=Part)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of control: `control(verb, options, hands)` and `facts(options, hands)`.

    Both raise ShellError where nothing was run; `control` raises UnknownVerb, `facts` gives None where it knows none.
    """

    options: type[Options]
    control: Callable[[Verb, Options, Hands], Awaitable[Completed]]
    facts: Callable[[Options, Hands], Awaitable[Facts | None]]


CONTROLS: Mapping[str, Kind[Any]] = {
    "docker": Kind(DockerOptions, control_docker, facts_docker),
    "compose": Kind(ComposeOptions, control_compose, facts_compose),
    "systemd": Kind(SystemdOptions, control_systemd, facts_systemd),
    "supervisor": Kind(SupervisorOptions, control_supervisor, facts_supervisor),
    "command": Kind(CommandOptions, control_command, facts_command),
    "http": Kind(HttpOptions, control_http, facts_http),
}
