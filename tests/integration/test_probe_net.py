"""Probes of network protocols, each against a real server."""

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import ssl
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
import trustme
from aiohttp import web
from grpc_health.v1 import health_pb2

from defib.demo.stack import reserve_ports
from exporter.probes.net.name_servers import look_up
from exporter.scheduler.probe_runner import probe_once
from runtime.addresses import bracket
from runtime.redaction import Redactor
from runtime.times import format_rfc3339
from tests.integration import frames, peers
from tests.integration.peers import Authority
from tests.support import inventory_of, leaves_the_loop_free, patience, probed


@contextlib.contextmanager
def no_file_left() -> Iterator[None]:
    """Let this process open no more files, as if all its file descriptors were in use."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                opened.enter_context(Path(os.devnull).open("rb"))
        yield


@pytest.mark.parametrize(
    "probe",
    [
        {"tcp": {"address": "127.0.0.1:{port}"}},
        {"tcp": {"address": "localhost:{port}"}},
        {"http": {"url": "http://127.0.0.1:{port}/"}},
        {"dns": {"server": "127.0.0.1:{port}", "name": "a.test"}},
        {"udp": {"address": "127.0.0.1:{port}", "dialogue": [{"send": "x"}, {"expect": "."}]}},
        {"dns": {"server": "127.0.0.1:{port}", "name": "a.test", "transport": "tcp"}},
        pytest.param({"icmp": {"address": "127.0.0.1"}}, marks=pytest.mark.needs("ping sockets")),
    ],
    ids=str,
)
async def test_exhausted_file_descriptors_are_an_error_of_this_machine(tmp_path: Path, probe: dict[str, Any]) -> None:
    async with peers.chat_server() as port:
        written = json.loads(json.dumps(probe).replace("{port}", str(port)))
        known = await asyncio.to_thread(inventory_of, tmp_path, {"services": {"it": {"probe": written}}})
        with no_file_left():
            result = await probe_once(known.inventory.services["it"], known.inventory.hosts, Redactor(known.secrets))
    assert result.reason in ("error", "resolve"), result.message  # neither of them restarts anything


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.made(tmp_path / "ca.pem")


STARTTLS: list[dict[str, Any]] = [
    {"expect": "^220 "}, {"send": "EHLO probe\r\n"}, {"expect": "^250[ -]STARTTLS"}, {"expect": "^250 "},
    {"send": "STARTTLS\r\n"}, {"expect": "^220 "}, {"starttls": True}, {"send": "EHLO probe\r\n"}, {"expect": "^250 "},
]  # fmt: skip


@pytest.mark.parametrize(
    ("tls", "dialogue", "reason", "message"),
    [
        ({"ca_file": "ca.pem", "server_name": "mail.test"}, STARTTLS, None, ""),
        ({"verify": False}, STARTTLS, None, ""),
        ({"ca_file": "ca.pem", "server_name": "other.test"}, STARTTLS, "tls", "certificate is not valid for 'other.test'"),
        (None, [{"expect": "^220 "}, {"send": "NOOP\r\n"}, {"expect": "^354"}], "protocol",
         "step 3 of the dialogue: expected '^354', received '250 OK'"),
    ],
)  # fmt: skip
async def test_smtp(
    tmp_path: Path, authority: Authority, tls: Any, dialogue: Any, reason: str | None, message: str
) -> None:
    async with peers.mail_server(authority.server("mail.test")) as port:
        options = {"address": f"127.0.0.1:{port}", "tls": tls, "dialogue": dialogue}
        result = await probed(tmp_path, "tcp", options, patience(reason, "1s", message))
    assert (result.reason, message in result.message) == (reason, True), result.message
    assert (result.details.tls is not None) == (tls is not None and reason is None)


async def test_groups_of_a_match_are_sent(tmp_path: Path) -> None:
    dialogue = [
        {"send": "NICK probe\r\nUSER probe 0 * :probe\r\n"}, {"expect": "^PING :(\\S+)"}, {"send": "PONG :{1}\r\n"},
        {"expect": "^:irc 001 "},
    ]  # fmt: skip
    async with peers.chat_server() as port:
        address = f"127.0.0.1:{port}"
        assert (await probed(tmp_path, "tcp", {"address": address, "dialogue": dialogue})).success
        dialogue[2] = {"send": "PONG :{2}\r\n"}
        wrong = await probed(tmp_path, "tcp", {"address": address, "dialogue": dialogue}, "300ms")
    message = "step 4 of the dialogue: expected '^:irc 001 ', but received nothing in time"
    assert (wrong.reason, wrong.message) == ("timeout", message)


PING: dict[str, Any] = {"send": "ping"}


@pytest.mark.parametrize(
    ("dialogue", "reason", "message"),
    [
        ([PING, {"expect": "^(p)ing$"}, {"send": "{1}ong"}, {"expect": "^pong$"}], None, ""),
        ([{"send_bytes": "00ff00"}, {"expect_bytes": "ff"}], None, ""),
        ([{"send": "many"}, {"expect": "^1$"}, {"expect": "^99$"}], None, ""),
        ([PING, {"expect": "^pong$"}], "protocol", "step 2 of the dialogue: expected '^pong$', received 'ping'"),
        ([PING, {"expect": "i"}, {"expect": "i"}], "timeout", "step 3 of the dialogue: expected 'i', but received nothing in time"),
        ([{"send": "quiet"}, {"expect": "."}], "timeout", "step 2 of the dialogue: expected '.', but received nothing in time"),
    ],
)  # fmt: skip
async def test_datagrams(tmp_path: Path, dialogue: Any, reason: str | None, message: str) -> None:
    def answers(data: bytes) -> list[bytes]:
        if data == b"many":
            return [b"%d" % number for number in range(100)]
        return [] if data == b"quiet" else [data]

    async with peers.datagram_server(answers) as port:
        options = {"address": f"127.0.0.1:{port}", "dialogue": dialogue}
        result = await probed(tmp_path, "udp", options, patience(reason, "500ms", message))
    assert (result.reason, message in result.message) == (reason, True), result.message
    assert list(result.details.phases) == ["processing"]


async def test_a_closed_port_and_datagrams_of_others(tmp_path: Path) -> None:
    dialogue = [PING, {"expect": "."}]
    (port,) = reserve_ports(1)
    for address in (f"127.0.0.1:{port}", f"localhost:{port}"):
        closed = await probed(tmp_path, "udp", {"address": address, "dialogue": dialogue})
        assert (closed.reason, "Connection refused" in closed.message) == ("connect", True), closed.message

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        server.bind(("127.0.0.1", 0))
        server.settimeout(30)
        options = {"address": f"127.0.0.1:{server.getsockname()[1]}", "dialogue": dialogue}
        probing = asyncio.create_task(probed(tmp_path, "udp", options, "1s"))
        _, client = await asyncio.to_thread(server.recvfrom, 100)
        other.sendto(b"injected", client)
        assert (await probing).reason == "timeout"


async def test_a_flood_of_datagrams(tmp_path: Path) -> None:
    async with peers.datagram_server(lambda _: [b"x" * 9000] * 5000) as port:
        options = {"address": f"127.0.0.1:{port}", "dialogue": [PING, {"expect": "^y"}]}
        await leaves_the_loop_free(lambda: probed(tmp_path, "udp", options, "300ms"))


@pytest.mark.parametrize(
    ("host", "options", "reason", "message"),
    [
        ("local.test", {}, None, ""),
        ("local.test", {"ip": [6, 4]}, None, ""),
        ("alias.test", {}, None, ""),
        ("lossy.test", {}, None, ""),
        ("four.test", {}, None, ""),
        ("garbled.test", {}, None, ""),
        ("127.0.0.1", {}, None, ""),
        ("local.test", {"ip": 6}, "resolve", "local.test: {resolver} answered without an address"),
        ("six.test", {"ip": 4}, "resolve", "six.test: {resolver} answered without an address"),
        ("garbled.test", {"ip": 6}, "resolve", "cannot resolve garbled.test: {resolver} sent an invalid answer: "),
        ("nxdomain.test", {}, "resolve", "cannot resolve nxdomain.test: {resolver} answered NXDOMAIN"),
        ("servfail.test", {}, "resolve", "cannot resolve servfail.test: {resolver} answered SERVFAIL"),
        ("silent.test", {}, "resolve", "cannot resolve silent.test: {resolver} did not answer in time"),
        ("local.test", {"resolver": "127.0.0.1:1"}, "resolve", "cannot resolve local.test: 127.0.0.1:1 cannot be asked: Connection refused"),
    ],
)  # fmt: skip
async def test_a_resolver_of_its_own(
    tmp_path: Path, name_server: int, host: str, options: Any, reason: str | None, message: str
) -> None:
    resolver = f"127.0.0.1:{name_server}"
    async with peers.chat_server() as port:
        address = {"address": f"{host}:{port}", "resolver": resolver, **options}
        result = await probed(tmp_path, "tcp", address, "700ms" if host == "silent.test" else "30s")
    assert (result.reason, message.format(resolver=resolver) in result.message) == (reason, True), result.message
    assert ("resolve" in result.details.phases) == (host != "127.0.0.1")


@pytest.mark.parametrize(("name", "kind", "serial"), [("soa.test", "SOA", 2026113001), ("local.test", "A", None)])
async def test_the_serial_number_of_a_zone(
    tmp_path: Path, name_server: int, name: str, kind: str, serial: int | None
) -> None:
    options = {"server": f"127.0.0.1:{name_server}", "name": name, "type": kind}
    gauges = (await probed(tmp_path, "dns", options)).details.gauges
    assert (gauges.get("service_dns_soa_serial"), gauges["service_ip_protocol"]) == (serial, 4)


async def test_the_ip_protocol_of_connections_and_datagrams(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    for host, version in (("127.0.0.1", 4), ("::1", 6)):
        try:
            server = await loop.create_server(asyncio.Protocol, host, 0)
        except OSError:
            assert version == 6  # a machine without IPv6
            continue
        address = f"{bracket(host)}:{server.sockets[0].getsockname()[1]}"
        connected = await probed(tmp_path, "tcp", {"address": address})
        assert (connected.success, connected.details.gauges["service_ip_protocol"]) == (True, version)
        datagram = {"address": f"{bracket(host)}:1", "dialogue": [PING, {"expect": "."}]}
        assert (await probed(tmp_path, "udp", datagram)).details.gauges["service_ip_protocol"] == version
        server.close()


async def test_the_length_of_a_body_and_the_version_of_http(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        response = web.Response(body=b"x" * 1000)
        if request.path == "/short":
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nhello")

    async with peers.web_server(answer) as port, peers.raw_server(old) as other:
        gauges = [
            (await probed(tmp_path, "http", {"url": url, "headers": {"Accept-Encoding": "gzip"}})).details.gauges
            for url in (f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/short", f"http://127.0.0.1:{other}/")
        ]
    assert [each["service_http_version"] for each in gauges] == [1.1, 1.1, 1.0]
    long, short, tiny = (each["service_http_body_bytes"] for each in gauges)
    assert (long, 0 < short < 100, tiny) == (1000, True, 5)


async def test_a_long_response_of_a_resolver(name_server: int) -> None:
    assert len(await look_up(f"127.0.0.1:{name_server}", "many.test", [4, 6])) == 300


async def test_redirects_and_tokens_use_the_resolver(tmp_path: Path, name_server: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/token":
            return web.json_response({"access_token": "t0ken"})
        if request.path == "/":
            raise web.HTTPFound(f"http://alias.test:{port}/found")
        return web.Response()

    async with peers.web_server(answer) as port:
        oauth2 = {"token_url": f"http://local.test:{port}/token", "client_id": "c", "client_secret": "s3cret"}
        options = {"url": f"http://local.test:{port}/", "auth": {"oauth2": oauth2}}
        with_resolver = {**options, "resolver": f"127.0.0.1:{name_server}"}
        result = await probed(tmp_path, "http", with_resolver)
        assert result.success, result.message
        assert result.details.gauges["service_http_redirects"] == 1
        assert (await probed(tmp_path, "http", options)).reason == "resolve"


@pytest.mark.parametrize(
    ("name", "trusted", "server_name", "expect", "reason", "message"),
    [
        ("www.test", True, "www.test", {}, None, ""),
        ("www.test", True, "www.test", {"valid_for": "360d"}, "tls", "expected at least 360.0 days"),
        ("www.test", False, "www.test", {}, "tls", "certificate verification failed"),
        ("www.test", True, "other.test", {}, "tls", "certificate is not valid for 'other.test'"),
    ],
)
async def test_certificates_are_recorded_even_if_invalid(
    tmp_path: Path,
    authority: Authority,
    name: str,
    trusted: bool,
    server_name: str,
    expect: Any,
    reason: str,
    message: str,
) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async with peers.web_server(hello, authority.server(name, not_after=_soon())) as port:
        tls = {"ca_file": "ca.pem"} if trusted else {}
        options = {"address": f"127.0.0.1:{port}", "server_name": server_name, "tls": tls, "expect": expect}
        result = await probed(tmp_path, "tls", options)
        assert (result.reason, message in result.message) == (reason, True), result.message
        web_tls = {**tls, "server_name": server_name}
        by_web = await probed(tmp_path, "http", {"url": f"https://127.0.0.1:{port}/", "tls": web_tls})
        assert by_web.reason == (None if expect else reason)
    for each in (result, by_web):
        gauges = each.details.gauges
        assert gauges["service_tls_certificate_expiry_timestamp_seconds"] == _soon().timestamp()
        assert gauges["service_tls_certificate_not_before_timestamp_seconds"] < _soon().timestamp()
        assert each.details.tls is not None
        assert "trustme" in each.details.tls.issuer
        assert (each.details.tls.version, each.details.tls.names) == ("TLSv1.3", "www.test")
        assert re.fullmatch("[0-9a-f]{64} [0-9a-f]+", f"{each.details.tls.fingerprint} {each.details.tls.serial}")
        shown = {"issuer": each.details.tls.issuer, "not_after": format_rfc3339(_soon().timestamp()), "tls": "TLSv1.3"}
        assert each.details.certificate_json() == {"certificate": shown}
    assert result.details.gauges["service_tls_chain_expiry_timestamp_seconds"] == _soon().timestamp()
    assert "valid" in result.details.evidence["chain"][0]


def _soon() -> Any:
    return (datetime.now(UTC) + timedelta(days=200)).replace(hour=0, minute=0, second=0, microsecond=0)


async def test_an_expired_certificate(tmp_path: Path, authority: Authority) -> None:
    ended = datetime(2021, 1, 1, tzinfo=UTC)
    context = authority.server("www.test", not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=ended)
    async with peers.mail_server(None) as _, peers.raw_server(_hold, ssl=context) as port:
        options = {"address": f"127.0.0.1:{port}", "tls": {"ca_file": "ca.pem", "server_name": "www.test"}}
        result = await probed(tmp_path, "tls", options)
    assert (result.reason, "certificate has expired" in result.message) == ("tls", True), result.message
    assert result.details.gauges["service_tls_certificate_expiry_timestamp_seconds"] == ended.timestamp()


@pytest.mark.parametrize("verifies", [True, False])
async def test_a_certificate_that_no_client_needs_is_not_part_of_the_chain(
    tmp_path: Path, authority: Authority, verifies: bool
) -> None:
    """Its expiry counts only if no chain verifies, since it may be the cause."""
    ended = datetime(2021, 1, 1, tzinfo=UTC)
    own = authority.own.issue_cert("www.test", not_after=_soon())
    useless = trustme.CA().issue_cert("old.test", not_before=datetime(2020, 1, 1, tzinfo=UTC), not_after=ended)
    served = [own.private_key_pem, own.cert_chain_pems[0], useless.cert_chain_pems[0]]
    (tmp_path / "served.pem").write_bytes(b"".join(each.bytes() for each in served))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "served.pem")
    async with peers.raw_server(_hold, ssl=context) as port:
        tls = {"server_name": "www.test", **({"ca_file": "ca.pem"} if verifies else {"verify": False})}
        result = await probed(tmp_path, "tls", {"address": f"127.0.0.1:{port}", "tls": tls})
    assert result.success, result.message
    expected = _soon() if verifies else ended
    assert result.details.gauges["service_tls_chain_expiry_timestamp_seconds"] == expected.timestamp()


@pytest.mark.parametrize(
    ("ciphers", "versions", "tls", "is_up"),
    [
        ("ALL:@SECLEVEL=0", ("TLSv1", "TLSv1"), {"min_version": "1.0"}, True),
        ("ALL:@SECLEVEL=0", ("TLSv1", "TLSv1"), {"max_version": "1.0"}, True),
        ("ALL:@SECLEVEL=0", ("TLSv1", "TLSv1"), {"min_version": "1.1"}, False),
        ("ALL:@SECLEVEL=0", ("TLSv1", "TLSv1"), {"legacy": True}, False),
        ("ALL:@SECLEVEL=0", ("TLSv1_1", "TLSv1_1"), {"min_version": "1.1"}, True),
        ("ALL:@SECLEVEL=0", ("TLSv1_1", "TLSv1_1"), {}, False),
        ("AES256-GCM-SHA384", ("TLSv1_2", "TLSv1_2"), {"legacy": True}, True),
        ("AES256-GCM-SHA384", ("TLSv1_2", "TLSv1_2"), {}, False),
        ("ECDHE-RSA-AES128-SHA", ("TLSv1_2", "TLSv1_2"), {"legacy": True}, True),
        ("ECDHE-RSA-AES128-SHA", ("TLSv1_2", "TLSv1_2"), {}, False),
        ("DHE-RSA-AES128-GCM-SHA256", ("TLSv1_2", "TLSv1_2"), {"legacy": True}, False),
        ("DEFAULT", ("TLSv1_2", "TLSv1_3"), {"max_version": "1.2"}, True),
        ("DEFAULT", ("TLSv1_3", "TLSv1_3"), {"max_version": "1.2"}, False),
    ],
)
async def test_old_tls(
    tmp_path: Path, authority: Authority, ciphers: str, versions: tuple[str, str], tls: dict[str, Any], is_up: bool
) -> None:
    context = authority.server("127.0.0.1", key_type=trustme.KeyType.RSA)
    context.set_ciphers(ciphers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = (ssl.TLSVersion[each] for each in versions)

    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async with peers.web_server(hello, context) as port:
        options = {"url": f"https://127.0.0.1:{port}/", "tls": {"ca_file": "ca.pem", **tls}}
        result = await probed(tmp_path, "http", options)
        assert (result.success, result.reason) == (is_up, None if is_up else "tls"), result.message
        address = {"address": f"127.0.0.1:{port}", "tls": {"ca_file": "ca.pem", **tls}}
        assert (await probed(tmp_path, "tls", address)).success == is_up


async def test_any_certificate_of_a_file_is_trusted(tmp_path: Path) -> None:
    root = trustme.CA()
    between = root.create_child_ca()
    leaf = between.issue_cert("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    between.cert_pem.write_to_path(tmp_path / "between.pem")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "leaf.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    async with peers.raw_server(_hold, ssl=context) as port:
        for name, reason in (("between", None), ("leaf", None), ("other", "tls")):
            tls = {"ca_file": f"{name}.pem"}
            result = await probed(tmp_path, "tls", {"address": f"127.0.0.1:{port}", "tls": tls})
            assert result.reason == reason, (name, result.message)


async def test_a_name_that_stands_in_the_common_name_only(tmp_path: Path, authority: Authority) -> None:
    context = authority.server("other.test", common_name="www.test")
    async with peers.raw_server(_hold, ssl=context) as port:
        tls = {"ca_file": "ca.pem", "server_name": "www.test"}
        result = await probed(tmp_path, "tls", {"address": f"127.0.0.1:{port}", "tls": tls})
    assert (result.reason, "not valid for 'www.test'" in result.message) == ("tls", True), result.message


async def test_a_renewed_file_of_certificates_is_used_by_the_next_probe(tmp_path: Path, authority: Authority) -> None:
    async with peers.raw_server(_hold, ssl=authority.server("127.0.0.1")) as port:
        options = {"address": f"127.0.0.1:{port}", "tls": {"ca_file": "renewed.pem"}}
        trustme.CA().cert_pem.write_to_path(tmp_path / "renewed.pem")
        assert (await probed(tmp_path, "tls", options)).reason == "tls"
        authority.own.cert_pem.write_to_path(tmp_path / "renewed.pem")
        renewed = await probed(tmp_path, "tls", options)
        assert renewed.success, renewed.message


@pytest.mark.parametrize("kind", ["tcp", "dns"])
async def test_every_connection_records_the_chain(tmp_path: Path, authority: Authority, kind: str) -> None:
    context = authority.server("127.0.0.1", not_after=_soon())
    with peers.name_server() as name_server:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            other_reader, other = await asyncio.open_connection("127.0.0.1", name_server)
            other.write(await reader.read(4096) or b"x")
            writer.write(await other_reader.read(4096))
            other.close()

        async with peers.raw_server(serve, ssl=context) as port:
            address, tls = f"127.0.0.1:{port}", {"ca_file": "ca.pem"}
            of_dns = {"server": address, "name": "www.test", "transport": "tls", "tls": tls}
            result = await probed(tmp_path, kind, of_dns if kind == "dns" else {"address": address, "tls": tls})
    assert result.success, result.message
    assert result.details.gauges["service_tls_chain_expiry_timestamp_seconds"] == _soon().timestamp()


async def _hold(reader: Any, _writer: Any) -> None:
    await reader.read()


async def test_client_certificates(tmp_path: Path, authority: Authority) -> None:
    context = authority.server("www.test")
    context.verify_mode = ssl.CERT_REQUIRED
    authority.own.configure_trust(context)
    ours = authority.own.issue_cert("probe.test")
    ours.private_key_and_cert_chain_pem.write_to_path(tmp_path / "ours.pem")

    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async with peers.web_server(hello, context) as port:
        tls: dict[str, Any] = {"ca_file": "ca.pem", "server_name": "www.test"}
        url = f"https://127.0.0.1:{port}/"
        without = await probed(tmp_path, "http", {"url": url, "tls": tls})
        assert without.reason in ("tls", "protocol"), without.message
        own = {**tls, "cert_file": "ours.pem", "key_file": "ours.pem"}
        assert (await probed(tmp_path, "http", {"url": url, "tls": own})).success
        chain = await probed(tmp_path, "tls", {"address": f"127.0.0.1:{port}", "tls": own})
        assert (chain.success, len(chain.details.evidence["chain"])) == (True, 2)
        old = ssl.TLSVersion.TLSv1_2
        context.maximum_version = old
        newer = await probed(tmp_path, "http", {"url": url, "tls": {**own, "min_version": "1.3"}})
        assert newer.reason == "tls"


@pytest.fixture(scope="module")
def name_server() -> Any:
    with peers.name_server() as port:
        yield port


@pytest.mark.parametrize(
    ("options", "reason", "message"),
    [
        ({"name": "www.test"}, None, ""),
        ({"name": "www.test", "transport": "tcp", "expect": {"answer": "IN A 192"}}, None, ""),
        ({"name": "www.test", "expect": {"answer": ["\\.1$", "\\.2$"]}}, None, ""),
        ({"name": "www.test", "expect": {"answer": "\\.3$"}}, "body", "no record in the answer section matches '\\\\.3$'; it has www.test. 60 IN A 192.0.2.1"),
        ({"name": "www.test", "expect": {"answer": {"lacks": "\\.2$"}}}, "body", "expected none"),
        ({"name": "www.test", "expect": {"answer": {"all_match": "\\.1$"}}}, "body", "not all records in the answer section match"),
        ({"name": "www.test", "expect": {"answer": {"all_match": "192", "not_all_match": "\\.1$"}}}, None, ""),
        ({"name": "www.test", "expect": {"answer": {"not_all_match": "192"}}}, "body", "expected that not all do"),
        ({"name": "www.test", "expect": {"authority": "NS ns", "additional": "A 192.0.2.53"}}, None, ""),
        ({"name": "text.test", "type": "TXT", "expect": {"answer": "spf1"}}, None, ""),
        ({"name": "nothing1.test", "expect": {"answer": {"all_match": "."}}}, "body", "it has no records"),
        ({"name": "nothing1.test"}, None, ""),
        ({"name": "servfail.test"}, "status", "answered SERVFAIL, expected NOERROR"),
        ({"name": "nxdomain.test"}, "status", "answered NXDOMAIN, expected NOERROR"),
        ({"name": "nxdomain.test", "expect": {"rcode": ["NXDOMAIN", "REFUSED"]}}, None, ""),
        ({"name": "norecursion.test"}, "status", "REFUSED"),
        ({"name": "norecursion.test", "recursion": False}, None, ""),
        ({"name": "many.test", "expect": {"answer": "10.0.1.49"}}, None, ""),
        ({"name": "silent.test"}, "timeout", "no answer within 0.5 s"),
        ({"name": "www.test", "expect": {"faster_than": "1ms"}, "transport": "tcp"}, "latency", "expected less than 0.001 s"),
    ],
)  # fmt: skip
async def test_dns(tmp_path: Path, name_server: int, options: Any, reason: str | None, message: str) -> None:
    result = await probed(tmp_path, "dns", {"server": f"127.0.0.1:{name_server}", **options}, patience(reason, "500ms"))
    assert (result.reason, message in result.message) == (reason, True), result.message


@pytest.mark.needs("ping sockets")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"address": "127.0.0.1"}, None),
        ({"address": "::1", "count": 2, "expect": {"replies": 2}}, None),
        ({"address": "localhost", "ip": 4, "ttl": 3, "size": 999, "dont_fragment": True}, None),
        ({"address": "127.0.0.1", "expect": {"faster_than": "5s"}, "count": 3}, None),
        ({"address": "nowhere.invalid"}, "resolve"),
        ({"address": "127.0.0.1", "ip": 6}, "resolve"),
        ({"address": "127.0.0.1", "source": "192.0.2.1"}, "error"),
    ],
)
async def test_icmp(tmp_path: Path, options: Any, reason: str | None) -> None:
    result = await probed(tmp_path, "icmp", options)
    assert result.reason == reason, result.message


@pytest.mark.parametrize(
    ("options", "reason", "message"),
    [
        ({}, None, ""),
        ({"service": "well"}, None, ""),
        ({"service": "ill"}, "state", "the service 'ill' is NOT_SERVING, expected SERVING"),
        ({"service": "unknown"}, "status", "NOT_FOUND"),
        ({"address": "127.0.0.1:1"}, "connect", "Connection refused"),
        ({"tls": True}, "tls", ""),
    ],
)
async def test_grpc(tmp_path: Path, options: Any, reason: str | None, message: str) -> None:
    async with peers.health_server() as port:
        result = await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}", **options})
    assert (result.reason, message in result.message) == (reason, True), result.message


async def test_grpc_over_all_connections(tmp_path: Path) -> None:
    """A name with several addresses, and a local address to connect from."""
    async with peers.health_server() as port:
        named = await probed(tmp_path, "grpc", {"address": f"localhost:{port}"})
        assert named.success, named.message
        result = await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}", "source": "127.0.0.2"})
        assert result.success, result.message
        assert list(result.details.phases) == ["connect", "processing"]
        other = await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}", "source": "192.0.2.1"})
    assert other.reason == "error", other.message


def _failed(code: str, message: str = "") -> bytes:
    """An answer of gRPC that has trailers only."""
    trailers = (("grpc-status", code), ("grpc-message", message))
    return frames.frame(frames.SETTINGS) + frames.headers(*frames.GRPC, *trailers, end=True)


def _web(status: str, content_type: str = "text/html") -> bytes:
    answer = frames.headers((":status", status), ("content-type", content_type), end=True)
    return frames.frame(frames.SETTINGS) + answer


_GOAWAY = frames.frame(frames.GOAWAY, b"\x7f\xff\xff\xff\0\0\0\0")
_BEGUN = frames.frame(frames.SETTINGS) + frames.headers(*frames.GRPC, ("grpc-encoding", "gzip"))
_ENDED = frames.headers(("grpc-status", "0"), end=True)


@pytest.mark.parametrize(
    ("said", "reason", "message"),
    [
        (frames.answer(), None, ""),
        (frames.answer(_GOAWAY), None, ""),  # a server that shuts down still answers
        (frames.answer(frames.frame(frames.PING, bytes(8)), frames.headers((":status", "103"))), None, ""),
        (frames.answer(body=b"\x12\x01x\x1d1234\x2112345678\x08\x01\x20\x05"), None, ""),  # unknown fields
        (frames.answer(body=b""), "state", "the service '' is UNKNOWN, expected SERVING"),
        (frames.answer(body=b"\x08\x03"), "state", "is SERVICE_UNKNOWN"),
        (frames.answer(body=b"\x08\x80\x01"), "state", "is 128 (unknown status)"),
        (frames.answer(body=b"\x08"), "protocol", "the message has an incomplete number"),
        (frames.answer(body=b"\x12\x7f"), "protocol", "the message is incomplete"),
        (frames.answer(body=b"\x0b"), "protocol", "the message is not a HealthCheckResponse"),
        (_failed("5", "no %E6%9C%8D%E5%8A%A1%"), "status", "the health service answered NOT_FOUND: no 服务%"),
        (_failed("14"), "status", "the health service answered UNAVAILABLE"),
        (_failed("99"), "status", "the unknown code '99'"),
        (_failed("9" * 5000), "status", "the unknown code '999"),
        (_BEGUN + frames.message(b"x", 1) + _ENDED, "protocol", "compressed (gzip), which was not requested"),
        (_BEGUN + frames.message(b"") * 2 + _ENDED, "protocol", "the response of 10 bytes is not one message"),
        (_BEGUN + _ENDED, "protocol", "the response of 0 bytes is not one message"),
        (_web("200"), "protocol", "HTTP status 200, content type 'text/html', no gRPC status"),
        (_web("503"), "protocol", "no gRPC server at 127.0.0.1"),
        (_web("404"), "status", "the health service answered UNIMPLEMENTED: HTTP status 404"),
    ],
)  # fmt: skip
async def test_answers_to_grpc(tmp_path: Path, said: bytes, reason: str | None, message: str) -> None:
    async with peers.raw_server(frames.saying(said)) as port:
        result = await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}"})
    assert (result.reason, message in result.message) == (reason, True), result.message


@pytest.mark.parametrize("code", [7, 16])
async def test_refused_metadata_of_grpc(tmp_path: Path, code: int) -> None:
    trailers = (("grpc-status", str(code)), ("grpc-message", "no s3cret-t0ken"))
    said = frames.frame(frames.SETTINGS) + frames.headers(*frames.GRPC, *trailers, end=True)
    async with peers.raw_server(frames.saying(said)) as port:
        address = f"127.0.0.1:{port}"
        assert (await probed(tmp_path, "grpc", {"address": address})).reason == "status"
        with_metadata = {"address": address, "metadata": {"x-api-key": "s3cret-t0ken"}}
        refused = await probed(tmp_path, "grpc", with_metadata)
    assert (refused.reason, "s3cret" in refused.message) == ("auth", False), refused.message


@pytest.mark.parametrize(
    ("address", "tls", "name"),
    [("127.0.0.1", False, "127.0.0.1"), ("localhost", False, "localhost"), ("127.0.0.1", True, "ranker.test")],
)
async def test_the_request_of_grpc(tmp_path: Path, authority: Authority, address: str, tls: bool, name: str) -> None:
    context = authority.server("ranker.test")
    context.set_alpn_protocols(["h2"])
    asked: list[Any] = []  # events

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        while not any(isinstance(event, h2.events.StreamEnded) for event in asked):
            asked.extend(server.receive_data(await reader.read(4096)))
        writer.write(frames.answer())
        await reader.read()

    async with peers.raw_server(serve, ssl=context if tls else None) as port:
        options: dict[str, Any] = {"address": f"{address}:{port}", "service": "s" * 1000, "ip": 4}
        options["metadata"] = {"Authorization": "Bearer s3cret-t0ken", "x-trace-bin": "AAE"}
        if tls:
            options["tls"] = {"server_name": "ranker.test", "ca_file": "ca.pem", "min_version": "1.3"}
        result = await probed(tmp_path, "grpc", options)
    assert result.success, result.message
    headers: dict[Any, Any] = dict(
        next(event.headers for event in asked if isinstance(event, h2.events.RequestReceived))
    )
    assert headers.pop("user-agent").startswith("defib/")
    assert headers == {
        ":method": "POST", ":scheme": "https" if tls else "http", ":path": "/grpc.health.v1.Health/Check",
        ":authority": name, "te": "trailers", "content-type": "application/grpc", "grpc-accept-encoding": "identity",
        "authorization": "Bearer s3cret-t0ken", "x-trace-bin": "AAE",
    }  # fmt: skip
    body = b"".join(event.data for event in asked if isinstance(event, h2.events.DataReceived))
    assert body[:5] == b"\0" + (len(body) - 5).to_bytes(4)
    assert health_pb2.HealthCheckRequest.FromString(body[5:]).service == "s" * 1000


async def test_grpc_with_tls_and_other_servers(tmp_path: Path, authority: Authority) -> None:
    own: trustme.LeafCert = authority.own.issue_cert("ranker.test")
    pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    async with peers.health_server(grpc.ssl_server_credentials([pair])) as port:
        options = {"address": f"127.0.0.1:{port}", "tls": {"ca_file": "ca.pem", "server_name": "ranker.test"}}
        assert (await probed(tmp_path, "grpc", options)).success
        wrong = await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}", "tls": True})
        assert (wrong.reason, "certificate verification failed" in wrong.message) == ("tls", True), wrong.message
        assert wrong.details.gauges["service_tls_certificate_expiry_timestamp_seconds"]
        unverified = {"address": f"127.0.0.1:{port}", "tls": {"verify": False, "min_version": "1.3"}}
        result = await probed(tmp_path, "grpc", unverified)
        assert result.success, result.message
        assert list(result.details.phases) == ["connect", "tls", "processing"]
    async with peers.mail_server(None) as port:
        assert (await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}"})).reason == "protocol"
    async with peers.raw_server(_hold) as port:
        assert (await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}"}, "500ms")).reason == "timeout"


async def test_grpc_with_servers_of_tls_that_have_no_http2(tmp_path: Path, authority: Authority) -> None:
    context = authority.server("127.0.0.1")
    tls = {"ca_file": "ca.pem"}
    for protocols, message in (([], "it does not choose HTTP/2 (ALPN h2)"), (["http/1.1"], "HTTP/2")):
        if protocols:
            context.set_alpn_protocols(protocols)
        async with peers.raw_server(_hold, ssl=context) as port:
            result = await probed(tmp_path, "grpc", {"address": f"127.0.0.1:{port}", "tls": tls})
        assert (result.reason, message in result.message) == ("protocol", True), result.message
        assert result.message.startswith(f"no gRPC server at 127.0.0.1:{port}")


async def test_client_certificates_of_grpc(tmp_path: Path, authority: Authority) -> None:
    own = authority.own.issue_cert("127.0.0.1")
    authority.own.issue_cert("probe.test").private_key_and_cert_chain_pem.write_to_path(tmp_path / "ours.pem")
    pair = (own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    ca = authority.own.cert_pem.bytes()
    async with peers.health_server(grpc.ssl_server_credentials([pair], ca, require_client_auth=True)) as port:
        options: dict[str, Any] = {"address": f"127.0.0.1:{port}", "tls": {"ca_file": "ca.pem"}}
        without = await probed(tmp_path, "grpc", options)
        assert without.reason in ("tls", "protocol"), without.message  # not every server sends an alert
        options["tls"]["cert_file"] = "ours.pem"
        result = await probed(tmp_path, "grpc", options)
        assert result.success, result.message


@pytest.mark.parametrize(
    ("dialogue", "reason", "message"),
    [
        ([], None, ""),
        ([{"send": '{"op": "ping"}'}, {"expect": '"op": ?"pong"'}], None, ""),
        (
            [{"send": "hello"}, {"expect": "^bye$"}],
            "protocol",
            "step 2 of the dialogue: expected '^bye$', received 'hello'",
        ),
        ([{"expect": "."}], "timeout", ""),
        ([{"send_bytes": "00 ff 01"}, {"expect_bytes": "ff01"}], None, ""),
        (
            [{"send_bytes": "00 ff 01"}, {"expect_bytes": "02"}],
            "protocol",
            "step 2 of the dialogue: expected the bytes 02, received 00 ff 01",
        ),
    ],
)
async def test_websocket(tmp_path: Path, authority: Authority, dialogue: Any, reason: str | None, message: str) -> None:
    async with peers.web_server(peers.echoing) as port:
        options: dict[str, Any] = {"url": f"ws://127.0.0.1:{port}/x", "dialogue": dialogue}
        result = await probed(tmp_path, "websocket", options, patience(reason, "500ms", message))
    assert (result.reason, message in result.message) == (reason, True), result.message
    assert list(result.details.phases) == ["connect", "processing", "transfer"]
    async with peers.web_server(peers.echoing, authority.server("live.test")) as port:
        url = f"wss://127.0.0.1:{port}/"
        tls = {"ca_file": "ca.pem", "server_name": "live.test"}
        assert (await probed(tmp_path, "websocket", {"url": url, "tls": tls})).success
        refused = await probed(tmp_path, "websocket", {"url": url})
        assert (refused.reason, refused.details.tls is not None) == ("tls", True)


@pytest.mark.parametrize(
    ("auth", "sent"),
    [
        ({"basic": {"username": "probe", "password": "s3cret"}}, "Basic cHJvYmU6czNjcmV0"),
        ({"bearer": "t0ken-of-a-feed"}, "Bearer t0ken-of-a-feed"),
        ({"bearer_file": "token"}, "Bearer t0ken-of-a-feed"),
    ],
)
async def test_credentials_of_a_websocket(tmp_path: Path, auth: Any, sent: str) -> None:
    async def guarded(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != sent:
            return web.Response(status=401)
        return await peers.echoing(request)

    (tmp_path / "token").write_text("t0ken-of-a-feed\n")
    async with peers.web_server(guarded) as port:
        options: dict[str, Any] = {"url": f"ws://127.0.0.1:{port}/", "auth": auth}
        assert (await probed(tmp_path, "websocket", options)).success
        options["headers"] = {"authorization": "Basic other-credentials"}
        assert (await probed(tmp_path, "websocket", options)).reason == "auth"
        assert (await probed(tmp_path, "websocket", {"url": options["url"]})).reason == "status"


async def test_websocket_handshake_failures(tmp_path: Path) -> None:
    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=403)

    async with peers.web_server(refuse) as port:
        url = f"ws://127.0.0.1:{port}/"
        assert (await probed(tmp_path, "websocket", {"url": url})).reason == "status"
        with_key = {"url": url, "headers": {"Authorization": "Bearer x1234567"}}
        assert (await probed(tmp_path, "websocket", with_key)).reason == "auth"
        with_auth = {"url": url, "auth": {"basic": {"username": "probe", "password": "x1234567"}}}
        assert (await probed(tmp_path, "websocket", with_auth)).reason == "auth"
    async with peers.mail_server(None) as port:
        assert (await probed(tmp_path, "websocket", {"url": f"ws://127.0.0.1:{port}/"})).reason == "protocol"
    assert (await probed(tmp_path, "websocket", {"url": "ws://127.0.0.1:1/"})).reason == "connect"


@pytest.mark.parametrize(
    ("greeting", "reason", "message"),
    [
        (b"220 hello\r\n250 injected\r\n", "protocol", "step 2 of the dialogue: unexpected plain text before TLS"),
        (b"220 hello\r\n", "timeout", "step 2 of the dialogue: the TLS handshake timed out"),
        (b"login: ", "protocol", "step 1 of the dialogue: expected '^220 ', received 'login: '"),
        (b"", "timeout", "step 1 of the dialogue: expected '^220 ', but received nothing in time"),
    ],
)  # fmt: skip
async def test_starttls_failures(tmp_path: Path, greeting: bytes, reason: str, message: str) -> None:
    async def handle(reader: Any, writer: Any) -> None:
        writer.write(greeting)
        await writer.drain()
        await reader.read(1)
        await reader.read()

    async with peers.raw_server(handle) as port:
        dialogue = [{"expect": "^220 "}, {"starttls": True}, {"expect": "^250"}]
        result = await probed(
            tmp_path, "tcp", {"address": f"127.0.0.1:{port}", "dialogue": dialogue}, patience(reason, "400ms", message)
        )
    assert (result.reason, message in result.message) == (reason, True), result.message


async def test_endless_lines_and_pings(tmp_path: Path) -> None:
    async def lines(_reader: Any, writer: Any) -> None:
        while True:
            writer.write(b"no\r\n" * 1000)
            await writer.drain()

    async def pings(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        while True:
            await socket.ping(b"x")
            await asyncio.sleep(0)  # `ping` only waits once 64 KiB stand unsent: the probe shares this loop

    async with peers.raw_server(lines) as port:
        options = {"address": f"127.0.0.1:{port}", "dialogue": [{"expect": "^yes"}]}
        assert (await probed(tmp_path, "tcp", options)).reason == "protocol"
    async with peers.web_server(pings) as port:
        asked = {"url": f"ws://127.0.0.1:{port}/", "dialogue": [{"expect": "yes"}]}
        result = await probed(tmp_path, "websocket", asked, "20s")
        assert (result.reason, "more than 1000 pings" in result.message) == ("protocol", True), result.message


@pytest.mark.parametrize("data", [b"\x01\x00" + 50_000 * b"\x00\x00", 50_000 * b"\x8a\x00", 50_000 * b"\x81\x01a"])
async def test_endless_frames(tmp_path: Path, data: bytes) -> None:
    async def frames(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        assert request.transport is not None
        while not request.transport.is_closing():
            request.transport.write(data)
            await asyncio.sleep(0.01)
        return socket

    async with peers.web_server(frames) as port:
        asked = {"url": f"ws://127.0.0.1:{port}/", "dialogue": [{"expect": "yes"}]}
        result = await probed(tmp_path, "websocket", asked, "20s")
    assert result.reason == "protocol", result.message
    assert "more than 1" in result.message, result.message
    assert result.duration < 10


async def test_frames_of_all_lengths(tmp_path: Path) -> None:
    """The frames of long messages are counted by their heads, wherever those are split."""
    sizes = [0, 1, 125, 126, 65_535, 65_536, 1_000_000]

    async def frames(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        for size in sizes:
            await socket.send_str("x" * size)
        await socket.send_str("yes")
        await socket.receive()
        return socket

    async with peers.web_server(frames) as port:
        asked = {"url": f"ws://127.0.0.1:{port}/", "dialogue": [{"expect": "^yes"}]}
        assert (await probed(tmp_path, "websocket", asked, "20s")).success


async def test_websocket_redirect_to_another_server_is_not_followed(tmp_path: Path) -> None:
    heard: list[Any] = []

    async def other(request: web.Request) -> web.Response:
        heard.append(request.headers)
        return web.Response()

    async with peers.web_server(other) as elsewhere:

        async def own(_request: web.Request) -> web.Response:
            raise web.HTTPFound(f"http://127.0.0.1:{elsewhere}/")

        async with peers.web_server(own) as port:
            asked = {"url": f"ws://127.0.0.1:{port}/", "headers": {"X-Key": "k3y12345"}}
            result = await probed(tmp_path, "websocket", asked)
    assert (result.reason, "another server" in result.message, heard) == ("protocol", True, [])


async def test_websocket_redirect_to_a_host_with_a_long_name(tmp_path: Path) -> None:
    name = "".join(map(chr, range(0x4E00, 0x4E00 + 2500)))  # its encoding takes seconds

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 302 Found\r\nLocation: http://{name}/\r\nContent-Length: 0\r\n\r\n".encode())

    async with peers.raw_server(redirect) as port:

        async def probe() -> None:
            result = await probed(tmp_path, "websocket", {"url": f"ws://127.0.0.1:{port}/"})
            assert (result.reason, "longer than 253" in result.message) == ("protocol", True), result.message

        await leaves_the_loop_free(probe)


async def test_dns_over_tls_with_an_unknown_authority(tmp_path: Path, authority: Authority) -> None:
    async with peers.raw_server(_hold, ssl=authority.server("127.0.0.1")) as port:
        options = {"server": f"127.0.0.1:{port}", "name": "www.test", "transport": "tls"}
        result = await probed(tmp_path, "dns", options)
    assert (result.reason, "certificate verification failed" in result.message) == ("tls", True), result.message
