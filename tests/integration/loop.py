"""A stack without Prometheus, in which a service is up if a file exists, and a restart writes a line to a log."""

import contextlib
import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import yaml

from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import Stack
from tests.support import NO_TLS, WEBHOOK_TOKEN, eventually

TOKEN = {"Authorization": f"Bearer {WEBHOOK_TOKEN}"}


class Loop:
    """The exporter and the remediator; the tests fire alerts in place of Prometheus and Alertmanager."""

    def __init__(self, launcher: Launcher, folder: Path, host: Sshd) -> None:
        self.launcher, self.folder, self.host = launcher, folder, host
        self.stack = Stack(launcher, folder, webhook_token=WEBHOOK_TOKEN)
        self.feishu = FeishuSimulator()

    def service(self, name: str, restart: str = "touch {alive}", **more: Any) -> dict[str, Any]:
        alive, log = self.folder / f"{name}.alive", self.folder / "restarts"
        alive.touch()
        script = f"echo {name} >> {log}; " + restart.format(alive=alive)
        probe = {
            "every": "200ms",
            "retry_every": "200ms",
            "timeout": "10s",
            "command": {"run": ["test", "-e", str(alive)]},
        }
        control = {"command": {"restart": ["sh", "-c", script]}, "timeout": "60s", "start_within": "6s"}
        return {"host": "h", "probe": probe, "control": control, "on_failure": "restart", **more}

    async def start(
        self,
        services: dict[str, Any],
        *,
        exporter: dict[str, Any] | None = None,
        remediator: dict[str, Any] | None = None,
        notify: dict[str, Any] | None = None,
        collect: dict[str, Any] | None = None,
        access: dict[str, Any] | None = None,
        runbooks: dict[str, Any] | None = None,
        gateway: dict[str, Any] | None = None,
        **remediation: Any,
    ) -> None:
        ssh = {
            "user": self.host.user, "port": self.host.port,
            "key_file": str(self.host.key_file), "known_hosts": str(self.host.known_hosts),
        }  # fmt: skip
        hosts = {
            "h": {"address": "127.0.0.1", "ssh": ssh, "collect": collect or {}},
            "uncontrolled": {"address": "127.0.0.1", "ssh": ssh, "control_ssh": {"port": 1}},
            "unreachable": {"address": "127.0.0.1", "ssh": {"port": 1, "user": "u", "known_hosts": "/dev/null"}},
            "here": {"address": "127.0.0.1", "shell": "local"},
        }  # fmt: skip
        if not hasattr(self.feishu, "url"):
            await self.feishu.start()
        webhook = self.feishu.webhook
        self.stack.configuration(
            {
                "hosts": hosts,
                "services": services,
                "runbooks": runbooks or {},
                "access": access or {},
                "gateway": gateway or {},
                "remediation": {"hold": "500ms", "backoff": {"first": "500ms", "factor": 1}, **remediation},
                "notify": {
                    "language": "en",
                    "channels": {"ops": {"feishu": {"webhook": webhook, "secret": SECRET}}},
                    "routes": [{"channels": ["ops"]}],
                    **(notify or {}),
                },
            }
        )
        path = self.folder / "config" / "defib.yaml"
        written = yaml.safe_load(path.read_text())
        del written["remediator"]["alertmanager_url"]  # there is none
        written["exporter"] |= exporter or {}
        written["remediator"] |= remediator or {}
        path.write_text(yaml.safe_dump(written, sort_keys=False))
        beside = Path(written["remediator"]["database"].removeprefix("sqlite:///")).parent / "token"
        if beside != self.stack.token_file:
            shutil.copy2(self.stack.token_file, beside)
        await self.stack.start_program("exporter")
        await self.stack.start_program("remediator")
        for name in (each for each, service in services.items() if "heartbeat" not in service["probe"]):
            await eventually(lambda name=name: self._decided(name))  # type: ignore[misc] # mypy cannot infer the lambda

    async def _decided(self, name: str) -> bool:
        return (await self.stack.get("exporter", f"/api/v1/services/{name}") or {}).get("up") is not None

    async def kill(self, name: str) -> None:
        (self.folder / f"{name}.alive").unlink()

        async def down() -> bool:
            return (await self.stack.get("exporter", f"/api/v1/services/{name}") or {}).get("up") is False

        await eventually(down)

    async def post(self, body: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"{self.stack.url('remediator')}/webhook/alertmanager"
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=120) as client:
            return await client.post(url, content=content, headers=TOKEN if headers is None else headers)

    async def fire(
        self, service: str, name: str = "ServiceDown", status: str = "firing", starts: str = "1"
    ) -> httpx.Response:
        return await self.post(delivery(alert(service, name, status, starts)))

    async def incident(self, number: int = 1) -> dict[str, Any]:
        return dict(await self.stack.get("remediator", f"/api/v1/incidents/{number}") or {})

    async def until(self, state: str, number: int = 1) -> dict[str, Any]:
        async def reached() -> dict[str, Any] | None:
            incident = await self.incident(number)
            return incident if incident.get("state") == state else None

        return (await eventually(reached)) or {}

    async def until_event(self, event: str, **detail: Any) -> dict[str, Any]:
        """Wait for an event of the first incident with these details, and return it."""

        async def find() -> dict[str, Any] | None:
            for entry in (await self.incident()).get("timeline", []):
                if entry["event"] == event and detail.items() <= entry["detail"].items():
                    return dict(entry)
            return None

        return (await eventually(find)) or {}

    async def until_decision(self, verb: str, reason: str | None = None) -> dict[str, Any]:
        return await self.until_event("decision", verb=verb, **({} if reason is None else {"reason": reason}))

    async def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return await self.stack.client.request(
            method, f"{self.stack.url('remediator')}{path}", json=body, headers={"X-Defib-User": "ann"}, timeout=120
        )

    async def restart_remediator(self, number: signal.Signals = signal.SIGKILL) -> None:
        await self.launcher.kill(self.stack.pids["remediator"], number)
        await self.stack.start_program("remediator")

    async def until_cards(self, *titles: str, killed: bool = False) -> None:
        """Wait until exactly these cards were received.

        If the remediator was `killed` while it sent one, that one may have been sent twice.
        """

        def received() -> list[str]:
            found = [card.title.split(" (")[0] for card in self.feishu.received]
            return [title for title, _ in itertools.groupby(found)] if killed else found

        async def are_received() -> bool:
            return received() == list(titles)

        try:
            await eventually(are_received)
        except AssertionError:
            assert received() == list(titles)

    async def until_card(self, title: str) -> None:
        """Wait until a card with this title was received."""

        async def is_received() -> bool:
            return any(card.title == title for card in self.feishu.received)

        try:
            await eventually(is_received)
        except AssertionError:
            assert title in [card.title for card in self.feishu.received]

    async def begun(self) -> bool:
        return bool(self.restarts())

    def restarts(self) -> list[str]:
        log = self.folder / "restarts"
        return log.read_text().split() if log.exists() else []


