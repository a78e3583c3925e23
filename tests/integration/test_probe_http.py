"""The `http` probe against well-behaved and misbehaving servers."""

import asyncio
import gzip
import re
import ssl
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from exporter.probes.net import connections
from exporter.probes.net.redirects import classify_address
from exporter.results import ProbeResult
from exporter.scheduler.probe_runner import probe_once
from runtime.errors import DefibError
from runtime.redaction import Redactor
from tests.integration import peers
from tests.integration.conftest import Serve
from tests.integration.peers import Authority
from tests.support import inventory_of, patience, probed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


async def run(folder: Path, url: str, timeout: str = "30s", **options: Any) -> ProbeResult:
    return await probed(folder, "http", {"url": url, **options}, timeout)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(data)
    await writer.drain()


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        (HEAD + b"Content-Length: 2\r\n\r\nok", {}, None),
        (HEAD + b"\r\nuntil the end", {}, None),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", {"expect": {"body_matches": "^ok$"}}, None),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\nok", {}, None),
        (b"HTTP/1.1 204 No Content\r\n\r\n", {}, None),
        (HEAD + b"Content-Length: 9\r\n\r\n", {"method": "HEAD"}, None),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", {}, "status"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", {"expect": {"status": [200, "5xx"]}}, None),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", {}, "status"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", {"auth": {"bearer": "wrong"}}, "auth"),
        (HEAD + b"Content-Length: 2\r\n\r\nok", {"expect": {"body_matches": ["ok", "more"]}}, "body"),
        (HEAD + b"Content-Length: 2\r\n\r\nok", {"expect": {"body_lacks": "o"}}, "body"),
        (HEAD + b"X-A: 1\r\nContent-Length: 0\r\n\r\n", {"expect": {"headers": {"x-a": "^1$"}}}, None),
        (HEAD + b"X-A: 1\r\nContent-Length: 0\r\n\r\n", {"expect": {"headers": {"x-a": "2"}}}, "header"),
        (HEAD + b"Content-Length: 0\r\n\r\n", {"expect": {"headers": {"x-a": ""}}}, "header"),
        (HEAD + b"Content-Length: 0\r\n\r\n", {"expect": {"faster_than": "1ms"}, "_delay": 0.05}, "latency"),
        (HEAD + b"Content-Length: 5\r\n\r\nok", {}, "protocol"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n", {}, "protocol"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", {}, "protocol"),
        (HEAD + b"X-Half", {}, "protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", {}, "protocol"),
        (b"", {}, "protocol"),
        (HEAD + b"X-Long: " + b"a" * 300_000 + b"\r\n\r\n", {}, "protocol"),
        (HEAD + b"Content-Length: 2000\r\n\r\n" + b"x" * 2000, {"max_body": "1KiB"}, "body"),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://x/\r\nContent-Length: 0\r\n\r\n", {}, "protocol"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", {}, "protocol"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
         {"follow_redirects": False, "expect": {"status": 302}}, None),
        (HEAD + b"Content-Type: text/plain; charset=gbk\r\nContent-Length: 4\r\n\r\n" + "你好".encode("gbk"),
         {"expect": {"body_matches": "你好"}}, None),
    ],
)  # fmt: skip
async def test_responses(
    serve: Serve, tmp_path: Path, data: bytes, options: dict[str, Any], reason: str | None
) -> None:
    delay = options.pop("_delay", 0.0) if "_delay" in options else 0.0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(delay)
        await answer(reader, writer, data)

    result = await run(tmp_path, f"http://127.0.0.1:{await serve(handler)}/", **options)
    assert (result.reason, result.success) == (reason, reason is None), result.message


def head(*lines: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", b""])


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        HEAD + b"Content-Length: 30\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5  \r\nhello\n0\n\n",
        HEAD + b"X-Long: a;\r\n  b\r\nSet-Cookie: w=\x01ab\r\nX Powered: a\r\nServer : b\r\n\r\nhello",
        b"HTTP/1.1 103 Early Hints\nLink : x\n\nHTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    ],
)
async def test_responses_that_clients_tolerate(serve: Serve, tmp_path: Path, data: bytes) -> None:
    port = await serve(lambda reader, writer: answer(reader, writer, data))
    options: dict[str, Any] = {"url": f"http://127.0.0.1:{port}/", "expect": {"body_matches": "^hello$"}}
    tolerant = await probed(tmp_path, "http", options)
    assert tolerant.success, tolerant.message
    status = {"components": {"each": "$", "up": {"$.a": 1}}, "url": options["url"], "strict": True}
    for kind, strict in (
        ("http", {**options, "strict": True}),
        ("openai", {"url": options["url"], "model": "m", "strict": True}),
        ("status", status),
    ):
        result = await probed(tmp_path, kind, strict)
        assert (result.reason, "the answer is not HTTP" in result.message) == ("protocol", True), result.message


