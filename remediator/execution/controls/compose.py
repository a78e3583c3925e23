"""The `compose` control: one service of a docker compose project."""

import posixpath
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import StringConstraints

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import docker
from fleet.shells import CompletedCommand
from remediator.execution.controls import ControlKind
from remediator.execution.controls.docker import parse_container_state
from remediator.execution.controls.runner import LOG_LINES, VERBS, ControlRunner, TargetState, Verb, succeeded


class ComposeControlOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    directory: Annotated[str, StringConstraints(pattern=r"^/[^\x00\n]*$")]  # on the service's host
    service: docker.ComposeService

    @property
    def target(self) -> str:
        return f"compose:{posixpath.normpath(self.directory)}:{self.service}"


async def run_compose(verb: Verb, options: ComposeControlOptions, runner: ControlRunner) -> CompletedCommand:
    if verb == "status":
        completed = await _inspect(options, runner)
        look = docker.parse_inspection(completed.stdout)
        if look is None and not succeeded(completed):
            return completed
        is_running = look is not None and look.details.state == "running"
        return CompletedCommand(0 if is_running else 1, completed.stdout, completed.stderr)
    lines = LOG_LINES if verb == "logs" else 0
    return await _run(
        docker.build_compose_action(options.directory, verb, options.service, lines=lines), options, runner
    )


async def _inspect(options: ComposeControlOptions, runner: ControlRunner) -> CompletedCommand:
    """Inspect the service's first container."""
    return await _run(docker.build_compose_inspect(options.directory, options.service), options, runner)


async def _run(argv: Sequence[str], options: ComposeControlOptions, runner: ControlRunner) -> CompletedCommand:
    target = f"container of the compose service {options.service} of {options.directory}"
    return await runner.run_manager(argv, target, docker.MESSAGES)


async def read_compose_state(options: ComposeControlOptions, runner: ControlRunner) -> TargetState | None:
    return parse_container_state(await _inspect(options, runner))


COMPOSE = ControlKind(ComposeControlOptions, run_compose, read_compose_state)
