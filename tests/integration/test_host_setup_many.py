"""`defib host setup --apply` on many hosts: real sshds, real sudo on copies of this machine, and hosts that misbehave."""

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from tests.integration.conftest import Serve
from tests.integration.test_host_setup import configure, create_keys, defib
from tests.machines import start_machine, start_sshd
from tests.support import eventually
from tests.terminal import Terminal

pytestmark = pytest.mark.needs("sshd", "ssh", "ssh-keygen")
ADMIN = "defib"  # the only account of the sshds


@pytest.fixture
async def agent(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The administrator's agent; its keys are added by `connect`."""
    socket = tmp_path / "agent"
    await launcher.start(["ssh-agent", "-D", "-a", str(socket)], tmp_path / "agent.log")

    async def listening() -> bool:
        return socket.exists()

    await eventually(listening)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    return socket


def add_key(server: Sshd) -> None:
    subprocess.run(["ssh-add", "-q", server.key_file], check=True)


def host_at(port: int, address: str = "127.0.0.1") -> dict[str, Any]:
    return {"address": address, "ssh": {"user": "defib", "port": port, "key_file": "read", "known_hosts": "known"}}


async def stay_silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def send_banner_without_end(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"welcome " * 20 + b"\r\n")
        await writer.drain()


async def prepare(config: Path, hosts: dict[str, Any], *servers: Sshd) -> None:
    await asyncio.to_thread(configure, config, hosts)
    await asyncio.to_thread(create_keys, config, "read")
    (config / "known").write_text("".join(server.known_hosts.read_text() for server in servers))


@pytest.mark.needs("root", "sudo", "unshare", "nsenter", "ssh-agent", "ssh-add")
@pytest.mark.usefixtures("agent")
async def test_some_hosts_are_set_up_while_others_fail(launcher: Launcher, tmp_path: Path, serve: Serve) -> None:
    first, second = [await start_machine(launcher, tmp_path / name) for name in ("first", "second")]
    denied = await start_sshd(launcher, tmp_path / "denied", "exit 1")
    for server in (first, second):
        await asyncio.to_thread(add_key, server)
    hosts = {
        "first": {**host_at(first.port), "group": "well"},
        "second": {**host_at(second.port), "group": "well"},
        "denied": host_at(denied.port),
        "unpinned": host_at(denied.port, "localhost"),
        "refused": host_at(reserve_ports(1)[0]),
        "silent": host_at(await serve(stay_silent)),
        "banner": host_at(await serve(send_banner_without_end)),
        "keyless": {"address": "127.0.0.1", "ssh": {"user": "defib"}},
        "local": {"address": "127.0.0.1", "shell": "local"},
    }
    config = tmp_path / "config"
    await prepare(config, hosts, first, second, denied)
    done = await asyncio.to_thread(defib, config, "host", "setup", "--all", "--apply", ADMIN)
    assert done.returncode == 1, done
    assert "local: skipped, it has no SSH settings" in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line.split(":")[0].split("] ")[1] for line in lines if line.startswith("[")) == sorted(
        {*hosts} - {"local"}
    )
    assert re.search(r"^\[\d/8\] first: changed$", done.stdout, re.MULTILINE), done.stdout
    summary = lines[lines.index("8 hosts: 2 changed, 6 failed") :]
    assert summary[1:3] == ["  changed: first, second", "  failed:"]
    why = dict(line.strip().split(": ", 1) for line in summary[3:])
    assert "Permission denied" in why["denied"]
    assert "pin the host's key: defib discover --known-hosts unpinned" in why["unpinned"]
    assert "Connection refused" in why["refused"]
    assert "timed out" in why["silent"].lower()
    assert why["banner"]
    assert "ssh.key_file is not set" in why["keyless"]

    again = await asyncio.to_thread(defib, config, "host", "setup", "--group", "well", "--apply", ADMIN)
    assert again.returncode == 0, again
    assert again.stdout.splitlines()[-2:] == ["2 hosts: 2 already set up", "  already set up: first, second"]


