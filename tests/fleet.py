"""A small fleet on this machine, on the shipped files as they are, and ways to break every part of it.

Services are pages of one server whose mode a test sets; hosts are sshds; cards are told of by a stand-in's nvidia-smi.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme
from aiohttp import web

from defib.demo import service, sshd
from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.feishu_app import APP_ID, APP_SECRET, CHAT
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import Stack, reserve_ports
from tests.gpu import CARD, write_nvidia_smi
from tests.hostile import Hostile
from tests.integration.conftest import start_supervisord
from tests.integration.long_connection import LongConnection
from tests.integration.peers import ModelServer

HOSTS = ("box", "gone", "mute", "swapped", "late", "odd", "strained")
PAGES = ("page", "flap", "burn", "slow", "stale", "alive", "asking")
MIB = 2**20
# A busy machine makes no service look down.
OFTEN = {"every": "2s", "retry_every": "2s", "timeout": "30s"}


def card(index: int, **more: str) -> dict[str, str]:
    """A card of the stand-in's nvidia-smi."""
    address = f"00000000:0{index}:00.0"
    return {**CARD, "index": str(index), "uuid": f"GPU-{index}", "pci.bus_id": address, **more}


class Pages:
    """One server on loopback; each service has a path, and does what its mode says."""

    def __init__(self) -> None:
        self.modes: dict[str, str] = dict.fromkeys((*PAGES, "channels"), "up")
        self.model = ModelServer()
        self._runner = web.AppRunner(web.Application(), access_log=None, shutdown_timeout=0.1)

    async def start(self) -> int:
        self._runner.app.router.add_get("/{service}", self._page)
        self._runner.app.router.add_post("/v1/chat/completions", self.model.answer)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    async def tls(self, context: ssl.SSLContext) -> int:
        """One more address, with TLS."""
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context).start()
        return int(self._runner.addresses[-1][1])

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _page(self, request: web.Request) -> web.Response:
        name = request.match_info["service"]
        mode = self.modes.get(name, "up")
        while self.modes.get(name) == "hang":
            await asyncio.sleep(0.2)
        if mode == "slow":
            await asyncio.sleep(0.6)
        if name == "channels":
            states = [
                {"name": "1", "state": "running"},
                {"name": "2", "state": "running" if mode == "up" else "stopped"},
            ]
            return web.json_response({"channels": states})
        return web.Response(status=500 if mode == "down" else 200, text="a heart beats")


class Fallback:
    """Receives what must not pass through the remediator."""

    def __init__(self) -> None:
        self.alerts: dict[tuple[str, str], dict[str, Any]] = {}
        self._runner = web.AppRunner(web.Application(), access_log=None, shutdown_timeout=0.1)

    async def start(self) -> str:
        self._runner.app.router.add_post("/", self._take)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        for alert in (await request.json())["alerts"]:
            self.alerts[alert["fingerprint"], alert["startsAt"]] = alert
        return web.Response()


class Certificate:
    """A served certificate that can be renewed."""

    def __init__(self, authority: trustme.CA, expires: timedelta) -> None:
        self._authority = authority
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.renew(expires)

    def renew(self, expires: timedelta) -> None:
        now = datetime.now(UTC)
        made = self._authority.issue_cert("127.0.0.1", not_before=now - timedelta(days=90), not_after=now + expires)
        made.configure_cert(self.context)


class Disk:
    """A filesystem of its own, which counts as a disk of the machine: its device is not called a loop."""

    def __init__(self, folder: Path) -> None:
        self.mountpoint = folder / "data"
        self._image, self._device = folder / "disk.img", folder / "disk"

    def mount(self) -> None:
        self.mountpoint.mkdir()
        with self._image.open("wb") as image:
            image.truncate(32 * MIB)
        _run("mkfs.ext4", "-q", "-N", "512", str(self._image))
        loop = Path(_run("losetup", "--find", "--show", str(self._image)))
        device = loop.stat().st_rdev
        _run("mknod", str(self._device), "b", str(os.major(device)), str(os.minor(device)))
        self._loop = loop
        _run("mount", "-t", "ext4", str(self._device), str(self.mountpoint))

    def fill(self) -> None:
        for index in range(480):
            (self.mountpoint / f"small-{index}").touch()
        with contextlib.suppress(OSError), (self.mountpoint / "large").open("wb") as large:
            large.write(bytes(30 * MIB))

    def empty(self) -> None:
        for path in self.mountpoint.glob("[sl]*-*"):
            path.unlink()
        (self.mountpoint / "large").unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.mountpoint], check=False, capture_output=True)
        if hasattr(self, "_loop"):
            subprocess.run(["losetup", "--detach", self._loop], check=False, capture_output=True)


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


