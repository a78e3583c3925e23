"""A host, a web server and a node_exporter that lie about everything, and healthy services beside them.

What they print is markup, mentions and links for a card, marks and sections for a reading, series for a scrape.
"""

import asyncio
import secrets
import shlex
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from defib.demo.sshd import Sshd
from tests.gpu import CARD, write_nvidia_smi
from tests.logins import has_login_shell, logs_in_with

NODE_PORT = 9100
HEALTHY = ("steady", "calm", "neighbour")  # what is lied about; `neighbour` is on the hostile host
# Redirected to what may change something; on the hostile host, where no restart helps; mended by its restart.
LURED, FRAMED, MENDED = "lured", "framed", "brittle"
# Those of the hostile web server, each with the reasons for which it is down.
WEB = {LURED: ("redirect",), "metadata": ("redirect",), "endless": ("protocol", "body"), "shouting": ("status",)}
DOWN = (*WEB, FRAMED, MENDED)
LINK = "http://evil.test/approve"
MARKUP = f'<at id=all></at> <at id="all">x</at> [press]({LINK}) <a href="{LINK}">x</a> **calm** ~~x~~ `x`'
NEW_LINES = "\n**服务** steady\n› steady\n---\n**主机** box\n"
STOP = b"/stop"
CHANGES = (
    "services/steady/restart", "services/calm/stop", "services/neighbour/restart", "actions/1/approve", "automation",
    "maintenance", "services/steady/reset", "incidents/1/acknowledge",
)  # fmt: skip
CHANGE = {"enabled": False, "reason": "x", "for": "1h", "scope": "service", "name": "steady"}
METADATA = ("169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "100.100.100.200")
_FORGED = """\
service_up{service="DOWN",host="HOST",provider="other",category="other"} 1
service_up{service="WELL",host="",provider="other",category="other"} 0
service_up{service="WELL",host="HOST",provider="other",category="other"} 1
service_up{job="defib-exporter",instance="e",service="DOWN",host="HOST",provider="other",category="other"} 1
service_up{service="DOWN",host="",provider="other",category="other"} 1 {now}
service_info{service="DOWN",severity="info",team="outsider"} 1
service_info{service="outsider",severity="critical",team="outsider"} 1
service_last_probe_timestamp_seconds{service="WELL"} 1
service_tls_certificate_expiry_timestamp_seconds{service="WELL"} 1
service:info:one{service="DOWN",severity="info"} 1
service:info:one{service="WELL"} 1
service:up:max{service="DOWN",host="",provider="other",category="other"} 1
service:up:max{service="WELL",host="",provider="other",category="other"} 0
service:up:max{service="outsider"} 0
host:up:max{host="HOST",group=""} 1
host:filesystem_usage:ratio{host="HOST",mountpoint="/"} 1
host_up{host="HOST",group=""} 1
host_up{host="outsider",group=""} 0
host_key_changed{host="HOST",group=""} 1
host_container_up{host="HOST",container="c"} 0
gpu_healthy{host="HOST",gpu="0"} 0
defib_remediator_breaker_open{service="DOWN"} 1
defib_remediator_automation_enabled 0
defib_remediator_outbox_oldest_seconds 9999
defib_config_last_reload_successful{job="defib-exporter"} 0
alertmanager_config_last_reload_successful 0
prometheus_config_last_reload_successful 0
up{job="defib-remediator"} 1
up{job="defib-exporter"} 0
ALERTS{alertname="ServiceDown",alertstate="firing",service="WELL"} 1
ALERTS{alertname="HostDown",alertstate="firing",host="outsider"} 1
ALERTS_FOR_STATE{alertname="HostDown",host="HOST"} 1
node_load1{job="defib-exporter",instance="e",service="DOWN",host="HOST"} 1
node_:recorded 1
"""
TOO_MANY = "".join(f'node_x{{i="{number}"}} 1\n' for number in range(20_000))


def forged(*, well: str, down: str, host: str) -> str:
    """A page that says the contrary of two services, and of a host, by every name that the rules read."""
    return _FORGED.replace("WELL", well).replace("DOWN", down).replace("HOST", host)


class Outsider:
    """Answers as a node_exporter with the page that a test sets, and counts how often it was asked."""

    def __init__(self) -> None:
        self.page, self.asked, self.elsewhere = "", 0, ""
        self._runner = web.AppRunner(web.Application(), access_log=None, shutdown_timeout=0.1)

    async def start(self, port: int, host: str = "127.0.0.1") -> None:
        self._runner.app.router.add_get("/metrics", self._answer)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, reuse_address=True).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, _request: web.Request) -> web.Response:
        self.asked += 1
        if self.elsewhere:
            raise web.HTTPFound(self.elsewhere)
        page = f"node_asked_total {self.asked}\n{self.page}".replace("{now}", f"{time.time() * 1000:.0f}")
        response = web.Response(text=page, content_type="text/plain")
        response.enable_compression()  # the limit is for what comes out of it
        return response


