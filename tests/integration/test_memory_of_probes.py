"""What a peer has sent does not outlive its probe: without garbage collection, too, which may be a minute away."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.probes.held_bodies import HELD
from exporter.probes.net import http_response
from exporter.results import ProbeResult
from exporter.scheduler.probe_runner import probe_once
from runtime.redaction import Redactor
from tests.integration import peers
from tests.support import eventually, inventory_of

LARGE = 3_000_000
BODY = b"x" * LARGE
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answering(body: bytes, kind: str = "text/plain") -> Serve:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + body)
        await writer.drain()
        await reader.read()

    return serve


async def talking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(BODY)
    await writer.drain()
    await reader.read()


def find_large(among: Callable[[], list[Any]]) -> Iterator[str]:
    """Yield what refers to large values."""
    for each in among():
        for value in gc.get_referents(each):
            if isinstance(value, bytes | bytearray | str) and len(value) > LARGE // 4 and value is not BODY:
                yield f"{type(each).__qualname__}: {len(value)}"


CASES: dict[str, tuple[Serve, str, Any]] = {
    "up": (answering(BODY), "http", {}),
    "status": (answering(BODY), "http", {"expect": {"status": [404]}}),
    "body_matches": (answering(BODY), "http", {"expect": {"body_matches": "nope"}}),
    "json": (answering(b'"' + BODY + b'"', "application/json"), "http", {"expect": {"json": {"$.a": 1}}}),
    "max_body": (answering(BODY), "http", {"max_body": "2MiB"}),
    "status page": (answering(BODY), "status", {"components": {"each": "$.x[*]", "name": "$.n", "up": {"$.s": "ok"}}}),
    "dialogue": (talking, "tcp", {"dialogue": [{"expect": "nope"}]}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_what_was_received_is_forgotten(tmp_path: Path, name: str) -> None:
    serve, kind, options = CASES[name]
    async with peers.raw_server(serve) as port:
        where = {"address": f"127.0.0.1:{port}"} if kind == "tcp" else {"url": f"http://127.0.0.1:{port}/"}
        service = {"probe": {"timeout": "60s", kind: {**where, **options}}}
        known = await asyncio.to_thread(inventory_of, tmp_path, {"services": {"it": service}})
        redact = Redactor(known.secrets)
        await probe_once(known.inventory.services["it"], {}, redact)  # fills caches
        gc.collect()
        before = set(find_large(gc.get_objects))
        gc.disable()
        try:
            for _ in range(2):
                result = await probe_once(known.inventory.services["it"], {}, redact)
                del result
            left = sorted(set(find_large(gc.get_objects)) - before)
        finally:
            gc.enable()
    assert left == []


async def test_bodies_have_a_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short bodies are always read, and a large one is read again once others have ended."""
    monkeypatch.setattr(http_response, "BODIES_LIMIT", LARGE)
    go_on = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        length = 1000 if b"small" in line else LARGE - 1000
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
        writer.write(BODY[: length - 1])
        if b"slow" in line:
            await go_on.wait()
        writer.write(b"x")

    async with peers.raw_server(serve) as port:
        urls = {name: f"http://127.0.0.1:{port}/{name}" for name in ("slow", "large", "small")}
        services = {name: {"probe": {"timeout": "100s", "http": {"url": url}}} for name, url in urls.items()}
        known = await asyncio.to_thread(inventory_of, tmp_path, {"services": services})

        async def probe(name: str) -> ProbeResult:
            return await probe_once(known.inventory.services[name], {}, Redactor(known.secrets))

        async def is_held() -> bool:
            return HELD.total == LARGE - 1001  # all but the last byte

        slow = asyncio.create_task(probe("slow"))
        await eventually(is_held)
        refused = await probe("large")
        assert (refused.reason, "all bodies that are being read" in refused.message) == ("body", True), refused.message
        assert (await probe("small")).success
        go_on.set()
        assert (await slow).success
        assert (await probe("large")).success
        go_on.clear()
        for _ in range(3):
            late = asyncio.create_task(probe("slow"))
            await eventually(is_held)
            late.cancel()  # as at a timeout
            await asyncio.wait([late])
        assert (await probe("large")).success