@pytest.mark.needs("ssh-agent", "ssh-add")
@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize(
    ("sudo", "why"),
    [
        ("cat >/dev/null; exit 0", "the script was not run to its end"),
        ("cat >/dev/null; echo 'defib-setup: changed'; echo more", "the script was not run to its end"),
        ("echo 'sudo: a password is required' >&2; exit 1", "sudo: a password is required"),
        ("cat >/dev/null; kill -9 $$", "signal 9 ended the command"),
        ("exec yes wrong", "the output is longer than|timed out"),
    ],
)
async def test_a_host_cannot_pretend_by_its_output(launcher: Launcher, tmp_path: Path, sudo: str, why: str) -> None:
    server = await start_sshd(launcher, tmp_path / "host", sudo)
    await asyncio.to_thread(add_key, server)
    await prepare(tmp_path / "config", {"h": host_at(server.port)}, server)
    done = await asyncio.to_thread(
        defib, tmp_path / "config", "host", "setup", "h", "--apply", ADMIN, "--timeout", "20s"
    )
    assert done.returncode == 1, done
    assert re.search(why, done.stdout.splitlines()[-1]), done.stdout
    assert len(done.stdout) < 50_000


@pytest.mark.needs("ssh-agent", "ssh-add")
@pytest.mark.usefixtures("agent")
async def test_the_output_of_a_host_is_shown_escaped_and_bounded(launcher: Launcher, tmp_path: Path) -> None:
    sudo = r"""cat >/dev/null
for n in $(seq 300); do printf 'line %d \033]0;title\007 %1000s\n' $n x; done
printf '\r[1/1] other: changed\ndefib-setup: unchanged\n'"""
    server = await start_sshd(launcher, tmp_path / "host", sudo)
    await asyncio.to_thread(add_key, server)
    await prepare(tmp_path / "config", {"h": host_at(server.port)}, server)
    done = await asyncio.to_thread(defib, tmp_path / "config", "host", "setup", "h", "--apply", ADMIN)
    assert done.returncode == 0, done
    shown = [line for line in done.stdout.splitlines() if line.startswith("h | ")]
    assert shown[0] == "h | … 281 lines before"
    assert r"h | line 300 \x1b]0;title\x07" in shown[-2]
    assert shown[-1] == "h | [1/1] other: changed"
    assert len(shown) == 21
    assert max(map(len, shown)) < 600
    assert done.stdout.splitlines()[-3:] == [
        "[1/1] h: already set up",
        "1 host: 1 already set up",
        "  already set up: h",
    ]


async def test_each_host_has_a_deadline(tmp_path: Path, serve: Serve) -> None:
    hosts = {name: host_at(await serve(stay_silent)) for name in ("a", "b", "c")}
    await prepare(tmp_path / "config", hosts)
    arguments = ("host", "setup", "--all", "--apply", ADMIN, "--timeout", "1s", "--parallel", "2")
    done = await asyncio.to_thread(defib, tmp_path / "config", *arguments)
    assert done.returncode == 1
    lines = ["3 hosts: 3 failed", "  failed:", *(f"    {name}: timed out after 1 s" for name in hosts)]
    assert done.stdout.splitlines()[-5:] == lines, done


