"""Every example in docs/probes.md, loaded and run against a real server."""

import asyncio
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from aiohttp import web

from defib.demo.launcher import Launcher
from exporter.probes import PROBES
from exporter.results import ProbeResult
from exporter.scheduler.probe_runner import probe_once
from runtime.redaction import Redactor
from tests.integration import peers
from tests.integration.conftest import start_supervisord
from tests.integration.peers import Authority, ModelServer
from tests.support import eventually, loaded

TEXT = (Path(__file__).parents[2] / "docs" / "probes.md").read_text()
SECTIONS = {part.split("`")[0]: part.partition("\n## ")[0] for part in TEXT.split("\n## `")[1:]}
HOSTS = {"hosts": {"gpu-01": {"address": "127.0.0.1", "shell": "local"}}}
# Text in an example, and what stands for it here.
Replaced = dict[str, str]


def example(kind: str) -> str:
    (text,) = re.findall(r"```yaml\n(.*?)```", SECTIONS[kind], re.DOTALL)
    return str(text)


async def run(folder: Path, kind: str, replaced: Replaced) -> None:
    """Load a kind's example with the addresses of local servers, and probe its services."""
    text = example(kind)
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "services.yaml").write_text(text)
    (folder / "hosts.yaml").write_text(yaml.safe_dump(HOSTS))
    environ = {"GATEWAY_PASSWORD": "s3cret", "VLLM_API_KEY": "k3y12345", "RANKER_KEY": "k3y", "FEED_TOKEN": "t0ken"}
    known = await asyncio.to_thread(loaded, folder, environ)
    assert known.inventory.services
    for each in known.inventory.services.values():
        assert each.probe.kind == kind

        last: list[ProbeResult] = []

        async def up(one: Any = each, last: list[ProbeResult] = last) -> bool:
            last[:] = [await probe_once(one, known.inventory.hosts, Redactor(known.secrets))]
            return last[0].success

        try:
            await eventually(up)
        except AssertionError:
            raise AssertionError(f"{each.id}: {last[0].message}") from None


async def pages(request: web.Request) -> web.StreamResponse:
    if request.path == "/file_parse":
        form = await request.post()
        assert isinstance(form["files"], web.FileField)
        assert (form["files"].filename, form["files"].content_type) == ("sample.pdf", "application/pdf")
        return web.json_response({"md_content": "# Hello OCR"})
    if request.path == "/health":
        assert request.headers["Authorization"] == "Basic cHJvYmU6czNjcmV0"
        return web.json_response({"status": "ok", "queue": {"length": 7}, "workers": [{"state": "idle"}]})
    channels = [{"name": f"channel {number}", "state": "running", "fps": 25} for number in range(4)]
    return web.json_response({"cpu": {"usage": 40}, "channels": [*channels, {"name": "channel 4", "state": "failed"}]})


async def test_http(tmp_path: Path) -> None:
    (tmp_path / "sample.pdf").write_bytes(b"%PDF-1.4")
    authority = Authority.made(tmp_path / "gateway-ca.pem")
    async with peers.web_server(pages) as plain, peers.web_server(pages, authority.server("127.0.0.1")) as secure:
        await run(tmp_path, "http", {":8000": f":{plain}", "gateway.example": f"127.0.0.1:{secure}"})


async def test_status(tmp_path: Path) -> None:
    async with peers.web_server(pages) as port:
        await run(tmp_path, "status", {":8080": f":{port}"})


