"""The `recreate` step on a real dockerd."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.inventory.model import SudoOptions
from fleet.shells import CompletedCommand
from fleet.shells.local import LocalShell
from remediator.execution.controls.container_arguments import find_differences
from remediator.execution.controls.docker import DockerControlOptions
from remediator.execution.controls.recreate import recreate
from remediator.execution.controls.runner import ControlRunner, TargetNotFoundError

pytestmark = pytest.mark.needs("dockerd", "busybox")
RICH = [
    "--network", "host", "--restart", "unless-stopped", "--env", "GREETING=it's a \"test\" $HOME", "--env", "EMPTY=",
    "--label", "team=docs, ocr", "--volume", "{name}-data:/data", "--mount", "type=bind,source={folder},target=/conf,readonly",
    "--memory", "64m", "--cpus", "0.5", "--shm-size", "32m", "--ulimit", "nofile=1024:2048", "--cap-add", "NET_ADMIN",
    "--cap-drop", "CHOWN", "--user", "0:0", "--workdir", "/www", "--hostname", "ocr", "--add-host", "a.test:10.0.0.1",
    "--tmpfs", "/scratch:size=1m", "--health-cmd", "true", "--health-interval", "30s", "--log-opt", "max-size=1m",
    "--read-only", "--stop-timeout", "1", "--pids-limit", "50", "--init", "--ipc", "host", "--volume", "/anonymous",
    "--security-opt", "systempaths=unconfined",
]  # fmt: skip
NETWORKED = [
    "--network", "name={inner},driver-opt=com.example.a=b", "--ip", "{subnet}.50", "--network-alias", "db", "--hostname", "db-1",
    "--mac-address", "00:16:3e:00:00:07", "--link", "{image}:other", "--link-local-ip", "169.254.3.4",
]  # fmt: skip


@pytest.fixture
def name(container: str) -> Iterator[str]:
    """The name of a container that the test may create; it is removed afterwards."""
    container_name = f"{container}-recreated"
    yield container_name
    remove(container_name)
    run("volume", "rm", "--force", f"{container_name}-data")


@pytest.fixture
def networks(name: str) -> Iterator[tuple[str, str, str]]:
    """Two networks, and the first three numbers of the addresses of the first one."""
    number = os.getpid() % 256
    names = (f"defib-inner-{os.getpid()}", f"defib-outer-{os.getpid()}")
    for each, first in zip(names, ("10.99", "10.98"), strict=True):
        run("network", "create", "--internal", "--subnet", f"{first}.{number}.0/24", each)
    yield (*names, f"10.99.{number}")
    remove(name)
    run("network", "rm", *names)


def remove(name: str) -> None:
    """Remove everything that a test may have created."""
    run("rm", "--force", "--volumes", name, f"{name}-other", f"{name}.defib-old", f"{name}.defib-new", check=False)


def run(*arguments: str, check: bool = True) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=check).stdout


def start(name: str, image: str, *arguments: str) -> None:
    run(
        "run",
        "-d",
        "--name",
        name,
        "--stop-signal",
        "KILL",
        *arguments,
        image,
        "sh",
        "-c",
        "echo started; exec sleep 1000",
    )


def inspect(name: str) -> Any:
    return json.loads(run("inspect", name))[0]


def recreate_container(name: str) -> CompletedCommand:
    return asyncio.run(recreate(DockerControlOptions(container=name), ControlRunner(LocalShell(), SudoOptions(), 60.0)))


def list_names(name: str) -> list[str]:
    return [each for each in run("ps", "--all", "--format", "{{.Names}}").split() if each.startswith(name)]


@pytest.mark.parametrize("arguments", [[], RICH], ids=["bare", "rich"])
def test_a_container_is_recreated_with_its_arguments(
    container: str, name: str, tmp_path: Path, arguments: list[str]
) -> None:
    start(name, container, *(each.format(name=name, folder=tmp_path) for each in arguments))
    before = inspect(name)
    completed = recreate_container(name)
    assert completed.status == 0, completed
    after = inspect(name)
    assert after["Id"] != before["Id"]
    assert (find_differences(before, after), after["State"]["Running"]) == ([], True)
    assert after["HostConfig"]["MaskedPaths"] == before["HostConfig"]["MaskedPaths"]
    assert list_names(name) == [name]


def test_an_old_container_that_cannot_be_removed_is_reported(
    container: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(name, container)
    before, real = inspect(name), shutil.which("docker")
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\n[ "$*" != "rm {before["Id"]}" ] || {{ echo "device busy" >&2; exit 1; }}\nexec {real} "$@"\n'
    )
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    completed = recreate_container(name)
    assert (completed.status, inspect(name)["State"]["Running"]) == (0, True)
    assert f"the new container runs; cannot remove the old one, {name}.defib-old: device busy" in completed.stderr
    assert inspect(name)["Id"] != before["Id"]


def test_the_settings_of_networks_are_kept(container: str, name: str, networks: tuple[str, str, str]) -> None:
    """Addresses, aliases, links and options, also if the container is recreated again."""
    inner, outer, subnet = networks
    start(f"{name}-other", container, "--network", inner)
    filled = [each.format(inner=inner, subnet=subnet, image=f"{name}-other") for each in NETWORKED]
    start(name, container, *filled)
    run(
        "network",
        "connect",
        "--ip",
        f"{subnet.replace('10.99', '10.98')}.60",
        "--alias",
        "cache",
        "--driver-opt",
        "c=d",
        outer,
        name,
    )
    for _ in range(2):
        before = inspect(name)
        completed = recreate_container(name)
        assert completed.status == 0, completed
        after = inspect(name)
        places = [
            {network: (each["IPAMConfig"], {*each["Aliases"]} - {document["Id"][:12]}, each["Links"], each["DriverOpts"], each["IPAddress"])
             for network, each in document["NetworkSettings"]["Networks"].items()}
            for document in (before, after)
        ]  # fmt: skip
        assert places[1] == places[0]
        assert {"db", "cache"} <= {alias for _, aliases, *_ in places[1].values() for alias in aliases}
        assert places[1][inner][4] == f"{subnet}.50"
        assert after["NetworkSettings"]["Networks"][inner]["MacAddress"] == "00:16:3e:00:00:07"
        assert before["Id"][:12] not in after["NetworkSettings"]["Networks"][inner]["Aliases"]


def test_the_old_container_is_restored_if_its_address_is_in_use(
    container: str, name: str, networks: tuple[str, str, str]
) -> None:
    inner, _, subnet = networks
    start(name, container, "--network", inner, "--ip", f"{subnet}.50")
    before = inspect(name)
    run("kill", name)
    start(f"{name}-other", container, "--network", inner, "--ip", f"{subnet}.50")
    completed = recreate_container(name)
    assert (completed.status, inspect(name)["Id"]) == (1, before["Id"])
    assert "the old container was restored, but does not start: " in completed.stderr
    assert list_names(name) == [f"{name}-other", name] or list_names(name) == [name, f"{name}-other"]


def test_a_container_in_the_network_of_another_one_is_recreated_and_the_other_is_not(container: str, name: str) -> None:
    other = f"{name}-other"
    start(other, container, "--network", "none")
    start(name, container, "--network", f"container:{other}")
    completed = recreate_container(name)
    assert completed.status == 0, completed
    assert inspect(name)["HostConfig"]["NetworkMode"] == f"container:{inspect(other)['Id']}"
    assert inspect(name)["State"]["Running"]
    before = inspect(other)["State"]["StartedAt"]
    refused = recreate_container(other)
    assert (refused.status, f"{name} uses the network of {other}" in refused.stderr) == (1, True)
    assert inspect(other)["State"]["StartedAt"] == before
    run("kill", other)
    before = inspect(name)
    refused = recreate_container(name)
    assert (refused.status, "which is not running (HostConfig.NetworkMode)" in refused.stderr) == (1, True), refused
    assert (inspect(name)["Id"], inspect(name)["State"]["Running"]) == (before["Id"], True)


def test_an_argument_that_cannot_be_kept_is_reported_before_anything_is_changed(
    container: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The docker of this test drops the size of shared memory at creation."""
    real = shutil.which("docker")
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\n[ "$1" != create ] || {{ shift; exec {real} create $(echo "$@" | sed "s/--shm-size [0-9]*//"); }}\n'
        f'exec {real} "$@"\n'
    )
    (tmp_path / "docker").chmod(0o755)
    run("run", "-d", "--network", "host", "--shm-size", "32m", "--name", name, container, "/bin/sleep", "1000")
    before = inspect(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    completed = recreate_container(name)
    assert (completed.status, "HostConfig.ShmSize" in completed.stderr, "was not changed" in completed.stderr) == (
        1,
        True,
        True,
    )
    after = inspect(name)
    assert (after["Id"], after["State"]) == (before["Id"], before["State"])
    assert list_names(name) == [name]


def test_an_interrupted_attempt_is_undone(container: str, name: str) -> None:
    start(name, container, "--network", "host")
    before = inspect(name)
    run("create", "--name", f"{name}.defib-new", container, "sleep", "1")
    run("stop", name)
    run("rename", name, f"{name}.defib-old")
    completed = recreate_container(name)
    assert completed.status == 0, completed
    assert (find_differences(before, inspect(name)), list_names(name)) == ([], [name])


def test_an_abbreviated_id_is_not_a_name(container: str) -> None:
    before = inspect(container)
    with pytest.raises(TargetNotFoundError, match=f"there is no container {before['Id'][:6]} on the host"):
        recreate_container(before["Id"][:6])
    after = inspect(container)
    assert (after["Id"], after["Name"], after["State"]) == (before["Id"], before["Name"], before["State"])