class Fleet:
    """Everything, started; `stack` has its addresses, and `hostile` what lies, if anything does."""

    def __init__(
        self, launcher: Launcher, folder: Path, systemd: Path, *, hurried: bool = False, hostile: bool = False
    ) -> None:
        self.launcher, self.folder, self.systemd, self.hurried = launcher, folder, systemd, hurried
        self.pages, self.fallback = Pages(), Fallback()
        self.feishu, self.app, self.stuck = (
            FeishuSimulator(),
            FeishuSimulator(extra_routes=[LongConnection().add_routes]),
            FeishuSimulator(),
        )
        self.container = f"defib-fleet-{secrets.token_hex(4)}"
        self.tools, self.pinned = folder / "tools", folder / "pinned"
        self.disk = Disk(folder)
        self.hostile = Hostile(folder) if hostile else None
        self.hosts = (*HOSTS, "hostile") if hostile else HOSTS
        authority = trustme.CA()
        self.expiring = Certificate(authority, timedelta(days=3))
        self.expired = Certificate(authority, timedelta(days=300))
        self.sshds: dict[str, Sshd] = {}

    async def start(self) -> None:
        self.tools.mkdir()
        self.cards([card(index) for index in range(4)])
        self.kernel_log()
        self.clock(0)
        await asyncio.to_thread(self.disk.mount)
        await self.launcher.remove_docker_at_end("image", self.container)
        await self.launcher.remove_docker_at_end("container", self.container)
        programs = "[program:worker]\ncommand=/bin/sleep 100000\nstartsecs=0\n[program:api]\ncommand=/bin/sleep 100000\nstartsecs=0\n"
        self.supervisor = await start_supervisord(self.launcher, self.folder, programs)
        (web_port,) = reserve_ports(1)
        httpd = ["/bin/httpd", "-f", "-p", f"127.0.0.1:{web_port}", "-h", "/www"]
        await service.run_container(self.container, self.container, httpd)
        await self._start_hosts()
        self.pin_key()
        await self.feishu.start()
        self.app_port, self.stuck_port = reserve_ports(2)
        await self.app.start(self.app_port)
        pages = await self.pages.start()
        expiring, expired = await self.pages.tls(self.expiring.context), await self.pages.tls(self.expired.context)
        self.stack = Stack(self.launcher, self.folder, hurried=self.hurried, fallback=await self.fallback.start())
        written = {
            "hosts": {name: self._host(name) for name in self.hosts},
            "services": self._services(web_port, pages, expiring, expired),
            "notify": self._notify(),
            "remediation": {"hold": "10s"},
            "gateway": {"upstreams": {"nvidia": {"url": f"http://127.0.0.1:{pages}/v1"}}, "default": "nvidia"},
        }
        if self.hostile is not None:
            await self._add_hostile(self.hostile, written, f"http://127.0.0.1:{pages}")
        self.config = self.stack.configuration(written) / "defib.yaml"
        await self.stack.start_program("gateway")
        await self.stack.start()

    async def _add_hostile(self, hostile: Hostile, written: Mapping[str, Any], pages: str) -> None:
        await hostile.start()
        hostile.web.lure_to(self.stack.url("remediator"))
        hostile.corrupt(self.sshds["hostile"], self.tools_of("hostile"))
        written["hosts"]["outsider"] = {"address": hostile.node_address}
        written["services"].update(hostile.services(pages, OFTEN))

    async def stop(self) -> None:
        # First what probes the servers: they would not close a connection in its handshake.
        if hasattr(self, "stack") and "exporter" in self.stack.pids:
            await self.launcher.kill(self.stack.pids["exporter"], signal.SIGKILL)
        await asyncio.to_thread(self.disk.unmount)
        if self.hostile is not None:
            await self.hostile.stop()
        for each in (self.pages, self.fallback, self.feishu, self.app, self.stuck):
            await each.stop()
        if hasattr(self, "stack"):
            await self.stack.client.aclose()

    def cards(self, cards: Sequence[Mapping[str, str]], *, lost: str = "") -> None:
        """What nvidia-smi tells of from now on."""
        apps = "".join(f"GPU-{index}, {os.getpid()}, 4096, python\n" for index in range(len(cards)))
        write_nvidia_smi(self.tools / "nvidia-smi", cards, apps=apps, before=lost)

    def kernel_log(self, text: str = "") -> None:
        """What dmesg prints from now on."""
        (self.tools / "dmesg").write_text(f"#!/bin/sh\necho '{text}'\n")
        (self.tools / "dmesg").chmod(0o755)

    def clock(self, offset: int) -> None:
        """What date says on the host `late`, that many seconds off."""
        date = self.tools_of("late") / "date"
        date.write_text(f'#!/bin/sh\nexec /bin/date -d "{offset} seconds" "$@"\n')
        date.chmod(0o755)

    def feishu_ahead(self, seconds: float) -> None:
        """How far Feishu's clock is ahead from now on."""
        self.feishu.now = lambda: time.time() + seconds

    def strain(self) -> None:
        """Have the host `strained` tell of little memory, much load, and a start a moment ago."""
        programs = {
            "grep": f'{shutil.which("grep")} "$@" | sed "s/^MemAvailable:.*/MemAvailable: 1000 kB/; s/^btime .*/btime $(date +%s)/"',
            "cat": f'[ "$*" != /proc/loadavg ] && exec {shutil.which("cat")} "$@"\necho 99 99 99 1/1 1',
        }
        for name, program in programs.items():
            tool = self.tools_of("strained") / name
            tool.write_text(f"#!/bin/sh\n{program}\n")
            tool.chmod(0o755)

    def relieve(self) -> None:
        """Have it tell of this machine."""
        for tool in self.tools_of("strained").iterdir():
            tool.unlink()

    def tools_of(self, host: str) -> Path:
        """The folder of the programs that a host has for itself."""
        folder = self.folder / f"tools-{host}"
        folder.mkdir(exist_ok=True)
        return folder

    async def _start_hosts(self) -> None:
        path = f"{self.tools}:{self.systemd}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        for name in self.hosts:
            environment = {"PATH": f"{self.tools_of(name)}:{path}", "DOCKER_HOST": os.environ["DOCKER_HOST"]}
            (port,) = reserve_ports(1)
            self.sshds[name] = await sshd.start(self.launcher, self.folder / f"sshd-{name}", port, environment)

    def _host(self, name: str) -> dict[str, Any]:
        known = self.sshds[name]
        pins = self.pinned if name == "swapped" else known.known_hosts
        login = {"user": known.user, "port": known.port, "key_file": str(known.key_file), "known_hosts": str(pins)}
        collect: dict[str, Any] = {"system": "10s"}
        if name == "box":
            collect |= {
                "gpu": "10s", "docker": "10s", "systemd": {"every": "10s", "units": ["well.service"]},
                "supervisor": {"every": "10s", "configs": [str(self.supervisor)]},
            }  # fmt: skip
        if name == "hostile":
            collect |= {"gpu": "10s", "docker": "10s", "supervisor": "10s"}
        return {"address": "127.0.0.1", "group": "test", "ssh": login, "collect": collect}

    def _services(self, web_port: int, pages: int, expiring: int, expired: int) -> dict[str, Any]:
        base = f"http://127.0.0.1:{pages}"

        def page(name: str, **more: Any) -> dict[str, Any]:
            return {
                "provider": "nginx",
                "category": "web",
                "team": "test",
                "probe": {**OFTEN, "http": {"url": f"{base}/{name}"}, **more},
            }

        unverified = {"verify": False}
        return {
            "web": {
                "provider": "nginx", "category": "web", "host": "box", "on_failure": "restart",
                "probe": {**OFTEN, "http": {"url": f"http://127.0.0.1:{web_port}/", "expect": {"body_matches": "heart"}}},
                "control": {"docker": {"container": self.container}, "timeout": "30s", "start_within": "15s"},
            },
            "hopeless": {
                "provider": "nginx", "category": "web", "host": "box", "on_failure": "restart",
                "probe": {**OFTEN, "http": {"url": f"{base}/hopeless"}},
                "control": {"command": {"restart": ["false"]}, "start_within": "2s"},
                "remediation": {"attempts": 1, "hold": "2s"},
            },
            "page": {**page("page"), "host": "box", "objective": 99.9},
            "flap": page("flap", every="1s", retry_every="1s", fail_after=1),
            "burn": page("burn"),
            "asking": {
                **page("asking"), "host": "box", "on_failure": "restart", "control": {"command": {"restart": ["true"]}},
                "remediation": {"steps": [{"restart": {"approve": True}}]},
            },
            "slow": page("slow", slow_after="300ms"),
            "stale": page("stale", timeout="30m"),
            "alive": {**page("alive"), "host": "mute"},
            "writer": {"probe": {"heartbeat": {"every": "1h"}}, "agent": {"rounds_limit": 30}},
            "expiring": page("", http={"url": f"https://127.0.0.1:{expiring}/x", "tls": unverified}),
            "expired": page("", http={"url": f"https://127.0.0.1:{expired}/x", "tls": unverified}),
            "channels": {
                "provider": "transcoder", "category": "video",
                "probe": {**OFTEN, "status": {
                    "url": f"{base}/channels", "up_when": "any",
                    "components": {"each": "$.channels[*]", "name": "$.name", "up": {"$.state": "running"}},
                }},
            },
            "llm": {
                "provider": "vllm", "category": "llm", "host": "box",
                "probe": {**OFTEN, "openai": {"url": base, "model": "m"}},
            },
        }  # fmt: skip

    def _notify(self) -> dict[str, Any]:
        bot = {"webhook": self.feishu.webhook, "secret": SECRET}
        app = {
            "app_id": APP_ID,
            "app_secret": APP_SECRET,
            "chat_id": CHAT,
            "url": self.app.url,
            "long_connection": True,
        }
        return {
            "language": "zh",
            "digest_over": 1000,  # everything fails at once, and each card is checked
            "channels": {
                "ops": {"feishu": bot},
                "app": {"feishu_app": app},
                "refused": {"feishu": {**bot, "secret": "not-the-bots"}},
                "stuck": {"feishu": {**bot, "webhook": bot["webhook"].replace(self.feishu.url, f"http://127.0.0.1:{self.stuck_port}")}},
            },
            "routes": [
                {"match": {"alertname": "ServiceDown", "service": "page"}, "channels": ["refused", "stuck"], "continue": True},
                {"match": {"service": "asking"}, "channels": ["app"]},
                {"channels": ["ops"]},
            ],
        }  # fmt: skip

    # What is known of it

    async def received(self, where: str, alert: str, labels: Mapping[str, str]) -> dict[str, Any] | None:
        """The last alert of that name with these labels that arrived at the remediator, or at `fallback`.

        In the labels, {disk} stands for where the disk is mounted, and {container} for the name of the container.
        """
        if where == "fallback":
            rows = sorted(self.fallback.alerts.values(), key=lambda row: str(row["startsAt"]), reverse=True)
        else:
            rows = await self.rows()
        named = {
            label: value.format(disk=self.disk.mountpoint, container=self.container) for label, value in labels.items()
        }
        wanted = {"alertname": alert, **named}
        return next((row for row in rows if wanted.items() <= row["labels"].items()), None)

    async def rows(self) -> list[dict[str, Any]]:
        """Every alert that the remediator has on record, the newest first."""
        rows: list[dict[str, Any]] = []
        while True:
            before = f"?before={rows[-1]['id']}" if rows else ""
            page = await self.stack.get("remediator", f"/api/v1/alerts{before}")
            if not page or not page["alerts"]:
                return rows
            rows += page["alerts"]

    async def ask(self, expression: str) -> list[Any]:
        """What Prometheus answers now. Raises AssertionError where it does not."""
        return await self._answer("query", expression, {})

    async def ask_of_last_hour(self, expression: str) -> list[Any]:
        """What Prometheus answers for a panel that shows the last hour. Raises AssertionError where it does not."""
        span = {"start": str(time.time() - 3600), "end": str(time.time()), "step": "15"}
        return await self._answer("query_range", expression, span)

    async def _answer(self, path: str, expression: str, more: Mapping[str, str]) -> list[Any]:
        url = f"{self.stack.url('prometheus')}/api/v1/{path}"
        answer = await self.stack.client.post(url, data={"query": expression, **more})
        assert answer.is_success, f"{expression}: {answer.text}"
        return list(answer.json()["data"]["result"])

    # How hosts are broken, and mended

    def fell(self, name: str) -> None:
        """End a host's sshd and all its sessions."""
        pid = self.sshds[name].pid
        assert pid is not None
        for each in (pid, *descendants(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    async def rise(self, name: str) -> None:
        self.sshds[name] = await sshd.restart(self.launcher, self.folder / f"sshd-{name}", self.sshds[name])

    async def swap_key(self) -> None:
        """Have `swapped` show another key than the one that is pinned."""
        port, other = self.sshds["swapped"].port, self.sshds["box"].known_hosts.read_text().split(maxsplit=1)[1]
        self.pinned.write_text(f"[127.0.0.1]:{port} {other}")
        self.fell("swapped")
        await self.rise("swapped")

    def pin_key(self) -> None:
        """Pin the key that `swapped` shows."""
        self.pinned.write_text(self.sshds["swapped"].known_hosts.read_text())


def descendants(pid: int) -> list[int]:
    """Return the children of a process, and theirs."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, listed) for each in (child, *descendants(child))]


@contextlib.asynccontextmanager
async def running(
    launcher: Launcher, folder: Path, systemd: Path, *, hurried: bool = False, hostile: bool = False
) -> AsyncIterator[Fleet]:
    """Run a fleet; unless `hurried`, Prometheus and Alertmanager keep the shipped intervals."""
    fleet = Fleet(launcher, folder, systemd, hurried=hurried, hostile=hostile)
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.stop()


def logged(seconds_ago: float, xid: int, address: str) -> str:
    """A line of the kernel's log that tells of an XID."""
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME) - seconds_ago
    return f"[{uptime:12.6f}] NVRM: Xid (PCI:{address}): {xid}, pid=1, name=python"
