"""The `docker` control: one container, and perhaps what is to be started inside it."""

import shlex
from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints

from fleet.inventory.endpoints import ConfigModel
from fleet.managers import docker
from fleet.shells import Completed
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import LOG_LINES, VERBS, ControlRunner, TargetState, Verb, succeeded

Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class AfterStart(ConfigModel):
    """A command inside the container once it is up; `log` is a file in the container for its output."""

    exec: list[str] = Field(min_length=1)
    env: dict[Variable, str] = Field(default_factory=dict)
    detach: bool = False
    log: Annotated[str, StringConstraints(pattern=r"^/")] | None = None


class DockerOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    can_recreate: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    container: docker.ContainerName
    after_start: list[AfterStart] = []

    @property
    def target(self) -> str:
        return f"docker:{self.container}"


async def control_docker(verb: Verb, options: DockerOptions, runner: ControlRunner) -> Completed:
    target = f"container {options.container}"
    if verb == "status":
        done = await runner.run_manager(docker.build_state_query(options.container), target, docker.MESSAGES)
        if succeeded(done) and not done.stdout.strip():
            raise runner.not_found(target)
        running = succeeded(done) and docker.is_running(done.stdout)
        return done if running or not succeeded(done) else Completed(1, done.stdout, done.stderr)
    if verb == "logs":
        return await _logs(options, target, runner)
    done = await runner.run_manager(docker.build_action(verb, options.container), target, docker.MESSAGES)
    return done if verb == "stop" or not succeeded(done) else await after_start(options, runner, done)


async def after_start(options: DockerOptions, runner: ControlRunner, done: Completed) -> Completed:
    """Start what is to be started inside; what came of it, or `done` where nothing failed."""
    for step in options.after_start:
        started = await runner.run(_exec(options.container, step))
        if not succeeded(started):
            return started
    return done


def _exec(container: str, step: AfterStart) -> list[str]:
    variables = [part for name, value in step.env.items() for part in ("--env", f"{name}={value}")]
    command = step.exec
    if step.log:
        # Only a shell in the container can point the output there; the command itself is quoted.
        command = ["sh", "-c", f"exec {shlex.join(step.exec)} >>{shlex.quote(step.log)} 2>&1"]
    return docker.build_exec(container, [*(["--detach"] if step.detach else []), *variables], command)


async def _logs(options: DockerOptions, target: str, runner: ControlRunner) -> Completed:
    done = await runner.run_manager(docker.build_logs(options.container, LOG_LINES), target, docker.MESSAGES)
    for step in options.after_start:
        if step.log and succeeded(done):
            more = await runner.run(docker.build_exec(options.container, [], ["tail", "-n", str(LOG_LINES), step.log]))
            done = Completed(0, f"{done.stdout}\n==> {step.log} <==\n{more.stdout}", done.stderr + more.stderr)
    return done


async def facts_docker(options: DockerOptions, runner: ControlRunner) -> TargetState | None:
    return of_container(await runner.run(docker.build_inspect(options.container)))


def of_container(done: Completed) -> TargetState | None:
    """How a container stands, by what its host has printed; None where that was nothing."""
    look = docker.parse_inspection(done.stdout)
    if look is None:
        return None
    told, end = look.details, docker.classify_end(look)
    healing = ""
    if told.state == "restarting":
        healing = f"docker restarts it itself (restart policy {told.policy}, {told.restarts} times so far)"
    elif told.state == "running" and told.health == "starting":
        healing = "it has been started, and its health check has not come to a verdict"
    return TargetState(
        state=f"{told.state} ({told.health})" if told.health else told.state,
        started=told.started, pid=told.pid or None, restarts=told.restarts,
        exit_status=told.exit_code, out_of_memory=told.out_of_memory, healing=healing,
        age=_since(docker.parse_time(told.started), look.now) if told.state == "running" else None,
        withheld="it is paused (docker pause)" if told.state == "paused" else "",
        stopped=end.stopped, stopped_for=_since(end.at, look.now), unsure="" if end.known else _unsure(done),
    )  # fmt: skip


def _unsure(done: Completed) -> str:
    """Why it is not known whether somebody stopped a container."""
    events = f"docker events: {done.stderr.strip() or done.why or f'exit status {done.status}'}"
    why = "docker keeps its last 256 events only" if succeeded(done) else events
    return f"whether somebody stopped it is not known: {why}"


def _since(at: float | None, now: float | None) -> float | None:
    return None if at is None or now is None else max(0.0, now - at)


DOCKER = ControlKind(DockerOptions, control_docker, facts_docker)
