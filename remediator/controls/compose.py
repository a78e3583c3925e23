"""The `compose` control: one service of a docker compose project."""

from typing import Annotated, ClassVar

from pydantic import StringConstraints

from fleet import docker
from fleet.endpoints import Part
from fleet.shells import Completed
from remediator.controls import Kind
from remediator.controls.docker import of_container
from remediator.controls.hands import LOG_LINES, VERBS, Facts, Hands, Verb, good


class ComposeOptions(Part):
    needs_host: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    directory: Annotated[str, StringConstraints(pattern=r"^/[^\x00\n]*$")]  # on the service's host
    service: docker.ComposeService


async def control_compose(verb: Verb, options: ComposeOptions, hands: Hands) -> Completed:
    if verb == "status":
        facts = await _inspect(options, hands)
        running = good(facts) and docker.is_running(facts.stdout)
        return facts if running or not good(facts) else Completed(1, facts.stdout, facts.stderr)
    if verb == "logs":
        return await hands.run(docker.compose(options.directory, "logs", options.service, lines=LOG_LINES))
    return await hands.run(docker.compose(options.directory, verb, options.service))


async def _inspect(options: ComposeOptions, hands: Hands) -> Completed:
    """The facts of the service's first container."""
    listed = await hands.run(docker.compose(options.directory, "ps", options.service))
    containers = listed.stdout.split()
    if not good(listed):
        return listed
    if not containers:
        return Completed(1, "", f"{options.service} has no container")
    return await hands.run(docker.facts(containers[0]))


async def facts_compose(options: ComposeOptions, hands: Hands) -> Facts | None:
    done = await _inspect(options, hands)
    return of_container(done.stdout) if good(done) else None


COMPOSE = Kind(ComposeOptions, control_compose, facts_compose)
