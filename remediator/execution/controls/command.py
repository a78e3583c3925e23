"""The `command` control: one command of the user's per verb."""

import shlex
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel
from fleet.shells import CompletedCommand
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import VERBS, ControlRunner, TargetState, UnknownVerbError, Verb

STATE_LIMIT = 200  # characters
Arguments = Annotated[Annotated[list[str], Field(min_length=1)] | None, REFERENCES_ARE_SECRET]


class CommandControlOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    start: Arguments = None
    stop: Arguments = None
    restart: Arguments = None
    status: Arguments = None
    logs: Arguments = None

    @model_validator(mode="after")
    def _check_verbs(self) -> "CommandControlOptions":
        if not self.verbs:
            raise ValueError("at least one of start, stop, restart, status and logs is required")
        return self

    @property
    def verbs(self) -> frozenset[Verb]:
        """The configured verbs, and `restart` if it can be done by `stop` and `start`."""
        configured = {verb for verb in VERBS if getattr(self, verb) is not None}
        return frozenset(configured | ({"restart"} if {"start", "stop"} <= configured else set()))

    @property
    def target(self) -> str:
        """The command that starts the target; services with the same command share the target."""
        argv = self.restart or self.start or self.stop or self.status or self.logs
        # An unresolved reference is a string.
        return f"command:{shlex.join(argv) if isinstance(argv, list) else argv}"


async def run_command(verb: Verb, options: CommandControlOptions, runner: ControlRunner) -> CompletedCommand:
    argv: list[str] | None = getattr(options, verb)
    if argv is not None:
        return await runner.run(argv)
    if verb == "restart" and options.stop and options.start:
        stopped = await runner.run(options.stop)
        return stopped if stopped.status is None else await runner.run(options.start)
    raise UnknownVerbError(f"the control does not support `{verb}`")


async def read_command_state(options: CommandControlOptions, runner: ControlRunner) -> TargetState | None:
    """Return the last line of the output of `status` as the state."""
    if options.status is None:
        return None
    completed = await runner.run(options.status)
    lines = completed.output.splitlines()
    state = lines[-1][:STATE_LIMIT] if lines else f"exit {completed.status}"
    return TargetState(state=state, exit_status=completed.status)


COMMAND = ControlKind(CommandControlOptions, run_command, read_command_state, reports_stops=False)
