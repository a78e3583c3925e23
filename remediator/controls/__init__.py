"""The kinds of controls: the options of each, the function that carries out a verb, and the one that tells facts."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fleet.endpoints import Part
from fleet.kinds import Table
from fleet.shells import Completed
from remediator.controls.hands import Facts, Hands, Verb

Options = TypeVar("Options", bound=Part)


@dataclass(frozen=True)
class Kind(Generic[Options]):
    """A kind of control: `control(verb, options, hands)` and `facts(options, hands)`.

    Both raise ShellError where nothing was run; `control` raises UnknownVerb, `facts` gives None where it knows none.
    """

    options: type[Options]
    control: Callable[[Verb, Options, Hands], Awaitable[Completed]]
    facts: Callable[[Options, Hands], Awaitable[Facts | None]]
    tells_of_stops: bool = True  # whether its facts may say that somebody stopped a target


CONTROLS: Mapping[str, Kind[Any]] = Table(
    {
        "docker": "remediator.controls.docker:DOCKER",
        "compose": "remediator.controls.compose:COMPOSE",
        "systemd": "remediator.controls.systemd:SYSTEMD",
        "supervisor": "remediator.controls.supervisor:SUPERVISOR",
        "command": "remediator.controls.command:COMMAND",
        "http": "remediator.controls.http:HTTP",
    }
)
