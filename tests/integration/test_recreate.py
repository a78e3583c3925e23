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

from fleet.inventory.model import Sudo
from fleet.shells import Completed
from fleet.shells.local import LocalShell
from remediator.execution.controls.docker import DockerOptions
from remediator.execution.controls.recreate import differences, recreate
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
    """The name of a container that the test makes; it is gone afterwards."""
    made = f"{container}-anew"
    yield made
    remove(made)
    run("volume", "rm", "--force", f"{made}-data")


@pytest.fixture
def networks(name: str) -> Iterator[tuple[str, str, str]]:
    """Two networks that end with the test, and the beginning of the addresses of the first."""
    number = os.getpid() % 256
    names = (f"defib-inner-{os.getpid()}", f"defib-outer-{os.getpid()}")
    for each, first in zip(names, ("10.99", "10.98"), strict=True):
        run("network", "create", "--internal", "--subnet", f"{first}.{number}.0/24", each)
    yield (*names, f"10.99.{number}")
    remove(name)
    run("network", "rm", *names)


def remove(name: str) -> None:
    """Remove whatever a test has made."""
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
        "echo begun; exec sleep 1000",
    )


def inspected(name: str) -> Any:
    return json.loads(run("inspect", name))[0]


def anew(name: str) -> Completed:
    return asyncio.run(recreate(DockerOptions(container=name), ControlRunner(LocalShell(), Sudo(), 60.0)))


def listed(name: str) -> list[str]:
    return [each for each in run("ps", "--all", "--format", "{{.Names}}").split() if each.startswith(name)]


@pytest.mark.parametrize("arguments", [[], RICH], ids=["bare", "rich"])
def test_a_container_is_made_anew_with_the_arguments_that_it_had(
    container: str, name: str, tmp_path: Path, arguments: list[str]
) -> None:
    start(name, container, *(each.format(name=name, folder=tmp_path) for each in arguments))
    before = inspected(name)
    done = anew(name)
    assert done.status == 0, done
    after = inspected(name)
    assert after["Id"] != before["Id"]
    assert (differences(before, after), after["State"]["Running"]) == ([], True)
    assert after["HostConfig"]["MaskedPaths"] == before["HostConfig"]["MaskedPaths"]
    assert listed(name) == [name]


def test_an_old_container_that_cannot_be_removed_is_left_and_named(
    container: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(name, container)
    before, real = inspected(name), shutil.which("docker")
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\n[ "$*" != "rm {before["Id"]}" ] || {{ echo "device busy" >&2; exit 1; }}\nexec {real} "$@"\n'
    )
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = anew(name)
    assert (done.status, inspected(name)["State"]["Running"]) == (0, True)
    assert f"the new container runs; the old one is left as {name}.defib-old: device busy" in done.stderr
    assert inspected(name)["Id"] != before["Id"]


def test_it_has_the_same_place_in_its_networks(container: str, name: str, networks: tuple[str, str, str]) -> None:
    """Addresses, names, links and options, also after the second time."""
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
        before = inspected(name)
        done = anew(name)
        assert done.status == 0, done
        after = inspected(name)
        places = [
            {network: (told["IPAMConfig"], {*told["Aliases"]} - {of["Id"][:12]}, told["Links"], told["DriverOpts"], told["IPAddress"])
             for network, told in of["NetworkSettings"]["Networks"].items()}
            for of in (before, after)
        ]  # fmt: skip
        assert places[1] == places[0]
        assert {"db", "cache"} <= {alias for _, aliases, *_ in places[1].values() for alias in aliases}
        assert places[1][inner][4] == f"{subnet}.50"
        assert after["NetworkSettings"]["Networks"][inner]["MacAddress"] == "00:16:3e:00:00:07"
        assert before["Id"][:12] not in after["NetworkSettings"]["Networks"][inner]["Aliases"]


def test_an_address_that_was_taken_meanwhile_puts_the_old_one_back(
    container: str, name: str, networks: tuple[str, str, str]
) -> None:
    inner, _, subnet = networks
    start(name, container, "--network", inner, "--ip", f"{subnet}.50")
    before = inspected(name)
    run("kill", name)
    start(f"{name}-other", container, "--network", inner, "--ip", f"{subnet}.50")
    done = anew(name)
    assert (done.status, inspected(name)["Id"]) == (1, before["Id"])
    assert "the old container was put back, and does not start: " in done.stderr
    assert listed(name) == [f"{name}-other", name] or listed(name) == [name, f"{name}-other"]


def test_the_network_of_another_container(container: str, name: str) -> None:
    other = f"{name}-other"
    start(other, container, "--network", "none")
    start(name, container, "--network", f"container:{other}")
    done = anew(name)
    assert done.status == 0, done
    assert inspected(name)["HostConfig"]["NetworkMode"] == f"container:{inspected(other)['Id']}"
    assert inspected(name)["State"]["Running"]
    before = inspected(other)["State"]["StartedAt"]
    refused = anew(other)
    assert (refused.status, f"is also that of {name}" in refused.stderr) == (1, True)
    assert inspected(other)["State"]["StartedAt"] == before
    run("kill", other)
    before = inspected(name)
    refused = anew(name)
    assert (refused.status, "does not run: HostConfig.NetworkMode" in refused.stderr) == (1, True), refused
    assert (inspected(name)["Id"], inspected(name)["State"]["Running"]) == (before["Id"], True)


def test_what_cannot_be_restored_is_named_before_anything_is_touched(
    container: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a docker that forgets the size of shared memory when it creates."""
    real = shutil.which("docker")
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\n[ "$1" != create ] || {{ shift; exec {real} create $(echo "$@" | sed "s/--shm-size [0-9]*//"); }}\n'
        f'exec {real} "$@"\n'
    )
    (tmp_path / "docker").chmod(0o755)
    run("run", "-d", "--network", "host", "--shm-size", "32m", "--name", name, container, "/bin/sleep", "1000")
    before = inspected(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = anew(name)
    assert (done.status, "HostConfig.ShmSize" in done.stderr, "was not touched" in done.stderr) == (1, True, True)
    after = inspected(name)
    assert (after["Id"], after["State"]) == (before["Id"], before["State"])
    assert listed(name) == [name]


def test_an_attempt_that_was_cut_short_is_undone(container: str, name: str) -> None:
    start(name, container, "--network", "host")
    before = inspected(name)
    run("create", "--name", f"{name}.defib-new", container, "sleep", "1")
    run("stop", name)
    run("rename", name, f"{name}.defib-old")
    done = anew(name)
    assert done.status == 0, done
    assert (differences(before, inspected(name)), listed(name)) == ([], [name])


def test_the_beginning_of_an_identifier_is_not_a_name(container: str) -> None:
    before = inspected(container)
    with pytest.raises(TargetNotFoundError, match=f"there is no container {before['Id'][:6]} on the host"):
        anew(before["Id"][:6])
    after = inspected(container)
    assert (after["Id"], after["Name"], after["State"]) == (before["Id"], before["Name"], before["State"])
