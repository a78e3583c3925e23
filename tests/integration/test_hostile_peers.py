"""Misbehaving servers: each leads to its reason within the timeout, and leaks nothing."""

import asyncio
import gc
import gzip
import itertools
import os
import ssl
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import brotli
import pytest
import pytest_asyncio

from exporter.results import ProbeResult
from exporter.scheduler.probe_runner import run_probe
from fleet.inventory.loading import LoadedInventory
from runtime.redaction import Redactor
from tests.integration import peers
from tests.integration.peers import Authority
from tests.support import eventually, inventory_of, patience

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
TIMEOUT = "400ms"
OK = b"HTTP/1.1 200 OK\r\n"
READS = {"expect": {"body_matches": "hello"}}
BOMB = gzip.compress(b"\0" * 20_000_000)
_WINDOW = {int(zstd.CompressionParameter.window_log): 26, int(zstd.CompressionParameter.content_size_flag): 0}
_COMPRESSOR = zstd.ZstdCompressor(options=_WINDOW)
WIDE = _COMPRESSOR.compress(b"hello") + _COMPRESSOR.flush()


def says(*pieces: bytes, every: float = 0.0, forever: bool = False, close: bool = True) -> Handle:
    """Return a server that reads a request, sends `pieces`, and closes the connection or waits."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in itertools.chain(pieces, itertools.repeat(pieces[-1])) if forever else pieces:
            writer.write(piece)
            await writer.drain()
            if every:
                await asyncio.sleep(every)
        if not close:
            await reader.read()

    return handle


async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.transport.abort()


async def half_a_handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03\x03")
    await writer.drain()


def body(content: bytes, coding: str) -> bytes:
    return OK + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n%s" % (coding.encode(), len(content), content)


@dataclass(frozen=True)
class Hostile:
    handle: Handle
    reason: str
    message: str = ""
    options: Any = None
    scheme: str = "http"
    certificate: str = ""


LONG_NAME = "".join(map(chr, range(0x4E00, 0x4E00 + 2500))).encode()  # its encoding takes seconds

HOSTILE = {
    "silent": Hostile(silent, "timeout", "no answer within 0.4 s (last phase: processing)"),
    "reset": Hostile(reset, "protocol", "the connection was lost before any answer"),
    "closing": Hostile(says(b""), "protocol", "before any answer"),
    "dripping a body": Hostile(says(OK + b"Content-Length: 999\r\n\r\n", b"x", every=0.05, forever=True), "timeout"),
    "dripping headers": Hostile(says(b"H", b"T", b"T", b"P", every=0.2, forever=True), "timeout"),
    "endless headers": Hostile(says(OK, b"X-A: " + b"a" * 8000 + b"\r\n", forever=True), "protocol", "longer than 262144"),
    "an endless header": Hostile(says(OK + b"X-A: ", b"a" * 8000, forever=True), "protocol", "longer than 262144"),
    "endless interim answers": Hostile(says(b"HTTP/1.1 103 Early\r\nX: y\r\n\r\n" * 100, forever=True), "protocol"),
    "an endless body": Hostile(says(OK + b"\r\n", b"x" * 65536, forever=True), "body", "longer than max_body (1048576 bytes)"),
    "endless chunks": Hostile(says(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10\r\nxxxxxxxxxxxxxxxx\r\n" * 9999, forever=True), "body"),
    "endless trailers": Hostile(
        says(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n" * 1000, forever=True), "protocol"
    ),
    "an endless trailer": Hostile(
        says(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-A: ", b"a" * 8000, forever=True), "protocol", "longer than"
    ),
    "an endless extension of a chunk": Hostile(
        says(OK + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"a" * 8000, forever=True), "protocol"
    ),
    "JSON of very many values": Hostile(
        says(OK + b"Content-Length: 200001\r\n\r\n[" + b"1," * 99_999 + b"1]"),
        "json", "selects more than 10000 values", {"expect": {"json": {"$[*]": 1}}},
    ),
    "a redirect to what is no URL": Hostile(
        says(b"HTTP/1.1 302 Found\r\nLocation: http://][p@\r\nContent-Length: 0\r\n\r\n"), "protocol", "which is not a URL"
    ),
    "a redirect to what is no name": Hostile(
        says(b"HTTP/1.1 302 Found\r\nLocation: http://xn--/\r\nContent-Length: 0\r\n\r\n"), "protocol"
    ),
    "a redirect to a host with a long name": Hostile(
        says(b"HTTP/1.1 302 Found\r\nLocation: http://" + LONG_NAME + b"/\r\nContent-Length: 0\r\n\r\n"),
        "protocol", "longer than 253 characters",
    ),
    "a gzip bomb": Hostile(says(body(BOMB, "gzip")), "body", "the decoded body is longer than max_body", READS),
    "a deflate bomb": Hostile(says(body(zlib.compress(b"\0" * 20_000_000), "deflate")), "body", "decoded", READS),
    "a brotli bomb": Hostile(says(body(brotli.compress(b"\0" * 20_000_000, quality=5), "br")), "body", "decoded", READS),
    "a zstd bomb": Hostile(says(body(zstd.compress(b"\0" * 20_000_000), "zstd")), "body", "decoded", READS),
    "bombs in a bomb": Hostile(says(body(gzip.compress(BOMB), "gzip, gzip")), "body", "decoded", READS),
    "a thousand codings": Hostile(
        says(body(b"x", ", ".join(["gzip"] * 1000))), "protocol", "has 1000 encodings, more than 5", READS
    ),
    "a redirect loop": Hostile(
        says(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"), "protocol", "more than 10 times"
    ),
    "too long a Content-Length": Hostile(says(OK + b"Content-Length: 99\r\n\r\nok"), "protocol", "the connection was closed after 2 bytes of the body"),
    "two lengths": Hostile(says(OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok"), "protocol"),
    "a negative length": Hostile(says(OK + b"Content-Length: -2\r\n\r\nok"), "protocol"),
    "a bad chunk": Hostile(says(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n0\r\n\r\n"), "protocol", "not HTTP"),
    "an unended chunk": Hostile(says(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nok"), "protocol", "the connection was closed"),
    "broken gzip": Hostile(says(body(b"no gzip", "gzip")), "protocol", "the body is not valid gzip", READS),
    "gzip cut short": Hostile(says(body(gzip.compress(b"hello" * 99)[:-9], "gzip")), "protocol", "the gzip body is truncated", READS),
    "brotli cut short": Hostile(says(body(brotli.compress(b"hello" * 99)[:-3], "br")), "protocol", "the br body is truncated", READS),
    "zstd cut short": Hostile(says(body(zstd.compress(b"hello" * 99)[:-3], "zstd")), "protocol", "the zstd body is truncated", READS),
    "broken zstd": Hostile(says(body(b"no zstd", "zstd")), "protocol", "the body is not valid zstd", READS),
    "zstd with a window of 64 MiB": Hostile(says(body(WIDE, "zstd")), "protocol", "the body is not valid zstd", READS),
    "gzip of many members": Hostile(says(body(gzip.compress(b"") * 5000, "gzip")), "protocol", "more than 100 members", READS),
    "zstd of many frames": Hostile(says(body(zstd.compress(b"") * 5000, "zstd")), "protocol", "more than 100 frames", READS),
    "a charset that is slow": Hostile(
        says(OK + b"Content-Type: text/html; charset=punycode\r\nContent-Length: 120000\r\n\r\n" + b"a-b" * 40000),
        "body", "does not match", {"expect": {"body_matches": "hello"}},
    ),
    "a coding that is not decoded": Hostile(says(body(b"hello", "compress")), "protocol", "encoded as compress, which cannot be decoded", READS),
    "broken UTF-8": Hostile(
        says(OK + b"Content-Length: 4\r\n\r\n\xff\xfe\xc3("), "body", "begins with '", {"expect": {"body_matches": "hello"}}
    ),
    "another protocol": Hostile(says(b"SSH-2.0-OpenSSH_9.2\r\n"), "protocol", "the answer is not HTTP"),
    "no TLS": Hostile(says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "timeout", "", None, "https"),
    "half a handshake": Hostile(half_a_handshake, "tls", "", None, "https"),
    "a silent handshake": Hostile(silent, "timeout", "last phase: tls", None, "https"),
    "an expired certificate": Hostile(silent, "tls", "certificate has expired", {"tls": "ca"}, "https", "expired"),
    "an unknown authority": Hostile(silent, "tls", "certificate verification failed", None, "https", "127.0.0.1"),
    "another's certificate": Hostile(silent, "tls", "IP address mismatch", {"tls": "ca"}, "https", "other.test"),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LoadedInventory]:
    """All of these servers, with a service for each."""
    folder = tmp_path_factory.mktemp("hostile")
    authority = Authority.made(folder / "ca.pem")
    services: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        for number, (name, each) in enumerate(HOSTILE.items()):
            context = _context(authority, each.certificate) if each.certificate else None
            port = await stack.enter_async_context(peers.raw_server(each.handle, ssl=context))
            options = dict(each.options or {})
            if options.get("tls") == "ca":
                options["tls"] = {"ca_file": str(authority.file)}
            http = {"url": f"{each.scheme}://127.0.0.1:{port}/", "max_body": "1MiB", **options}
            services[f"s{number}"] = {"name": name, "probe": {"timeout": patience(each.reason, TIMEOUT), "http": http}}
        yield inventory_of(folder / "config", {"services": services})


def _context(authority: Authority, certificate: str) -> ssl.SSLContext:
    if certificate == "expired":
        begun, ended = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
        return authority.server("127.0.0.1", not_before=begun, not_after=ended)
    return authority.server(certificate)


async def run(world: LoadedInventory, number: int) -> ProbeResult:
    service = world.inventory.services[f"s{number}"]
    nobody: Any = None
    return await run_probe(service, nobody, nobody, Redactor(world.secrets))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", HOSTILE)
async def test_reasons_of_hostile_peers(world: LoadedInventory, name: str) -> None:
    expected = HOSTILE[name]
    result = await run(world, list(HOSTILE).index(name))
    assert (result.reason, expected.message in result.message) == (expected.reason, True), result.message
    assert result.duration < 20


BYTES = 40_000_000


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("probes", [500, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
async def test_no_resources_leak(world: LoadedInventory, probes: int) -> None:
    """Sockets, tasks and memory return to their previous numbers once the servers have closed."""
    rounds = probes // len(HOSTILE) + 1

    async def some(count: int) -> None:
        gate = asyncio.Semaphore(150)

        async def one(number: int) -> None:
            async with gate:
                assert not (await run(world, number)).success

        await asyncio.gather(*(one(number) for _ in range(count) for number in range(len(HOSTILE))))

    before = _held()
    await some(rounds // 2)  # the allocator has then seen what there is to see
    await _until_released(before)
    grown: list[int] = []
    # What leaks grows each time. The allocator's peak may grow once, if a busy machine lets more probes overlap.
    while len(grown) < 4 and min(grown, default=BYTES) >= BYTES:
        resident = _resident()
        await some(rounds)
        await _until_released(before)
        grown.append(_resident() - resident)
    assert min(grown) < BYTES, grown


def _held() -> tuple[int, int]:
    """Return the numbers of open files and of tasks."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


async def _until_released(before: tuple[int, int]) -> None:
    """Wait until about as many files are open, and tasks exist, as `before`."""

    async def is_released() -> bool:
        return all(now - then <= 5 for now, then in zip(_held(), before, strict=True))

    try:
        await eventually(is_released)
    except AssertionError:
        assert _held() == before


def _resident() -> int:
    """Return the memory that this process uses, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