def alert(service: str, name: str = "ServiceDown", status: str = "firing", starts: str = "1") -> dict[str, Any]:
    return {
        "status": status,
        "labels": {"alertname": name, "service": service, "severity": "critical"},
        "annotations": {"summary": f"{service} is down"},
        "startsAt": f"2026-11-22T03:39:0{starts}Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "fingerprint": f"{name}-{service}"[:200],
    }


def host_alert(name: str = "HostDiskFull", status: str = "firing", starts: str = "1", **labels: str) -> dict[str, Any]:
    """Return an alert of the host `h`, without a service."""
    made = alert("", name, status, starts)
    shown = {"alertname": name, "host": "h", "severity": "critical", **labels}
    fingerprint = "-".join(shown.values())
    return made | {"labels": shown, "annotations": {"summary": "a disk of h is full"}, "fingerprint": fingerprint}


def delivery(*alerts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": "4", "status": "firing", "receiver": "defib", "alerts": list(alerts), **more}


async def fill_disk(loop: Loop, disk: Path) -> None:
    """Fill a disk, and the pages that the journal of the database on it has already."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    for number in range(1000):
        text = "x" * 20_000
        one = alert("", "Other", starts=str(number)) | {"annotations": {"text": text}, "fingerprint": str(number)}
        if (await loop.post(delivery(one))).status_code == 503:
            return
    raise AssertionError("the disk is not full")