class WebServer:
    """Answers probes with redirects to what may change something, without end, or with a call to everybody.

    `turns` counts the answers by service. `followed` are the requests that came to the other address to which it
    redirects, beside the remediator's.
    """

    def __init__(self) -> None:
        self.followed: list[bytes] = []
        self.turns: Counter[str] = Counter()
        self.places: list[str] = []

    def lure_to(self, remediator: str) -> None:
        """Redirect to what changes something at the remediator with this address."""
        changes = [f"{remediator}/api/v1/{change}" for change in CHANGES]
        self.places = [*changes, f"{remediator}/webhook/alertmanager", f"{self.other}{STOP.decode()}"]

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._other = await asyncio.start_server(self._follow, "127.0.0.1", 0)
        self.url, self.other = (
            f"http://127.0.0.1:{each.sockets[0].getsockname()[1]}" for each in (self._server, self._other)
        )

    async def stop(self) -> None:
        for each in (self._server, self._other):
            each.close()

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Programs of other tests may connect, if the address was that of another server before.
        if STOP in (line := await reader.readline()):
            self.followed.append(line)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            name = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().strip("/")
            answer = {LURED: self._lure, "metadata": self._metadata, "endless": self._endless}.get(name, self._shout)
            self.turns[name] += 1
            await answer(writer, self.turns[name])
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _lure(self, writer: asyncio.StreamWriter, turn: int) -> None:
        """Keep the method and the body, and lead them elsewhere."""
        place = self.places[turn // 2 % len(self.places)]
        await self._redirect(writer, 307 + turn % 2, place)

    async def _metadata(self, writer: asyncio.StreamWriter, turn: int) -> None:
        await self._redirect(writer, 302, f"http://{METADATA[turn % len(METADATA)]}/latest/meta-data/")

    async def _redirect(self, writer: asyncio.StreamWriter, status: int, location: str) -> None:
        writer.write(f"HTTP/1.1 {status} {MARKUP}\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()

    async def _endless(self, writer: asyncio.StreamWriter, turn: int) -> None:
        piece = b"x" * 8000 if turn % 2 else b"X-A: " + b"a" * 8000 + b"\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if turn % 2 else b""))
        while True:
            writer.write(piece)
            await writer.drain()

    async def _shout(self, writer: asyncio.StreamWriter, _turn: int) -> None:
        body = f"{MARKUP}{NEW_LINES}{MARKUP}".encode()
        head = f"HTTP/1.1 500 {MARKUP}\r\nX-A: {MARKUP}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()


# Finds the mark of the reading that runs it, in the arguments of a process above its own.
_FIND_MARK = r"""
pid=$$ mark=
while [ -z "$mark" ] && [ "$pid" -gt 1 ] 2>/dev/null; do
    mark=$(tr '\0' '\n' <"/proc/$pid/cmdline" | sed -n 's/^mark=\(@defib-[0-9a-f]*\) .*/\1/p')
    read -r _ _ _ pid _ <"/proc/$pid/stat"
done
"""
_SECTIONS = ("proc", "df", "supervisor", "systemd")
_HUGE = "9" * 400  # no float is as large
_STATE = "running\t\t0\t2026-01-01T00:00:00Z"
LYING_CONTAINER = f'{MARKUP}"}} 0'


def claims() -> str:
    """What everything on the host prints: markup, samples of others, and sections of a reading."""
    marks = "".join(f"@defib-{'0' * 16} {name}\n\n@defib-{'0' * 16} {name} 0\n" for name in _SECTIONS)
    listed = "".join(f"listed\t1\t{name}\texited\ti\tExited (1)\n" for name in HEALTHY)
    return f"{MARKUP}{NEW_LINES}{forged(well='steady', down='page', host='box')}{marks}{listed}{MARKUP}\n"


def _containers() -> str:
    """As `docker inspect` tells of them: names that would end a label or a line, numbers that no float holds, and many."""
    names = (LYING_CONTAINER, 'x"} 1\\nservice_up{service="steady"} 0\\n', "\\", "é" * 3000, "steady", "calm\x85calm")
    odd = "".join(f"/{name}\t{_STATE}\t{_HUGE}\t{MARKUP}\n" for name in names)
    return odd + "".join(f"/c{number}\t{_STATE}\t1\ti\n" for number in range(3000))


def write_programs(folder: Path) -> None:
    """Write the host's docker, supervisorctl and nvidia-smi."""
    for name, text in (("claims", claims()), ("containers", _containers())):
        (folder / name).write_text(text)
    # With the reading's own mark, docker ends its section and writes others.
    forge = 'printf "\\n%s docker 0\\n" "$mark"\n' + "".join(
        f'printf "\\n%s {name}\\n" "$mark"\ncat {folder}/claims\nprintf "\\n%s {name} 0\\n" "$mark"\n'
        for name in _SECTIONS
    )
    programs = {
        "docker": 'case "$*" in *listed*) printf "listed|1|x|running|i|Up\\n"; exit ;; esac\n'
        f"cat {folder}/containers {folder}/claims\n{_FIND_MARK}{forge}",
        "supervisorctl": f"cat {folder}/claims\necho 'steady FATAL x'\necho 'x\"}}_0 FATAL {MARKUP}'\n",
    }
    for name, program in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{program}")
        (folder / name).chmod(0o755)
    lying = {**CARD, "name": f'{MARKUP}"}} 1', "gpu_recovery_action": MARKUP, "uuid": f'GPU-0"}} {_HUGE}'}
    write_nvidia_smi(folder / "nvidia-smi", [lying], apps=f"GPU-0, 1, {_HUGE}, {MARKUP}\n", before=claims())


class Hostile:
    """The hostile parts of a fleet, and the services that they lie about."""

    def __init__(self, folder: Path) -> None:
        self.web, self.node = WebServer(), Outsider()
        self.restarts, self._alive, self._claims = folder / "restarts", folder / "brittle.alive", folder / "claims"
        # An address of its own: other tests have a port 9100, too.
        self.node_address = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}.{secrets.randbelow(250) + 2}"

    async def start(self) -> None:
        self.restarts.touch()
        self._alive.touch()
        self._claims.write_text(claims())
        self.node.page = forged(well="steady", down="page", host="box")
        await self.web.start()
        await self.node.start(NODE_PORT, self.node_address)

    async def stop(self) -> None:
        await self.web.stop()
        await self.node.stop()

    def fail(self) -> None:
        """Have the service fail that its restart mends."""
        self._alive.unlink()

    def corrupt(self, sshd: Sshd, tools: Path) -> None:
        """Have a host print what is not so, before and after every command and in its place."""
        write_programs(tools)
        if has_login_shell(sshd):
            said = f"cat {self._claims}"
            logs_in_with(sshd, f'{said}; {said} >&2\nsh -c "$2"\nstatus=$?\n{said}\nexit $status')

    def services(self, pages: str, often: Mapping[str, Any]) -> dict[str, Any]:
        """The services; `pages` is where those that are well answer."""

        def service(name: str, probe: Mapping[str, Any], host: str, restart: str = "", **more: Any) -> dict[str, Any]:
            script = f"echo {name} >> {shlex.quote(str(self.restarts))}; {restart or 'true'}"
            control = {"command": {"restart": ["sh", "-c", script]}, "timeout": "60s", "start_within": "15s"}
            return {"host": host, "probe": {**often, **probe}, "control": control, "on_failure": "restart", **more}

        def lie(name: str, **more: Any) -> dict[str, Any]:
            return {"http": {"url": f"{self.web.url}/{name}", "max_body": "64KiB", **more}}

        lying = f"cat {shlex.quote(str(self._claims))}; exit 1"
        return {
            "steady": service("steady", {"http": {"url": f"{pages}/steady"}}, "box"),
            "calm": service("calm", {"http": {"url": f"{pages}/calm"}}, "box"),
            "neighbour": service("neighbour", {"http": {"url": f"{pages}/neighbour"}}, "hostile"),
            MENDED: service(MENDED, {"command": {"run": ["test", "-e", str(self._alive)]}}, "box", f"touch {self._alive}"),
            LURED: service(LURED, lie(LURED, method="POST", json=CHANGE), "box"),
            "metadata": {"probe": {**often, **lie("metadata")}},
            "endless": {"probe": {**often, **lie("endless")}},
            "shouting": {"probe": {**often, **lie("shouting")}},
            FRAMED: service(
                FRAMED, {"command": {"run": ["sh", "-c", lying]}}, "hostile", lying,
                remediation={"attempts": 1, "hold": "2s"},
            ),
        }  # fmt: skip
