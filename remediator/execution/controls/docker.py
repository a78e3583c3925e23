"""The `docker` control: one container, and commands to start inside it."""

import shlex
from typing import Annotated, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from fleet.inventory.endpoints import REFERENCES_ARE_SECRET, ConfigModel
from fleet.managers import docker
from fleet.managers.containers import ContainerName, ContainerSelector, ImageName, Label
from fleet.shells import CompletedCommand
from remediator.execution.controls import ControlKind
from remediator.execution.controls.runner import LISTED, LOG_LINES, VERBS, ControlRunner, TargetState, Verb, succeeded

MAX_LABELS = 10
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class AfterStart(ConfigModel):
    """A command to run inside the container after its start; `log` is a file in the container for its output."""

    exec: Annotated[list[str], Field(min_length=1), REFERENCES_ARE_SECRET]
    env: dict[VariableName, SecretStr] = Field(default_factory=dict)
    detach: bool = False
    log: Annotated[str, StringConstraints(pattern=r"^/")] | None = None

    @field_validator("env")
    @classmethod
    def _check_variables(cls, env: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in env.items():
            if not docker.can_pass(f"{name}={value.get_secret_value()}"):
                raise ValueError(f"{name} cannot have several lines: docker's client uses this variable itself")
        return env


def _list_of_one(value: object) -> object:
    return [value] if isinstance(value, str) else value


Labels = Annotated[
    list[Label],
    Field(min_length=1, max_length=MAX_LABELS),
    BeforeValidator(_list_of_one),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_LABELS}]}
    ),
]


class DockerControlOptions(ConfigModel):
    needs_host: ClassVar[bool] = True
    can_recreate: ClassVar[bool] = True
    verbs: ClassVar[frozenset[Verb]] = VERBS
    container: ContainerName | None = None
    label: Labels | None = None
    image: ImageName | None = None
    after_start: list[AfterStart] = []

    @model_validator(mode="after")
    def _check_selection(self) -> "DockerControlOptions":
        chosen = [name for name in ("container", "label", "image") if getattr(self, name) is not None]
        if len(chosen) != 1:
            found = f", not {' and '.join(chosen)}" if chosen else ""
            raise ValueError(f"must have exactly one of container, label, image{found}")
        return self

    @property
    def selector(self) -> ContainerSelector:
        return ContainerSelector(self.container or "", tuple(self.label or ()), self.image or "")

    @property
    def target(self) -> str:
        return f"docker:{self.selector.key}"


async def run_docker(verb: Verb, options: DockerControlOptions, runner: ControlRunner) -> CompletedCommand:
    selector, target = options.selector, str(options.selector)
    if verb == "status":
        completed = await runner.run_manager(docker.build_state_query(selector), target, docker.MESSAGES)
        if succeeded(completed) and not completed.stdout.strip():
            raise runner.not_found(target)
        if succeeded(completed) and not docker.is_running(completed.stdout):
            return CompletedCommand(1, completed.stdout, completed.stderr)
        return completed
    if verb == "logs":
        return await _read_logs(options, target, runner)
    completed = await runner.run_manager(docker.build_action(verb, selector), target, docker.MESSAGES)
    if verb == "stop" or not succeeded(completed):
        return completed
    return await run_after_start(options, runner) or completed


async def run_after_start(options: DockerControlOptions, runner: ControlRunner) -> CompletedCommand | None:
    """Run the commands of `after_start` in order; returns the first that failed, None if there is none."""
    for step in options.after_start:
        argv, stdin = _build_exec(options.selector, step)
        completed = await runner.run(argv, stdin=stdin)
        if not succeeded(completed):
            return completed
    return None


def _build_exec(container: ContainerSelector, step: AfterStart) -> tuple[list[str], bytes]:
    variables = [f"{name}={value.get_secret_value()}" for name, value in step.env.items()]
    command = step.exec
    if step.log:
        # Only a shell in the container can redirect the output; the command itself is quoted.
        command = ["sh", "-c", f"exec {shlex.join(step.exec)} >>{shlex.quote(step.log)} 2>&1"]
    return docker.build_exec(container, ["--detach"] if step.detach else [], command, variables)


async def _read_logs(options: DockerControlOptions, target: str, runner: ControlRunner) -> CompletedCommand:
    completed = await runner.run_manager(docker.build_logs(options.selector, LOG_LINES), target, docker.MESSAGES)
    for step in options.after_start:
        if step.log and succeeded(completed):
            argv, _ = docker.build_exec(options.selector, [], ["tail", "-n", str(LOG_LINES), step.log])
            tail = await runner.run(argv)
            text = f"{completed.stdout}\n==> {step.log} <==\n{tail.stdout}"
            completed = CompletedCommand(0, text, completed.stderr + tail.stderr)
    return completed


async def read_docker_state(options: DockerControlOptions, runner: ControlRunner) -> TargetState | None:
    selector, inspect = options.selector, docker.build_inspect(options.selector)
    if selector.name:
        return parse_container_state(await runner.run(inspect))
    return parse_container_state(
        await runner.run_manager(inspect, str(selector), docker.MESSAGES, acts=False), selector
    )


def parse_container_state(completed: CompletedCommand, selector: ContainerSelector | None = None) -> TargetState | None:
    """Parse the output of `docker.build_inspect`; None if it has no container.

    With a `selector`, the state says which container it selected.
    """
    inspection = docker.parse_inspection(completed.stdout)
    if inspection is None:
        return None
    details, end = inspection.details, docker.classify_end(inspection)
    healing = ""
    if details.state == "restarting":
        healing = f"docker is restarting it (restart policy {details.policy}, {details.restarts} restarts so far)"
    elif details.state == "running" and details.health == "starting":
        healing = "it was started, and its health check has no result yet"
    return TargetState(
        state=f"{details.state} ({details.health})" if details.health else details.state,
        started=details.started, pid=details.pid or None, restarts=details.restarts,
        exit_status=details.exit_code, out_of_memory=details.out_of_memory, healing=healing,
        exited=details.state in ("exited", "dead"),
        age=_seconds_since(docker.parse_time(details.started), inspection.now) if details.state == "running" else None,
        withheld="it is paused (docker pause)" if details.state == "paused" else "",
        stopped=end.stopped, stopped_for=_seconds_since(end.at, inspection.now),
        unsure="" if end.known else _explain_unsure(completed),
        selected=_describe_selection(inspection, selector) if selector else "",
    )  # fmt: skip


def _describe_selection(inspection: docker.ContainerInspection, selector: ContainerSelector) -> str:
    name = inspection.details.name
    others = [each for each in inspection.running if each != name]
    more = f"; not the newest: {', '.join(others[:LISTED])}{', …' if len(others) > LISTED else ''}" if others else ""
    return f"{name}, the newest {selector}{more}"


def _explain_unsure(completed: CompletedCommand) -> str:
    """Return why it is unknown whether somebody stopped the container."""
    if succeeded(completed):
        why = "docker keeps only its last 256 events"
    else:
        why = f"docker events: {completed.stderr.strip() or completed.why or f'exit status {completed.status}'}"
    return f"unknown whether somebody stopped it: {why}"


def _seconds_since(at: float | None, now: float | None) -> float | None:
    return None if at is None or now is None else max(0.0, now - at)


DOCKER = ControlKind(DockerControlOptions, run_docker, read_docker_state)
