"""The `compose` control: one service of a docker compose project."""

import posixpath
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import StringConstraints

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import docker
from fleet.shells import Completed
from remediator.execution.controls import Kind
from remediator.execution.controls.context import LOG_LINES, VERBS, Facts, Hands, Verb, good
from remediator.execution.controls.docker import of_container


class ComposeOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    directory: Annotated[str, StringConstraints(pattern=r"^/[^\x00\n]*$")]  # on the service's host
    service: docker.ComposeService

    @property
    def target(self) -> str:
        return f"compose:{posixpath.normpath(self.directory)}:{self.service}"


async def control_compose(verb: Verb, options: ComposeOptions, hands: Hands) -> Completed:
    if verb == "status":
        facts = await _inspect(options, hands)
        look = docker.parse_inspection(facts.stdout)
        if look is None:
            return facts if not good(facts) else Completed(1, facts.stdout, facts.stderr)
        return Completed(0 if look.details.state == "running" else 1, facts.stdout, facts.stderr)
    lines = LOG_LINES if verb == "logs" else 0
    return await _ask(
        docker.build_compose_action(options.directory, verb, options.service, lines=lines), options, hands
    )


async def _inspect(options: ComposeOptions, hands: Hands) -> Completed:
    """The facts of the service's first container."""
    return await _ask(docker.build_compose_inspect(options.directory, options.service), options, hands)


async def _ask(argv: Sequence[str], options: ComposeOptions, hands: Hands) -> Completed:
    target = f"container of the compose service {options.service} of {options.directory}"
    return await hands.ask(argv, target, docker.MESSAGES)


async def facts_compose(options: ComposeOptions, hands: Hands) -> Facts | None:
    return of_container(await _inspect(options, hands))


COMPOSE = Kind(ComposeOptions, control_compose, facts_compose)