async def test_tcp(tmp_path: Path) -> None:
    async def banner(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await writer.drain()
        await reader.read()

    async def socks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(3) == b"\x05\x01\x00"
        writer.write(b"\x05\x00")
        await reader.read()

    async def console(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\r\nlogin: ")
        await reader.read()

    context = Authority.made(tmp_path / "mail-ca.pem").server("mail.example")
    async with (
        peers.mail_server(context) as mail, peers.raw_server(banner) as ssh, peers.chat_server() as chat,
        peers.raw_server(socks) as proxy, peers.raw_server(console) as telnet,
    ):  # fmt: skip
        await run(
            tmp_path, "tcp",
            {"mail.example:25": f"127.0.0.1:{mail}", "bastion.example:22": f"127.0.0.1:{ssh}",
             "irc.example:6667": f"127.0.0.1:{chat}", "socks.example:1080": f"127.0.0.1:{proxy}",
             "console.example:23": f"127.0.0.1:{telnet}"},
        )  # fmt: skip


async def test_udp(tmp_path: Path) -> None:
    def time_server(request: bytes) -> list[bytes]:
        assert (len(request), request[0] & 7) == (48, 3)  # a client's request (RFC 5905, 7.3)
        return [b"\x24\x01" + bytes(46)]

    async with peers.datagram_server(time_server) as port:
        await run(tmp_path, "udp", {"ntp.example:123": f"127.0.0.1:{port}"})


async def test_tls(tmp_path: Path) -> None:
    context = Authority.made(tmp_path / "www-ca.pem").server("127.0.0.1")
    async with peers.web_server(pages, context) as port:
        await run(tmp_path, "tls", {"www.example:443": f"127.0.0.1:{port}"})


async def test_dns(tmp_path: Path) -> None:
    with peers.name_server() as port:
        await run(tmp_path, "dns", {"ns.example:53": f"127.0.0.1:{port}", "secret.example": "nxdomain.example"})


@pytest.mark.needs("ping sockets")
async def test_icmp(tmp_path: Path) -> None:
    await run(tmp_path, "icmp", {"switch.example": "127.0.0.1"})


async def test_grpc(tmp_path: Path) -> None:
    own = Authority.made(tmp_path / "ca.pem").own.issue_cert("other.example")
    credentials = grpc.ssl_server_credentials([(own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())])
    async with peers.health_server() as port, peers.health_server(credentials) as secure:
        await run(
            tmp_path, "grpc",
            {"ranker.example:50051": f"127.0.0.1:{port}", "ranking.v1.Ranker": "well",
             "gateway.example:443": f"127.0.0.1:{secure}"},
        )  # fmt: skip


async def test_websocket(tmp_path: Path) -> None:
    async with peers.web_server(peers.echoing) as port:
        await run(tmp_path, "websocket", {"live.example:8765": f"127.0.0.1:{port}"})


async def test_openai(tmp_path: Path) -> None:
    async with peers.web_server(ModelServer("k3y12345").answer) as port:
        await run(tmp_path, "openai", {":8000": f":{port}"})


@pytest.mark.needs("dockerd", "busybox")
async def test_container(tmp_path: Path, container: str) -> None:
    await run(tmp_path, "container", {"mineru_container": container})


@pytest.mark.needs("systemd")
async def test_unit(tmp_path: Path, systemd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{systemd}:{os.environ['PATH']}")
    await run(tmp_path, "unit", {"nginx.service": "well.service"})


async def test_program(tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = "[program:worker]\ncommand=/bin/sleep 1000\nstartsecs=0\n[group:stack]\nprograms=worker\n"
    config = await start_supervisord(launcher, tmp_path, worker)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    await run(tmp_path, "program", {"/etc/supervisor/stack.conf": str(config)})


async def test_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        await run(tmp_path, "port", {"8001": str(listening.getsockname()[1])})


async def test_file(tmp_path: Path) -> None:
    (tmp_path / "db-1.dump").write_bytes(b"x" * 2**21)
    await run(tmp_path, "file", {"/var/backups": str(tmp_path)})


async def test_command(tmp_path: Path) -> None:
    await run(tmp_path, "command", {})


async def test_python(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n# (\S+)\n(.*?)```", SECTIONS["python"], re.DOTALL)
    (tmp_path / code[0]).parent.mkdir()
    (tmp_path / code[0]).write_text(code[1])
    await run(tmp_path, "python", {})


async def test_heartbeat(tmp_path: Path) -> None:
    (tmp_path / "services.yaml").write_text(example("heartbeat"))
    inventory = (await asyncio.to_thread(loaded, tmp_path)).inventory
    for each in inventory.services.values():
        result = await probe_once(each, {}, Redactor())
        assert (result.reason, result.message) == (
            "error",
            "only the exporter receives pings: see `defib heartbeat list`",
        )


def test_every_kind_has_an_example() -> None:
    assert [kind for kind in PROBES if f"test_{kind}" not in globals()] == []
