"""Controls of containers that deploys rename: selected by labels or an image, on a real dockerd."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.inventory.model import SudoOptions
from fleet.shells import ShellError
from fleet.shells.local import LocalShell
from remediator.execution.controls.docker import DockerControlOptions
from remediator.execution.controls.recreate import recreate
from remediator.execution.controls.runner import ControlRunner, TargetNotFoundError, TargetState
from tests.integration.test_controls import control, read_state

pytestmark = pytest.mark.needs("dockerd", "busybox")
LABEL = f"app=defib-{os.getpid()}"
SELECTED = {"label": LABEL}


def docker(*arguments: str, check: bool = True) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=check).stdout.strip()


@pytest.fixture
def name(container: str) -> Iterator[str]:
    """The beginning of names of containers, which are removed afterwards."""
    beginning = f"{container}-web"
    yield beginning
    named = docker("ps", "--all", "--format", "{{.Names}}").split()
    docker("rm", "--force", *(each for each in named if each.startswith(beginning)), check=False)


def deploy(name: str, image: str, *arguments: str) -> None:
    run = ["run", "--detach", "--pull", "never", "--network", "host", "--stop-signal", "KILL", "--label", LABEL]
    docker(*run, "--name", name, *arguments, image, "sh", "-c", "echo started; exec sleep 1000")


def started_at(name: str) -> str:
    return docker("inspect", "--format", "{{.State.StartedAt}}", name)


async def state_of(options: object = SELECTED) -> TargetState:
    state = await read_state("docker", options)
    assert state is not None
    return state


def test_the_newest_running_container_is_selected_at_each_command(container: str, name: str) -> None:
    """As a deploy replaces it under another name; what was selected is in the output and in the state."""

    async def deploys() -> None:
        with pytest.raises(TargetNotFoundError, match=f"there is no container with the label {LABEL} on"):
            await control("docker", "restart", SELECTED)
        deploy(f"{name}-1", container)
        deploy(f"{name}-other", container, "--label", "app=other")
        before, other = started_at(f"{name}-1"), started_at(f"{name}-other")
        completed = await control("docker", "restart", SELECTED)
        assert completed.status == 0
        assert completed.stdout.startswith(f"container {name}-1 (")
        assert started_at(f"{name}-1") != before
        deploy(f"{name}-2", container)  # the old one still runs
        assert (await state_of()).selected == (
            f"{name}-2, the newest container with the label {LABEL}; not the newest: {name}-1"
        )
        before = started_at(f"{name}-1")
        assert f"container {name}-2 (" in (await control("docker", "stop", SELECTED)).stdout
        # The old one is the newest that runs.
        assert (await state_of()).selected == f"{name}-1, the newest container with the label {LABEL}"
        assert started_at(f"{name}-1") == before
        docker("kill", f"{name}-1")
        assert (await control("docker", "status", SELECTED)).status == 1
        assert (await state_of()).selected.startswith(f"{name}-2, ")
        assert (await control("docker", "start", SELECTED)).status == 0
        assert (await control("docker", "status", SELECTED)).status == 0
        logs = await control("docker", "logs", SELECTED)
        assert f"container {name}-2 (" in logs.stdout
        assert logs.stdout.count("started") == 2
        assert started_at(f"{name}-other") == other

    asyncio.run(deploys())


def test_all_labels_must_match_and_commands_run_inside(container: str, name: str) -> None:
    deploy(f"{name}-blue", container, "--label", "colour=dark blue")
    deploy(f"{name}-red", container, "--label", "colour=red")
    step = {"exec": ["sh", "-c", "echo inside > /done"]}
    options = {"label": [LABEL, "colour=dark blue"], "after_start": [step]}
    assert asyncio.run(control("docker", "restart", options)).status == 0
    assert docker("exec", f"{name}-blue", "cat", "/done") == "inside"
    assert asyncio.run(state_of(options)).selected.startswith(f"{name}-blue, ")


def test_an_image_is_selected_by_its_name_in_any_version(container: str, name: str) -> None:
    """Also where a pull has given its tag to another image, and docker shows only an ID."""
    repository = f"registry.test:5000/{name}"
    tags = [f"{repository}:v1", f"{repository}:v2", f"{repository}/worker:v3", f"{repository}er:v4"]
    for tag in tags:
        docker("tag", container, tag)
    try:
        deploy(f"{name}-v1", tags[0])
        deploy(f"{name}-worker", tags[2])
        deploy(f"{name}-longer", tags[3])
        docker("rmi", tags[0])
        assert asyncio.run(state_of({"image": repository})).selected.startswith(f"{name}-v1, ")
        deploy(f"{name}-v2", tags[1])
        assert asyncio.run(state_of({"image": repository})).selected.startswith(f"{name}-v2, ")
        assert asyncio.run(state_of({"image": tags[0]})).selected.startswith(f"{name}-v1, ")
        with pytest.raises(TargetNotFoundError, match=r"there is no container of the image registry\.test on"):
            asyncio.run(control("docker", "restart", {"image": "registry.test"}))
    finally:
        docker("rm", "--force", f"{name}-v1", f"{name}-v2", f"{name}-worker", f"{name}-longer", check=False)
        docker("rmi", "--force", *tags, check=False)


def test_containers_that_cannot_be_told_apart_are_named(
    container: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is run then. docker gives no two containers the same time: here, its client does."""
    deploy(f"{name}-1", container)
    deploy(f"{name}-2", container)
    before = [started_at(f"{name}-{number}") for number in (1, 2)]
    real = shutil.which("docker")
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\ncase "$*" in *.Created*) echo now; echo now; exit ;; esac\nexec {real} "$@"\n'
    )
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    expected = f"created at the same time: {name}-2 {name}-1"
    with pytest.raises(ShellError, match=expected):
        asyncio.run(control("docker", "restart", SELECTED))
    with pytest.raises(ShellError, match=expected):
        asyncio.run(read_state("docker", SELECTED))
    assert [started_at(f"{name}-{number}") for number in (1, 2)] == before


def test_recreate_replaces_the_selected_container_under_its_own_name(container: str, name: str) -> None:
    deploy(f"{name}-1", container)
    deploy(f"{name}-2", container, "--env", "VERSION=2")
    old = docker("inspect", "--format", "{{.Id}}", f"{name}-2")
    options = DockerControlOptions.model_validate(SELECTED)

    def run() -> object:
        return asyncio.run(recreate(options, ControlRunner(LocalShell(), SudoOptions(), 60.0)))

    run()
    new = docker("inspect", "--format", "{{.Id}}", f"{name}-2")
    assert new != old
    assert docker("exec", f"{name}-2", "sh", "-c", "echo $VERSION") == "2"
    # An earlier attempt was interrupted after it had renamed the container: it is not selected for a restart.
    docker("rm", "--force", f"{name}-1")
    docker("stop", f"{name}-2")
    docker("rename", f"{name}-2", f"{name}-2.defib-old")
    with pytest.raises(TargetNotFoundError):
        asyncio.run(control("docker", "restart", SELECTED))
    run()
    assert docker("ps", "--filter", f"label={LABEL}", "--format", "{{.Names}}") == f"{name}-2"
