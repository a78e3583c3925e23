"""The whole loop with real Prometheus, Alertmanager, sshd and docker."""

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from defib.demo import service, sshd
from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.launcher import Launcher
from defib.demo.stack import Stack, reserve_ports
from tests.support import eventually

pytestmark = [
    pytest.mark.needs("dockerd", "prometheus", "prometheus-alertmanager", "sshd", "busybox"),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("docker"),
]


class World:
    """A container, everything that watches it, and those who are told."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        self.stack = Stack(launcher, folder)
        self.feishu = FeishuSimulator()
        self.container = f"defib-test-{secrets.token_hex(4)}"

    async def start(self, on_failure: str, hold: str = "2s") -> None:
        port, ssh = reserve_ports(2)
        await self.launcher.remove_docker_at_end("image", self.container)
        await self.launcher.remove_docker_at_end("container", self.container)
        httpd = ["/bin/httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", "/www"]
        await service.run_container(self.container, self.container, httpd)
        environment = {"PATH": os.environ["PATH"], "DOCKER_HOST": os.environ["DOCKER_HOST"]}
        host = await sshd.start(self.launcher, self.folder / "sshd", ssh, environment)
        self.stack.configuration(
            {
                "hosts": {"h": {"address": "127.0.0.1", "ssh": {
                    "user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts),
                }}},
                "services": {"web": {
                    "host": "h",
                    "probe": {"every": "500ms", "timeout": "2s", "http": {"url": f"http://127.0.0.1:{port}/", "expect": {"body_matches": "heart"}}},
                    "control": {"docker": {"container": self.container}, "timeout": "30s", "start_within": "15s"},
                    "on_failure": on_failure,
                }},
                "remediation": {"hold": hold, "backoff": {"first": "20s"}},
                "notify": {
                    "language": "en",
                    "channels": {"ops": {"feishu": {"webhook": await self.feishu.start(), "secret": SECRET}}},
                    "routes": [{"channels": ["ops"]}],
                },
            }
        )  # fmt: skip
        await self.stack.start()
        await self.stack.wait_for("the service to be seen up", self._is_up)

    async def _is_up(self) -> bool:
        found = await self.stack.get("prometheus", '/api/v1/query?query=service_up{service="web"}==1')
        return bool(found and found["data"]["result"])

    def started_at(self) -> str:
        argv = [
            "docker",
            "inspect",
            "--format",
            "{{.State.StartedAt}} {{.State.Running}} {{.RestartCount}}",
            self.container,
        ]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    def identifier(self) -> str:
        argv = ["docker", "inspect", "--format", "{{.Id}}", self.container]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    def kill(self) -> None:
        subprocess.run(["docker", "kill", self.container], capture_output=True, check=True)

    async def incident(self) -> dict[str, Any]:
        return dict(await self.stack.get("remediator", "/api/v1/incidents/1") or {})

    async def until(self, event: str, within: float = 200.0, **detail: str) -> None:
        """Wait for an event of the first incident with these details."""

        async def is_there() -> bool:
            entries = (await self.incident()).get("timeline", [])
            return any(entry["event"] == event and detail.items() <= entry["detail"].items() for entry in entries)

        await eventually(is_there, within)

    def titles(self) -> list[str]:
        return [card.title.split(" (")[0] for card in self.feishu.received]


@pytest.fixture
async def launcher() -> AsyncIterator[Launcher]:
    """The launcher of the demo, which starts every program as it is."""
    made = await Launcher.begin()
    yield made
    await made.end()


@pytest.fixture
async def world(launcher: Launcher, tmp_path: Path) -> AsyncIterator[World]:
    made = World(launcher, tmp_path)
    yield made
    await made.feishu.stop()
    await made.stack.client.aclose()


async def test_a_container_that_dies_is_restarted_once_and_people_are_told(world: World) -> None:
    await world.start("restart")
    before = world.started_at()
    world.kill()
    await world.until("incident_closed", state="recovered")
    incident = await world.incident()
    assert (incident["state"], incident["recovered_by"]) == ("recovered", "defib")
    (action,) = incident["actions"]
    assert (action["state"], action["exit_status"], action["output"]) == ("succeeded", 0, world.identifier())
    after = world.started_at()
    assert after != before
    assert after.split()[1:] == ["true", "0"]

    async def told() -> bool:
        return len(world.feishu.received) == 3

    await eventually(told)
    assert world.titles() == ["Service down: web", "Restarted, being watched: web", "Recovered: web"]
    assert [card.colour for card in world.feishu.received] == ["red", "orange", "green"]
    assert not world.feishu.refused
    assert [entry["event"] for entry in incident["timeline"] if entry["event"] not in ("alert_resolved", "service_up", "action_ended")
        and entry["detail"].get("verb") not in ("wait", "refuse")
    ] == [
        "incident_opened", "alert_firing", "decision", "action_started", "command_ended", "incident_closed",
    ]  # fmt: skip
    report = await world.stack.get("remediator", "/api/v1/report?since=1h")
    total = report["total"]
    assert (report["missing"], total["services"], total["observed"], total["incidents"]) == ([], 1, 1, 1)
    assert (total["recovered_by"]["defib"], total["restarts_helped"], total["open"]) == (1, 1, 0)
    assert 0 < total["availability"] < 1
    (of_web,) = report["services"]
    assert 0 < of_web["availability"] < 1
    down = of_web["down_seconds"]  # None as long as it was observed for less than a step
    assert down is None or 0 < down < of_web["observed_seconds"]


async def test_a_service_that_is_only_to_be_told_of_is_not_restarted(world: World) -> None:
    await world.start("notify")
    before = world.started_at().split()[0]
    world.kill()
    await world.until("decision", verb="refuse")
    incident = await world.incident()
    assert (incident["reason"], incident["actions"]) == ("notify-only", [])
    assert world.started_at().split()[:2] == [before, "false"]
    # A person brings it back.
    subprocess.run(["docker", "start", world.container], capture_output=True, check=True)
    await world.until("incident_closed", state="recovered")
    assert (await world.incident())["recovered_by"] == "self"

    async def told() -> bool:
        return world.titles() == ["Service down: web", "Recovered: web"]

    await eventually(told)


async def test_killed_between_the_command_and_its_record_it_restarts_nothing_twice(world: World) -> None:
    """Docker's answer is held up, so that the container is up again while the remediator does not know it yet."""
    slow = world.folder / "slow"
    slow.mkdir()
    docker = subprocess.run(["which", "docker"], capture_output=True, text=True, check=True).stdout.strip()
    (slow / "docker").write_text(f'#!/bin/sh\n{docker} "$@"\ntouch {slow}/done\nsleep 3\n')
    (slow / "docker").chmod(0o755)
    path, os.environ["PATH"] = os.environ["PATH"], f"{slow}:{os.environ['PATH']}"
    try:
        await world.start("restart")
    finally:
        os.environ["PATH"] = path
    world.kill()

    async def restarted() -> bool:
        return (slow / "done").exists() and "true" in world.started_at()

    await eventually(restarted, 120)
    after = world.started_at()
    await world.launcher.kill(world.stack.pids["remediator"], signal.SIGKILL)
    await world.stack.start_program("remediator")
    await world.until("incident_closed", state="recovered")
    incident = await world.incident()
    (action,) = incident["actions"]
    assert (action["command"], action["state"]) == ("unknown", "unknown")
    assert "interrupted" in action["why"]
    assert world.started_at() == after

    async def told() -> bool:
        return world.titles() == ["Service down: web", "Restarted, being watched: web", "Recovered: web"]

    await eventually(told)


