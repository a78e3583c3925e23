"""`defib discover --known-hosts`: the keys of real SSH servers, and of hosts that misbehave."""

import asyncio
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from defib.discovery import known_hosts_file
from defib.discovery.known_hosts_file import HostKey, add_keys
from fleet.shells.ssh import Login, SshShell
from runtime.errors import DefibError
from tests.integration.conftest import Serve
from tests.integration.test_host_setup import configure, defib
from tests.integration.test_host_setup_many import send_banner_without_end, stay_silent
from tests.terminal import Terminal

pytestmark = pytest.mark.needs("sshd", "ssh-keygen")
OTHER = asyncssh.generate_private_key("ssh-ed25519")
Listen = Callable[..., Awaitable[int]]


def line_of(key: asyncssh.SSHKey, name: str) -> str:
    return f"{name} {' '.join(key.export_public_key().decode().split()[:2])}\n"


def host_at(port: int, known_hosts: str = "known", **ssh: Any) -> dict[str, Any]:
    """A host without an account: its key for reading does not exist yet."""
    return {"address": "127.0.0.1", "ssh": {"port": port, "key_file": "none", "known_hosts": known_hosts, **ssh}}


async def discover(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(defib, config, "discover", "--known-hosts", *arguments)


def states(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {each["host"]: each["state"] for each in json.loads(done.stdout)["keys"]}


@pytest.fixture
async def listen() -> AsyncIterator[Listen]:
    """Start servers of asyncssh with some keys; returns their port."""
    async with AsyncExitStack() as stack:

        async def start(*keys: asyncssh.SSHKey) -> int:
            server = await stack.enter_async_context(
                asyncssh.listen("127.0.0.1", 0, server_host_keys=list(keys), reuse_address=True)
            )
            return int(server.get_port())

        yield start


async def start_sshds(launcher: Launcher, folder: Path, *names: str) -> dict[str, Sshd]:
    started = {}
    for name, port in zip(names, reserve_ports(len(names)), strict=True):
        started[name] = await sshd.start(launcher, folder / name, port, {"PATH": os.environ["PATH"]})
    return started


async def test_new_keys_are_pinned_and_others_are_reported(launcher: Launcher, tmp_path: Path, serve: Serve) -> None:
    config, known = tmp_path / "config", tmp_path / "config" / "known"
    servers = await start_sshds(launcher, tmp_path, "fresh", "pinned", "changed", "gate")
    (refusing,) = reserve_ports(1)
    gate = servers["gate"]
    account = {"user": gate.user, "key_file": str(gate.key_file)}
    hosts = {
        **{name: host_at(server.port) for name, server in servers.items()},
        "gate": host_at(gate.port, **account),
        "behind": host_at(servers["fresh"].port, "behind", via="gate"),
        "beyond": host_at(servers["fresh"].port, "beyond", via="changed"),
        "refused": host_at(refusing),
        "silent": host_at(await serve(stay_silent)),
        "banner": host_at(await serve(send_banner_without_end)),
        "local": {"address": "127.0.0.1", "shell": "local"},
    }
    await asyncio.to_thread(configure, config, hosts)
    pinned = "# ours\n" + "".join(
        [
            servers["pinned"].known_hosts.read_text(),
            gate.known_hosts.read_text(),
            line_of(OTHER, f"[127.0.0.1]:{servers['changed'].port}").rstrip(),  # without an end of the line
        ]
    )
    known.write_text(pinned)

    shown = await discover(config, "--all")
    assert (shown.returncode, known.read_text()) == (1, pinned), shown
    assert "Traceback" not in shown.stderr, shown.stderr
    assert not (config / "behind").exists()
    table = {line.split()[0]: line for line in shown.stdout.splitlines()[1:10]}
    for name, server in servers.items():
        listed = subprocess.run(
            ["ssh-keygen", "-lf", tmp_path / name / "host"], capture_output=True, text=True, check=True
        ).stdout
        assert table[name].split()[1:4] == [f"[127.0.0.1]:{server.port}", "ssh-ed25519", listed.split()[1]]
    ends = {name: line.split()[4:] for name, line in table.items()}
    assert (ends["fresh"], ends["pinned"], ends["gate"], ends["behind"]) == (["new"], ["pinned"], ["pinned"], ["new"])
    assert f"CHANGED (pinned is ssh-ed25519 {OTHER.get_fingerprint()})" in table["changed"]
    assert "unreachable: " in table["refused"]
    assert "Connection refused" in table["refused"]
    assert "unreachable: through changed: " in table["beyond"]
    assert "no host key within 10 s" in table["silent"]
    assert "unreachable: " in table["banner"]
    assert "local: skipped, it has no SSH settings" in shown.stderr
    assert "  ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub\n" in shown.stdout
    assert f"ssh-keygen -R '[127.0.0.1]:{servers['changed'].port}' -f {known}" in shown.stdout
    assert "2 new keys not pinned; --yes pins without asking" in shown.stderr
    assert "Traceback" not in shown.stderr

    done = await discover(config, "fresh", "pinned", "changed", "behind", "gate", "--yes")
    assert done.returncode == 1, done  # one has changed
    assert f"pinned 1 key in {known}" in done.stdout
    assert f"pinned 1 key in {config}/behind" in done.stdout
    assert known.read_text() == f"{pinned}\n{servers['fresh'].known_hosts.read_text()}"
    assert (config / "behind").read_text() == servers["fresh"].known_hosts.read_text()
    assert (config / "behind").stat().st_mode & 0o777 == 0o644

    before = known.stat()
    again = await discover(config, "fresh", "pinned", "behind", "gate", "--yes", "--json")
    assert (again.returncode, states(again)) == (0, dict.fromkeys(("fresh", "pinned", "behind", "gate"), "pinned"))
    assert (known.stat().st_mtime_ns, known.stat().st_size) == (before.st_mtime_ns, before.st_size)
    fresh = servers["fresh"]
    shell = SshShell(Login("127.0.0.1", fresh.port, fresh.user, fresh.key_file, known))
    assert (await shell.run(["echo", "in"], timeout=20)).output == "in"
    await shell.close()


async def test_a_changed_key_is_pinned_after_the_old_one_was_removed(tmp_path: Path, listen: Listen) -> None:
    """With the command that is shown."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    port = await listen(key)
    await asyncio.to_thread(configure, tmp_path, {"h": host_at(port)})
    known = tmp_path / "known"
    known.write_text(line_of(OTHER, f"[127.0.0.1]:{port}"))
    changed = await discover(tmp_path, "h", "--yes")
    assert (changed.returncode, known.read_text()) == (1, line_of(OTHER, f"[127.0.0.1]:{port}"))
    (fix,) = (line for line in changed.stdout.splitlines() if line.startswith("  ssh-keygen -R"))
    subprocess.run(["sh", "-c", fix], check=True, capture_output=True)
    assert (await discover(tmp_path, "h", "--yes")).returncode == 0
    assert known.read_text() == line_of(key, f"[127.0.0.1]:{port}")


@pytest.mark.parametrize(
    ("written", "state"),
    [
        ("{hashed}", "pinned"),
        ("@revoked {name} {key}\n", "revoked"),
        ("@cert-authority {name} {other}\n", "pinned"),
        ("127.0.0.1 {key}\n", "pinned"),  # accepted at all ports
        ("127.0.0.1 {other}\n", "new"),  # of the server at port 22
        ("[127.0.0.*]:* {other}\n", "changed"),
        ("{name},other {other}\n{name} {key}\n", "pinned"),
        ("{name} not a key\n", "new"),
        ("nothing\n", "new"),  # a line that is ignored
        ("\udcff\n", "new"),
    ],
)
async def test_entries_of_known_hosts_are_understood(tmp_path: Path, listen: Listen, written: str, state: str) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    port = await listen(key)
    await asyncio.to_thread(configure, tmp_path, {"h": host_at(port)})
    name, known = f"[127.0.0.1]:{port}", tmp_path / "known"
    keys = {each: line_of(which, "").strip() for each, which in (("key", key), ("other", OTHER))}
    if written == "{hashed}":
        known.write_text(line_of(key, name))
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
        assert known.read_text().startswith("|1|")
    else:
        known.write_bytes(written.format(name=name, **keys).encode(errors="surrogateescape"))
    content = known.read_bytes()
    done = await discover(tmp_path, "h", "--json")
    assert (states(done), done.returncode) == ({"h": state}, 0 if state == "pinned" else 1), done
    assert known.read_bytes() == content
    if state == "new":
        done = await discover(tmp_path, "h", "--yes", "--json")
        assert (states(done), known.read_bytes()) == ({"h": "pinned"}, content + line_of(key, name).encode())


async def test_a_pinned_key_of_another_type_counts(tmp_path: Path, listen: Listen) -> None:
    """A host may have keys of several types: one of those that are pinned is asked for, else what ssh prefers."""
    ed25519, rsa = (asyncssh.generate_private_key(name) for name in ("ssh-ed25519", "ssh-rsa"))
    port, without = await listen(ed25519, rsa), await listen(ed25519)
    hosts = {"both": host_at(port), "fresh": host_at(port, "empty"), "gone": host_at(without)}
    await asyncio.to_thread(configure, tmp_path, hosts)
    (tmp_path / "known").write_text(line_of(rsa, f"[127.0.0.1]:{port}") + line_of(rsa, f"[127.0.0.1]:{without}"))
    done = await discover(tmp_path, "--all", "--json")
    found = {each["host"]: (each["key_type"], each["state"]) for each in json.loads(done.stdout)["keys"]}
    assert found == {"both": ("ssh-rsa", "pinned"), "fresh": ("ssh-ed25519", "new"), "gone": ("ssh-ed25519", "changed")}


async def test_controls_may_have_a_file_of_their_own(tmp_path: Path, listen: Listen) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    host = {**host_at(await listen(key)), "control_ssh": {"key_file": "none", "known_hosts": "for-controls"}}
    await asyncio.to_thread(configure, tmp_path, {"h": host})
    done = await discover(tmp_path, "h", "--yes", "--json")
    assert done.returncode == 0
    assert [each["known_hosts"] for each in json.loads(done.stdout)["keys"]] == [
        str(tmp_path / "known"), str(tmp_path / "for-controls"),
    ]  # fmt: skip
    assert (tmp_path / "known").read_text() == (tmp_path / "for-controls").read_text() != ""


@pytest.mark.parametrize(
    ("known_hosts", "message"),
    [
        ("missing/known", "the directory {folder}/missing does not exist: create it, such as with `install -d"),
        ("folder", "folder: cannot be read: Is a directory"),
        ("/dev/null", "/dev/null: is not a regular file"),
        ("/proc/version", "/proc/version: cannot be"),
    ],
)
async def test_a_file_that_cannot_be_written_is_named(
    tmp_path: Path, listen: Listen, known_hosts: str, message: str
) -> None:
    """The keys of other files are pinned nevertheless."""
    port = await listen(asyncssh.generate_private_key("ssh-ed25519"))
    (tmp_path / "folder").mkdir()
    await asyncio.to_thread(configure, tmp_path, {"bad": host_at(port, known_hosts), "good": host_at(port)})
    done = await discover(tmp_path, "bad", "good", "--yes")
    assert done.returncode == 1
    assert message.format(folder=tmp_path) in done.stdout + done.stderr, done
    assert "Traceback" not in done.stderr
    assert (tmp_path / "known").read_text() != ""


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 1), ("", 1)])
async def test_a_terminal_is_asked(tmp_path: Path, listen: Listen, answer: str, status: int) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    port = await listen(key)
    await asyncio.to_thread(configure, tmp_path, {"h": host_at(port)})
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TERM": "xterm", "HOME": "/"}
    terminal = Terminal(["sh"], environment, tmp_path)
    try:
        terminal.type(f"defib --config {tmp_path} discover --known-hosts h; echo status $?\n")
        await asyncio.to_thread(terminal.until, r"Pin 1 new key\? \[y/N\] $")
        assert key.get_fingerprint() in terminal.seen
        assert not (tmp_path / "known").exists()
        terminal.type(f"{answer}\n")
        await asyncio.to_thread(terminal.until, f"status {status}")
    finally:
        terminal.close()
    assert (tmp_path / "known").exists() == (answer == "y")


async def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "known"
    keys = [HostKey("127.0.0.1", 1000 + number % 20, OTHER) for number in range(100)]
    await asyncio.gather(*(asyncio.to_thread(add_keys, path, [key]) for key in keys))
    lines = path.read_text().splitlines(keepends=True)
    assert sorted(lines) == sorted({key.line for key in keys})


def test_a_key_that_was_pinned_meanwhile_is_not_contradicted(tmp_path: Path) -> None:
    path, key = tmp_path / "known", asyncssh.generate_private_key("ssh-ed25519")
    path.write_text(line_of(OTHER, "h"))
    assert add_keys(path, [HostKey("h", 22, key), HostKey("h", 22, OTHER)]) == ["changed", "pinned"]
    assert path.read_text() == line_of(OTHER, "h")


def test_a_lock_that_is_never_released_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_hosts_file, "LOCK_TIMEOUT", 0.2)
    path = tmp_path / "known"
    path.touch()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(DefibError, match=r"another program has locked it for 0\.2 s"):
            add_keys(path, [HostKey("h", 22, OTHER)])


def test_a_file_keeps_its_mode_and_links(tmp_path: Path) -> None:
    real, path = tmp_path / "real", tmp_path / "known"
    real.touch(mode=0o640)
    path.symlink_to(real)
    assert add_keys(path, [HostKey("fd00::1", 22, OTHER), HostKey("fd00::2", 2222, OTHER)]) == ["new", "new"]
    assert real.read_text() == line_of(OTHER, "fd00::1") + line_of(OTHER, "[fd00::2]:2222")
    assert (path.is_symlink(), real.stat().st_mode & 0o777) == (True, 0o640)


def test_mistakes_are_named(tmp_path: Path) -> None:
    configure(tmp_path, {"here": {"address": "127.0.0.1", "shell": "local"}, "h": {"address": "${ADDRESS}", "ssh": {}}})
    for arguments, message in (
        ([], "no hosts: name them, or use --group GROUP or --all"),
        (["nowhere"], "the inventory has no host 'nowhere'"),
        (["here"], "the host 'here' has no SSH settings"),
        (["h"], "hosts.h.address: the environment variable ADDRESS is not set"),
    ):
        done = defib(tmp_path, "discover", "--known-hosts", *arguments)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
