"""Servers that send too much, or in many small parts: the event loop is never blocked for long."""

import asyncio
import json
import struct
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fleet.inventory.access import OidcAccess
from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import SudoOptions
from fleet.json_client import RESPONSE_LIMIT as CLIENT_LIMIT
from fleet.json_client import ClientError, JsonClient
from fleet.shells.local import LocalShell
from remediator.clients.alerts import (
    MAX_BODY,
    MAX_LABELS,
    InvalidPayloadError,
    PayloadTooLargeError,
    parse_webhook,
)
from remediator.execution.controls.http import HTTP, HttpControlOptions
from remediator.execution.controls.http import RESPONSE_LIMIT as CONTROL_LIMIT
from remediator.execution.controls.runner import ControlRunner
from remediator.notifications.channels import http
from remediator.notifications.channels.http import RESPONSE_LIMIT, HttpReply, send_request
from remediator.sign_in.registry import create_oidc
from remediator.sign_in.services import SignInError
from runtime.http_clients import limit_interim_responses
from runtime.payloads import decode_json, parse_body
from tests.integration import frames, peers
from tests.integration.frames import frame
from tests.support import NO_TLS, eventually, leaves_the_loop_free, probed

MIB = 2**20
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _build_bomb(size: int) -> bytes:
    """Return the beginning of a gzip stream of `size` MiB of zeros; a full flush makes all of its blocks equal."""
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    first, second = (stream.compress(bytes(MIB)) + stream.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + second * (size - 1)


BOMB = _build_bomb(500)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
# The headers, and what follows them without end.
ANSWERS = {
    "500 MB of gzip": (OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB), BOMB),
    "1 GB": (OK + b"Content-Length: 1000000000\r\n\r\n", bytes(65536)),
    "chunks of one byte": (CHUNKED, b"1\r\n \r\n" * 11_000),
    "interim responses": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 2000),
}


def answering(head: bytes, rest: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        while True:
            writer.write(rest)
            await writer.drain()

    return serve


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "interim responses"])
async def test_answers_to_a_control(name: str) -> None:
    async with peers.raw_server(answering(*ANSWERS[name])) as port:
        options = HttpControlOptions.model_validate({"start": {"url": f"http://127.0.0.1:{port}/start"}})

        async def start() -> None:
            completed = await HTTP.run("start", options, ControlRunner(LocalShell(), SudoOptions(), 60.0))
            assert (completed.status, completed.output[:8]) == (0, "HTTP 200")
            assert len(completed.output) <= CONTROL_LIMIT + len("HTTP 200 ")

        await leaves_the_loop_free(start)


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "interim responses"])
async def test_answers_of_a_chat_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "DEADLINE", 100.0)  # a busy machine takes long
    async with (
        peers.raw_server(answering(*ANSWERS[name])) as port,
        httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client,
    ):

        async def send() -> None:
            reply = await send_request(client, "POST", f"http://127.0.0.1:{port}/hook", b"{}", {})
            assert (reply.status, reply.error, len(reply.body)) == (200, "", RESPONSE_LIMIT)

        await leaves_the_loop_free(send)


async def test_interim_responses_to_a_control_and_to_a_message() -> None:
    async with peers.raw_server(answering(*ANSWERS["interim responses"])) as port:
        url = f"http://127.0.0.1:{port}/"
        options = HttpControlOptions.model_validate({"start": {"url": url}})

        async def start() -> None:
            completed = await HTTP.run("start", options, ControlRunner(LocalShell(), SudoOptions(), 60.0))
            assert (completed.status, completed.why) == (None, "no response: RemoteProtocolError")

        await leaves_the_loop_free(start)
        async with limit_interim_responses(httpx.AsyncClient(verify=NO_TLS, trust_env=False)) as client:

            async def send() -> None:
                assert "RemoteProtocolError" in (await send_request(client, "POST", url, b"{}", {})).error

            await leaves_the_loop_free(send)