async def test_what_alertmanager_has_silenced_is_left_alone_until_it_has_not(world: World) -> None:
    await world.start("restart")
    held = {"scope": "service", "name": "web", "reason": "to have the time", "for": "1h"}
    begun = await world.stack.client.post(f"{world.stack.url('remediator')}/api/v1/maintenance", json=held)
    world.kill()
    await world.until("decision", verb="wait")
    matcher = {"name": "service", "value": "web", "isRegex": False}
    now = datetime.now(UTC)
    silence = {
        "matchers": [matcher], "startsAt": now.isoformat(), "endsAt": (now + timedelta(hours=1)).isoformat(),
        "createdBy": "ann", "comment": "known",
    }  # fmt: skip
    url = f"{world.stack.url('alertmanager')}/api/v2"
    made = (await world.stack.client.post(f"{url}/silences", json=silence)).json()["silenceID"]
    ended = await world.stack.client.delete(f"{world.stack.url('remediator')}/api/v1/maintenance/{begun.json()['id']}")
    assert ended.status_code == 200

    async def silenced() -> bool:
        return bool((await world.incident()).get("reason") == "silenced")

    await eventually(silenced, 120)
    explained = await world.stack.get("remediator", "/api/v1/services/web/explain")
    shut = [(gate["gate"], gate["detail"]) for gate in explained["gates"] if not gate["open"]]
    assert shut == [("silenced", f"silenced by {made}")]
    assert world.started_at().split()[1] == "false"
    await world.stack.client.delete(f"{url}/silence/{made}")
    await world.until("incident_closed", state="recovered")
    assert world.started_at().split()[1] == "true"


async def test_replay_says_what_would_have_been_done(world: World) -> None:
    await world.start("restart")
    config = world.folder / "config" / "defib.yaml"
    config.write_text(config.read_text().replace("remediation:\n", "remediation:\n  automatic: false\n"))
    await world.stack.client.post(f"{world.stack.url('remediator')}/-/reload")
    world.kill()
    await world.until("decision", verb="wait")
    argv = [sys.executable, "-m", "defib", "replay", "--since", "5m", "--config", str(world.folder / "config")]
    told = ""

    async def replayed() -> bool:
        nonlocal told
        told = (await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=True)).stdout
        return "  web  would restart (attempt 1)" in told

    await eventually(replayed)
    assert told.splitlines()[-1].startswith("1 actions: web 1")
    assert world.started_at().split()[1] == "false"
