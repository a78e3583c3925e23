"""`defib demo`: starts a service and everything that watches it, kills it, and shows how it comes back."""

import asyncio
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from defib.demo import service, sshd
from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.feishu_app import APP, CHAT, USER_OPEN_ID
from defib.demo.launcher import Launcher
from defib.demo.stack import Stack, reserve_ports

ROUND_WITHIN = 180.0
SERVICE = "web"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run(*, once: bool, as_json: bool) -> int:
    """Run the demo; 0 if the remediator restarted the service and it recovered."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - we are one
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    launcher = await Launcher.begin()
    feishu = FeishuSimulator()
    try:
        return await _show(launcher, feishu, once=once, as_json=as_json)
    except asyncio.CancelledError:
        return 128 + signal.SIGINT
    finally:
        for number in SIGNALS:  # it is being stopped; once is enough
            asyncio.get_running_loop().add_signal_handler(number, lambda: None)
        _say("stopping everything")
        await feishu.stop()
        await launcher.end()


async def _show(launcher: Launcher, feishu: FeishuSimulator, *, once: bool, as_json: bool) -> int:
    folder = Path(tempfile.mkdtemp(prefix="defib-demo-"))
    await launcher.remove_folder_at_end(folder)
    folder.chmod(0o711)
    stack = Stack(launcher, folder)
    _say(f"starting everything on loopback, in {folder}")
    web, ssh = reserve_ports(2)
    victim = await service.start(launcher, folder, web, f"defib-demo-{secrets.token_hex(4)}")
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    host = await sshd.start(launcher, folder / "sshd", ssh, {"PATH": path, **_docker_environment()})
    await feishu.start()
    feishu.apps.callback_url = f"{stack.url('remediator')}/webhook/feishu/chat"
    stack.configuration(_inventory(host, victim, web, feishu))
    await stack.start()
    await stack.wait_for("the service to be seen up", lambda: _is_up(stack))
    _say(f"the service is {victim.how} on http://127.0.0.1:{web}; now it is killed")
    story = _Story(stack, feishu, out=sys.stderr if as_json else sys.stdout)
    await victim.kill()
    well = await story.follow(within=ROUND_WITHIN)
    if as_json:
        print(json.dumps({"events": story.events}), flush=True)
    if not once:
        await _stay(stack, feishu, folder, web)
    await stack.client.aclose()
    return 0 if well else 1


def _docker_environment() -> Mapping[str, str]:
    return {name: os.environ[name] for name in ("DOCKER_HOST",) if name in os.environ}


def _inventory(host: sshd.Sshd, victim: service.DemoService, port: int, feishu: FeishuSimulator) -> Mapping[str, Any]:
    return {
        "hosts": {
            "demo": {
                "address": "127.0.0.1",
                "ssh": {
                    "user": host.user,
                    "port": host.port,
                    "key_file": str(host.key_file),
                    "known_hosts": str(host.known_hosts),
                },
            }
        },
        "services": {
            SERVICE: {
                "name": "Demo web page",
                "category": "web",
                "provider": "demo",
                "host": "demo",
                "probe": {
                    "every": "1s",
                    "retry_every": "500ms",
                    "timeout": "2s",
                    "http": {"url": f"http://127.0.0.1:{port}/", "expect": {"body_matches": "heart"}},
                },
                "control": {**victim.control, "timeout": "30s", "start_within": "20s"},
                "on_failure": "restart",
            }
        },
        "remediation": {"hold": "3s", "backoff": {"first": "5s"}},
        "notify": {
            "language": "en",
            "timezone": "UTC",
            "people": {"you": {"open_id": USER_OPEN_ID}},
            "channels": {
                "oncall": {"feishu": {"webhook": feishu.webhook, "secret": SECRET}},
                "chat": {"feishu_app": {**APP, "chat_id": CHAT, "url": feishu.url}},
            },
            # What is of no service is told in one of the two chats.
            "routes": [
                {"match": {"service": SERVICE}, "channels": ["chat"], "continue": True},
                {"channels": ["oncall"]},
            ],
        },
    }


async def _is_up(stack: Stack) -> bool:
    seen = await stack.get("exporter", f"/api/v1/services/{SERVICE}")
    found = await stack.get("prometheus", f'/api/v1/query?query=service_up{{service="{SERVICE}"}}')
    return bool(seen and seen["up"] and found and found["data"]["result"])


async def _stay(stack: Stack, feishu: FeishuSimulator, folder: Path, port: int) -> None:
    _say("everything stays up until Ctrl-C:")
    for name, url in (
        ("service", f"http://127.0.0.1:{port}/"),
        ("exporter", f"{stack.url('exporter')}/metrics"),
        ("prometheus", f"{stack.url('prometheus')}/graph"),
        ("alertmanager", stack.url("alertmanager")),
        ("console", f"{stack.url('remediator')}/"),
        ("feishu", f"{feishu.url}/ (its buttons work)"),
        ("configuration", str(folder / "config")),
        ("API token", str(stack.token_file)),
        ("ask it", f"{sys.argv[0]} incidents 1 --config {folder / 'config'}"),
    ):
        _say(f"  {name:<14}{url}")
    await asyncio.Event().wait()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Story:
    """What happened, by each part's own record, in seconds since the kill."""

    def __init__(self, stack: Stack, feishu: FeishuSimulator, out: Any) -> None:
        self._stack, self._feishu, self._out = stack, feishu, out
        self._killed = time.time()
        self._told: set[tuple[str, Any]] = set()
        self.events: list[dict[str, Any]] = []
        self._event("killed", self._killed, SERVICE)

    async def follow(self, within: float) -> bool:
        """Tell events until the incident is closed and told; True if the remediator brought the service back."""
        try:
            async with asyncio.timeout(within):
                while True:
                    await self._look()
                    done = await self._outcome()
                    if done is not None:
                        return done
                    await asyncio.sleep(0.1)
        except TimeoutError:
            print(f"the service was not brought back within {within:g} s", file=sys.stderr)
            return False
        finally:
            self.events.sort(key=lambda event: float(event["t"]))

    async def _outcome(self) -> bool | None:
        listed = await self._stack.get("remediator", "/api/v1/incidents")
        incidents = listed["incidents"] if listed else []
        if not incidents or incidents[0]["state"] == "open":
            return None
        # down, restarted, recovered: the last is sent after the incident was closed.
        if not any("Recovered" in each.title or "no recovery" in each.title for each in self._feishu.received):
            return None
        await self._look()
        return bool(incidents[0]["state"] == "recovered" and incidents[0]["recovered_by"] == "defib")

    async def _look(self) -> None:
        seen = await self._stack.get("exporter", f"/api/v1/services/{SERVICE}")
        if seen and seen["up"] is False:
            self._event("down", _unix(seen["since"]), seen["last"]["message"])
        alerts = await self._stack.get("prometheus", "/api/v1/alerts")
        for alert in alerts["data"]["alerts"] if alerts else []:
            if alert["labels"]["alertname"] == "ServiceDown" and alert["state"] == "firing":
                self._event("firing", _unix(alert["activeAt"]), "ServiceDown")
        incident = await self._stack.get("remediator", "/api/v1/incidents/1")
        if incident:
            self._look_at(incident)
        for number, card in enumerate(self._feishu.received):
            self._event("notice", card.at, card.title, key=number)

    def _look_at(self, incident: Mapping[str, Any]) -> None:
        for action in incident["actions"]:
            self._event("action", _unix(action["claimed_at"]), f"{action['kind']} over SSH", key=action["id"])
            if action["up_at"]:
                self._event("recovered", _unix(action["up_at"]), "the first successful probe", key=action["id"])
        for entry in incident["timeline"]:
            if entry["event"] == "resolved":
                self._event("resolved", _unix(entry["at"]), f"by {entry['detail']['by']}", key=entry["id"])

    def _event(self, event: str, at: float, what: str, key: Any = None) -> None:
        if (event, key) in self._told:
            return
        self._told.add((event, key))
        seconds = round(at - self._killed, 3)
        self.events.append({"t": seconds, "event": event, "what": what})
        print(f"{seconds:+8.2f} s  {event:<10} {what}", file=self._out, flush=True)


def _unix(text: str) -> float:
    # Prometheus writes nanoseconds, of which Python leaves out what is too fine.
    return datetime.fromisoformat(text).timestamp()