async def test_an_interrupted_run_says_what_was_not_set_up(tmp_path: Path, serve: Serve) -> None:
    connected, closed = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def hold(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        connected.release()
        while await reader.read(1000):
            pass
        closed.release()

    hosts = {name: host_at(await serve(hold)) for name in ("a", "b", "c", "d")}
    await prepare(tmp_path / "config", hosts)
    argv = [sys.executable, "-m", "defib", "host", "setup", *hosts, "--apply", ADMIN, "--parallel", "2"]
    process = await asyncio.create_subprocess_exec(
        *argv, "--config", str(tmp_path / "config"),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    for _ in range(2):
        await connected.acquire()
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert b"Traceback" not in err
    assert out.decode().splitlines() == [
        "4 hosts: 4 not set up",
        "  not set up:",
        "    a: interrupted; run it again",
        "    b: interrupted; run it again",
        "    c: interrupted before it began",
        "    d: interrupted before it began",
    ]
    for _ in range(2):  # ssh has ended
        await closed.acquire()
    assert connected.locked()  # no other was started


async def test_a_terminal_shows_which_hosts_are_being_set_up(tmp_path: Path, serve: Serve) -> None:
    hosts = {name: host_at(await serve(stay_silent)) for name in ("a", "b", "c", "d", "e")}
    await prepare(tmp_path / "config", hosts)
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TERM": "xterm", "COLUMNS": "200"}
    terminal = Terminal(["sh"], environment, tmp_path)
    try:
        terminal.type("defib host setup --all --apply admin --timeout 2s\n")
        await asyncio.to_thread(terminal.until, r"0 of 5 hosts finished; running: a, b, c and 2 more")
        await asyncio.to_thread(terminal.until, r"\r\x1b\[K\[1/5\] \w: failed \(timed out after 2 s\)")
        await asyncio.to_thread(terminal.until, r"5 hosts: 5 failed")
    finally:
        terminal.close()


@pytest.mark.needs("ssh-agent", "ssh-add", "setsid")
@pytest.mark.usefixtures("agent")
async def test_a_single_host_on_a_terminal_may_be_asked_about(launcher: Launcher, tmp_path: Path) -> None:
    """Ssh asks about a host key that is not pinned; what is answered counts. The host's output is escaped."""
    server = await start_sshd(
        launcher, tmp_path / "host", r"cat >/dev/null; printf 'it ran as %s \033]0;title\007\n' $1; exit 3"
    )
    await asyncio.to_thread(add_key, server)
    await prepare(tmp_path / "config", {"h": host_at(server.port, "localhost")})
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TERM": "xterm"}
    terminal = Terminal(["setsid", "--ctty", "--wait", "sh"], environment, tmp_path)
    try:
        terminal.type("defib host setup h --apply defib; echo status $?\n")
        await asyncio.to_thread(terminal.until, r"running ssh -p \d+ .* -- defib@localhost sudo sh -s")
        await asyncio.to_thread(terminal.until, r"yes/no")
        terminal.type("no\n")
        await asyncio.to_thread(terminal.until, r"status 255")
        (tmp_path / "config" / "known").write_text(server.known_hosts.read_text().replace("127.0.0.1", "localhost"))
        terminal.type("defib host setup h --apply defib; echo status $?\n")
        await asyncio.to_thread(terminal.until, r"it ran as sh \\x1b]0;title\\x07\r\nstatus 3")
    finally:
        terminal.close()


def test_scripts_are_written_where_only_their_owner_can_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "s3cret-token")
    config, scripts = tmp_path / "config", tmp_path / "scripts"
    control = {"command": {"restart": ["remake", "${TOKEN}"]}}
    wrapped = {**host_at(22, "10.0.0.1"), "control_ssh": {"key_file": "read", "wrapper": True}}
    hosts = {"a": wrapped, "b": host_at(22, "10.0.0.2"), "keyless": {"address": "10.0.0.3", "ssh": {"user": "u"}}}
    configure(config, hosts, {"it": {"host": "a", "probe": {"unit": {"name": "u"}}, "control": control}})
    create_keys(config, "read")
    scripts.mkdir()
    (scripts / "a.sh").write_text("old")
    (scripts / "a.sh").chmod(0o644)
    done = defib(config, "host", "setup", "--all", "--output", str(scripts))
    assert (done.returncode, done.stdout.splitlines()) == (1, [f"a: {scripts}/a.sh", f"b: {scripts}/b.sh"])
    assert "keyless: failed: ssh.key_file is not set" in done.stderr
    assert sorted(path.name for path in scripts.iterdir()) == ["a.sh", "b.sh"]
    assert {path.stat().st_mode & 0o777 for path in scripts.iterdir()} == {0o600}
    assert "s3cret-token" in (scripts / "a.sh").read_text()
    assert "s3cret-token" not in done.stdout + done.stderr
    for path in scripts.iterdir():
        subprocess.run(["sh", "-n", path], check=True)


async def test_hosts_behind_a_jump_host_are_reached_through_it(tmp_path: Path, serve: Serve) -> None:
    """With the addresses and ports of the inventory, the first jump host first."""
    jump = {**host_at(2201, "10.0.0.1")}
    inner = {**host_at(2202, "fd00::2"), "ssh": {**host_at(2202)["ssh"], "via": "jump"}}
    behind = {**host_at(2203, "10.0.0.3"), "ssh": {**host_at(2203)["ssh"], "via": "inner"}}
    await prepare(tmp_path / "config", {"jump": jump, "inner": inner, "behind": behind})
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ssh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/arguments; exit 255\n')
    (tools / "ssh").chmod(0o755)
    argv = [
        sys.executable,
        "-m",
        "defib",
        "host",
        "setup",
        "behind",
        "--apply",
        "admin",
        "--config",
        str(tmp_path / "config"),
    ]
    await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, check=False,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    words = (tmp_path / "arguments").read_text().splitlines()
    assert words[words.index("--") :] == ["--", "admin@10.0.0.3", "sudo", "-n", "sh", "-s"]
    known = tmp_path / "config" / "known"
    hops = []
    while proxy := next((word for word in words if word.startswith("ProxyCommand=")), None):
        words = shlex.split(proxy.removeprefix("ProxyCommand=").replace("%%", "%"))
        assert f'GlobalKnownHostsFile="/etc/ssh/ssh_known_hosts" "/etc/ssh/ssh_known_hosts2" "{known}"' in words
        hops.append((words[words.index("-p") + 1], words[words.index("-W") + 1], words[-1]))
    assert hops == [("2202", "10.0.0.3:2203", "admin@fd00::2"), ("2201", "[fd00::2]:2202", "admin@10.0.0.1")]


@pytest.mark.needs("ssh-agent", "ssh-add")
@pytest.mark.usefixtures("agent")
async def test_keys_that_are_pinned_are_trusted_on_the_way(launcher: Launcher, tmp_path: Path) -> None:
    sudo = "cat >/dev/null; echo 'defib-setup: changed'"
    jump = await start_sshd(launcher, tmp_path / "jump", sudo)
    behind = await start_sshd(launcher, tmp_path / "behind", sudo)
    for server in (jump, behind):
        await asyncio.to_thread(add_key, server)
    hosts = {"jump": host_at(jump.port), "behind": {**host_at(behind.port)}}
    hosts["behind"]["ssh"] = {**hosts["behind"]["ssh"], "via": "jump"}
    await prepare(tmp_path / "config", hosts, jump)
    with (tmp_path / "config" / "known").open("a") as known:
        known.write(behind.known_hosts.read_text())
    done = await asyncio.to_thread(defib, tmp_path / "config", "host", "setup", "behind", "--apply", ADMIN)
    assert (done.returncode, done.stdout.splitlines()[-2]) == (0, "1 host: 1 changed"), done


@pytest.mark.needs("root", "sudo", "unshare", "nsenter", "ssh-agent", "ssh-add")
@pytest.mark.usefixtures("agent")
async def test_discovery_as_the_administrator(launcher: Launcher, tmp_path: Path) -> None:
    """It sees what the account of Defib, which need not exist yet, cannot see."""
    machine = await start_machine(launcher, tmp_path / "machine")
    denied = await start_sshd(launcher, tmp_path / "denied", "echo 'sudo: a password is required' >&2; exit 1")
    await asyncio.to_thread(add_key, machine)
    await asyncio.to_thread(add_key, denied)
    hardened = {"ssh": {**host_at(machine.port)["ssh"], "user": "nobody-yet", "wrapper": True}}
    hosts = {"good": {**host_at(machine.port), **hardened}, "denied": host_at(denied.port)}
    config = tmp_path / "config"
    await prepare(config, hosts, machine, denied)
    done = await asyncio.to_thread(defib, config, "discover", "--all", "--as", ADMIN, "--json")
    assert done.returncode == 1, done
    good, refused = sorted(json.loads(done.stdout)["hosts"], key=lambda each: each["host"] != "good")
    assert good["error"] is None
    assert {each["process"]["name"] for each in good["listeners"] if each["port"] == machine.port} == {"sshd"}, (
        good["notes"],
        good["missing"],
        good["listeners"][:5],
    )
    assert "a password is required" in refused["error"]
    wrong = await asyncio.to_thread(defib, config, "discover", "good", "--as=-oProxyCommand=x", "--json")
    assert (wrong.returncode, wrong.stderr) == (
        1,
        "defib: argument --as: '-oProxyCommand=x' is not the name of a user\n",
    )
