"""The whole stack on loopback: the shipped files with shorter intervals and other addresses."""

import asyncio
import atexit
import contextlib
import random
import secrets
import shutil
import socket
import sys
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from defib.demo.launcher import Launcher
from runtime.errors import StartError

SHIPPED = Path(__file__).resolve().parents[2] / "alerts"
READY_WITHIN = 120.0
UNHURRIED_WITHIN = 180.0
PORTS = (12_000, 32_000)
RESERVED = 200  # ports that a process holds at most
NEEDED = ("prometheus", "prometheus-alertmanager")
WEBHOOK_TOKEN = "demo-webhook-token"  # noqa: S105 - on loopback, for as long as the demo lasts


_reserved: deque[socket.socket] = deque()


@atexit.register
def _release() -> None:
    """Close what the interpreter would close with a warning."""
    while _reserved:
        _reserved.popleft().close()


def reserve_ports(count: int) -> list[int]:
    """Free ports on loopback, below those that outgoing connections are given; no other process is given the same."""
    found: list[int] = []
    for port in random.sample(range(*PORTS), PORTS[1] - PORTS[0]):
        if len(found) == count:
            return found
        with contextlib.suppress(OSError):
            _reserve(port)
            found.append(port)
    raise StartError(f"no {count} ports from {PORTS[0]} to {PORTS[1]} are free")


def _reserve(port: int) -> None:
    """Bind a port without listening on it, so that nobody else finds it free. Raises OSError where it is not.

    A server that sets SO_REUSEADDR, as all of ours do, can still listen there.
    """
    reservation = socket.socket()
    try:
        reservation.bind(("127.0.0.1", port))
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError:
        reservation.close()
        raise
    _reserved.append(reservation)
    if len(_reserved) > RESERVED:
        _reserved.popleft().close()


class Credential(httpx.Auth):
    """The API token, sent to the exporter and the remediator alone, where a request has no other credential."""

    def __init__(self, token: str, ports: Iterable[int]) -> None:
        self._token, self._ports = token, frozenset(ports)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if request.url.port in self._ports and "Authorization" not in request.headers:
            request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


