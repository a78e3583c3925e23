"""Hosts that print too much: what is cut is reported, and the event loop is never blocked for long."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from exporter.exposition.collector_samples import SERIES_LIMIT
from exporter.metrics import ExporterMetrics
from exporter.scheduler.probe_scheduler import ProbeScheduler
from fleet.shells import READ_LIMIT, ShellError
from fleet.shells.local import LocalShell
from fleet.shells.ssh import Login, SshShell
from runtime.redaction import Redactor
from tests.gpu import CARD
from tests.logins import logs_in_with
from tests.support import eventually, inventory_of, leaves_the_loop_free, probed

STATE = "running\t\t0\t2026-01-01T00:00:00Z\t1\ti"
LONG = "x" * 700_000
XID = "NVRM: Xid (PCI:0000:07:00)"
FIELDS = "".join(f'"{name}"\n' for name in CARD)

# A login shell that runs nothing. It reads the script, and prints the marks and the sections that the table has.
LOGIN = """\
#!{python}
import json, pathlib, re, sys
script = ""
while not script.endswith("\\nexit\\n}}\\n"):
    script += sys.stdin.readline()
first, second = re.search(r"first=(\\S+) second=(\\S+)", script).groups()
mark = re.search(r"mark=(\\S+) more=", script)[1]
sections, endless = json.loads(pathlib.Path({table!r}).read_text())
names = {{"MARK": mark, "BEGIN": first + second, "END": second + first}}
endless = re.sub("|".join(names), lambda name: names[name[0]], endless)
print(first + second)
print(first + second, file=sys.stderr)
for name, text in sections.items():
    print(f"\\n{{mark}} {{name}}\\n{{text}}\\n{{mark}} {{name}} 0")
while endless:
    sys.stdout.write(endless)
