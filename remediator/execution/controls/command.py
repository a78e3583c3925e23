"""The `command` control: the user's own commands."""

import shlex
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from fleet.inventory.endpoints import ConfigModel
from fleet.shells import Completed
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import VERBS, ControlRunner, TargetState, UnknownVerbError, Verb

Argv = Annotated[list[str], Field(min_length=1)]


class CommandOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    start: Argv | None = None
    stop: Argv | None = None
    restart: Argv | None = None
    status: Argv | None = None
    logs: Argv | None = None

    @model_validator(mode="after")
    def _something(self) -> "CommandOptions":
        if not self.verbs:
            raise ValueError("wants at least one of start, stop, restart, status, logs")
        return self

    @property
    def verbs(self) -> frozenset[Verb]:
        said = {verb for verb in VERBS if getattr(self, verb) is not None}
        return frozenset(said | ({"restart"} if {"start", "stop"} <= said else set()))

    @property
    def target(self) -> str:
        """The command that makes it run; what runs the same one acts on the same thing."""
        argv = self.restart or self.start or self.stop or self.status or self.logs
        # A reference that this program does not resolve is a text still.
        return f"command:{shlex.join(argv) if isinstance(argv, list) else argv}"


async def control_command(verb: Verb, options: CommandOptions, runner: ControlRunner) -> Completed:
    argv: list[str] | None = getattr(options, verb)
    if argv is not None:
        return await runner.run(argv)
    if verb == "restart" and options.stop and options.start:
        stopped = await runner.run(options.stop)
        return stopped if stopped.status is None else await runner.run(options.start)
    raise UnknownVerbError(f"the control has no `{verb}`")


async def facts_command(options: CommandOptions, runner: ControlRunner) -> TargetState | None:
    if options.status is None:
        return None
    done = await runner.run(options.status)
    said = done.output.splitlines()
    return TargetState(state=said[-1][:200] if said else f"exit {done.status}", exit_status=done.status)


COMMAND = ControlKind(CommandOptions, control_command, facts_command, reports_stops=False)
