"""Stack: Prometheus, Alertmanager, the exporter and the remediator on loopback, with the shipped files."""

import asyncio
import atexit
import contextlib
import random
import secrets
import shutil
import socket
import ssl
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from defib.demo.launcher import Launcher
from runtime.errors import StartError

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "defib"
READY_WITHIN = 120.0
UNHURRIED_READY_WITHIN = 180.0
PORTS = (12_000, 32_000)
RESERVED = 200  # ports that a process reserves at most
PROGRAMS = ("prometheus", "prometheus-alertmanager")


_reserved: deque[socket.socket] = deque()


@atexit.register
def _release() -> None:
    """Close the sockets, which the interpreter would close with a warning."""
    while _reserved:
        _reserved.popleft().close()


def reserve_ports(count: int) -> list[int]:
    """Reserve free ports on loopback, below those of outgoing connections, so that no other process gets them."""
    ports: list[int] = []
    for port in random.sample(range(*PORTS), PORTS[1] - PORTS[0]):
        if len(ports) == count:
            return ports
        with contextlib.suppress(OSError):
            _reserve(port)
            ports.append(port)
    raise StartError(f"no {count} ports from {PORTS[0]} to {PORTS[1]} are free")


def _reserve(port: int) -> None:
    """Bind a port without listening on it. Raises OSError if it is not free.

    A server that sets SO_REUSEADDR, as all of this project do, can still listen on it.
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


def _write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    path.touch(mode=0o600)
    path.write_text(text)


def find_alert_files() -> Path:
    """Return the folder of the shipped files of Prometheus and Alertmanager. Raises StartError."""
    folders = [base / "alerts" for base in (CHECKOUT, INSTALLED)]
    for folder in folders:
        if (folder / "prometheus.yml").is_file():
            return folder
    looked_in = ", ".join(map(str, folders))
    raise StartError(
        f"cannot find the alert rules of Defib (looked in {looked_in}): run `make demo` in a checkout of Defib, or"
        " install Defib from one with pip"
    )


def check_requirements() -> None:
    """Check that all files and programs are there. Raises StartError."""
    find_alert_files()
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise StartError(
            f"not found on PATH: {', '.join(missing)}. `make demo` in a checkout of Defib downloads these programs; or"
            f" install them (Debian, Ubuntu: apt install {' '.join(missing)})"
        )


class ApiTokenAuth(httpx.Auth):
    """Adds the local token to requests to the exporter and the remediator that have no other credential."""

    def __init__(self, token: str, ports: Iterable[int]) -> None:
        self._token, self._ports = token, frozenset(ports)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if request.url.port in self._ports and "Authorization" not in request.headers:
            request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


class Stack:
    """Prometheus, Alertmanager, the exporter and the remediator, with all their files in one folder.

    Unless `hurried`, the intervals of the shipped files stay as they are. `fallback` is the webhook of the receiver of
    that name. `webhook_token` is what Alertmanager sends, by default a random one. `report` is called with each step of
    the start.
    """

    def __init__(
        self,
        launcher: Launcher,
        folder: Path,
        *,
        hurried: bool = True,
        fallback: str = "",
        webhook_token: str = "",
        report: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._launcher, self._folder, self._report = launcher, folder, report
        self._hurried, self._fallback = hurried, fallback
        names = ("exporter", "remediator", "prometheus", "alertmanager", "node", "pings", "gateway")
        self.ports = dict(zip(names, reserve_ports(len(names)), strict=True))
        self.pids: dict[str, int] = {}
        self.options: dict[str, list[str]] = {}  # more arguments of the servers
        self.token_file = folder / "token"  # next to the database
        self.token, self.metrics_token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self.ping_key = secrets.token_urlsafe(32)
        self.webhook_token = webhook_token or secrets.token_urlsafe(32)
        self.credential = ApiTokenAuth(self.token, (self.ports[name] for name in ("exporter", "remediator", "gateway")))
        no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would read all certificates for a client without it
        self.client = httpx.AsyncClient(verify=no_tls, trust_env=False, timeout=30.0, auth=self.credential)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def configuration(self, extra: Mapping[str, Any]) -> Path:
        """Write the configuration directory, with `extra` besides the settings of the stack itself, and return it."""
        directory = self._folder / "config"
        directory.mkdir(exist_ok=True)
        _write_secret(self.token_file, self.token)
        written = {
            "exporter": {
                "url": self.url("exporter"),
                "heartbeats": {
                    "listen": f"127.0.0.1:{self.ports['pings']}",
                    "database": f"{self._folder}/heartbeats.db",
                    "ping_key": self.ping_key,
                },
            },
            "remediator": {
                "url": self.url("remediator"),
                "database": f"sqlite:///{self._folder}/remediator.db",
                "webhook_token": self.webhook_token,
                "prometheus_url": self.url("prometheus"),
                "alertmanager_url": self.url("alertmanager"),
            },
            **extra,
            "access": {"metrics_token": self.metrics_token, **extra.get("access", {})},
        }
        _write_secret(directory / "defib.yaml", yaml.safe_dump(written, allow_unicode=True, sort_keys=False))
        return directory

    async def start(self) -> None:
        """Start all four programs, and wait until an alert has passed through all of them. Raises StartError."""
        check_requirements()
        await self.start_program("exporter")
        await self.start_program("remediator")
        await self.start_alertmanager()
        await self.start_prometheus()
        within = READY_WITHIN if self._hurried else UNHURRIED_READY_WITHIN
        self._report("waiting for the first alert (Watchdog) to pass Prometheus and Alertmanager")
        await self.wait_for("the Watchdog alert at the remediator", self._watchdog_arrived, within)

    async def start_program(self, program: str) -> None:
        """Start one of Defib's servers, and wait until it is ready."""
        argv = [sys.executable, "-P", "-m", "defib", program, "--config", str(self._folder / "config")]
        options = self.options.get(program, [])
        await self._run(program, [*argv, "--listen", f"127.0.0.1:{self.ports[program]}", *options])
        await self.wait_for(program, lambda: self._is_ready(program))

    async def _run(self, name: str, argv: Sequence[str]) -> None:
        self._report(f"starting {name}")
        self.pids[name] = await self._launcher.start(argv, self.log_path(name))

    def log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    async def start_prometheus(self) -> None:
        """Start Prometheus, and wait until it is ready."""
        shipped = find_alert_files()
        config = yaml.safe_load((shipped / "prometheus.yml").read_text())
        if self._hurried:
            config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(shipped / "rules" / "*.yml")]
        if "gateway" in self.pids:
            (job,) = (each for each in config["scrape_configs"] if each["job_name"] == "defib-gateway")
            job["static_configs"] = [{"targets": [f"127.0.0.1:{self.ports['gateway']}"]}]
        self._write_with_own_addresses(config, "prometheus.yml")
        await self._run(
            "prometheus",
            [
                "prometheus",
                f"--config.file={self._folder}/prometheus.yml",
                f"--storage.tsdb.path={self._folder}/prometheus",
                f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}",
                f"--rules.alert.resend-delay={'1s' if self._hurried else '1m'}",
                "--log.level=warn",
            ],
        )
        await self.wait_for("prometheus", lambda: self._is_ready("prometheus"))

    async def start_alertmanager(self) -> None:
        """Start Alertmanager, and wait until it is ready."""
        config = yaml.safe_load((find_alert_files() / "alertmanager.yml").read_text())
        if self._hurried:
            config["route"]["group_interval"] = "1s"
        # No watcher runs here.
        (fallback,) = (each for each in config["receivers"] if each["name"] == "fallback")
        fallback["webhook_configs"] = [{"url": self._fallback}] if self._fallback else []
        self._write_with_own_addresses(config, "alertmanager.yml")
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

    def _write_with_own_addresses(self, config: Any, name: str) -> None:
        """Write a shipped file, with the addresses and tokens of this stack instead of those of docker-compose.yml."""
        for token, value in (("webhook_token", self.webhook_token), ("metrics_token", self.metrics_token)):
            _write_secret(self._folder / token, value)
        text = yaml.safe_dump(config, sort_keys=False)
        own = {
            "exporter:9999": "exporter", "remediator:9095": "remediator",
            "alertmanager:9093": "alertmanager", "localhost:9090": "prometheus", "node-exporter:9100": "node",
        }  # fmt: skip
        for shipped, program in own.items():
            text = text.replace(shipped, f"127.0.0.1:{self.ports[program]}")
        (self._folder / name).write_text(text.replace("secrets/", f"{self._folder}/"))

    async def get(self, name: str, path: str) -> Any:
        """Return the JSON response of one of the programs, or None if there is none."""
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
            page = (await self.client.get(f"{self.url('remediator')}/metrics")).text
            name = "defib_remediator_watchdog_last_timestamp_seconds "
            return any(line.startswith(name) and float(line.split()[1]) > 0 for line in page.splitlines())
        return False

    async def wait_for(self, what: str, condition: Any, within: float = READY_WITHIN) -> None:
        """Wait until `condition()` is true. Raises StartError with the end of all logs."""
        try:
            async with asyncio.timeout(within):
                while not await condition():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            logs = "".join(f"\n--- {name}\n{self.log_path(name).read_text()[-1500:]}" for name in self.pids)
            raise StartError(f"{what}: not ready within {within:g} s{logs}") from None
