"""A fleet in which three things are wrong, for trying the console: 30 services on 6 hosts, four of them with GPUs.

A gateway is in front of a model API whose rate one client uses up.

`python -m tests.prepared_fleet` starts it and says where its console is, but not what is wrong.
"""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defib.demo import sshd
from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import Stack, reserve_ports
from defib.output import print_text
from tests.gpu import CARD, write_nvidia_smi
from tests.integration.conftest import start_supervisord
from tests.integration.test_access import write_users
from tests.prepared_gateway import PreparedGateway
from tests.support import eventually

PROGRAM = Path(__file__).with_name("prepared_program.py")
OFTEN = {"every": "2s", "retry_every": "1s", "timeout": "10s"}


@dataclass(frozen=True)
class Prepared:
    """A service: what it is, where it runs, and what it needs."""

    title: str
    host: str
    provider: str
    category: str
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None


HOSTS: Mapping[str, tuple[str, int]] = {  # group and number of GPUs
    "gpu-01": ("inference", 4), "gpu-02": ("inference", 4), "gpu-03": ("inference", 2), "media-01": ("media", 1),
    "web-01": ("web", 0), "app-01": ("agents", 0),
}  # fmt: skip
APPROVED = {"on_failure": "restart", "remediation": {"steps": [{"restart": {"approve": True}}]}}
SERVICES: Mapping[str, Prepared] = {
    "portal": Prepared("Company portal", "web-01", "nginx", "web", ("search", "login"), {"slow_after": "500ms"}),
    "wiki": Prepared("Wiki", "web-01", "nginx", "web", ("login",)),
    "login": Prepared("Login", "web-01", "keycloak", "web", (), {"on_failure": "restart"}),
    "search": Prepared("Search", "app-01", "opensearch", "web", ("embed-1",)),
    "files": Prepared("File exchange", "web-01", "nginx", "web"),
    "chat-1": Prepared("Chat model 1", "gpu-01", "vllm", "llm", (), {"on_failure": "restart"}),
    "chat-2": Prepared("Chat model 2", "gpu-01", "vllm", "llm", (), {"on_failure": "restart"}),
    "code": Prepared("Code model", "gpu-02", "vllm", "llm", (), {"on_failure": "restart"}),
    "embed-1": Prepared("Embeddings 1", "gpu-03", "vllm", "embedding"),
    "embed-2": Prepared("Embeddings 2", "gpu-03", "vllm", "embedding"),
    "rerank": Prepared("Reranking", "gpu-03", "vllm", "embedding"),
    "mineru-1": Prepared("PDF extraction 1", "gpu-02", "mineru", "ocr", (), APPROVED),
    "mineru-2": Prepared("PDF extraction 2", "gpu-02", "mineru", "ocr", (), APPROVED),
    "speech": Prepared("Speech recognition", "gpu-02", "whisper", "audio"),
    **{f"live-{n}": Prepared(f"Live channel {n}", "media-01", "transcoder", "video") for n in range(1, 6)},
    **{f"agent-{n:02}": Prepared(f"Agent {n}", "app-01", "agent", "agent", ("chat-1",)) for n in range(1, 12)},
}


