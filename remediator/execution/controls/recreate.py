"""The `recreate` step: replace a container by a new one with the same image and arguments.

The new container is created first, under another name. Only if `docker inspect` shows the same arguments for both, the
old one is stopped and renamed. If the new one does not start, the old one is restored.
"""

import json
from collections.abc import Iterable
from dataclasses import replace

from fleet.managers import containers, docker
from fleet.managers.containers import NEW_SUFFIX, OLD_SUFFIX
from fleet.managers.guarded_scripts import build_script
from fleet.shells import CompletedCommand
from remediator.execution.controls.container_arguments import (
    ContainerDocument,
    build_connects,
    build_create,
    find_differences,
    network_owner,
)
from remediator.execution.controls.docker import DockerControlOptions, run_after_start
from remediator.execution.controls.runner import ControlRunner, TargetNotFoundError, succeeded

WORDS = replace(docker.MESSAGES, gone=())  # a missing container may be another one than the target
OWN_COMMAND = "configure a command for the step"


class _StepEndedError(Exception):
    """The step cannot continue; `completed` is its result."""

    def __init__(self, completed: CompletedCommand) -> None:
        super().__init__(completed)
        self.completed = completed


async def recreate(options: DockerControlOptions, runner: ControlRunner) -> CompletedCommand:
    """Recreate the container. Raises ShellError if nothing was done to it."""
    try:
        name = options.container or await _find_name(options.selector, runner)
        old = await _find_container(runner, name)
        await _check_replaceable(runner, name, old)
        new = await _create_copy(runner, name, old)
    except _StepEndedError as ended:
        return ended.completed
    completed = await _replace(runner, name, str(old["Id"]), str(new["Id"]))
    if not succeeded(completed):
        return completed
    return await run_after_start(options, runner) or completed


async def _find_name(selector: containers.ContainerSelector, runner: ControlRunner) -> str:
    """Return the name that the selected container has, or had before an interrupted earlier attempt."""
    script = build_script(*containers.build_name_query(selector))
    completed = await runner.run_manager(script, str(selector), docker.MESSAGES, acts=False)
    if not succeeded(completed):
        raise _StepEndedError(completed)
    return completed.stdout.strip().removesuffix(OLD_SUFFIX).removesuffix(NEW_SUFFIX)


async def _find_container(runner: ControlRunner, name: str) -> ContainerDocument:
    """Undo an interrupted earlier attempt, and return the container."""
    new, old, current = [await _inspect(runner, name + suffix) for suffix in (NEW_SUFFIX, OLD_SUFFIX, "")]
    # If there is an old container, the one under the name itself is the new one of the earlier attempt.
    for leftover, leftover_name in ((new, name + NEW_SUFFIX), (current if old is not None else None, name)):
        if leftover is None:
            continue
        if leftover["State"]["Status"] != "created":
            remove = name + OLD_SUFFIX if leftover_name == name else leftover_name
            raise _StepEndedError(_fail(f"{remove} is left over from an earlier attempt; remove it or {name}"))
        await _run_all(runner, [["docker", "rm", leftover["Id"]]], acts=bool(old))
    if old is not None:
        renamed = await _run_all(runner, [["docker", "rename", old["Id"], name]])
        if not succeeded(renamed):
            raise _StepEndedError(renamed)
        current = old
    if current is None:
        raise runner.not_found(f"container {name}")
    return current


async def _check_replaceable(runner: ControlRunner, name: str, old: ContainerDocument) -> None:
    """Raise _StepEndedError if the container cannot be replaced by another."""
    if old["HostConfig"].get("AutoRemove"):
        raise _StepEndedError(_fail(f"{name} is removed when it stops (--rm): {OWN_COMMAND}"))
    owner_id = network_owner(old)
    owner = await _inspect(runner, owner_id) if owner_id else None
    if owner_id and (owner is None or not owner["State"]["Running"]):
        why = "is not running" if owner else "no longer exists"
        text = f"{name} uses the network of the container {owner_id}, which {why} (HostConfig.NetworkMode)"
        raise _StepEndedError(_fail(text))
    listed = await runner.run_manager(["docker", "ps", "--all", "--quiet", "--no-trunc"], "", WORDS, acts=False)
    if not succeeded(listed):
        raise _StepEndedError(listed)
    query = ["docker", "inspect", "--type", "container", "--format", "{{.HostConfig.NetworkMode}} {{.Name}}"]
    modes = (await runner.run([*query, *listed.stdout.split()], acts=False)).stdout.splitlines()
    users = [line.partition(" /")[2] for line in modes if line.startswith(f"container:{old['Id']} ")]
    if users:
        text = f"{', '.join(users)} uses the network of {name} and would lose it: {OWN_COMMAND}"
        raise _StepEndedError(_fail(text))