@pytest.mark.parametrize(
    ("written", "location", "sent"),
    [
        ("/a%2Fb/%7E/%27x%27?sig=a%2Fb%3D&t=10%3A00", None, ["/a%2Fb/%7E/%27x%27?sig=a%2Fb%3D&t=10%3A00"]),
        ("/a/../b/./c", None, ["/a/../b/./c"]),
        ("/a|b^c`{d}%zz", None, ["/a|b^c`{d}%zz"]),
        ("?", None, ["/?"]),
        ("/?", None, ["/?"]),
        ("?a=b", None, ["/?a=b"]),
        ("/é?ü=中#part", None, ["/%C3%A9?%C3%BC=%E4%B8%AD"]),
        ("/a", "/b%2Fc?sig=%27%7E|", ["/a", "/b%2Fc?sig=%27%7E|"]),
        ("/wiki/A_&_B", "/wiki/A_%26_B", ["/wiki/A_&_B", "/wiki/A_%26_B"]),
        ("/a%2F/b?c", "d?#e", ["/a%2F/b?c", "/a%2F/d?"]),
        ("/a/b/c?d", "../%2E/x", ["/a/b/c?d", "/a/%2E/x"]),
        ("/a/b/c?d", "..", ["/a/b/c?d", "/a/"]),
        ("/a?b", "/x/../../y/.", ["/a?b", "/y/"]),
        ("/a/b?c", "?d", ["/a/b?c", "/a/b?d"]),
        ("/a", "/b c/é", ["/a", "/b%20c/%C3%A9"]),
        ("/a", "http://{origin}/b/../%7E|?", ["/a", "/%7E|?"]),
        ("/a/b", "//{origin}/c/../%7E", ["/a/b", "/%7E"]),
    ],
)
async def test_urls_are_sent_as_written(
    serve: Serve, tmp_path: Path, written: str, location: str | None, sent: list[str]
) -> None:
    """References in redirects are resolved (RFC 3986, 5.2)."""
    got: list[str] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode())
        if location is not None and len(got) == 1:
            target = location.replace("{origin}", f"127.0.0.1:{port}")
            writer.write(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())
        else:
            writer.write(head(b"Content-Length: 0"))
        await writer.drain()

    port = await serve(handler)
    result = await run(tmp_path, f"http://127.0.0.1:{port}{written}")
    assert (result.success, got) == (True, sent), result.message
    if location is None:
        proxied = await run(tmp_path, f"http://web.test{written}", proxy=f"http://127.0.0.1:{port}")
        assert (proxied.success, got[1:]) == (True, [f"http://web.test{sent[0]}"]), proxied.message


@pytest.mark.parametrize(
    ("encoding", "body", "reads", "reason"),
    [
        ("gzip", b"no gzip", False, None),
        ("gzip", b"no gzip", True, "protocol"),
        ("compress", b"hello", False, None),
        ("compress", b"hello", True, "protocol"),
        ("utf-8", b"hello", True, None),
        ("none", b"hello", True, None),
        ("Identity, UTF-8", b"hello", True, None),
        ("utf-8, gzip", gzip.compress(b"hello", mtime=0), True, None),
        ("gzip", gzip.compress(b"bye", mtime=0), True, "body"),
        ("zstd", zstd.compress(b"hello"), True, None),
        ("zstd", zstd.compress(b"hel") + zstd.compress(b"") + zstd.compress(b"lo"), True, None),
        ("gzip, zstd", zstd.compress(gzip.compress(b"hello", mtime=0)), True, None),
    ],
)
async def test_a_body_is_decoded_where_something_is_expected_of_it(
    serve: Serve, tmp_path: Path, encoding: str, body: bytes, reads: bool, reason: str | None
) -> None:
    data = head(f"Content-Encoding: {encoding}".encode(), b"Content-Length: %d" % len(body)) + body
    port = await serve(lambda reader, writer: answer(reader, writer, data))
    expect = {"body_matches": "^hello$"} if reads else {"status": 200}
    result = await run(tmp_path, f"http://127.0.0.1:{port}/", expect=expect)
    assert result.reason == reason, result.message


@pytest.mark.parametrize("body", [gzip.compress(b"too busy", mtime=0), b"no gzip"])
async def test_the_status_code_is_reported_whatever_the_body(serve: Serve, tmp_path: Path, body: bytes) -> None:
    data = head(b"Content-Encoding: gzip", b"Content-Length: %d" % len(body)).replace(b"200 OK", b"503 Busy") + body
    port = await serve(lambda reader, writer: answer(reader, writer, data))
    result = await run(tmp_path, f"http://127.0.0.1:{port}/", expect={"body_matches": "hello"})
    shown = "'too busy'" if body != b"no gzip" else "'no gzip'"
    assert (result.reason, shown in result.message) == ("status", True), result.message


@pytest.mark.parametrize(
    ("expect", "reason"),
    [
        ({"matches": "^b=2; Secure$"}, None),
        ({"matches": "^a=1$"}, None),
        ({"matches": "a=1.*Secure"}, "header"),
        ({"matches": "^c"}, "header"),
        ({"lacks": "a=1.*Secure"}, None),
        ({"lacks": "Secure"}, "header"),
        ({"matches": "^a", "lacks": "^b"}, "header"),
    ],
)
async def test_each_value_of_a_repeated_header_is_matched(
    serve: Serve, tmp_path: Path, expect: dict[str, str], reason: str | None
) -> None:
    data = head(b"Set-Cookie: a=1", b"Set-Cookie: b=2; Secure", b"Content-Length: 0")
    port = await serve(lambda reader, writer: answer(reader, writer, data))
    result = await run(tmp_path, f"http://127.0.0.1:{port}/", expect={"headers": {"Set-Cookie": expect}})
    assert result.reason == reason, result.message


