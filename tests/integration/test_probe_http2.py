"""HTTP probes over HTTP/2: with a real nginx, and with servers that say what they like."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpack
import pytest

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from exporter.probes import PROBES
from exporter.results import ProbeResult
from exporter.scheduler.probe_runner import run_options
from runtime.redaction import Redactor
from tests.integration import frames, peers
from tests.integration.peers import Authority
from tests.support import eventually, leaves_the_loop_free, probed

SIZE = 3_000_000


@dataclass
class Nginx:
    """Ports of nginx: TLS with and without HTTP/2, and without TLS."""

    both: int
    old: int
    plain: int


@pytest.fixture
async def nginx(launcher: Launcher, tmp_path: Path) -> Nginx:
    authority = Authority.made(tmp_path / "ca.pem")
    authority.own.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    ports = Nginx(*reserve_ports(3))
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "large").write_bytes(b"x" * SIZE + b"end")
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; user root; pid {tmp_path}/nginx.pid; error_log stderr warn; events {{}} http {{"
        f" access_log off; {temporary} ssl_certificate {tmp_path}/own.pem; ssl_certificate_key {tmp_path}/own.pem;"
        f" client_max_body_size 20m; server {{ listen 127.0.0.1:{ports.both} ssl http2; listen 127.0.0.1:{ports.old} ssl;"
        f" listen 127.0.0.1:{ports.plain} http2; root {tmp_path}/www;"
        ' location = /says { return 200 "$server_protocol $request_method $http_x_a $content_length $host"; }'
        " location = /moved { return 302 /says; } location = /busy { return 503 later; }"
        f" location = /echo {{ client_body_in_single_buffer on; proxy_pass http://127.0.0.1:{ports.plain}/never; }} }} }}"
    )
    argv = ["nginx", "-e", "stderr", "-p", str(tmp_path), "-c", f"{tmp_path}/nginx.conf"]
    await launcher.start(argv, tmp_path / "nginx.log")

    async def is_up() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", ports.plain)
        except OSError:
            return False
        writer.close()
        return True

    await eventually(is_up)
    return ports


async def probe(folder: Path, port: int, path: str = "/says", *, secure: bool = True, **options: Any) -> ProbeResult:
    scheme = "https" if secure else "http"
    tls = {"tls": {"ca_file": "ca.pem"}} if secure else {}
    return await probed(folder, "http", {"url": f"{scheme}://127.0.0.1:{port}{path}", **tls, **options})


@pytest.mark.needs("nginx")
async def test_the_version_that_is_used(nginx: Nginx, tmp_path: Path) -> None:
    for port, secure, version, expected in (
        (nginx.both, True, "auto", 2.0), (nginx.both, True, "2", 2.0), (nginx.both, True, "1.1", 1.1),
        (nginx.old, True, "auto", 1.1), (nginx.plain, False, "2", 2.0),
    ):  # fmt: skip
        name = {2.0: "HTTP/2.0", 1.1: "HTTP/1.1"}[expected]
        expect = {"body_matches": f"^{name} GET 1  127.0.0.1", "http_version": "2" if expected == 2.0 else "1.1"}
        result = await probe(tmp_path, port, secure=secure, version=version, headers={"X-A": "1"}, expect=expect)
        assert result.success, (port, version, result.message)
        assert result.details.gauges["service_http_version"] == expected
    refused = await probe(tmp_path, nginx.old, version="2")
    assert (refused.reason, refused.message) == ("protocol", "the server does not offer HTTP/2")


@pytest.mark.needs("nginx")
async def test_requests_and_responses(nginx: Nginx, tmp_path: Path) -> None:
    large = await probe(tmp_path, nginx.both, "/large", version=2, expect={"body_matches": "xend$"})
    assert (large.success, large.details.gauges["service_http_body_bytes"]) == (True, SIZE + 3), large.message
    limited = await probe(tmp_path, nginx.both, "/large", version=2, max_body="1MiB")
    assert (limited.reason, "max_body" in limited.message) == ("body", True)
    moved = await probe(tmp_path, nginx.both, "/moved", version=2, expect={"body_matches": "^HTTP/2.0 GET"})
    assert (moved.success, moved.details.gauges["service_http_redirects"]) == (True, 1), moved.message
    head = await probe(tmp_path, nginx.both, "/large", version=2, method="HEAD")
    assert (head.success, head.details.gauges["service_http_body_bytes"]) == (True, 0), head.message
    busy = await probe(tmp_path, nginx.both, "/busy", version=2)
    assert (busy.reason, busy.message) == ("status", "answered 503, expected 200-299; the body begins with 'later'")
    post: Any = {"method": "POST", "body": "y" * 500_000, "expect": {"body_matches": "^HTTP/2.0 POST  500000 "}}
    sent = await probe(tmp_path, nginx.both, version="auto", **post)
    assert sent.success, sent.message
    assert sent.details.phases["processing"] > 0


def ending(text: bytes) -> frames.Serve:
    """Return a server that says something when a request arrives, and ends its side of the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(text)
        writer.write_eof()
        await reader.read()

    return serve