class Stack:
    """Prometheus, Alertmanager, the exporter and the remediator, kept by a launcher in one folder.

    Unless `hurried`, the shipped files' intervals are left as they are. `fallback` is a webhook's address for the
    receiver of that name.
    """

    def __init__(self, launcher: Launcher, folder: Path, *, hurried: bool = True, fallback: str = "") -> None:
        self._launcher, self._folder = launcher, folder
        self._hurried, self._fallback = hurried, fallback
        names = ("exporter", "remediator", "prometheus", "alertmanager", "node")
        self.ports = dict(zip(names, reserve_ports(len(names)), strict=True))
        self.pids: dict[str, int] = {}
        self.token_file = folder / "token"  # beside the record
        self.token = secrets.token_urlsafe(32)
        self.credential = Credential(self.token, (self.ports[name] for name in ("exporter", "remediator")))
        self.client = httpx.AsyncClient(trust_env=False, timeout=30.0, auth=self.credential)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def configuration(self, extra: Mapping[str, Any]) -> Path:
        """Write the configuration directory; `extra` joins what the stack itself needs."""
        directory = self._folder / "config"
        directory.mkdir(exist_ok=True)
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(self.token)
        written = {
            "exporter": {"url": self.url("exporter")},
            "remediator": {
                "url": self.url("remediator"),
                "database": f"sqlite:///{self._folder}/remediator.db",
                "webhook_token": WEBHOOK_TOKEN,
                "prometheus_url": self.url("prometheus"),
                "alertmanager_url": self.url("alertmanager"),
            },
            **extra,
        }
        (directory / "defib.yaml").write_text(yaml.safe_dump(written, allow_unicode=True, sort_keys=False))
        return directory

    async def start(self) -> None:
        """Start all four; returns once an alert has come through all of them. Raises StartError."""
        missing = [program for program in NEEDED if shutil.which(program) is None]
        if missing:
            raise StartError(
                f"not on PATH: {', '.join(missing)} (run `make demo`, or install Prometheus and Alertmanager)"
            )
        (self._folder / "webhook_token").write_text(WEBHOOK_TOKEN)
        await self.start_program("exporter")
        await self.start_program("remediator")
        await self.start_alertmanager()
        await self.start_prometheus()
        within = READY_WITHIN if self._hurried else UNHURRIED_WITHIN
        await self.wait_for("the Watchdog, from Prometheus to the remediator", self._watchdog_arrived, within)

    async def start_program(self, program: str) -> None:
        """Start the exporter or the remediator."""
        argv = [sys.executable, "-m", "defib", program, "--config", str(self._folder / "config")]
        await self._run(program, [*argv, "--listen", f"127.0.0.1:{self.ports[program]}"])
        await self.wait_for(program, lambda: self._is_ready(program))

    async def _run(self, name: str, argv: Sequence[str]) -> None:
        self.pids[name] = await self._launcher.start(argv, self.log(name))

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    async def start_prometheus(self) -> None:
        """Start Prometheus."""
        config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
        if self._hurried:
            config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(SHIPPED / "rules" / "*.yml")]
        self._readdressed(config, "prometheus.yml")
        await self._run(
            "prometheus",
            [
                "prometheus",
                f"--config.file={self._folder}/prometheus.yml",
                f"--storage.tsdb.path={self._folder}/prometheus",
                f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}",
                f"--rules.alert.resend-delay={'1s' if self._hurried else '15s'}",
                "--log.level=warn",
            ],
        )
        await self.wait_for("prometheus", lambda: self._is_ready("prometheus"))

    async def start_alertmanager(self) -> None:
        """Start Alertmanager."""
        config = yaml.safe_load((SHIPPED / "alertmanager.yml").read_text())
        if self._hurried:
            config["route"]["group_interval"] = "1s"
        if self._fallback:
            (fallback,) = (each for each in config["receivers"] if each["name"] == "fallback")
            fallback["webhook_configs"] = [{"url": self._fallback}]
        self._readdressed(config, "alertmanager.yml")
        await self._run(
            "alertmanager",
            [
                "prometheus-alertmanager",
                f"--config.file={self._folder}/alertmanager.yml",
                f"--storage.path={self._folder}/alertmanager",
                f"--web.listen-address=127.0.0.1:{self.ports['alertmanager']}",
                "--cluster.listen-address=",
                "--log.level=warn",
            ],
        )
        await self.wait_for("alertmanager", lambda: self._is_ready("alertmanager"))

    def _readdressed(self, config: Any, name: str) -> None:
        """Write a shipped file with this stack's addresses in place of those of docker-compose.yml."""
        text = yaml.safe_dump(config, sort_keys=False)
        own = {
            "exporter:9999": "exporter", "remediator:9095": "remediator",
            "alertmanager:9093": "alertmanager", "localhost:9090": "prometheus", "node-exporter:9100": "node",
        }  # fmt: skip
        for shipped, program in own.items():
            text = text.replace(shipped, f"127.0.0.1:{self.ports[program]}")
        (self._folder / name).write_text(text.replace("secrets/webhook_token", str(self._folder / "webhook_token")))

    async def get(self, name: str, path: str) -> Any:
        """JSON from one of the four; None where there is none to be had."""
        try:
            response = await self.client.get(f"{self.url(name)}{path}")
            return response.json() if response.is_success else None
        except (httpx.HTTPError, ValueError):
            return None

    async def _is_ready(self, name: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (await self.client.get(f"{self.url(name)}/-/ready")).is_success
        return False

    async def _watchdog_arrived(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            headers = {"Authorization": f"Bearer {WEBHOOK_TOKEN}"}
            page = (await self.client.get(f"{self.url('remediator')}/metrics", headers=headers)).text
            name = "defib_remediator_watchdog_last_timestamp_seconds "
            return any(line.startswith(name) and float(line.split()[1]) > 0 for line in page.splitlines())
        return False

    async def wait_for(self, what: str, condition: Any, within: float = READY_WITHIN) -> None:
        """Wait until `condition()` is true. Raises StartError, with the end of the logs."""
        try:
            async with asyncio.timeout(within):
                while not await condition():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            logs = "".join(f"\n--- {name}\n{self.log(name).read_text()[-1500:]}" for name in self.pids)
            raise StartError(f"{what}: not ready within {within:g} s{logs}") from None
