"""Commands on hosts whose sshd accepts few sessions on a connection (MaxSessions)."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncssh
import pytest

from defib.demo import sshd
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from fleet.shells import ShellError
from fleet.shells.ssh import Login, SshShell
from tests.support import eventually

pytestmark = pytest.mark.needs("sshd")
Limit = Callable[[int], Awaitable[SshShell]]


@pytest.fixture
async def limit(host: Sshd, launcher: Launcher) -> AsyncIterator[Limit]:
    """Restart sshd with another MaxSessions; returns a shell, which connects again after a further restart."""
    folder, pid = host.key_file.parent, host.pid
    text = (folder / "config").read_text()
    shell = SshShell(Login("127.0.0.1", host.port, host.user, host.key_file, host.known_hosts))

    async def restarted(sessions: int) -> SshShell:
        nonlocal pid
        (folder / "config").write_text(f"{text}MaxSessions {sessions}\n")
        assert pid is not None
        await launcher.kill(pid, signal.SIGTERM)
        pid = (await sshd.restart(launcher, folder, host)).pid
        return shell

    yield restarted
    await shell.close()


def refusals(host: Sshd) -> int:
    return (host.key_file.parent / "log").read_text().count("no more sessions")


async def run_echoes(shell: SshShell, count: int) -> list[str]:
    """Run commands at the same time; returns their outputs."""
    script = "sleep 0.2; echo $0"
    done = await asyncio.gather(*(shell.run(["sh", "-c", script, str(n)], timeout=60) for n in range(count)))
    return [each.stdout for each in done]


@pytest.mark.parametrize("sessions", [1, 2])
async def test_commands_wait_for_the_sessions_that_the_server_accepts(host: Sshd, limit: Limit, sessions: int) -> None:
    shell = await limit(sessions)
    expected = [f"{number}\n" for number in range(12)]
    assert await run_echoes(shell, 12) == expected
    learned = refusals(host)
    assert learned > 0
    assert await run_echoes(shell, 12) == expected
    assert refusals(host) - learned < learned  # a session that has just ended may count a little longer


async def test_a_command_without_a_free_session_is_not_run(limit: Limit, tmp_path: Path) -> None:
    """Its error names the limit, and the connection stays: the other command is not lost."""
    shell = await limit(1)
    begun, end, ran = tmp_path / "begun", tmp_path / "end", tmp_path / "ran"
    script = f"touch {begun}; while [ ! -e {end} ]; do sleep 0.1; done; echo done"
    long = asyncio.create_task(shell.run(["sh", "-c", script], timeout=100))

    async def has_begun() -> bool:
        return begun.exists()

    await eventually(has_begun)
    for _ in range(2):
        with pytest.raises(ShellError, match=r"no free SSH session within 1 s; .* MaxSessions"):
            await shell.run(["touch", str(ran)], timeout=1)
    waiting = asyncio.create_task(shell.run(["echo", "next"], timeout=100))
    end.touch()
    assert (await long).stdout == "done\n"
    assert (await waiting).stdout == "next\n"
    assert not ran.exists()


async def test_the_limit_is_forgotten_with_the_connection(limit: Limit, tmp_path: Path) -> None:
    await run_echoes(await limit(1), 4)
    shell = await limit(10)
    (await shell.connection()).abort()
    await asyncio.sleep(0)
    meet = 'touch "$1/$2"; while [ $(ls "$1" | wc -l) -lt 4 ]; do sleep 0.05; done; echo met'
    place = tmp_path / "meeting"
    place.mkdir()
    together = (shell.run(["sh", "-c", meet, "sh", str(place), str(number)], timeout=100) for number in range(4))
    assert [done.stdout for done in await asyncio.gather(*together)] == ["met\n"] * 4


async def test_a_command_that_waits_uses_the_next_connection(limit: Limit) -> None:
    """One that hangs takes the connection with it, not those that wait for its session."""
    shell = await limit(1)
    assert (await shell.run(["echo", "first"], timeout=60)).stdout == "first\n"
    hanging = asyncio.create_task(shell.run(["sh", "-c", "trap '' TERM; sleep 30; sleep 30; sleep 30"], timeout=1))
    await asyncio.sleep(0.5)
    started = time.monotonic()
    assert (await shell.run(["echo", "next"], timeout=100)).stdout == "next\n"
    assert time.monotonic() - started < 90
    assert (await hanging).status is None


class _NoSessions(asyncssh.SSHServer):
    def session_requested(self) -> bool:
        return False


async def test_a_server_that_accepts_no_session_says_so_soon(host: Sshd) -> None:
    """Waiting would not help: such a server permits forwarding only."""
    folder = host.key_file.parent
    options = {"server_host_keys": [str(folder / "host")], "authorized_client_keys": str(folder / "authorized")}
    server = await asyncssh.listen("127.0.0.1", 0, server_factory=_NoSessions, **options)
    known_hosts = folder / "others"
    public = (folder / "known_hosts").read_text().split(" ", 1)[1]
    known_hosts.write_text(f"[127.0.0.1]:{server.get_port()} {public}")
    shell = SshShell(Login("127.0.0.1", server.get_port(), host.user, host.key_file, known_hosts))
    started = time.monotonic()
    with pytest.raises(ShellError, match="no SSH session"):
        await shell.run(["true"], timeout=100)
    assert time.monotonic() - started < 60
    await shell.close()
    server.close()
