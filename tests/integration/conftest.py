"""Real peers on loopback: sshd, and servers that misbehave."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from defib.demo import service, sshd
from defib.demo.feishu import FeishuSimulator
from defib.demo.launcher import Launcher
from defib.demo.sshd import Sshd
from defib.demo.stack import reserve_ports
from fleet.shells.ssh import Login, SshShell
from tests.integration.loop import Loop
from tests.integration.model_api import Gateway, ModelApi
from tests.integration.peers import Transcoder, raw_server, web_server

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Serve = Callable[[Handler], Awaitable[int]]


@pytest.fixture
async def host(launcher: Launcher, tmp_path: Path) -> Sshd:
    """A real sshd with an account of its own."""
    (port,) = reserve_ports(1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return await sshd.start(launcher, tmp_path / "sshd", port, {"PATH": path})


@pytest.fixture
async def shell(host: Sshd) -> AsyncIterator[SshShell]:
    made = SshShell(Login("127.0.0.1", host.port, host.user, host.key_file, host.known_hosts))
    yield made
    await made.close()


@pytest.fixture
async def api() -> AsyncIterator[ModelApi]:
    """A stand-in for a model API."""
    made = ModelApi()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def gateway(launcher: Launcher, tmp_path: Path, api: ModelApi) -> AsyncIterator[Gateway]:
    """A gateway before `api`, which a test configures and starts."""
    made = Gateway(launcher, tmp_path, api)
    yield made
    await made.close()


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start servers made of one function; returns their port."""
    async with AsyncExitStack() as stack:

        async def start(handler: Handler) -> int:
            return await stack.enter_async_context(raw_server(handler))

        yield start


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate for web.test with its key, in one file."""
    path = tmp_path / "web.pem"
    write_certificate(path)
    return path


def write_certificate(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "web.test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("web.test")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@pytest.fixture(scope="module")
def container(docker: None) -> Iterator[str]:
    """A container that sleeps, of an image of its own name."""
    name = f"defib-test-{os.getpid()}"
    asyncio.run(service.run_container(name, name, ["/bin/sleep", "1000"]))
    yield name
    subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=True)
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=True)


@pytest.fixture
def compose_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker compose` by Debian's docker-compose, which is of the version before the plugin."""
    plugins = tmp_path / "docker" / "cli-plugins"
    plugins.mkdir(parents=True)
    told = {"SchemaVersion": "0.1.0", "Vendor": "x", "Version": "1", "ShortDescription": "x"}
    (plugins / "docker-compose").write_text(
        f"""#!/bin/sh
if [ "$1" = docker-cli-plugin-metadata ]; then echo '{json.dumps(told)}'; exit; fi
[ "$1 $2" = "compose version" ] && exit
[ "$1 $2" = "compose --project-directory" ] && cd "$3" && shift 3 && exec docker-compose "$@"
"""
    )
    (plugins / "docker-compose").chmod(0o755)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


async def start_supervisord(launcher: Launcher, folder: Path, programs: str) -> Path:
    """Start a supervisord with these programs; gives its configuration."""
    config = folder / "supervisord.conf"
    config.write_text(
        f"[supervisord]\nnodaemon=true\nlogfile={folder}/supervisord.log\npidfile={folder}/supervisord.pid\n"
        # Otherwise another supervisord on this machine removes the logs of programs when it starts.
        f"childlogdir={folder}\n"
        f"[unix_http_server]\nfile={folder}/supervisor.sock\n"
        f"[supervisorctl]\nserverurl=unix://{folder}/supervisor.sock\n"
        "[rpcinterface:supervisor]\n"
        f"supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n{programs}"
    )
    await launcher.start([f"{Path(sys.executable).parent}/supervisord", "-c", str(config)], folder / "supervisord.out")
    return config


@pytest.fixture
async def transcoder() -> AsyncIterator[Transcoder]:
    """A transcoder with channels that can be restarted."""
    made = Transcoder()
    async with web_server(made.answer) as made.port:
        yield made


@pytest.fixture
async def feishu() -> AsyncIterator[FeishuSimulator]:
    """A running simulator of Feishu."""
    made = FeishuSimulator()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def loop(launcher: Launcher, tmp_path: Path, host: Sshd) -> AsyncIterator[Loop]:
    made = Loop(launcher, tmp_path, host)
    yield made
    await made.feishu.stop()
    await made.stack.client.aclose()


@pytest.fixture
async def small_disk(loop: Loop) -> AsyncIterator[Path]:
    """A filesystem of 16 MiB for the database."""
    path = loop.folder / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], check=True)
    yield path
    if "remediator" in loop.stack.pids:
        await loop.launcher.kill(loop.stack.pids["remediator"], signal.SIGTERM)
    subprocess.run(["umount", path], check=True)