@pytest.mark.parametrize("location", ["/", "http://127.0.0.1:1/"])
async def test_the_status_code_of_a_redirect_stays_known(serve: Serve, tmp_path: Path, location: str) -> None:
    data = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 4\r\n\r\nhere".encode()
    port = await serve(lambda reader, writer: answer(reader, writer, data))
    result = await run(tmp_path, f"http://127.0.0.1:{port}/")
    assert result.reason == ("protocol" if location == "/" else "connect"), result.message
    assert result.details.gauges["service_http_status_code"] == 302
    assert ("location", location) in result.details.evidence["headers"]
    assert result.details.evidence["body"] == b"here"


async def test_of_a_repeated_header_the_first_value_is_used(serve: Serve, tmp_path: Path) -> None:
    got: list[str] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode())
        if len(got) == 1:
            writer.write(b"HTTP/1.1 302 Found\r\nLocation: /plain\r\nLocation: /plain\r\nContent-Length: 0\r\n\r\n")
        else:
            text = "text/plain; charset=windows-1251"
            lines = f"HTTP/1.1 200 OK\r\nContent-Type: {text}\r\nContent-Type: {text}\r\nX-N: 5\r\nX-N: 5\r\n"
            writer.write(f"{lines}Content-Length: 2\r\n\r\n".encode() + "Да".encode("cp1251"))
        await writer.drain()

    url = f"http://127.0.0.1:{await serve(handler)}/"
    result = await run(tmp_path, url, expect={"body_matches": "Да"}, values={"n": {"header": "X-N"}})
    assert (result.success, got, result.details.values) == (True, ["/", "/plain"], {"n": 5.0}), result.message


@pytest.mark.parametrize(
    ("location", "path"), [(b"/caf\xe9?a=\xff|", "/caf%E9?a=%FF|"), ("/café".encode(), "/caf%C3%A9")]
)
async def test_a_location_keeps_its_bytes(serve: Serve, tmp_path: Path, location: bytes, path: str) -> None:
    got: list[str] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode())
        redirect = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
        writer.write(redirect if len(got) == 1 else head(b"Content-Length: 0"))

    result = await run(tmp_path, f"http://127.0.0.1:{await serve(handler)}/")
    assert (result.success, got) == (True, ["/", path]), result.message


async def test_an_empty_location_is_none(serve: Serve, tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation:\r\nContent-Length: 0\r\n\r\n")

    result = await run(tmp_path, f"http://127.0.0.1:{await serve(handler)}/", expect={"status": 302})
    assert result.success, result.message


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        (["max-age", "includeSub"], ""),
        (["max-age", "preload"], "expected to match 'preload'"),
        ({"lacks": ["none", "^max"]}, "expected not to match '^max'"),
    ],
)
async def test_several_patterns_of_a_header(serve: Serve, tmp_path: Path, expect: Any, message: str) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head(b"Strict-Transport-Security: max-age=1; includeSubDomains", b"Content-Length: 0"))

    url = f"http://127.0.0.1:{await serve(handler)}/"
    result = await run(tmp_path, url, expect={"headers": {"Strict-Transport-Security": expect}})
    assert (result.success, message in result.message) == (not message, True), result.message


async def test_a_default_header_can_be_left_out(serve: Serve, tmp_path: Path) -> None:
    got: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(head(b"Content-Length: 0"))

    url = f"http://127.0.0.1:{await serve(handler)}/"
    result = await run(tmp_path, url, method="POST", body="x", headers={"content-type": "", "Accept": "", "X-Own": ""})
    assert result.success, result.message
    names = {line.partition(b":")[0].lower() for line in got[0].split(b"\r\n")[1:-2]}
    assert names == {b"host", b"user-agent", b"x-own", b"content-length", b"connection"}


async def test_a_token_in_a_file_is_read_for_each_probe(serve: Serve, tmp_path: Path) -> None:
    sent: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 401 No\r\nContent-Length: 12\r\n\r\nnot t0ken-22")
        await writer.drain()

    url = f"http://127.0.0.1:{await serve(handler)}/"
    file = tmp_path / "token"
    refused = None
    for token in ("t0ken-11", "t0ken-22"):
        file.write_text(f"{token}\n")
        refused = await run(tmp_path, url, auth={"bearer_file": "token"})
        assert refused.reason == "auth"
        assert f"\r\nAuthorization: Bearer {token}\r\n".encode() in sent[-1]
    assert refused is not None
    assert "t0ken-22" not in refused.message
    for content, message in ((b"", "must be one line"), (b"a\nb", "must be one line"), (b"\xff", "than ASCII")):
        file.write_bytes(content)
        result = await run(tmp_path, url, auth={"bearer_file": "token"})
        assert (result.reason, message in result.message) == ("error", True), result.message
    assert len(sent) == 2


