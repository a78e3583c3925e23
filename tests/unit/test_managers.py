"""What docker, podman, systemd and supervisor of several versions print."""

import os
import subprocess
from pathlib import Path

import pytest

from fleet.managers import docker, supervisor, systemd

ID = "ab12" * 16
BY_DOCKER = f"/web|running|healthy|0|2026-11-28T20:00:00.5Z|3|nginx:1.27|always|{ID}"
BY_PODMAN = f"web|running||0|2026-11-28 20:00:00.5 +0000 UTC|3|nginx:1.27|always|{ID}"


@pytest.mark.parametrize(
    ("output", "state", "health", "restarts"),
    [
        (BY_DOCKER, "running", "healthy", 3),
        (BY_PODMAN, "running", "", 3),
        ("/web\trunning\thealthy\t0\t2026-11-28T20:00:00.5Z\t3\tnginx:1.27", "running", "healthy", 3),
        (f"listed|{ID}|web|Up 2 hours ago|nginx:1.27|Up 2 hours ago (healthy)", "running", "healthy", 0),
        (f"listed|{ID}|web|running|nginx:1.27|Up 2 hours (starting)", "running", "starting", 0),
        (f"listed|{ID}|web|Exited (3) 2 hours ago|nginx:1.27|Exited (3) 2 hours ago", "exited", "", 0),
        (f"listed\t{ID}\tweb,db/web\trunning\tnginx:1.27\tUp 2 hours", "running", "", 0),
    ],
)
def test_containers_of_docker_and_podman(output: str, state: str, health: str, restarts: int) -> None:
    container = docker.parse_containers(f"a banner\n{output}\n")["web"]
    assert (container.state, container.health, container.restarts) == (state, health, restarts)
    assert container.image == "nginx:1.27"
    assert docker.parse_time(container.started) == (1795896000.5 if container.started else None)


def test_details_of_podman() -> None:
    zero = "0001-01-01 00:00:00 +0000 UTC"
    output = f"running  77 0 false 2026-11-28 20:00:00.123456789 +0000 UTC {zero} - 2 {ID} web always\n1795896001\n"
    inspection = docker.parse_inspection(output)
    assert inspection is not None
    details = inspection.details
    assert (details.state, details.health, details.pid, details.name, details.policy) == (
        "running",
        "",
        77,
        "web",
        "always",
    )
    assert docker.parse_time(details.started) == pytest.approx(1795896000.123456)
    assert docker.parse_time(details.finished) is None


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        ("microseconds|2500000|5000|1000|max", docker.ContainerUsage(2.5, 4000, None)),
        ("microseconds|2500000|5000|6000|8192", docker.ContainerUsage(2.5, 0, 8192)),
        ("nanoseconds|1500000000|5000||9223372036854771712", docker.ContainerUsage(1.5, 5000, None)),
        ("microseconds||||", docker.ContainerUsage(None, None, None)),
        ("hours|1|2|3|4", None),
        ("microseconds|1|2", None),
    ],
)
def test_usage(used: str, expected: docker.ContainerUsage | None) -> None:
    assert docker.parse_usage(f"{BY_DOCKER}\nused|{ID}|{used}\nused|other|{used}\n").get("web") == expected


def test_podman_3_is_asked_for_its_own_name_of_the_health(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text(
        "#!/bin/sh\n"
        f"case \"$*\" in ps*) echo 'listed|{ID}|web|Up 2 hours ago|nginx:1.27|Up 2 hours ago (healthy)' ;;\n"
        f"*State.Healthcheck.Status*) echo '{BY_DOCKER}' ;;\n"
        '*) echo \'Error: template: inspect:1:40: executing "inspect" at <.State.Health>:'
        " can'\\''t evaluate field Health in type *define.InspectContainerState' >&2; exit 125 ;; esac\n"
    )
    (tmp_path / "docker").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", docker.SECTION.script], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert docker.parse_containers(done.stdout)["web"].policy == "always"


@pytest.mark.parametrize(
    ("active", "sub", "is_active"),
    [
        ("active", "running", True),
        ("active", "exited", True),
        ("reloading", "reload", True),
        ("refreshing", "refresh", True),
        ("yet-to-come", "running", True),
        ("yet-to-come", "dead", False),
        ("inactive", "dead", False),
        ("failed", "failed", False),
        ("activating", "auto-restart", False),
        ("deactivating", "stop-sigterm", False),
        ("maintenance", "cleaning", False),
        ("", "", False),
    ],
)
def test_states_of_units(active: str, sub: str, is_active: bool) -> None:
    output = f"unit: a.service\nLoadState=loaded\nActiveState={active}\nSubState={sub}\nResult=success\n"
    unit = systemd.parse_units(output)["a.service"]
    assert isinstance(unit, systemd.UnitStatus)
    assert unit.is_active is is_active


@pytest.mark.parametrize(
    ("output", "programs", "error"),
    [
        (
            "web:one   RUNNING   pid 12, uptime 1 day, 0:00:01\n",
            {"web:one": ("RUNNING", "pid 12, uptime 1 day, 0:00:01")},
            "",
        ),
        ("unix:///run/supervisor.sock no such file\n", {}, "unix:///run/supervisor.sock no such file"),
        ("unix:///run/supervisor.sock refused connection\nfailed: 4\n", {}, "unix:///run/supervisor.sock refused"),
        ("Server requires authentication\nUsername:\n", {}, "Server requires authentication"),
        (
            "error: <class 'socket.error'>, [Errno 13] Permission denied: file: socket.py line: 228\n",
            {},
            "error: <class",
        ),
        ("error: <class 'xmlrpclib.Fault'>, <Fault 6: 'SHUTDOWN_STATE'>: file: x line: 1\n", {}, "error: <class"),
        ("Sorry, supervisord responded but did not recognize the supervisor namespace commands\n", {}, "Sorry, "),
        ("", {}, ""),  # without programs
    ],
)
def test_supervisor_3_and_4(output: str, programs: dict[str, tuple[str, str]], error: str) -> None:
    status = supervisor.parse_supervisord_statuses(f"config: -\n{output}")["-"]
    assert status.programs == programs
    assert status.error.startswith(error)
    assert bool(status.error) is bool(error)


def test_usage_is_in_the_container_s_own_control_group(tmp_path: Path) -> None:
    """The second version of control groups; podman's have a group of conmon beside them, and one below."""
    for group, memory in (
        (f"libpod-{ID}.scope", 5000),
        (f"libpod-conmon-{ID}.scope", 1),
        (f"libpod-{'0' * 64}.scope", 1),
    ):
        folder = tmp_path / "machine.slice" / group
        (folder / "container").mkdir(parents=True)
        (folder / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
        (folder / "memory.current").write_text(f"{memory}\n")
        (folder / "memory.stat").write_text("anon 7\ninactive_file 1000\n")
        (folder / "memory.max").write_text("max\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    row = f"listed|{ID}|web|running|nginx:1.27|Up 2 hours"
    (tools / "docker").write_text(f"#!/bin/sh\ncase $1 in ps) echo '{row}' ;; *) echo '{BY_PODMAN}' ;; esac\n")
    (tools / "docker").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", docker.SECTION.script.replace("/sys/fs/cgroup", f"/sys/..{tmp_path}")],
        env={"PATH": f"{tools}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert docker.parse_usage(done.stdout) == {"web": docker.ContainerUsage(2.5, 4000, None)}
