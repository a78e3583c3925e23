"""Real peers on loopback: sshd, and servers that misbehave."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from defib.demo import sshd
from defib.demo.keeper import Keeper
from defib.demo.sshd import Sshd
from defib.demo.stack import free_ports
from fleet.shells.ssh import Login, SshShell

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Serve = Callable[[Handler], Awaitable[int]]


@pytest.fixture
async def host(keeper: Keeper, tmp_path: Path) -> Sshd:
    """A real sshd with an account of its own."""
    (port,) = free_ports(1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return await sshd.start(keeper, tmp_path / "sshd", port, {"PATH": path})


@pytest.fixture
async def shell(host: Sshd) -> AsyncIterator[SshShell]:
    made = SshShell(Login("127.0.0.1", host.port, host.user, host.key_file, host.known_hosts))
    yield made
    await made.close()


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start servers made of one function; returns their port."""
    servers: list[asyncio.Server] = []

    async def start(handler: Handler) -> int:
        async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handler(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(guarded, "127.0.0.1", 0)
        servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    yield start
    for server in servers:
        server.close()
