"""The probe scheduler with many services: hanging services do not delay others."""

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web

from exporter.metrics import ExporterMetrics
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.redaction import Redactor
from tests.integration import peers
from tests.support import eventually, inventory_of


async def test_hanging_services_do_not_delay_others(tmp_path: Path) -> None:
    async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with peers.raw_server(hang) as hanging, peers.raw_server(flood) as flooding:
        slow = {"every": "1s", "timeout": "10m", "http": {"url": f"http://127.0.0.1:{hanging}/"}}
        endless = {"every": "1s", "timeout": "2s", "http": {"url": f"http://127.0.0.1:{flooding}/", "max_body": "1GiB"}}
        quick: dict[str, Any] = {"every": "200ms", "tcp": {"address": f"127.0.0.1:{hanging}"}}
        services = {f"slow-{n}": {"probe": slow} for n in range(300)}
        services |= {f"endless-{n}": {"probe": endless} for n in range(3)}
        services |= {f"quick-{n}": {"probe": quick} for n in range(20)}
        known = await asyncio.to_thread(inventory_of, tmp_path, {"services": services})
        scheduler = ProbeScheduler(ExporterMetrics(), Redactor())
        await scheduler.apply(known.inventory)

        async def probed_often() -> bool:
            return all(scheduler.services[f"quick-{n}"].state.successes >= 10 for n in range(20))

        try:
            await eventually(probed_often)
            assert all(scheduler.services[f"slow-{n}"].last is None for n in range(300))
        finally:
            await scheduler.close()


async def test_a_reload_notices_changed_files_and_keeps_cached_tokens(tmp_path: Path) -> None:
    """A changed file is read again; a cached token does not make a service count as changed."""
    sent: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        if request.path == "/token":
            return web.json_response({"access_token": "t0ken123", "expires_in": 3600})
        if request.method == "POST":
            form = await request.post()
            assert isinstance(form["f"], web.FileField)
            sent.append(form["f"].file.read())
        return web.Response()

    async with peers.web_server(take) as port:
        url = f"http://127.0.0.1:{port}/"
        oauth2 = {"token_url": f"{url}token", "client_id": "me", "client_secret": "s3cret99"}
        services: dict[str, Any] = {
            "upload": {"probe": {"http": {"url": url, "method": "POST", "files": {"f": {"path": "it.txt"}}}}},
            "token": {"probe": {"http": {"url": url, "auth": {"oauth2": oauth2}}}},
        }
        scheduler = ProbeScheduler(ExporterMetrics(), Redactor())
        try:
            for text in ("one", "two, and longer"):
                (tmp_path / "it.txt").write_text(text)
                known = await asyncio.to_thread(inventory_of, tmp_path, {"services": services})
                before = scheduler.services["token"].task if scheduler.services else None
                await scheduler.apply(known.inventory)
                assert before in (None, scheduler.services["token"].task)
                for probed in scheduler.services.values():
                    assert (await scheduler.probe_now(probed)).success
        finally:
            await scheduler.close()
    assert sent == [b"one", b"two, and longer"]
