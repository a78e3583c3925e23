"""The `compose` control: one service of a docker compose project."""

import posixpath
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import StringConstraints

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import docker
from fleet.shells import Completed
from remediator.execution.controls import ControlKind
from remediator.execution.controls.docker import of_container
from remediator.execution.controls.runner import LOG_LINES, VERBS, ControlRunner, TargetState, Verb, succeeded


class ComposeOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    directory: Annotated[str, StringConstraints(pattern=r"^/[^\x00\n]*$")]  # on the service's host
    service: docker.ComposeService

    @property
    def target(self) -> str:
        return f"compose:{posixpath.normpath(self.directory)}:{self.service}"


async def control_compose(verb: Verb, options: ComposeOptions, runner: ControlRunner) -> Completed:
    if verb == "status":
        facts = await _inspect(options, runner)
        look = docker.parse_inspection(facts.stdout)
        if look is None:
            return facts if not succeeded(facts) else Completed(1, facts.stdout, facts.stderr)
        return Completed(0 if look.details.state == "running" else 1, facts.stdout, facts.stderr)
    lines = LOG_LINES if verb == "logs" else 0
    return await _ask(
        docker.build_compose_action(options.directory, verb, options.service, lines=lines), options, runner
    )


async def _inspect(options: ComposeOptions, runner: ControlRunner) -> Completed:
    """The facts of the service's first container."""
    return await _ask(docker.build_compose_inspect(options.directory, options.service), options, runner)


async def _ask(argv: Sequence[str], options: ComposeOptions, runner: ControlRunner) -> Completed:
    target = f"container of the compose service {options.service} of {options.directory}"
    return await runner.run_manager(argv, target, docker.MESSAGES)


async def facts_compose(options: ComposeOptions, runner: ControlRunner) -> TargetState | None:
    return of_container(await _inspect(options, runner))


COMPOSE = ControlKind(ComposeOptions, control_compose, facts_compose)