async def test_interim_responses_and_connections_that_are_kept() -> None:
    """Some interim responses are usual, however their parts arrive, and the next request may have some, too."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            for part in (
                b"HTTP/1.1 103 Early Hints\r\n\r\nHTT",
                b"P/1.1 20",
                b"0 OK\r\nContent-Length: 300000\r\n\r\n",
            ):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
            writer.write(b"HTTP/1.1 100 " * 20_000 + bytes(40_000))
            await writer.drain()

    async with (
        peers.raw_server(serve) as port,
        limit_interim_responses(httpx.AsyncClient(verify=NO_TLS, trust_env=False)) as client,
    ):
        for _ in range(3):
            assert len((await client.get(f"http://127.0.0.1:{port}/")).content) == 300_000


async def test_a_short_answer_is_read_although_the_connection_is_lost() -> None:
    """A message that was sent must not be sent again."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b'Content-Length: 99\r\n\r\n{"code": 0}')

    async with peers.raw_server(serve) as port, httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:
        reply = await send_request(client, "POST", f"http://127.0.0.1:{port}/hook", b"{}", {})
    assert reply == HttpReply(200, reply.headers, b'{"code": 0}')


@pytest.mark.parametrize("name", ["500 MB of gzip", "1 GB"])
async def test_answers_of_an_api(name: str) -> None:
    async with peers.raw_server(answering(*ANSWERS[name])) as port:
        client = JsonClient(Endpoint(url=f"http://127.0.0.1:{port}"))

        async def request() -> None:
            with pytest.raises(ClientError, match=f"longer than {CLIENT_LIMIT} bytes"):
                await client.request("GET", "/api/v2/alerts")

        await leaves_the_loop_free(request)
        await client.close()


@pytest.mark.parametrize(
    ("name", "within", "error"),
    [("chunks of one byte", 1.0, "Timeout"), ("interim responses", 100.0, "RemoteProtocolError")],
)
async def test_endless_answers_of_an_api(name: str, within: float, error: str) -> None:
    async with peers.raw_server(answering(*ANSWERS[name])) as port:
        client = JsonClient(Endpoint(url=f"http://127.0.0.1:{port}"))

        async def request() -> None:
            with pytest.raises(ClientError, match=error):
                await client.request("GET", "/api/v2/alerts", within)

        await leaves_the_loop_free(request)
        await client.close()


