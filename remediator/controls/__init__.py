"""The kinds of controls: the options of each and the function that carries out a verb."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fleet.endpoints import Part
from fleet.shells import Completed
from remediator.controls.command import CommandOptions, control_command
from remediator.controls.docker import DockerOptions, control_docker
from remediator.controls.hands import Hands, Verb
from remediator.controls.supervisor import SupervisorOptions, control_supervisor

Options = TypeVar("Options", bound=Part)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of control: `control(verb, options, hands)`; raises UnknownVerb and ShellError."""

    options: type[Options]
    control: Callable[[Verb, Options, Hands], Awaitable[Completed]]


CONTROLS: Mapping[str, Kind[Any]] = {
    "docker": Kind(DockerOptions, control_docker),
    "supervisor": Kind(SupervisorOptions, control_supervisor),
    "command": Kind(CommandOptions, control_command),
}
