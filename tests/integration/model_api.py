"""A stand-in for a model API, which answers byte by byte as a test says, and the gateway before it."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.support import NO_TLS, eventually

ADMIN = {"Authorization": "Bearer a-token-for-admins"}
KEY = "nvapi-a-key-for-the-upstream"
EVENT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
NIM_429 = b'{"status":429,"title":"Too Many Requests"}'


@dataclass
class Received:
    """A request as it arrived."""

    method: str
    target: str
    head: list[str]  # lines
    body: bytes
    at: float
    ended_at: float | None = None  # when the gateway closed the connection before the response was complete
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def header(self, name: str) -> list[str]:
        lines = (line.partition(": ") for line in self.head)
        return [value for key, _, value in lines if key.lower() == name.lower()]


Respond = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def whole(body: bytes = b"{}", status: str = "200 OK", *headers: str) -> Respond:
    """Answer with a complete response."""

    async def respond(_request: Received, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    return respond


def completion(model: str = "m", prompt: int = 7, completion: int = 5) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return json.dumps({"object": "chat.completion", "model": model, "choices": [], "usage": usage}).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def endless(_request: Received, writer: asyncio.StreamWriter) -> None:
    """Answer with events that never end."""
    writer.write(EVENT_STREAM)
    while True:
        writer.write(chunk(b"data: {}\n\n"))
        await writer.drain()
        await asyncio.sleep(0.05)


class ModelApi:
    """Answers each request with `respond`; with `rate`, it enforces that in any 60 seconds, as NIM does."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.respond: Respond = whole(completion(), "200 OK", "Content-Type: application/json")
        self.rate: int | None = None
        self.refused = 0
        (self.port,) = reserve_ports(1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=2**26)
        self._connections: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        self._server.close()
        for each in self._connections:
            each.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await self._read(reader)) is not None:
                watch = asyncio.create_task(self._watch(reader, request))
                if self._is_too_many(request):
                    await whole(NIM_429, "429 Too Many Requests")(request, writer)
                else:
                    await self.respond(request, writer)
                await writer.drain()
                watch.cancel()
                if writer.is_closing():
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _is_too_many(self, request: Received) -> bool:
        recent = sum(each.at > request.at - 60 for each in self.received)
        too_many = self.rate is not None and recent > self.rate
        self.refused += too_many
        return too_many

    async def _watch(self, reader: asyncio.StreamReader, request: Received) -> None:
        """Note when the gateway closes the connection."""
        while not reader.at_eof():
            await asyncio.sleep(0.01)
        request.ended_at = time.monotonic()
        request.closed.set()

    async def _read(self, reader: asyncio.StreamReader) -> Received | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.IncompleteReadError:
            return None
        method, target, _ = head[0].split(" ")
        request = Received(method, target, head[1:-2], b"", time.monotonic())
        length = request.header("Content-Length")
        request.body = await reader.readexactly(int(length[0])) if length else b""
        self.received.append(request)
        return request


class Gateway:
    """A running gateway, as its clients see it."""

    def __init__(self, launcher: Launcher, folder: Path, api: ModelApi) -> None:
        self.launcher, self.folder, self.api = launcher, folder, api
        (self.port,) = reserve_ports(1)
        base = f"http://127.0.0.1:{self.port}"
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(verify=NO_TLS, base_url=base, trust_env=False, timeout=300, limits=limits)
        self.log = folder / "log"
        self.pid = 0

    def configure(self, upstreams: dict[str, Any] | None = None, access: Any = None, **more: Any) -> None:
        (self.folder / "config").mkdir(exist_ok=True)
        one = {"api": {"url": self.api.url, "api_key": KEY, "rate": "1000/min"}}
        settings = {"token": "a-token-for-admins", "state_file": "../state", "default": "api"}
        gateway = {**settings, "upstreams": upstreams or one, **more}
        written = {"gateway": gateway, **({"access": access} if access else {})}
        (self.folder / "config" / "a.yaml").write_text(yaml.safe_dump(written))

    def upstream(self, **more: Any) -> dict[str, Any]:
        return {"url": self.api.url, "api_key": KEY, "rate": "1000/min", **more}

    async def start(self) -> None:
        await self.launch()
        await eventually(self.is_healthy)

    async def launch(self) -> None:
        argv = [sys.executable, "-m", "defib", "gateway", "--config", str(self.folder / "config")]
        argv += ["--listen", f"127.0.0.1:{self.port}"]
        self.pid = await self.launcher.start(argv, self.log)

    async def is_healthy(self) -> bool:
        try:
            return (await self.client.get("/-/healthy")).is_success
        except httpx.HTTPError:
            return False

    async def chat(self, body: Any = None, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body or {"model": "m", "messages": []}).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, content=content, headers={"Content-Type": "application/json", **named})

    async def status(self, name: str = "api") -> dict[str, Any]:
        return dict((await self.client.get("/api/v1/status", headers=ADMIN)).json()["upstreams"][name])

    async def metrics(self) -> dict[str, float]:
        page = (await self.client.get("/metrics")).text
        lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    async def logged(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Return the log lines of an event, once there are so many: they may be written after a response."""

        async def are_written() -> bool:
            return len(self.find_logged(event)) >= count

        await eventually(are_written, 20)
        return self.find_logged(event)

    def find_logged(self, event: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [each for each in map(json.loads, lines) if each["event"] == event]

    async def close(self) -> None:
        await self.client.aclose()
