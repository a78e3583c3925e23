"""The kinds of controls: the options of each, the function that carries out a verb, and the one that tells facts."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.kinds import LazyTable
from fleet.shells import Completed
from remediator.execution.controls.context import Facts, Hands, Verb

Options = TypeVar("Options", bound=ConfigModel)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of control: `control(verb, options, hands)` and `facts(options, hands)`.

    Both raise ShellError where nothing was run; `control` raises UnknownVerb, `facts` gives None where it knows none.
    """

    options: type[Options]
    control: Callable[[Verb, Options, Hands], Awaitable[Completed]]
    facts: Callable[[Options, Hands], Awaitable[Facts | None]]
    tells_of_stops: bool = True  # whether its facts may say that somebody stopped a target


CONTROLS: Mapping[str, Kind[Any]] = LazyTable(
    {
        "docker": "remediator.execution.controls.docker:DOCKER",
        "compose": "remediator.execution.controls.compose:COMPOSE",
        "systemd": "remediator.execution.controls.systemd:SYSTEMD",
        "supervisor": "remediator.execution.controls.supervisor:SUPERVISOR",
        "command": "remediator.execution.controls.command:COMMAND",
        "http": "remediator.execution.controls.http:HTTP",
    }
)