class PreparedFleet:
    """The fleet; each host has a supervisor that runs its services."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        self.stack = Stack(launcher, folder)
        self.feishu = FeishuSimulator()
        self.gateway = PreparedGateway(self.stack, folder)
        self.ports = dict(zip(SERVICES, reserve_ports(len(SERVICES)), strict=True))

    async def start(self) -> None:
        await self.feishu.start()
        hosts = {name: await self._start_host(name) for name in HOSTS}
        users = write_users(self.folder, {role: role for role in ("viewer", "operator", "admin")})
        self.stack.options = {"remediator": ["--web.config.file", str(users)]}
        self.stack.configuration(
            {
                "hosts": hosts,
                "services": {name: self._service(name, each) for name, each in SERVICES.items()},
                "remediation": {"hold": "5s"},
                "gateway": self.gateway.configuration,
                "notify": {
                    "language": "en",
                    "channels": {"oncall": {"feishu": {"webhook": self.feishu.webhook, "secret": SECRET}}},
                    "routes": [{"channels": ["oncall"]}],
                },
            }
        )
        await self.stack.start()
        await self.gateway.start()
        for name in SERVICES:
            await eventually(lambda name=name: self.is_up(name))  # type: ignore[misc] # mypy cannot infer the lambda

    async def stop(self) -> None:
        await self.gateway.stop()
        await self.feishu.stop()
        await self.stack.client.aclose()

    async def break_it(self) -> None:
        """Let a service hang that another one needs, another one crash that needs approval, and stop a third one."""
        await self._tell("app-01", "signal", "STOP", "search")
        await self._tell("gpu-02", "signal", "KILL", "mineru-2")
        url = f"{self.stack.url('remediator')}/api/v1/services/live-3/stop"
        reason = {"reason": "new encoder settings, back at 7:00", "overrule": []}
        stopped = await self.stack.client.post(url, json=reason, headers={"X-Defib-User": "night-shift"})
        assert stopped.is_success, stopped.text

    async def is_up(self, name: str) -> bool:
        """Return whether the exporter sees a service up, and quickly."""
        seen = await self.stack.get("exporter", f"/api/v1/services/{name}")
        return bool(seen and seen["up"] and seen["last"]["duration_seconds"] < 1.0)

    async def _start_host(self, name: str) -> dict[str, Any]:
        group, gpus = HOSTS[name]
        tools = self.folder / f"tools-{name}"
        tools.mkdir()
        if gpus:
            write_nvidia_smi(tools / "nvidia-smi", [_card(index, name) for index in range(gpus)])
        path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        (port,) = reserve_ports(1)
        known = await sshd.start(self.launcher, self.folder / f"sshd-{name}", port, {"PATH": path})
        folder = self.folder / name
        folder.mkdir()
        programs = "".join(self._program(each) for each, service in SERVICES.items() if service.host == name)
        await start_supervisord(self.launcher, folder, programs)
        collect = {"system": "15s", "supervisor": {"every": "15s", "configs": [str(folder / "supervisord.conf")]}}
        return {
            "address": "127.0.0.1",
            "group": group,
            "ssh": _login(known),
            "collect": {**collect, **({"gpu": "15s"} if gpus else {})},
        }

    def _program(self, name: str) -> str:
        needed = " ".join(f"http://127.0.0.1:{self.ports[each]}/" for each in SERVICES[name].needs)
        return (
            f"[program:{name}]\ncommand={sys.executable} -S -E {PROGRAM} {name} {self.ports[name]} {needed}\n"
            "startsecs=0\nstopwaitsecs=2\nautorestart=false\nredirect_stderr=true\n"
            f"stdout_logfile={self.folder / SERVICES[name].host / name}.log\n"
        )

    def _service(self, name: str, prepared: Prepared) -> dict[str, Any]:
        settings = dict(prepared.settings or {})
        probe = {**OFTEN, "http": {"url": f"http://127.0.0.1:{self.ports[name]}/"}}
        if "slow_after" in settings:
            probe["slow_after"] = settings.pop("slow_after")
        config = self.folder / prepared.host / "supervisord.conf"
        return {
            "name": prepared.title, "host": prepared.host, "provider": prepared.provider, "category": prepared.category,
            "depends_on": list(prepared.needs), "probe": probe,
            "control": {"supervisor": {"program": name, "config": str(config)}, "start_within": "20s"},
            **settings,
        }  # fmt: skip

    async def _tell(self, host: str, *command: str) -> None:
        """Have a host's supervisor do something."""
        argv = [f"{Path(sys.executable).parent}/supervisorctl", "-c", str(self.folder / host / "supervisord.conf")]
        process = await asyncio.create_subprocess_exec(*argv, *command, stdout=asyncio.subprocess.DEVNULL)
        assert await process.wait() == 0, command


def _login(known: Sshd) -> dict[str, Any]:
    return {
        "user": known.user, "port": known.port, "key_file": str(known.key_file), "known_hosts": str(known.known_hosts),
    }  # fmt: skip


def _card(index: int, host: str) -> dict[str, str]:
    use = {"gpu-01": ("97", "78000"), "gpu-02": ("61", "52000")}.get(host, ("34", "21000"))
    return {
        **CARD, "index": str(index), "uuid": f"GPU-{host}-{index}", "pci.bus_id": f"00000000:0{index}:00.0",
        "utilization.gpu": use[0], "memory.used": use[1], "memory.free": str(81_320 - int(use[1])),
    }  # fmt: skip


async def _main(_arguments: Sequence[str]) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    launcher = await Launcher.begin()
    folder = Path(tempfile.mkdtemp(prefix="defib-fleet-"))
    await launcher.remove_folder_at_end(folder)
    folder.chmod(0o711)
    fleet = PreparedFleet(launcher, folder)
    try:
        await fleet.start()
        await fleet.break_it()
        print_text(f"console: {fleet.stack.url('remediator')}/ (users viewer, operator, admin; passwords as the names)")
        print_text(f"chat: {fleet.feishu.url}/")
        print_text(f"files: {folder}")
        await ended.wait()
    finally:
        await fleet.stop()
        await launcher.end()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
