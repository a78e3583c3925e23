"""Control kinds: the options of each, and the functions that run a verb and read the target's state."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fleet.inventory.endpoints import ConfigModel
from fleet.inventory.kinds import LazyTable
from fleet.inventory.model import Service
from fleet.shells import CompletedCommand
from remediator.execution.controls.runner import ControlRunner, TargetState, UnknownVerbError, Verb

OptionsT = TypeVar("OptionsT", bound=ConfigModel)


@dataclass(frozen=True)
class ControlKind(Generic[OptionsT]):
    """A kind of control. Both functions raise ShellError if no command was run.

    `run(verb, options, runner)` raises UnknownVerbError; `read_state(options, runner)` returns None if the kind has no
    state to read. `reports_stops` says whether the state may show that somebody stopped the target. `exited_at_start`
    is a pattern of what a restart prints whose target has started and has exited.
    """

    options: type[OptionsT]
    run: Callable[[Verb, OptionsT, ControlRunner], Awaitable[CompletedCommand]]
    read_state: Callable[[OptionsT, ControlRunner], Awaitable[TargetState | None]]
    reports_stops: bool = True
    exited_at_start: str = ""


CONTROLS: Mapping[str, ControlKind[Any]] = LazyTable(
    {
        "docker": "remediator.execution.controls.docker:DOCKER",
        "compose": "remediator.execution.controls.compose:COMPOSE",
        "systemd": "remediator.execution.controls.systemd:SYSTEMD",
        "supervisor": "remediator.execution.controls.supervisor:SUPERVISOR",
        "command": "remediator.execution.controls.command:COMMAND",
        "http": "remediator.execution.controls.http:HTTP",
    }
)


def find_options(service: Service, component: str = "") -> Any:
    """Return the options of a service's control, or those whose verb `restart` restarts one of its components.

    Raises UnknownVerbError and UnknownComponentError.
    """
    control = service.control
    if control is None:
        raise UnknownVerbError(f"service {service.id!r} has no control")
    if not component:
        return control.options
    if not service.restartable_components:
        raise UnknownVerbError(f"the control of service {service.id!r} does not restart components")
    return control.options.for_component(component)