async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await answer(reader, writer, HEAD + b"Content-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await answer(reader, writer, HEAD + b"\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


@pytest.mark.parametrize(("handler", "reason"), [(silent, "timeout"), (drip, "timeout"), (endless, "body")])
async def test_endless_responses(serve: Serve, tmp_path: Path, handler: Callable[..., Any], reason: str) -> None:
    result = await run(
        tmp_path, f"http://127.0.0.1:{await serve(handler)}/", timeout=patience(reason, "500ms"), max_body="1MiB"
    )
    assert result.reason == reason
    assert result.duration < 60


async def test_connection_refused(tmp_path: Path) -> None:
    result = await run(tmp_path, "http://127.0.0.1:1/")
    assert (result.reason, result.message) == ("connect", "cannot connect to 127.0.0.1:1: Connection refused")


async def test_unresolvable_name(tmp_path: Path) -> None:
    assert (await run(tmp_path, "http://nowhere.invalid/")).reason == "resolve"


async def test_requests_received_by_a_server(tmp_path: Path) -> None:
    """A real server parses every kind of body, and redirects."""
    (tmp_path / "sample.pdf").write_bytes(b"%PDF-1.4 \x00\xff")
    got: list[dict[str, Any]] = []

    async def take(request: web.Request) -> web.Response:
        fields: dict[str, Any] = {}
        if request.content_type in ("multipart/form-data", "application/x-www-form-urlencoded"):
            for name, value in (await request.post()).items():
                fields[name] = (
                    (value.filename, value.content_type, value.file.read())
                    if isinstance(value, web.FileField)
                    else value
                )
        body = await request.text() if not fields else ""
        got.append({"method": request.method, "headers": request.headers, "fields": fields, "body": body})
        return web.Response(text="taken")

    async def elsewhere(_request: web.Request) -> web.Response:
        raise web.HTTPSeeOther("/take?a=b")

    app = web.Application()
    app.router.add_route("*", "/take", take)
    app.router.add_route("*", "/elsewhere", elsewhere)
    async with TestServer(app) as server:
        url = str(server.make_url("/take"))
        for options in (
            {"method": "POST", "files": {"files": {"path": "sample.pdf", "content_type": "application/pdf"}}, "form": {"lang": "字"}},
            {"method": "POST", "form": {"a": "1 2&3", "b": "字"}},
            {"method": "PUT", "json": {"a": [1, None]}},
            {"method": "POST", "body": "text"},
            {"auth": {"basic": {"username": "u", "password": "pä"}}, "headers": {"Host": "other", "X-A": "1"}},
        ):  # fmt: skip
            assert (await run(tmp_path, url, **options, expect={"body_matches": "^taken$"})).success
        assert (await run(tmp_path, str(server.make_url("/elsewhere")), method="POST", body="x")).success
    assert got[0]["fields"] == {"lang": "字", "files": ("sample.pdf", "application/pdf", b"%PDF-1.4 \x00\xff")}
    assert got[1]["fields"] == {"a": "1 2&3", "b": "字"}
    assert (got[2]["body"], got[2]["headers"]["Content-Type"]) == ('{"a": [1, null]}', "application/json")
    assert got[3]["body"] == "text"
    assert got[4]["headers"]["Authorization"] == "Basic dTpww6Q="
    assert (got[4]["headers"]["Host"], got[4]["headers"]["X-A"]) == ("other", "1")
    assert (got[5]["method"], got[5]["body"]) == ("GET", "")


@pytest.mark.parametrize(
    ("tls", "reason", "expected_message"),
    [
        ({"ca_file": "web.pem", "server_name": "web.test"}, None, ""),
        ({"verify": False}, None, ""),
        ({}, "tls", "self-signed certificate"),
        ({"ca_file": "web.pem", "server_name": "other.test"}, "tls", "Hostname mismatch"),
    ],
)
async def test_tls(
    tmp_path: Path, certificate: Path, tls: dict[str, Any], reason: str | None, expected_message: str
) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    await asyncio.to_thread(context.load_cert_chain, certificate)
    app = web.Application()
    app.router.add_get("/", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        result = await run(tmp_path, f"https://127.0.0.1:{runner.addresses[0][1]}/", tls=tls)
    finally:
        await runner.cleanup()
    assert (result.reason, expected_message in result.message) == (reason, True), result.message
    if reason is None:
        assert list(result.details.phases) == ["connect", "tls", "processing", "transfer"]
        assert (
            29
            < (
                result.details.gauges["service_tls_certificate_expiry_timestamp_seconds"]
                - datetime.now(UTC).timestamp()
            )
            / 86400
            < 31
        )


@pytest.mark.parametrize(
    ("host", "options", "name"),
    [
        ("web.test", {}, "web.test"),
        ("web.test.", {}, "web.test"),
        ("other.test", {"headers": {"host": "web.test:8443"}}, "web.test"),
        ("web.test", {"headers": {"Host": "other.test"}, "tls": {"server_name": "web.test."}}, "web.test"),
        ("127.0.0.1", {"headers": {"Host": "web.test"}}, "web.test"),
        ("127.0.0.1", {}, None),
        ("127.0.0.1", {"headers": {"Host": "other.test"}}, "other.test"),
        ("[::1%lo]", {}, None),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_the_name_that_tls_sends_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, host: str, options: dict[str, Any], name: str | None
) -> None:
    authority = Authority.made(tmp_path / "ca.pem")
    context = authority.server("web.test", "127.0.0.1", "::1")
    names: list[str | None] = []
    context.sni_callback = lambda _socket, sent, _context: names.append(sent)
    resolved: list[str] = []

    async def resolve(host: str, *_: Any) -> list[str]:
        resolved.append(host)
        return ["127.0.0.1"] if host.endswith((".test", ".test.")) else [host]

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer, b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")

    monkeypatch.setattr(connections, "resolve", resolve)
    async with await asyncio.start_server(refuse, "::1" if ":" in host else "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"{'https' if kind == 'http' else 'wss'}://{host}:{port}/"
        tls = {"ca_file": str(authority.file), **options.get("tls", {})}
        result = await probed(tmp_path, kind, {**options, "url": url, "tls": tls})
    assert (result.reason, names[0]) == ("tls" if name == "other.test" else "status", name), result.message
    assert resolved[0] == host.strip("[]")


@pytest.mark.parametrize("kind", ["tls", "tcp", "grpc"])
async def test_a_dot_at_the_end_of_a_host_is_not_sent_by_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    authority = Authority.made(tmp_path / "ca.pem")
    context = authority.server("web.test")
    names: list[str | None] = []
    context.sni_callback = lambda _socket, sent, _context: names.append(sent)

    async def resolve(*_: Any) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(connections, "resolve", resolve)
    async with await asyncio.start_server(silent, "127.0.0.1", 0, ssl=context) as server:
        address = f"web.test.:{server.sockets[0].getsockname()[1]}"
        result = await probed(tmp_path, kind, {"address": address, "tls": {"ca_file": str(authority.file)}})
    assert {*names} == {"web.test"}
    assert (result.success, "HTTP/2" in result.message) == (kind != "grpc", kind == "grpc"), result.message


@pytest.mark.parametrize("host", ["[::1%lo]", "[::1%25lo]"])
async def test_a_zone_is_not_part_of_the_host_header(tmp_path: Path, host: str) -> None:
    heard: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(head(b"Content-Length: 0"))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "::1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert (await run(tmp_path, f"http://{host}:{port}/")).success
        assert (await probed(tmp_path, "websocket", {"url": f"ws://{host}:{port}/"})).reason == "status"
    assert [f"\r\nHost: [::1]:{port}\r\n".encode() in each for each in heard] == [True, True]


async def test_handshake_with_a_server_without_tls(serve: Serve, tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"220 hello\r\n")
        await writer.drain()

    assert (await run(tmp_path, f"https://127.0.0.1:{await serve(handler)}/")).reason == "tls"


async def test_secrets_are_redacted_in_messages(serve: Serve, tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n%s" % (len(head), head))
        await writer.drain()

    result = await run(
        tmp_path, f"http://127.0.0.1:{await serve(echo)}/", headers={"Authorization": "Bearer t0psecret"}
    )
    assert result.reason == "status"
    assert "t0psecret" not in result.message


class TokenServer:
    """An OAuth 2 server that counts requests and accepts only the last token."""

    def __init__(self, **told: Any) -> None:
        self.told = told
        self.given = self.asked = 0

    async def answer(self, request: web.Request) -> web.Response:
        if request.path == "/token":
            self.given += 1
            return web.json_response({"access_token": f"t0ken-{self.given:04}", **self.told})
        self.asked += 1
        good = request.headers.get("Authorization") == f"Bearer t0ken-{self.given:04}"
        return web.Response(status=200 if good else 401, text=str(request.headers.get("Authorization")))


async def oauth2(folder: Path, port: int, **more: Any) -> Callable[[], Any]:
    """Return a function that probes one service, so that state is kept between probes."""
    asked = {"token_url": f"http://127.0.0.1:{port}/token", "client_id": "me", "client_secret": "s3cret99", **more}
    http = {"url": f"http://127.0.0.1:{port}/", "auth": {"oauth2": asked}}
    known = await asyncio.to_thread(inventory_of, folder, {"services": {"it": {"probe": {"http": http}}}})
    return lambda: probe_once(known.inventory.services["it"], {}, Redactor(known.secrets))


async def test_a_token_is_cached_while_it_is_valid(tmp_path: Path) -> None:
    server = TokenServer(expires_in=3600)
    async with peers.web_server(server.answer) as port:
        probe = await oauth2(tmp_path, port)
        assert [(await probe()).success for _ in range(3)] == [True] * 3
        assert (server.given, server.asked) == (1, 3)
        server.given = 7  # what was given before is no longer taken
        assert (await probe()).success
        assert (server.given, server.asked) == (8, 5)


async def test_an_expired_token_is_fetched_again(tmp_path: Path) -> None:
    server = TokenServer(expires_in=0)
    async with peers.web_server(server.answer) as port:
        probe = await oauth2(tmp_path, port)
        assert [(await probe()).success for _ in range(3)] == [True] * 3
    assert server.given == 3


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [(401, "{}", "auth"), (400, "{}", "auth"), (503, "", "status"), (200, "<html>", "json"), (200, "{}", "auth"), (200, '{"access_token": "a\\r\\nb"}', "auth")],
)  # fmt: skip
async def test_token_endpoint_without_a_token(tmp_path: Path, status: int, body: str, reason: str) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    async with peers.web_server(answer) as port:
        result = await (await oauth2(tmp_path, port))()
    assert (result.reason, "the token endpoint" in result.message) == (reason, True), result.message


async def test_a_probe_that_is_cancelled_ends_whatever_cookies_it_has_got(tmp_path: Path) -> None:
    """Else a reload would wait for it for ever."""
    is_asked = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/next":
            is_asked.set()
            await asyncio.Event().wait()
        response = web.Response(status=302, headers={"Location": "/next"})
        for number in range(200):
            response.headers.add("Set-Cookie", f"c{number}=value-{number}")
        return response

    async with peers.web_server(answer) as port:
        base = f"http://127.0.0.1:{port}"
        probe = asyncio.create_task(run(tmp_path, f"{base}/x", **_in_sequence(base, {"url": "/"})))
        await asyncio.wait_for(is_asked.wait(), 60)
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe


async def test_a_token_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.json_response({"access_token": "<'&+/\"" * 4000})

    async with peers.web_server(answer) as port:
        result = await (await oauth2(tmp_path, port))()
    assert result.reason == "auth"
    assert result.message.endswith("returned an access token longer than 16384 characters")


async def test_tokens_are_redacted(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/token":
            return web.json_response({"access_token": "t0psecret-token"})
        return web.Response(status=401, text=request.headers["Authorization"])

    async with peers.web_server(answer) as port:
        result = await (await oauth2(tmp_path, port))()
    assert (result.reason, "t0psecret" in result.message, "***" in result.message) == ("auth", False, True)
    assert "t0psecret" not in str(result.details.redact.redact_all({"body": result.details.evidence["body"].decode()}))


async def test_headers_and_cookies_after_redirects(tmp_path: Path) -> None:
    """Cookies are sent to the server that set them; credentials are not sent to other origins."""
    heard: dict[str, dict[str, str]] = {}

    async def other(request: web.Request) -> web.Response:
        heard["other"] = dict(request.headers)
        return web.Response()

    async with peers.web_server(other) as elsewhere:

        async def own(request: web.Request) -> web.Response:
            heard[request.path] = dict(request.headers)
            if request.path == "/a":
                headers = {"Location": "/b", "Set-Cookie": "a=1; Path=/"}
                return web.Response(status=302, headers=headers)
            headers = {"Location": f"http://localhost:{elsewhere}/"}
            return web.Response(status=307, headers=headers)

        async with peers.web_server(own) as port:
            options: dict[str, Any] = {
                "headers": {"X-Key": "k3y12345", "Cookie": "own=2"},
                "auth": {"bearer": "t0ken123"},
            }
            result = await run(tmp_path, f"http://127.0.0.1:{port}/a", **options)
    assert result.success, result.message
    assert heard["/b"]["Cookie"] == "own=2; a=1"
    assert heard["/b"]["X-Key"] == "k3y12345"
    assert not {"Cookie", "X-Key", "Authorization"} & heard["other"].keys()
    assert result.details.gauges["service_http_redirects"] == 2


@pytest.mark.parametrize(
    "date", ["Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 01-Jan-1970 00:00:00 GMT", "Mon, 01 Jan 1968 00:00:00 GMT"]
)
async def test_a_cookie_that_a_server_deletes_is_not_sent(tmp_path: Path, date: str) -> None:
    heard: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        heard.append(request.headers.get("Cookie", ""))
        cookies = {"/a": "a=1; Path=/", "/b": f"a=; Path=/; Expires={date}"}
        following = {"/a": "/b", "/b": "/c"}
        if request.path == "/c":
            return web.Response()
        return web.Response(
            status=302, headers={"Location": following[request.path], "Set-Cookie": cookies[request.path]}
        )

    async with peers.web_server(handle) as port:
        result = await run(tmp_path, f"http://127.0.0.1:{port}/a")
    assert (result.success, heard) == (True, ["", "a=1", ""])


@pytest.mark.parametrize("value", ['"a b"', '"a\\"b"', "a/b=c", '"', "a%20b", ""])
async def test_cookies_are_sent_as_they_were_set(tmp_path: Path, value: str) -> None:
    heard: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        heard.append(request.headers.get("Cookie", ""))
        headers = {"Location": "/b", "Set-Cookie": f"a={value}; Path=/"}
        return web.Response() if request.path == "/b" else web.Response(status=302, headers=headers)

    async with peers.web_server(handle) as port:
        result = await run(tmp_path, f"http://127.0.0.1:{port}/a")
    assert (result.success, heard) == (True, ["", f"a={value}"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "options", [{"method": "POST", "json": {"a": 1}}, {"method": "DELETE"}, {"body": "a body of a GET"}]
)
async def test_unsafe_requests_are_not_redirected_to_another_origin(
    tmp_path: Path, status: int, options: dict[str, Any]
) -> None:
    asked: list[str] = []

    async def other(request: web.Request) -> web.Response:
        asked.append(request.method)
        return web.Response()

    async with peers.web_server(other) as elsewhere:

        async def own(_request: web.Request) -> web.Response:
            return web.Response(status=status, headers={"Location": f"http://127.0.0.1:{elsewhere}/stop"})

        async with peers.web_server(own) as port:
            result = await run(tmp_path, f"http://127.0.0.1:{port}/", **options)
    assert (result.reason, "another origin" in result.message) == ("redirect", True), result.message
    assert asked == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"])
async def test_redirects_to_loopback_are_refused(tmp_path: Path, host: str) -> None:
    """A proxy simulates the network of the probed server."""
    asked: list[str] = []

    async def proxy(request: web.Request) -> web.Response:
        asked.append(f"{request.url}")
        return web.Response(status=302, headers={"Location": f"http://{host}:9095/api/v1/incidents"})

    async with peers.web_server(proxy) as port:
        result = await run(tmp_path, "http://shop.test/", proxy={"url": f"http://127.0.0.1:{port}"})
    assert (result.reason, "refused" in result.message) == ("redirect", True), result.message
    assert asked == ["http://shop.test/"]


async def test_redirects_through_a_proxy_to_what_the_resolver_knows(tmp_path: Path) -> None:
    async def proxy(request: web.Request) -> web.Response:
        if request.host == "shop.test":
            return web.Response(status=302, headers={"Location": "http://local.test/"})
        return web.Response()

    async with peers.web_server(proxy) as port:
        through = {"url": f"http://127.0.0.1:{port}"}
        assert (await run(tmp_path, "http://shop.test/", proxy=through)).success  # only the proxy knows the name
        with peers.name_server() as server:
            result = await run(tmp_path, "http://shop.test/", proxy=through, resolver=f"127.0.0.1:{server}")
    assert (result.reason, "127.0.0.1 (loopback)" in result.message) == ("redirect", True), result.message


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "100.100.100.200"])
async def test_redirects_to_link_local_and_metadata_are_refused(tmp_path: Path, host: str) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": f"http://{host}/latest/meta-data/"})

    async with peers.web_server(answer) as port:
        result = await run(tmp_path, f"http://127.0.0.1:{port}/")
    assert (result.reason, "refused" in result.message) == ("redirect", True), result.message


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("10.0.0.7", ""), ("192.168.1.1", ""), ("2001:db8::1", ""), ("127.8.8.8", "loopback"), ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"), ("64:ff9b::7f00:1", "loopback"), ("2002:7f00:1::", "loopback"),
        ("0.0.0.0", "loopback"), ("::", "loopback"), ("169.254.1.1", "link-local"), ("fe80::1%eth0", "link-local"),
        ("168.63.129.16", "metadata"), ("::127.0.0.1", "loopback"), ("::ffff:0:7f00:1", "loopback"), ("fd20:ce::254", "metadata"),
        ("64:ff9b:1::a9fe:a9fe", "link-local"),
    ],
)  # fmt: skip
def test_classify_address(address: str, kind: str) -> None:
    assert classify_address(address) == kind


async def test_all_addresses_of_a_name_are_tried(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer, HEAD + b"Content-Length: 0\r\n\r\n")

    addresses = ["2001:db8::1", "127.0.0.2", "127.0.0.1"]

    async def resolve(*_: Any) -> list[str]:
        return addresses

    port = await serve(handler)
    monkeypatch.setattr(connections, "resolve", resolve)
    assert (await run(tmp_path, f"http://many.test:{port}/")).success
    addresses[0] = "::1"
    nobody = await run(tmp_path, "http://many.test:1/")
    assert nobody.message == "cannot connect to [::1]:1 or 127.0.0.2:1 or 127.0.0.1:1: Connection refused"


async def test_unreachable_ipv6(tmp_path: Path) -> None:
    result = await run(tmp_path, "http://[2001:db8::1]/", timeout="500ms")
    assert result.reason in ("connect", "timeout")
    assert result.duration < 10
    assert (await run(tmp_path, "http://127.0.0.1/", ip=6)).message == "127.0.0.1 has no address of IP version 6"


async def test_proxy_credentials_are_sent_to_the_proxy_only(serve: Serve, tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    url = f"http://127.0.0.1:{await serve(proxy)}"
    auth = {"basic": {"username": "u", "password": "pr0xypass"}}
    refused = await run(tmp_path, "https://web.test/", proxy={"url": url, "auth": auth})
    assert (refused.reason, refused.message) == ("auth", f"the proxy {url[7:]}: answered 407 to CONNECT web.test:443")
    assert b"Proxy-Authorization: Basic dTpwcjB4eXBhc3M=\r\n" in heard[0]
    plain = await run(tmp_path, "http://web.test/x", proxy=url)
    assert (plain.reason, heard[1].split(b"\r\n")[0]) == ("status", b"GET http://web.test/x HTTP/1.1")


class Shop:
    """A server that answers orders only after a sign-in, with the token, the cookie and the number that it gave."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.token = 't0ken "/&é'

    async def answer(self, request: web.Request) -> web.Response:
        self.sent.append(f"{request.method} {request.rel_url.raw_path_qs} {await request.text()}")
        if request.path == "/login":
            good = await request.json() == {"user": "probe", "password": "pass1234"}
            response = web.json_response(
                {"auth": {"token": self.token}, "n": 7} if good else {}, headers={"X-Id": "a/b"}
            )
            response.set_cookie("session", "s1-of-the-session")
            return response
        if request.cookies.get("session") != "s1-of-the-session":
            return web.Response(status=401, text="sign in first")
        if request.path == "/next":
            return web.Response(text=f"ticket={request.query['n']}-{request.query['id']};")
        return web.json_response({"seen": await request.json(), "header": request.headers["X-Token"]})


LOGIN = {
    "url": "/login", "method": "POST", "json": {"user": "probe", "password": "pass1234"},
    "keep": {"token": "$.auth.token", "n": "$.n", "id": {"header": "X-Id"}},
}  # fmt: skip
NEXT = {"url": "/next?n={kept.n}&id={kept.id}", "keep": {"ticket": {"body": "ticket=([^;]+);"}}}


def _in_sequence(base: str, *steps: dict[str, Any], **options: Any) -> dict[str, Any]:
    before = [{**step, "url": f"{base}{step['url']}"} for step in steps]
    return {"before": before, **options}


async def test_requests_in_sequence_hand_values_on(tmp_path: Path) -> None:
    shop = Shop()
    async with peers.web_server(shop.answer) as port:
        base = f"http://127.0.0.1:{port}"
        options = _in_sequence(
            base, LOGIN, NEXT, method="POST", json={"t": "{kept.token}", "k": ["{kept.ticket}"]},
            headers={"X-Token": "T {kept.ticket}"},
            expect={"json": {"$.seen.t": shop.token, "$.seen.k[0]": "7-a/b", "$.header": "T 7-a/b"}},
        )  # fmt: skip
        result, again = [await run(tmp_path, f"{base}/orders", **options) for _ in range(2)]
        assert (result.success, again.success) == (True, True), result.message
        assert shop.sent[1] == "GET /next?n=7&id=a%2Fb "
        assert len(shop.sent) == 6
        body = result.details.evidence["body"].decode()
        assert "t0ken" in body
        assert "t0ken" not in result.details.redact(body)


@pytest.mark.parametrize(
    ("steps", "reason", "message"),
    [
        ([{**LOGIN, "json": {}}], "body", "request 1 before: the response has no text or number for "),
        ([LOGIN, {**NEXT, "expect": {"status": 204}}], "status", "request 2 before: answered 200, expected 204"),
        ([NEXT | {"url": "/next"}], "status", "request 1 before: answered 401"),
        ([LOGIN, {**NEXT, "keep": {"x": "$.x"}}], "body", "request 2 before: the response has no text or number for x"),
    ],
)
async def test_a_request_before_fails(tmp_path: Path, steps: Any, reason: str, message: str) -> None:
    async with peers.web_server(Shop().answer) as port:
        base = f"http://127.0.0.1:{port}"
        result = await run(tmp_path, f"{base}/orders", **_in_sequence(base, *steps))
    assert (result.reason, message in result.message) == (reason, True), result.message


@pytest.mark.parametrize(
    "expect",
    [{"status": 201}, {"json": {"$.auth.token": "x"}}, {"body_matches": "zzz"}, {"headers": {"Set-Cookie": "^x"}}],
)
async def test_what_is_kept_is_masked_also_where_the_request_fails(tmp_path: Path, expect: dict[str, Any]) -> None:
    shop = Shop()
    shop.token = "t0ken-of-the-shop"
    async with peers.web_server(shop.answer) as port:
        base = f"http://127.0.0.1:{port}"
        result = await run(tmp_path, f"{base}/orders", **_in_sequence(base, {**LOGIN, "expect": expect}))
    assert result.message.startswith("request 1 before: ")
    assert "t0ken" not in result.message
    assert "s1-of-the-session" not in result.message


@pytest.mark.parametrize(
    ("count", "length", "reason", "message"),
    [
        (45, 10, "status", "answered 500"),
        (2000, 10, "protocol", "the responses have more than 100 cookies"),
        (20, 6000, "protocol", "the responses have more than 100 cookies"),
    ],
)
async def test_cookies_are_masked_also_those_of_redirects(
    tmp_path: Path, count: int, length: int, reason: str, message: str
) -> None:
    async def many(request: web.Request) -> web.Response:
        response = web.Response(status=302 if request.path == "/" else 500, text="session-of-the-redirect")
        if request.path == "/":
            response.headers["Location"] = "/next"
            response.headers.add("Set-Cookie", "sid=session-of-the-redirect")
        for number in range(count):
            response.headers.add("Set-Cookie", f"c{number}={number:0{length}}")
        return response

    async with peers.web_server(many) as port:
        base = f"http://127.0.0.1:{port}"
        result = await run(tmp_path, f"{base}/orders", **_in_sequence(base, {"url": "/"}))
    assert result.reason == reason, result.message
    assert result.message.startswith(f"request 1 before: {message}")
    assert "session-of" not in result.message


async def test_half_a_character_is_not_kept(tmp_path: Path) -> None:
    async def answer_half(_request: web.Request) -> web.Response:
        return web.Response(text='{"a": "\\ud800"}')

    async with peers.web_server(answer_half) as port:
        base = f"http://127.0.0.1:{port}"
        steps = {"url": "/", "keep": {"a": "$.a"}}
        result = await run(tmp_path, f"{base}/?{{kept.a}}", **_in_sequence(base, steps))
    assert (result.reason, "has no text or number for a" in result.message) == ("body", True), result.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://h/", "auth": {"bearer": "{kept.a}"}}, "is possible in url, headers, body, json and form only"),
        ({"url": "http://h/", "expect": {"body_matches": "{kept.a}"}}, "is possible in url"),
        ({"url": "http://h/", "files": {"f": {"content": "{kept.a}"}}}, "is possible in url"),
        (
            {
                "url": "https://h/",
                "headers": {"hOst": "{kept.a}"},
                "before": [{"url": "https://h/", "keep": {"a": "$.a"}}],
            },
            "{kept.…} is not possible in the header Host",
        ),
        ({"url": "http://h/{kept.a}"}, "{kept.a}: no request before keeps it"),
        ({"url": "http://h/", "before": [{"url": "http://h/{kept.a}", "keep": {"a": "$.a"}}]}, "no request before"),
        ({"url": "http://{kept.a}.test/", "before": [{"url": "http://h/", "keep": {"a": "$.a"}}]}, "{kept.a}"),
        (
            {"url": "http://h/", "before": [{"url": "http://h/", "keep": {"a": "$.a"}}, {"url": "http://{kept.a}/"}]},
            "{kept.a}",
        ),
        ({"url": "http://h/", "before": [{"url": "http://h/"}] * 11}, "10"),
        ({"url": "http://h/", "before": [{"url": "http://h/", "values": {"a": "$.a"}}]}, "values"),
    ],
)
async def test_sequences_that_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(DefibError, match=re.escape(message)):
        await probed(tmp_path, "http", options)
