"""The probe scheduler with many services: hanging services do not delay others."""

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web

from exporter.api.services import service_json
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


async def test_paused_services_are_probed_only_on_request(tmp_path: Path) -> None:
    """A pause ends when it is ended, or when its time has passed; the state before it is not shown any more."""
    async with peers.web_server(_answer) as port:
        probe = {"every": "100ms", "retry_every": "100ms", "http": {"url": f"http://127.0.0.1:{port}/"}}
        known = await asyncio.to_thread(inventory_of, tmp_path, {"services": {n: {"probe": probe} for n in "ab"}})
        scheduler = ProbeScheduler(ExporterMetrics(), Redactor())
        await scheduler.apply(known.inventory)
        paused, other = scheduler.services["a"], scheduler.services["b"]

        async def probed_again() -> None:
            """Wait until both services have been probed again."""
            successes = [each.state.successes for each in (paused, other)]

            async def have_more() -> bool:
                return all(
                    each.state.successes > before for each, before in zip((paused, other), successes, strict=True)
                )

            await eventually(have_more)

        async def other_probed_often() -> None:
            successes = other.state.successes

            async def has_more() -> bool:
                return other.state.successes >= successes + 5

            await eventually(has_more)

        try:
            await probed_again()
            await scheduler.pause({"a"}, 3600)
            await other_probed_often()
            before = paused.state.successes
            lines = "".join(paused.render().values())
            assert 'service_probing_paused{service="a"' in lines
            assert "service_up" not in lines
            assert "service_probe_success" not in lines
            await other_probed_often()
            assert paused.state.successes == before
            assert (await scheduler.probe_now(paused)).success
            await scheduler.pause({"a"}, 3600)
            # Who asked has the result; nobody else takes it for the state of the rest of the pause.
            assert (paused.state.up, paused.state.successes) == (True, before + 1)
            assert "service_up" not in "".join(paused.render().values())
            assert service_json(paused, None, None)["up"] is None
            await scheduler.pause((), 0)
            assert "service_probing_paused" not in "".join(paused.render().values())
            await probed_again()
            await scheduler.pause({"a"}, 0.3)
            assert paused.visible_state[0].up is None
            await probed_again()
            lines = "".join(paused.render().values())
            assert 'service_up{service="a"' in lines
            assert "service_probing_paused" not in lines
            assert [event.state for event in scheduler.events.page(None, 100).events if event.name == "a"] == [
                "up", "unknown", "up", "unknown", "up",
            ]  # fmt: skip
        finally:
            await scheduler.close()


async def _answer(_request: web.Request) -> web.Response:
    return web.Response()