def interim(number: int, value: str = "") -> bytes:
    """Return an interim response with many headers, each of which takes a byte."""
    block = hpack.Encoder().encode([(":status", "103"), ("x-a", value)])
    return frames.frame(frames.HEADERS, block + b"\xbe" * number, 1, frames.END_HEADERS)


SETTINGS = frames.frame(frames.SETTINGS)
OK = frames.headers((":status", "200"), ("x-a", "1"))
ACK = frames.frame(frames.SETTINGS, flags=frames.ACK)
BODY = frames.frame(frames.DATA, b"hello", 1, frames.END_STREAM)


@pytest.mark.parametrize(
    ("said", "reason", "message"),
    [
        (SETTINGS + OK + BODY, None, ""),
        (SETTINGS + frames.headers((":status", "103")) + OK + BODY, None, ""),
        (SETTINGS + OK, "protocol", "the connection was closed after 0 bytes of the body"),
        (SETTINGS, "protocol", "the connection was lost before any answer"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "protocol", "it does not begin as HTTP/2 does"),
        (b"220 smtp\r\n", "protocol", "it does not begin as HTTP/2 does"),
        (OK + BODY, "protocol", "it does not begin as HTTP/2 does"),
        (SETTINGS + frames.headers((":status", "200"), ("content-length", "9")) + BODY, "protocol", "InvalidBodyLength"),
        (SETTINGS + frames.frame(frames.RST_STREAM, bytes(4), 1), "protocol", "the server reset the stream"),
        (SETTINGS + frames.frame(frames.GOAWAY, bytes(8)), "protocol", "the server ended the connection"),
        (SETTINGS + b"\xff\xff\xff", "protocol", ""),
        (SETTINGS + frames.frame(frames.DATA, b"x" * 20_000, 1), "protocol", "a frame of more than 16384"),
        (SETTINGS + interim(100) * 20 + OK + BODY, None, ""),
        (SETTINGS + interim(100) * 60 + OK + BODY, "protocol", "received more than 5000 headers"),
        (SETTINGS + interim(7000) * 28, "protocol", "received more than 5000 headers"),
        (SETTINGS + interim(30, "v" * 3900) * 2 + OK + BODY, None, ""),
        (SETTINGS + interim(30, "v" * 3900) * 3 + OK + BODY, "protocol", "received more than 262144 bytes of headers"),
        (SETTINGS + (interim(30, "v" * 3900) + ACK) * 3 + OK + BODY, "protocol", "received more than 262144 bytes of headers"),
        (SETTINGS * 2000, "protocol", "more than 1000 small frames"),
        (SETTINGS + frames.frame(frames.PING, bytes(8)) * 5000, "protocol", "more than 1000 small frames"),
        (SETTINGS + OK + frames.frame(frames.DATA, b"x", 1) * 5000, "protocol", "more than 1000 small"),
        (SETTINGS + OK + frames.frame(frames.DATA, b"", 1) * 5000, "protocol", "more than 1000 small"),
    ],
)  # fmt: skip
async def test_servers_that_say_what_they_like(tmp_path: Path, said: bytes, reason: str | None, message: str) -> None:
    async with peers.raw_server(ending(said)) as port:
        results: list[ProbeResult] = []

        async def run() -> None:
            results.append(await probe(tmp_path, port, secure=False, version="2", expect={"body_matches": "hello"}))

        await leaves_the_loop_free(run)
    assert (results[0].reason, message in results[0].message) == (reason, True), results[0].message


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("token", ["tok-" + "0123456789abcdef" * 30, "t\u00f6k-'\\\"" * 50])
async def test_a_secret_that_a_server_sends_back_is_masked(tmp_path: Path, kind: str, token: str) -> None:
    """Also if it is longer than what is quoted of an answer."""
    goaway = frames.frame(frames.GOAWAY, bytes(7) + b"\x0b" + b"x" * 20 + token.encode())
    for answer in (
        frames.headers((":status", "200"), ("x-a", f"\n{token}")),
        frames.headers((f"X{token}", "1")),
        goaway,
    ):
        async with peers.raw_server(ending(SETTINGS + answer)) as port:
            if kind == "http":
                options: dict[str, Any] = {
                    "url": f"http://127.0.0.1:{port}/",
                    "version": "2",
                    "headers": {"X-A": token},
                }
            else:
                options = {"address": f"127.0.0.1:{port}"}
            result = await run_options(kind, PROBES[kind].options.model_validate(options), 5.0, Redactor([token]))
        assert result.reason == "protocol", result.message
        assert "violates HTTP/2: ProtocolError: " in result.message or "ENHANCE_YOUR_CALM (xxxx" in result.message
        assert not any(token[start : start + 8] in result.message for start in range(len(token) - 8)), result.message
        assert "\\xc3" not in result.message


@pytest.mark.parametrize("version", ["3", "2.0.1", True])
async def test_versions_that_are_refused(tmp_path: Path, version: Any) -> None:
    with pytest.raises(Exception, match="version"):
        await probed(tmp_path, "http", {"url": "http://h/", "version": version})


async def test_a_proxy_takes_no_http2(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cannot be used through a proxy"):
        await probed(tmp_path, "http", {"url": "http://h/", "version": "2", "proxy": "http://p:1"})