print(second + first, 0)
print(second + first, 0, file=sys.stderr)
"""


def lines(count: int, line: Callable[[int], str]) -> str:
    return "".join(f"{line(number)}\n" for number in range(count))


def containers(count: int) -> str:
    names = lines(count, lambda number: f"listed\t{number:064x}\tc{number}\trunning\timage\tUp 3 hours (healthy)")
    return names + lines(count, lambda number: f"/c{number}\t{STATE}")


def gpus(rows: str = "", log: str = "") -> dict[str, str]:
    return {"fields": FIELDS, "query": rows, "processes": "", "xids": log}


# By name: the collector, and the sections that the host prints.
OUTPUTS: dict[str, tuple[str, dict[str, str]]] = {
    "60,000 containers": ("docker", {"docker": containers(60_000)}),
    "containers with long names": ("docker", {"docker": lines(9, lambda number: f"/{number}{LONG}\t{STATE}")}),
    "many empty lines": ("docker", {"docker": "\n" * 9_000_000}),
    "many other line ends": ("docker", {"docker": "\x0b" * 9_000_000}),
    "20,000 units": ("systemd", {"systemd": "", "failed-units": lines(20_000, lambda n: f"u{n} loaded failed failed x")}),
    "units with long names": ("systemd", {"systemd": "", "failed-units": lines(9, lambda n: f"{n}{LONG} a b c d")}),
    "20,000 programs": ("supervisor", {"supervisor": f"config: -\n{lines(20_000, lambda n: f'p{n} RUNNING x')}"}),
    "programs with long names": ("supervisor", {"supervisor": f"config: -\n{lines(9, lambda n: f'{n}{LONG} RUNNING x')}"}),
    "20,000 filesystems": ("system", {"proc": "", "df": lines(20_000, lambda n: f"mount /dev/{n} ext4 /{n}\n/d 9 9 9 9% /")}),
    "20,000 GPUs": ("gpu", gpus(lines(20_000, lambda n: ", ".join([str(n), *list(CARD.values())[1:]])))),
    "20,000 lost GPUs": ("gpu", gpus(lines(20_000, lambda n: f"handle for GPU 0000:{n % 256:02x}:00.0: GPU is lost"))),
    "20,000 XIDs": ("gpu", gpus(log=lines(20_000, lambda n: f"[{n}.0] {XID}: {n}, x"))),
    "XIDs at local times": ("gpu", gpus(log=lines(20_000, lambda n: f"[Mon Jan  5 10:00:{n % 60:02} 2026] {XID}: {n}, x"))),
    "many lines of a log": ("logs", {"log-files": f"!source /a\n!position 1.1.a\n{'+ERROR' * 3}\n" + "+\n" * 9_000_000}),
    "logs with long lines": ("logs", {"log-files": "!source /a\n!position 1.1.a\n" + lines(9, lambda n: f"+{n}{LONG}")}),
    "many logs": ("logs", {"log-files": lines(90_000, lambda n: f"!source /{n}\n!position 1.1.a\n+ERROR")}),
    # Quadratic for an expression with `.*?` before and after the address.
    "an XID that takes long to parse": ("gpu", gpus(log=f"[1.0] {'NVRM: Xid (0)' * 80_000}")),
}  # fmt: skip
OPTIONS = {"logs": {"every": "1s", "files": ["/a"], "patterns": {"error": "ERROR", "end": "x$"}}}
# What a host prints without end, in place of the marks' names.
ENDLESS = {
    "empty lines": "\n" * 4096,
    "text": "x" * 80 + "\n",
    "a line": "x" * 4096,
    "a section": "\nMARK docker\n" + "x\n" * 4096,
    "sections": "\nMARK docker\nx\nMARK docker 1\n",
    "sections that were not requested": lines(1000, lambda number: f"MARK s{number}\n\nMARK s{number} 0"),
    "sections of another mark": "@defib-0 docker\n",
    "marks of the beginning": "BEGIN\n",
    "marks of the end without a status": "END x\n",
}


class ReadHost:
    """A scheduler that reads one host, and the page that it publishes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.scheduler = ProbeScheduler(ExporterMetrics(), Redactor())

    async def apply(self, host: Mapping[str, Any], services: Mapping[str, Any] | None = None) -> None:
        written = {"hosts": {"h": host}, "services": dict(services or {})}
        loaded = await asyncio.to_thread(inventory_of, self._folder, written)
        await self.scheduler.apply(loaded.inventory)

    @property
    def page(self) -> str:
        return b"".join(self.scheduler.page.chunks()).decode()

    def value(self, metric: str, collector: str) -> float | None:
        found = re.search(rf'^{metric}\{{host="h",collector="{collector}"\}} (\S+)$', self.page, re.MULTILINE)
        return float(found[1]) if found else None

    async def next_run(self, collector: str) -> None:
        """Wait until a collector has run again."""
        before = self.value("host_collect_duration_seconds", collector)

        async def has_run() -> bool:
            return self.value("host_collect_duration_seconds", collector) not in (before, None)

        await eventually(has_run)


@pytest.fixture
async def read_host(tmp_path: Path) -> AsyncIterator[ReadHost]:
    made = ReadHost(tmp_path / "config")
    yield made
    await made.scheduler.close()