# What a server sends, what follows that without end, and the reason and message of the failure.
ENDLESS = {
    "chunks of one byte": (CHUNKED, b"1\r\n \r\n" * 11_000, "protocol", "chunks, most shorter than 8 bytes"),
    "a long Location": (
        b"HTTP/1.1 302 Found\r\nLocation: http://" + "é".encode() * 100_000 + b"/\r\nContent-Length: 0\r\n\r\n", b"x" * 65536,
        "protocol", "redirected to a URL that is longer than 8192 characters",
    ),
    "headers": (OK, b"a:\r\n" * 16_000, "protocol", "the response headers are longer than"),
    "interim responses": (b"", b"HTTP/1.1 100 \n\n" * 16_000, "protocol", "the response headers are longer than"),
    "a folded header": (OK + b"a: b", b"\n b" * 16_000, "protocol", "the response headers are longer than"),
    "many lines": (OK + b"a :\n b\n" * 2499 + b"\n", b"x" * 65536, "body", "longer than max_body"),
    "too many lines": (OK + b"a :\n b\n" * 20_000 + b"\n", b"x" * 65536, "protocol", "more than 5000 header lines"),
    "chunk sizes": (CHUNKED, b"1\n\n" * 16_000, "protocol", "the answer is not HTTP"),
    "an extension of a chunk": (CHUNKED + b"1;", b"a" * 65536, "protocol", "the response headers are longer than"),
    "trailers": (CHUNKED + b"0\n", b"a:\n" * 16_000, "protocol", "the response headers are longer than"),
    "500 MB of gzip": (*ANSWERS["500 MB of gzip"], "body", "the decoded body is longer than max_body"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
async def test_answers_to_an_http_probe(tmp_path: Path, name: str) -> None:
    head, rest, reason, message = ENDLESS[name]
    async with peers.raw_server(answering(head, rest)) as port:

        async def probe() -> None:
            options = {"url": f"http://127.0.0.1:{port}/", "expect": {"body_matches": "."}}
            result = await probed(tmp_path, "http", options)
            assert (result.reason, message in result.message) == (reason, True), result.message

        await leaves_the_loop_free(probe)


# Records that OpenSSL passes over, or that it collects: HelloRequest, one for each record or many, and a certificate
# whose end never comes.
HANDSHAKES = {
    "empty messages": b"\x16\x03\x03\x00\x04" + bytes(4),
    "records of empty messages": b"\x16\x03\x03\x40\x00" + bytes(16384),
    "parts of a message": b"\x16\x03\x03\x00\x01\x0b",
}


@pytest.mark.parametrize("name", HANDSHAKES)
@pytest.mark.parametrize("kind", ["tls", "http", "dns"])
async def test_tls_handshakes(tmp_path: Path, name: str, kind: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        while True:
            writer.write(HANDSHAKES[name] * max(1, 65536 // len(HANDSHAKES[name])))
            await writer.drain()

    async with peers.raw_server(serve) as port:
        options: dict[str, dict[str, Any]] = {
            "tls": {"address": f"127.0.0.1:{port}"}, "http": {"url": f"https://127.0.0.1:{port}/"},
            "dns": {"server": f"127.0.0.1:{port}", "name": "www.test", "transport": "tls"},
        }  # fmt: skip

        async def probe() -> None:
            result = await probed(tmp_path, kind, options[kind], "5s")
            assert (result.reason, result.duration < 4) == ("tls", True), (result.message, result.duration)

        await leaves_the_loop_free(probe)


@pytest.mark.parametrize("code", [100, 103])
async def test_interim_responses_to_a_websocket_handshake(tmp_path: Path, code: int) -> None:
    async with peers.raw_server(answering(b"", b"HTTP/1.1 %d Go On\r\nLink: x\r\n\r\n" % code * 10_000)) as port:

        async def probe() -> None:
            result = await probed(tmp_path, "websocket", {"url": f"ws://127.0.0.1:{port}/"})
            assert (result.reason, "more than 10 responses" in result.message) == ("protocol", True), result.message

        await leaves_the_loop_free(probe)


@pytest.mark.parametrize("name", ["chunks of one byte", "interim responses"])
async def test_answers_of_a_provider_of_openid_connect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with peers.raw_server(answering(*ANSWERS[name])) as port:
        settings = {
            "issuer": f"http://127.0.0.1:{port}",
            "client_id": "c",
            "client_secret": "s",
            "default_role": "viewer",
        }

        async def check() -> None:
            service = await asyncio.to_thread(create_oidc, OidcAccess.model_validate(settings))  # it loads libraries
            monkeypatch.setattr("remediator.sign_in.oidc.DEADLINE", 1.0)
            with pytest.raises(SignInError, match=r"did not answer within 1 s|RemoteProtocolError"):
                await service.check()
            await service.close()

        await leaves_the_loop_free(check)


STREAMS = {
    "chunks of one byte": b"1\r\nx\r\n" * 11_000,
    "empty lines": b"1\r\n\n\r\n" * 11_000,
    "small events": b'2d\r\ndata:{"choices":[{"delta":{"content":"x"}}]}\n\r\n' * 1000,
}


@pytest.mark.parametrize("name", STREAMS)
async def test_streams_of_a_model(tmp_path: Path, name: str) -> None:
    async with peers.raw_server(answering(CHUNKED, STREAMS[name])) as port:
        options = {"url": f"http://127.0.0.1:{port}", "model": "m", "max_tokens": 100_000}

        async def probe() -> None:
            result = await probed(tmp_path, "openai", options)
            assert result.reason == ("protocol" if name != "small events" else None), result.message

        await leaves_the_loop_free(probe)


SETTINGS = frame(frames.SETTINGS)
_LONG = b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000  # a header of 4,000 bytes that enters the table, at 62
# What a server sends after its settings, what follows that without end, and the message of the failure.
HTTP2: dict[str, tuple[bytes, bytes, str]] = {
    "pings": (b"", frame(frames.PING, bytes(8)), "more than 1000 frames"),
    "answers to pings": (b"", frame(frames.PING, bytes(8), flags=frames.ACK), "more than 1000 frames"),
    "resets of the stream": (b"", frame(frames.RST_STREAM, b"\0\0\0\2", 1), "reset the stream: INTERNAL_ERROR"),
    "resets of other streams": (b"", frame(frames.RST_STREAM, b"\0\0\0\2", 3), "more than 1000 frames"),
    "window updates": (b"", frame(frames.WINDOW_UPDATE, b"\0\0\0\1"), "more than 1000 frames"),
    "window updates of the stream": (b"", frame(frames.WINDOW_UPDATE, b"\0\0\0\1", 1), "more than 1000 frames"),
    "settings": (b"", frame(frames.SETTINGS, b"\0\x03\0\0\0\1"), "more than 1024 bytes of settings"),
    "empty settings": (b"", SETTINGS, "more than 1000 frames"),
    "many settings": (
        b"", frame(frames.SETTINGS, b"".join(struct.pack("!HI", 1000 + n, n) for n in range(2700))),
        "more than 1024 bytes of settings",
    ),
    "priorities": (b"", frame(frames.PRIORITY, b"\0\0\0\0\1", 1), "more than 1000 frames"),
    "unknown frames": (b"", frame(0xBE, b"x", 1), "more than 1000 frames"),
    "long unknown frames": (b"", frame(0xBE, bytes(16_000), 1), "more than 262144 bytes"),
    "promises": (b"", frame(frames.PUSH_PROMISE, b"\0\0\0\2\x88", 1, frames.END_HEADERS), "violates HTTP/2"),
    "headers": (b"", frames.headers(*frames.GRPC), "violates HTTP/2"),
    "interim headers": (b"", frames.headers((":status", "103")), "more than 16384 bytes of headers"),
    "continuations": (frame(frames.HEADERS, b"", 1), frame(frames.CONTINUATION, b"", 1), "violates HTTP/2: ProtocolError: Too many"),
    "long continuations": (
        frame(frames.HEADERS, b"", 1), frame(frames.CONTINUATION, bytes(1000), 1), "more than 16384 bytes of headers",
    ),
    "empty data": (frames.headers(*frames.GRPC), frame(frames.DATA, b"", 1), "more than 1000 frames"),
    "padding": (frames.headers(*frames.GRPC), frame(frames.DATA, b"\xff" + bytes(255), 1, 8), "violates HTTP/2"),
    "data": (frames.headers(*frames.GRPC), frame(frames.DATA, bytes(1000), 1), "longer than 8192 bytes"),
    "data without headers": (b"", frame(frames.DATA, bytes(1000), 1), "violates HTTP/2"),
    "data of other streams": (b"", frame(frames.DATA, bytes(1000), 3), "violates HTTP/2"),
    "long frames": (b"", frame(0xBE, bytes(16_385)), "a frame of more than 16384 bytes"),
    "copies of a header": (
        b"", frame(frames.HEADERS, _LONG + b"\xbe" * 12_000, 1, frames.END_HEADERS), "more than 16384 bytes of headers",
    ),
    "short headers": (b"", frame(frames.HEADERS, b"\x84" * 16_000, 1, frames.END_HEADERS), "more than 16384 bytes of headers"),
    "sizes of the table": (b"", frame(frames.HEADERS, b"\x20" * 16_000, 1, frames.END_HEADERS), "violates HTTP/2"),
    "ends of the connection": (b"", frame(frames.GOAWAY, b"\x7f\xff\xff\xff\0\0\0\0"), "more than 1000 frames"),
    "an end of the connection": (
        frame(frames.GOAWAY, bytes(7) + b"\x0btoo many pings"), b"", "ENHANCE_YOUR_CALM (too many pings)",
    ),
}  # fmt: skip
# What a server sends without settings.
OTHERS: dict[str, tuple[bytes, bytes, str]] = {
    "HTTP/1.1": (
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
        "the answer is not HTTP/2: 'HTTP/1.1 400 Bad Request\\r\\n\\r\\n'",
    ),
    "text": (b"", b"hello\r\n", "the answer is not HTTP/2"),
    "zeros": (b"", bytes(1000), "the answer is not HTTP/2"),
    "data first": (b"", frame(frames.DATA, bytes(1000), 1), "the answer is not HTTP/2"),
    "acknowledged settings first": (b"", frame(frames.SETTINGS, flags=frames.ACK), "the answer is not HTTP/2"),
}


@pytest.mark.parametrize("name", [*HTTP2, *OTHERS])
async def test_frames_to_a_grpc_probe(tmp_path: Path, name: str) -> None:
    head, rest, message = OTHERS[name] if name in OTHERS else (SETTINGS + HTTP2[name][0], *HTTP2[name][1:])
    rest *= 65536 // len(rest) if rest else 0
    sent: list[int] = []
    connections: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        sent.append(0)
        try:
            await reader.readexactly(24)
            writer.write(head)
            while rest:
                writer.write(rest)
                await writer.drain()
                sent[-1] += len(rest)
            await reader.read()
        finally:
            connections.discard(writer)

    async with peers.raw_server(serve) as port:

        async def probe() -> None:
            result = await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}"})
            assert (result.reason, message in result.message) == ("protocol", True), result.message
            assert ("no gRPC server at 127.0.0.1" in result.message) == (name in OTHERS), result.message

        await leaves_the_loop_free(probe)
        await eventually(lambda: asyncio.sleep(0, not connections), within=10)
    assert max(sent) < 16 * MIB  # most of it in the buffers of the kernel


async def test_endless_frames_with_tls(tmp_path: Path) -> None:
    context = peers.Authority.made(tmp_path / "ca.pem").server("127.0.0.1")
    context.set_alpn_protocols(["h2"])

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SETTINGS)
        while True:
            writer.write(frame(frames.PING, bytes(8)) * 4000)
            await writer.drain()

    async with peers.raw_server(serve, ssl=context) as port:

        async def probe() -> None:
            options = {"address": f"127.0.0.1:{port}", "tls": {"ca_file": str(tmp_path / "ca.pem")}}
            result = await probed(tmp_path, "grpc", options)
            assert (result.reason, "more than 1000 frames" in result.message) == ("protocol", True), result.message

        await leaves_the_loop_free(probe)


@pytest.mark.parametrize(
    ("text", "every", "reason"),
    [
        (b"", 0.0, "timeout"),
        (SETTINGS, 0.0, "timeout"),
        (SETTINGS[:5], 0.0, "timeout"),
        (SETTINGS + frame(frames.PING, bytes(8)) * 1000, 0.001, "timeout"),
        (SETTINGS + frame(frames.DATA, bytes(9), 3), 0.001, "protocol"),
        (frames.answer(), 0.001, None),
    ],
)
async def test_slow_servers_of_grpc(tmp_path: Path, text: bytes, every: float, reason: str | None) -> None:
    """Each byte is a packet; the connection ends with the probe."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(24)
            for byte in text:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(every)
            await reader.read()
        finally:
            ended.set()

    async with peers.raw_server(serve) as port:
        result = await probed(
            tmp_path, "grpc", {"address": f"127.0.0.1:{port}"}, "1s" if reason == "timeout" else "30s"
        )
        assert result.reason == reason, result.message
        await asyncio.wait_for(ended.wait(), 10)


async def test_the_connection_of_a_cancelled_grpc_probe_is_closed(tmp_path: Path) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(24)
            begun.set()
            await reader.read()
        finally:
            ended.set()

    async with peers.raw_server(serve) as port:
        probing = asyncio.create_task(probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}"}))
        await asyncio.wait_for(begun.wait(), 10)
        probing.cancel()
        await asyncio.wait_for(ended.wait(), 10)


def _dns_response(query: bytes, count: int, record: Callable[[int], bytes]) -> bytes:
    header = query[:2] + struct.pack("!HHHHH", 0x8180, 1, count, 0, 0)
    return header + query[12:29] + b"".join(record(number) for number in range(count))


def _address_record(number: int) -> bytes:
    return b"\xc0\x0c" + struct.pack("!HHIHI", 1, 1, 60, 4, number)


def _text_record(_number: int) -> bytes:
    return b"\xc0\x0c" + struct.pack("!HHIH", 16, 1, 60, 60_000) + bytes(60_000)


def _long_name_record(number: int) -> bytes:
    """The first one has a name of 126 labels, to which the others point."""
    name = b"\1a" * 126 + b"\0" if number == 0 else (0xC000 | (29 + 12)).to_bytes(2)
    return b"\xc0\x0c" + struct.pack("!HHIH", 12, 1, 60, len(name)) + name


RESPONSES = {
    "300 names of 126 labels": (300, _long_name_record, "protocol", "its names have more than 20000 labels"),
    "4,000 records": (4000, _address_record, "protocol", "it has more than 1000 records"),
    "1,000 records": (999, _address_record, None, ""),
    "a record of 60,000 texts": (1, _text_record, None, ""),
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("transport", ["udp", "tcp"])
async def test_answers_of_a_name_server(tmp_path: Path, name: str, transport: str) -> None:
    count, record, reason, message = RESPONSES[name]

    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, address: Any) -> None:
            self.transport.sendto(_dns_response(data, count, record), address)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        query = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        response = _dns_response(query, count, record)
        writer.write(len(response).to_bytes(2) + response)
        await writer.drain()

    async with peers.raw_server(serve) as port:
        loop = asyncio.get_running_loop()
        datagrams, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", port))
        options = {"server": f"127.0.0.1:{port}", "name": "long.x.test", "transport": transport}

        async def probe() -> None:
            result = await probed(tmp_path, "dns", options)
            assert (result.reason, message in result.message) == (reason, True), result.message

        try:
            await leaves_the_loop_free(probe)
        finally:
            datagrams.close()


@pytest.mark.parametrize("decode", [decode_json, json.loads])
async def test_long_answers_of_an_api(decode: Callable[[bytes], Any]) -> None:
    """Only a program that does nothing else, such as replay, parses documents with very many values."""
    body = json.dumps([[1, "0"]] * 200_000).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    async with peers.raw_server(serve) as port:
        client = JsonClient(Endpoint(url=f"http://127.0.0.1:{port}"), decode=decode)
        if decode is decode_json:
            with pytest.raises(ClientError, match="TooManyValuesError"):
                await client.request("GET", "/api/v1/query_range")
        else:
            assert len(await client.request("GET", "/api/v1/query_range")) == 200_000
        await client.close()


def _alert(**fields: Any) -> dict[str, Any]:
    return {"status": "firing", "fingerprint": "f", "startsAt": "2026-11-29T00:00:00Z", **fields}


def _payload(*alerts: Any, **fields: Any) -> bytes:
    return json.dumps({"version": "4", "alerts": alerts, **fields}, separators=(",", ":")).encode()


LABELS = {f"{number:x}": "" for number in range(800_000)}
TOO_LARGE = {
    "labels": _payload(_alert(labels=dict(list(LABELS.items())[:370_000]))),
    "annotations": _payload(_alert(annotations=dict(list(LABELS.items())[:370_000]))),
    "alerts": _payload(*([{}] * 1_300_000)),
    "lists": _payload(other=[[]] * 1_300_000),
    "maps": _payload(other=[{"": 1}] * 500_000),
    "members": _payload(other=dict(list(LABELS.items())[:370_000])),
}
IGNORED = {
    "lists": _payload(other=[["a" * 20]] * 140_000),
    "strings": _payload(other=["a"] * 1_000_000),
    "numbers": _payload(other=[10**4000] * 1000),
    "a string": _payload(other="é" * 600_000),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TOO_LARGE)
async def test_webhooks_that_are_too_large(name: str) -> None:
    body = TOO_LARGE[name]
    assert len(body) <= MAX_BODY

    async def receive() -> None:
        with pytest.raises(PayloadTooLargeError):
            await parse_body(parse_webhook, body)

    await leaves_the_loop_free(receive)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", IGNORED)
async def test_webhooks_with_large_unknown_fields(name: str) -> None:
    body = IGNORED[name]
    assert MAX_BODY // 2 < len(body) <= MAX_BODY

    async def receive() -> None:
        assert (await parse_body(parse_webhook, body)).alerts == []

    await leaves_the_loop_free(receive)


async def test_large_webhooks_are_accepted() -> None:
    labels = {f"label{number}": "\ud800 é" for number in range(20)}
    body = _payload(*[_alert(fingerprint=f"{number:016x}", labels=labels) for number in range(4000)])
    assert MAX_BODY // 2 < len(body) <= MAX_BODY

    async def receive() -> None:
        payload = await parse_body(parse_webhook, body)
        assert len(payload.alerts) == 4000
        assert payload.alerts[-1].labels == dict.fromkeys(labels, "? é")

    await leaves_the_loop_free(receive)


def test_long_labels_and_annotations_are_cut() -> None:
    payload = parse_webhook(_payload(
        _alert(labels={"service": "web", "long": "é" * 5000}, annotations={"summary": "x" * 4096}),
        _alert(labels={f"{number:03}": "<&*_" * 2000 for number in range(400)}, annotations={"summary": "late"}),
        _alert(labels={"alertname": "A"}),
        _alert(labels={"a" * 10_000: "b"}),
    ))  # fmt: skip
    first, second, third, fourth = payload.alerts
    assert first.labels == {"service": "web", "long": "é" * 4095 + "…"}
    assert first.annotations == {"summary": "x" * 4096}
    assert sum(len(name) + len(value) for name, value in {**second.labels, **second.annotations}.items()) <= 32 * 1024
    assert third.labels == {"alertname": "A"}
    assert len(next(iter(fourth.labels))) == 10_000
    assert payload.cut == 2
    with pytest.raises(InvalidPayloadError, match="longer than 200"):
        parse_webhook(_payload(_alert(fingerprint="f" * 201)))


def test_brackets_in_strings_are_no_lists() -> None:
    text = '[{"' * 150_000
    (alert,) = parse_webhook(_payload(_alert(annotations={"summary": text}))).alerts
    assert alert.annotations == {"summary": text[:4095] + "…"}


def test_limit_of_labels() -> None:
    most = {f"{number}": "" for number in range(MAX_LABELS)}
    assert len(parse_webhook(_payload(_alert(labels=most))).alerts[0].labels) == MAX_LABELS
    with pytest.raises(PayloadTooLargeError, match="more than 500 labels"):
        parse_webhook(_payload(_alert(labels={**most, "x": ""})))
