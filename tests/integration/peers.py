"""Real servers on loopback, one for each protocol that is probed."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import dnslib
import dnslib.server
import grpc
import trustme
from aiohttp import WSMsgType, web
from aiosmtpd.smtp import SMTP
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from defib.demo.stack import reserve_ports

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Authority:
    """A certificate authority, and the file with its certificate."""

    own: trustme.CA
    file: Path

    @classmethod
    def made(cls, file: Path) -> "Authority":
        own = trustme.CA()
        own.cert_pem.write_to_path(file)
        return cls(own, file)

    def server(self, *names: str, **options: Any) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.own.issue_cert(*names, **options).configure_cert(context)
        return context


@contextlib.asynccontextmanager
async def web_server(handle: Handle, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve every path with `handle`; yields the port."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


class Transcoder:
    """A server with channels, each of which a request restarts once it `may_restart`."""

    def __init__(self) -> None:
        self.channels = {"ch1": "running", "ch2": "running", "线路/3": "running", "ch4": "running"}
        self.restarts: list[str] = []
        self.broken: set[str] = set()  # channels that a restart does not help
        self.may_restart = asyncio.Event()
        self.may_restart.set()
        self.port = 0

    async def answer(self, request: web.Request) -> web.Response:
        if request.path == "/status":
            channels = [{"name": name, "state": state, "cpu": 3.5} for name, state in self.channels.items()]
            return web.json_response({"channels": channels})
        name = (await request.json())["channel"]
        self.restarts.append(name)
        await self.may_restart.wait()
        if name not in self.broken:
            self.channels[name] = "running"
        return web.json_response({"restarted": name})

    @property
    def service(self) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}"
        components = {
            "each": "$.channels[*]",
            "name": "$.name",
            "up": {"$.state": "running"},
            "values": {"cpu": "$.cpu"},
        }
        restart = {"url": f"{url}/restart?channel={{component}}", "json": {"channel": "{component}"}}
        http = {"components": ["ch1", "ch2", "线路/3"], "component": {"restart": restart}}
        return {
            "probe": {
                "every": "200ms", "retry_every": "200ms", "timeout": "10s",
                "status": {"url": f"{url}/status", "components": components},
            },
            "control": {"http": http, "timeout": "60s", "start_within": "4s"},
        }  # fmt: skip


@contextlib.asynccontextmanager
async def raw_server(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], **options: Any
) -> AsyncIterator[int]:
    """Serve TCP with one function; yields the port. The backlog is large, for a busy machine."""

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0, **{"backlog": 1000, **options})
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()


class _DatagramServer(asyncio.DatagramProtocol):
    def __init__(self, answers: Callable[[bytes], Iterable[bytes]]) -> None:
        self._answers = answers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)  # uvloop's is no subclass

    def datagram_received(self, data: bytes, address: Any) -> None:
        for answer in self._answers(data):
            self._transport.sendto(answer, address)


@contextlib.asynccontextmanager
async def datagram_server(answers: Callable[[bytes], Iterable[bytes]]) -> AsyncIterator[int]:
    """Answer each datagram with those that a function returns; yields the port."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _DatagramServer(answers), ("127.0.0.1", 0))
    try:
        yield int(transport.get_extra_info("sockname")[1])
    finally:
        transport.close()


@contextlib.asynccontextmanager
async def mail_server(context: ssl.SSLContext | None) -> AsyncIterator[int]:
    """A mail server that offers STARTTLS."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(object(), hostname="mail.test", tls_context=context, loop=loop), "127.0.0.1", 0
    )
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()


@contextlib.asynccontextmanager
async def chat_server() -> AsyncIterator[int]:
    """The registration of an IRC server (RFC 2812, 3.1)."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b":irc NOTICE * :*** Looking up your hostname\r\n")
        await reader.readuntil(b"USER ")
        await reader.readline()
        writer.write(b"PING :cookie-4711\r\n")
        if await reader.readline() == b"PONG :cookie-4711\r\n":
            writer.write(b":irc 001 probe :Welcome\r\n")
        await writer.drain()
        await reader.read()

    async with raw_server(handle) as port:
        yield port


_RECORDS = {
    "text": '60 TXT "v=spf1 -all"',
    "local": "60 A 127.0.0.1",
    "four": "60 A 127.0.0.1",
    "lossy": "60 A 127.0.0.1",
    "garbled": "60 A 127.0.0.1",
    "six": "60 AAAA ::1",
    "alias": "60 CNAME local.test.\nlocal.test. 60 A 127.0.0.1",
    "soa": "60 SOA ns.test. admin.test. 2026113001 7200 3600 1209600 300",
}