async def start_sshd(launcher: Launcher, folder: Path, path: str) -> tuple[Sshd, dict[str, Any]]:
    (port,) = reserve_ports(1)
    host = await sshd.start(launcher, folder / "sshd", port, {"PATH": path})
    ssh = {"user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    return host, {"address": "127.0.0.1", "ssh": ssh}


async def start_lying_sshd(
    launcher: Launcher, folder: Path, sections: Mapping[str, str], endless: str = ""
) -> tuple[Sshd, dict[str, Any]]:
    """Start an sshd whose login shell prints these sections, and then `endless` without end."""
    host, inventory = await start_sshd(launcher, folder, os.environ["PATH"])
    table = folder / "table"
    table.write_text(json.dumps([dict(sections), endless and endless * (65536 // len(endless) + 1)]))
    (folder / "lie").write_text(LOGIN.format(python=sys.executable, table=str(table)))
    (folder / "lie").chmod(0o755)
    logs_in_with(host, f"exec {folder}/lie")
    return host, inventory


@pytest.mark.needs("sshd")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", OUTPUTS)
async def test_excessive_output_is_cut_and_reported(
    launcher: Launcher, tmp_path: Path, read_host: ReadHost, name: str
) -> None:
    collector, sections = OUTPUTS[name]
    _, host = await start_lying_sshd(launcher, tmp_path, sections)
    await read_host.apply({**host, "collect": {collector: OPTIONS.get(collector, "1s")}})
    await read_host.next_run(collector)
    await leaves_the_loop_free(lambda: read_host.next_run(collector))
    assert read_host.value("host_collect_success", collector) == 0
    assert (read_host.value("host_collect_truncated", collector) or 0) > 0
    assert read_host.page.count("\n") < 2 * SERIES_LIMIT
    assert len(read_host.page) < 5 * 2**20


@pytest.mark.needs("sshd")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ENDLESS)
async def test_output_without_end_is_cut_and_reported(
    launcher: Launcher, tmp_path: Path, read_host: ReadHost, name: str
) -> None:
    _, host = await start_lying_sshd(launcher, tmp_path, {}, ENDLESS[name])
    await read_host.apply({**host, "collect": {"docker": "1s"}})
    await read_host.next_run("docker")
    await leaves_the_loop_free(lambda: read_host.next_run("docker"))
    assert read_host.value("host_collect_success", "docker") == 0


async def test_local_output_without_end_is_cut() -> None:
    completed = await LocalShell(read_only=True).run(["yes"], timeout=200)
    assert (completed.status, completed.late) == (None, False)
    assert completed.why == f"the output is longer than {READ_LIMIT} bytes"


@pytest.mark.parametrize(
    ("server_options", "message"),
    [
        # A few bytes could expand to gigabytes.
        ({"compression_algs": ["zlib@openssh.com"]}, "No matching compression algorithm"),
        # The host would choose a prime, before its key is checked, whose size blocks the event loop for minutes.
        ({"kex_algs": ["diffie-hellman-group-exchange-sha256"]}, "No matching key exchange algorithm"),
    ],
)
async def test_what_costs_too_much_is_refused(tmp_path: Path, server_options: Any, message: str) -> None:
    host_key, client_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    client_key.write_private_key(str(tmp_path / "client"))
    authorized = asyncssh.import_authorized_keys(client_key.export_public_key().decode())
    server = await asyncssh.listen(
        "127.0.0.1", 0, server_host_keys=[host_key], authorized_client_keys=authorized,
        process_factory=lambda process: process.exit(0), **server_options,
    )  # fmt: skip
    port = server.sockets[0].getsockname()[1]
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key.export_public_key().decode()}")
    shell = SshShell(Login("127.0.0.1", port, "u", tmp_path / "client", tmp_path / "known_hosts"))
    try:
        with pytest.raises(ShellError, match=message):
            await shell.connection()
    finally:
        await shell.close()
        server.close()


def write_docker(tools: Path, listing: str) -> None:
    """Write a docker whose `docker ps` runs a command of sh."""
    tools.mkdir()
    (tools / "docker").write_text(f"#!/bin/sh\ncase $1 in ps) {listing} ;; esac\n")
    (tools / "docker").chmod(0o755)


LOCAL = {"address": "127.0.0.1", "shell": "local"}


async def test_series_of_what_is_gone_are_removed(
    tmp_path: Path, read_host: ReadHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host may name other containers at every reading."""
    listing = 'seq -f "listed\t1\t$(date +%s%N)-%g\trunning\ti\tUp" 1000'
    write_docker(tmp_path / "tools", listing.replace("\\t", "\t"))
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:{os.environ['PATH']}")
    await read_host.apply({**LOCAL, "collect": {"docker": "2s"}})  # longer than a reading is shared
    seen: set[str] = set()
    for _ in range(4):
        await read_host.next_run("docker")
        names = set(re.findall(r'host_container_up.*container="([^"]+)"', read_host.page))
        assert len(names) == 1000
        assert not names & seen
        seen |= names


@pytest.mark.parametrize("name", ["c10", "missing"])
async def test_what_a_cut_section_lacks_is_not_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_docker(tmp_path / "tools", 'seq -f "listed\t1\tc%g\trunning\ti\tUp" 20000')
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:{os.environ['PATH']}")
    result = await probed(tmp_path / "config", "container", {"name": name})
    expected = (
        (None, "") if name == "c10" else ("shell", "h: the output of docker is too long; a part of it was not read")
    )
    assert (result.reason, result.message) == expected