async def _create_copy(runner: ControlRunner, name: str, old: ContainerDocument) -> ContainerDocument:
    """Create the new container without starting it.

    If it differs from `old`, it is removed, and _StepEndedError is raised.
    """
    new = None
    create, variables = build_create(name + NEW_SUFFIX, old)
    completed = await runner.run_manager(create, "", WORDS, stdin=variables, acts=False)
    if succeeded(completed):
        completed = await _run_all(runner, build_connects(name + NEW_SUFFIX, old), acts=False)
    if succeeded(completed):
        new = await _inspect(runner, name + NEW_SUFFIX)
        differing = find_differences(old, new) if new is not None else ["it was not created"]
        if new is not None and not differing:
            return new
        completed = CompletedCommand(1, "", f"the new container would differ in: {'; '.join(differing)}")
    new = new or await _inspect(runner, name + NEW_SUFFIX)
    if new is not None:
        await _run_all(runner, [["docker", "rm", "--force", new["Id"]]], acts=False)
    raise _StepEndedError(replace(completed, stderr=f"{completed.stderr}\n{name} was not changed"))


async def _replace(runner: ControlRunner, name: str, old: str, new: str) -> CompletedCommand:
    """Replace the old container by the new one, both given by ID; restore the old one if that fails."""
    completed = await _run_all(runner, [["docker", "stop", old]])
    renamed = False
    if succeeded(completed):
        completed = await _run_all(runner, [["docker", "rename", old, name + OLD_SUFFIX]])
        renamed = succeeded(completed)
    if renamed:
        completed = await _run_all(runner, [["docker", "rename", new, name], ["docker", "start", new]])
        if succeeded(completed):
            return await _remove_old(runner, name, old)
    if completed.status is None:
        return completed  # unknown what was done; the next attempt inspects the containers
    await _run_all(runner, [["docker", "rm", "--force", new]])
    restored = not renamed or succeeded(await _run_all(runner, [["docker", "rename", old, name]]))
    started = await _run_all(runner, [["docker", "start", old]])
    result = "restored" if restored else f"NOT restored; its name is {name}{OLD_SUFFIX}"
    start_error = "" if succeeded(started) else f", but does not start: {started.output or started.why}"
    return replace(completed, stderr=f"{completed.stderr}\nthe old container was {result}{start_error}")


async def _remove_old(runner: ControlRunner, name: str, old: str) -> CompletedCommand:
    """Remove the old container. The step has succeeded even if this fails."""
    completed = await _run_all(runner, [["docker", "rm", old]])
    if succeeded(completed):
        return completed
    why = completed.output or completed.why
    return CompletedCommand(
        0, completed.stdout, f"the new container runs; cannot remove the old one, {name}{OLD_SUFFIX}: {why}"
    )


async def _run_all(runner: ControlRunner, commands: Iterable[list[str]], *, acts: bool = True) -> CompletedCommand:
    """Run commands until one fails; returns the result of the last one."""
    completed = CompletedCommand(0, "", "")
    for argv in commands:
        completed = await runner.run_manager(argv, "", WORDS, acts=acts)
        if not succeeded(completed):
            break
    return completed


async def _inspect(runner: ControlRunner, name_or_id: str) -> ContainerDocument | None:
    """Inspect the container with exactly this name or ID; None if there is none. Raises _StepEndedError."""
    try:
        argv = ["docker", "inspect", "--type", "container", name_or_id]
        completed = await runner.run_manager(argv, f"container {name_or_id}", docker.MESSAGES, acts=False)
    except TargetNotFoundError:
        return None
    try:
        document = json.loads(completed.stdout)[0]
        is_exact = name_or_id in (str(document["Name"]).removeprefix("/"), document["Id"])
    except (ValueError, LookupError, TypeError, RecursionError):
        if succeeded(completed):
            completed = _fail(f"unexpected output of docker inspect {name_or_id}: {OWN_COMMAND}")
        raise _StepEndedError(completed) from None
    return document if is_exact else None


def _fail(why: str) -> CompletedCommand:
    return CompletedCommand(1, "", why)