class _Zone(dnslib.server.BaseResolver):  # type: ignore[misc] # dnslib has no types
    """Answers by the first label of the name."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, int]] = set()  # first labels and types of queries

    def resolve(self, request: Any, handler: Any) -> Any:
        reply = request.reply()
        first = str(request.q.qname).split(".")[0]
        name = str(request.q.qname)
        if first in ("servfail", "nxdomain"):
            reply.header.rcode = getattr(dnslib.RCODE, first.upper())
        elif first == "www":
            reply.add_answer(*dnslib.RR.fromZone(f"{name} 60 A 192.0.2.1\n{name} 60 A 192.0.2.2"))
            reply.add_auth(*dnslib.RR.fromZone("test. 60 NS ns.test."))
            reply.add_ar(*dnslib.RR.fromZone("ns.test. 60 A 192.0.2.53"))
        elif first == "many":
            reply.add_answer(
                *dnslib.RR.fromZone("\n".join(f"{name} 60 A 10.0.{n // 250}.{n % 250}" for n in range(300)))
            )
        elif first == "norecursion":
            reply.header.rcode = dnslib.RCODE.REFUSED if request.header.rd else dnslib.RCODE.NOERROR
        elif first in _RECORDS:
            reply.add_answer(*dnslib.RR.fromZone(f"{name} {_RECORDS[first]}"))
        self._lose(first, request.q.qtype)
        if first == "garbled" and request.q.qtype == dnslib.QTYPE.AAAA:
            reply.add_answer(dnslib.RR(name, dnslib.QTYPE.AAAA, rdata=dnslib.RD(b"too short")))
        return reply

    def _lose(self, first: str, kind: int) -> None:
        """Raise an error, upon which the server does not answer, if the query is to be lost."""
        is_first = (first, kind) not in self.asked
        self.asked.add((first, kind))
        if first == "silent" or (first == "four" and kind == dnslib.QTYPE.AAAA) or (first == "lossy" and is_first):
            raise dnslib.DNSError("it says nothing")


class _QuietLogger(dnslib.server.DNSLogger):  # type: ignore[misc] # dnslib has no types
    def log_pass(self, *_: Any) -> None:
        pass

    log_prefix = log_request = log_reply = log_truncated = log_error = log_data = log_recv = log_send = log_pass


@contextlib.contextmanager
def name_server() -> Iterator[int]:
    """A name server for `test.`, over UDP and TCP on the same port."""
    zone = _Zone()
    (port,) = reserve_ports(1)  # a port chosen by the kernel for UDP may be in use for TCP
    servers = [
        dnslib.server.DNSServer(zone, port=port, address="127.0.0.1", tcp=tcp, logger=_QuietLogger())
        for tcp in (False, True)
    ]
    for server in servers:
        server.start_thread()
    try:
        yield port
    finally:
        for server in servers:
            server.server.shutdown()
            server.server.server_close()
            server.thread.join(5)


@contextlib.asynccontextmanager
async def health_server(credentials: Any = None) -> AsyncIterator[int]:
    """A gRPC server with the standard health service: `well` serves, `ill` does not."""
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    statuses = health_pb2.HealthCheckResponse
    for name, status in (("", statuses.SERVING), ("well", statuses.SERVING), ("ill", statuses.NOT_SERVING)):
        await servicer.set(name, status)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield int(port)
    finally:
        await server.stop(None)


async def echoing(request: web.Request) -> web.StreamResponse:
    """A WebSocket that echoes messages, and responds to the JSON message `ping` with `pong`."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            asked = message.data
            await socket.send_str('{"op": "pong"}' if asked == '{"op": "ping"}' else asked)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


class ModelServer:
    """An OpenAI-compatible server, as strict about requests as vLLM; `misbehave` selects a failure."""

    def __init__(self, key: str = "", misbehave: str = "") -> None:
        self.key, self.misbehave = key, misbehave
        self.asked: list[dict[str, Any]] = []
        self.sent = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        if self.misbehave.isdigit():
            return web.json_response({"error": {"message": "refused"}}, status=int(self.misbehave))
        if request.path in ("/v1/models", "/v1/embeddings"):
            return await self._answer_list(request)
        if request.path != "/v1/chat/completions" or request.method != "POST":
            return web.json_response({"error": {"message": "no such path"}}, status=404)
        asked = await request.json()
        self.asked.append(asked)
        words = ["", "4", " is", " the", " sum"] if self.misbehave != "empty" else [""]
        if self.misbehave != "endless":
            words = words[: asked.get("max_completion_tokens", asked.get("max_tokens")) + 1]
        usage = {"prompt_tokens": 9, "completion_tokens": len(words) - 1, "total_tokens": 8 + len(words)}
        if not asked["stream"]:
            message = {"role": "assistant", "content": "".join(words)}
            return web.json_response(
                {"choices": [{"index": 0, "message": message, "finish_reason": "length"}], "usage": usage}
            )
        return await self._stream(request, words, usage, with_usage="stream_options" in asked)

    async def _answer_list(self, request: web.Request) -> web.Response:
        if request.method == "GET" and request.path == "/v1/models":
            data: list[dict[str, Any]] = [{"id": name, "object": "model"} for name in ("qwen3-32b", "bge-m3")]
        else:
            asked = await request.json()
            self.asked.append(asked)
            vector = [0.25] * asked.get("dimensions", 1024)
            data = [{"object": "embedding", "index": 0, "embedding": [] if self.misbehave == "empty" else vector}]
        return web.json_response({"object": "list", "data": data, "model": "bge-m3"})

    async def _stream(
        self, request: web.Request, words: list[str], usage: dict[str, int], *, with_usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def event(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            await response.write(f"data: {text}\n\n".encode())

        for word in words:
            await event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            self.sent += 1
            await asyncio.sleep(0.02)
        while self.misbehave == "endless":
            await event({"choices": [{"index": 0, "delta": {"content": " more"}, "finish_reason": None}]})
            self.sent += 1
            await asyncio.sleep(0.005)
        if self.misbehave == "error":
            await event({"error": {"message": "out of memory", "code": 500}})
        if self.misbehave == "cut":
            assert request.transport
            request.transport.abort()
            return response
        if self.misbehave not in ("error", "unended"):
            await event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            if with_usage:
                await event({"choices": [], "usage": usage})
            await event("[DONE]")
        return response
