"""The options of blackbox_exporter 0.23, each passing and failing: both exporters give the same result.

What differs on purpose stands in docs/probes.md.
"""

import asyncio
import base64
import gzip
import socket
import ssl
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brotli
import httpx
import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from exporter.modules.prober import ModuleProber
from exporter.modules.series import render
from exporter.results import ProbeResult
from exporter.scheduler.probe_runner import probe_once
from fleet.inventory.loading import LoadedInventory
from runtime.redaction import Redactor
from tests.integration import peers
from tests.integration.peers import Authority
from tests.support import NO_TLS, eventually, inventory_of

HELLO = b"hello world"


def basic(credentials: str) -> str:
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"


async def pages(request: web.Request) -> web.StreamResponse:  # noqa: C901, PLR0911 - a site of many pages
    name = request.match_info["path"]
    headers = {"X-A": "1", "X-Path": name}
    if name.startswith("status/"):
        return web.Response(status=int(name.removeprefix("status/")))
    if name == "redirect":
        raise web.HTTPFound("/ok", headers={"X-Redirect": "yes"})
    if name == "set-cookie":
        raise web.HTTPFound("/wants-cookie", headers={"Set-Cookie": "session=abc; Path=/"})
    if name == "wants-cookie":
        return web.Response(status=200 if request.cookies.get("session") == "abc" else 403)
    if name == "wants-post":
        good = request.method == "POST" and await request.read() == b"payload"
        return web.Response(status=200 if good else 400)
    if name == "wants-host":
        return web.Response(status=200 if request.headers["Host"] == "other.test" else 421)
    if name == "wants-basic":
        good = request.headers.get("Authorization") == basic("user:pass1234")
        return web.Response(status=200 if good else 401)
    if name == "wants-bearer":
        return web.Response(status=200 if request.headers.get("Authorization") == "Bearer t0ken123" else 401)
    if name == "token":
        good = request.headers.get("Authorization") == basic("client:s3cret99")
        form = await request.post()
        good = good and form["grant_type"] == "client_credentials" and form["scope"] == "a b" and form["aud"] == "x"
        return web.json_response({"access_token": "t0ken123", "token_type": "bearer"}, status=200 if good else 401)
    encodings = {"gzip": gzip.compress(HELLO), "br": brotli.compress(HELLO), "deflate": zlib.compress(HELLO)[2:-4]}
    if name in encodings:
        return web.Response(body=encodings[name], headers={"Content-Encoding": name, **headers})
    if name == "gzip-cut":
        return web.Response(body=encodings["gzip"][:-9], headers={"Content-Encoding": "gzip"})
    return web.Response(body=HELLO, headers=headers)


async def old_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.0 200 OK\r\n\r\nhello world")
    await writer.drain()


async def greeter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A line-based server that sends a cookie and checks that it is sent back."""
    writer.write(b"100 hello\r\n200 say c00kie\r\n")
    message = (await reader.readline()).strip()
    writer.write(b"300 well\r\n" if message == b"c00kie" else b"400 ill\r\n")
    await writer.drain()


class Proxy:
    """An HTTP proxy: absolute-form requests and CONNECT; asks for a header where told to."""

    def __init__(self, wants: bytes = b"") -> None:
        self.wants = wants

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b" ", 2)
        if self.wants not in head:
            writer.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
            return
        if method == b"CONNECT":
            host, _, port = target.decode().rpartition(":")
            other_reader, other = await asyncio.open_connection(host, int(port))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            rest = target.removeprefix(b"http://")
            address, _, path = rest.partition(b"/")
            host, _, port = address.decode().rpartition(":")
            other_reader, other = await asyncio.open_connection(host, int(port))
            other.write(head.replace(target, b"/" + path, 1))
        await asyncio.gather(_pipe(reader, other), _pipe(other_reader, writer))


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@dataclass(frozen=True)
class Case:
    """A module of theirs, options of ours, the target, and the verdict. `{…}` are the servers' ports and our files."""

    kind: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    target: str
    up: bool


def http(
    theirs: dict[str, Any], ours: dict[str, Any], path: str, up: bool, base: str = "http://127.0.0.1:{web}"
) -> Case:
    return Case("http", theirs, ours, f"{base}/{path}", up)


def https(theirs: dict[str, Any], tls: dict[str, Any], up: bool, port: str = "{secure}") -> Case:
    return Case("http", {"tls_config": theirs}, {"tls": tls}, f"https://127.0.0.1:{port}/ok", up)


def tcp(
    theirs: dict[str, Any], ours: dict[str, Any], up: bool, port: str = "{greeter}", host: str = "127.0.0.1"
) -> Case:
    return Case("tcp", theirs, ours, f"{host}:{port}", up)


def dns(theirs: dict[str, Any], ours: dict[str, Any], up: bool, host: str = "127.0.0.1") -> Case:
    theirs = {"query_name": "www.test", "query_type": "A", **theirs}
    return Case("dns", theirs, {"name": "www.test", **ours}, f"{host}:{{dns}}", up)


def records(section: str, option: str, patterns: Any, key: str, up: bool, name: str = "www.test") -> Case:
    theirs = {"query_name": name, f"validate_{section}_rrs": {option: patterns}}
    return dns(theirs, {"name": name, "expect": {section: {key: patterns}}}, up)


BODY, HEADER = "fail_if_body", "fail_if_header"
CA, OWN = "{folder}/ca.pem", "{folder}/own.pem"
EXPECTS: list[dict[str, Any]] = [{"expect": "^200 say (.*)$", "send": "${1}"}, {"expect": "^300"}]
DIALOGUE: list[dict[str, Any]] = [{"expect": "^200 say (.*)$"}, {"send": "{1}\n"}, {"expect": "^300"}]
MAIL: list[dict[str, Any]] = [{"expect": "^220 "}, {"send": "EHLO p\r"}, {"expect": "^250[ -]STARTTLS"}, {"send": "STARTTLS\r"},
        {"expect": "^220 "}, {"starttls": True}, {"send": "EHLO p\r"}, {"expect": "^250 "}]  # fmt: skip
OUR_MAIL = [{"send": f"{step['send']}\n"} if "send" in step else step for step in MAIL]
OAUTH = {"client_id": "client", "client_secret": "s3cret99", "token_url": "http://127.0.0.1:{web}/token",
         "scopes": ["a", "b"], "endpoint_params": {"aud": "x"}}  # fmt: skip
WRONG_OAUTH = {**OAUTH, "client_secret": "another1"}

CASES = {
    "no options: up": http({}, {}, "ok", True),
    "no options: down": http({}, {}, "status/404", False),
    "valid_status_codes: up": http({"valid_status_codes": [404, 500]}, {"expect": {"status": [404, 500]}}, "status/404", True),
    "valid_status_codes: down": http({"valid_status_codes": [404]}, {"expect": {"status": 404}}, "ok", False),
    "valid_http_versions: up": http({"valid_http_versions": ["HTTP/1.1"]}, {"expect": {"http_version": "1.1"}}, "ok", True),
    "valid_http_versions: down": http({"valid_http_versions": ["HTTP/1.1"]}, {"expect": {"http_version": ["1.1"]}}, "", False, "http://127.0.0.1:{old}"),
    "method and body: up": http({"method": "POST", "body": "payload"}, {"method": "POST", "body": "payload"}, "wants-post", True),
    "method and body: down": http({"method": "POST", "body": "other"}, {"method": "POST", "body": "other"}, "wants-post", False),
    "method HEAD: up": http({"method": "HEAD"}, {"method": "HEAD"}, "ok", True),
    "method HEAD: down": http({"method": "HEAD"}, {"method": "HEAD"}, "status/500", False),
    "headers: up": http({"headers": {"Host": "other.test"}}, {"headers": {"Host": "other.test"}}, "wants-host", True),
    "headers: down": http({"headers": {"Host": "third.test"}}, {"headers": {"Host": "third.test"}}, "wants-host", False),
    "body_size_limit: up": http({"body_size_limit": "11B"}, {"max_body": "11B"}, "ok", True),
    "body_size_limit: down": http({"body_size_limit": "10B"}, {"max_body": "10B"}, "ok", False),
    **{
        f"compression {name}: {'up' if up else 'down'}": http(
            {"compression": name, "fail_if_body_not_matches_regexp": [f"^{text}$"]},
            {"headers": {"Accept-Encoding": name}, "expect": {"body_matches": f"^{text}$"}}, name, up)
        for name in ("gzip", "br", "deflate") for text, up in (("hello world", True), ("bye", False))
    },
    "compression cut short: down": http({"compression": "gzip", "fail_if_body_not_matches_regexp": ["zz"]}, {"expect": {"body_matches": "zz"}}, "gzip-cut", False),
    "follow_redirects: up": http({"follow_redirects": True}, {"follow_redirects": True}, "redirect", True),
    "follow_redirects: down": http({"follow_redirects": False}, {"follow_redirects": False}, "redirect", False),
    "no_follow_redirects: up": http({"no_follow_redirects": False}, {}, "redirect", True),
    "no_follow_redirects: down": http({"no_follow_redirects": True}, {"follow_redirects": False}, "redirect", False),
    "cookies on redirects: up": http({}, {}, "set-cookie", True),
    "cookies on redirects: down": http({}, {}, "wants-cookie", False),
    "fail_if_ssl: up": http({"fail_if_ssl": True}, {"expect": {"tls": False}}, "ok", True),
    "fail_if_ssl: down": http({"fail_if_ssl": True, "tls_config": {"ca_file": CA}}, {"expect": {"tls": False}, "tls": {"ca_file": CA}}, "ok", False, "https://127.0.0.1:{secure}"),
    "fail_if_not_ssl: up": http({"fail_if_not_ssl": True, "tls_config": {"ca_file": CA}}, {"expect": {"tls": True}, "tls": {"ca_file": CA}}, "ok", True, "https://127.0.0.1:{secure}"),
    "fail_if_not_ssl: down": http({"fail_if_not_ssl": True}, {"expect": {"tls": True}}, "ok", False),
    "fail_if_body_matches_regexp: up": http({f"{BODY}_matches_regexp": ["bye"]}, {"expect": {"body_lacks": "bye"}}, "ok", True),
    "fail_if_body_matches_regexp: down": http({f"{BODY}_matches_regexp": ["bye", "hello"]}, {"expect": {"body_lacks": ["bye", "hello"]}}, "ok", False),
    "fail_if_body_not_matches_regexp: up": http({f"{BODY}_not_matches_regexp": ["hello", "^h.*d$"]}, {"expect": {"body_matches": ["hello", "^h.*d$"]}}, "ok", True),
    "fail_if_body_not_matches_regexp: down": http({f"{BODY}_not_matches_regexp": ["hello", "bye"]}, {"expect": {"body_matches": ["hello", "bye"]}}, "ok", False),
    "fail_if_header_matches: up": http({f"{HEADER}_matches": [{"header": "X-A", "regexp": "2"}]}, {"expect": {"headers": {"X-A": {"lacks": "2"}}}}, "ok", True),
    "fail_if_header_matches: down": http({f"{HEADER}_matches": [{"header": "X-A", "regexp": "1"}]}, {"expect": {"headers": {"X-A": {"lacks": "1"}}}}, "ok", False),
    "fail_if_header_matches, missing: down": http({f"{HEADER}_matches": [{"header": "X-B", "regexp": "1"}]}, {"expect": {"headers": {"X-B": {"lacks": "1"}}}}, "ok", False),
    "fail_if_header_matches, allow_missing: up": http({f"{HEADER}_matches": [{"header": "X-B", "regexp": "1", "allow_missing": True}]}, {"expect": {"headers": {"X-B": {"lacks": "1", "optional": True}}}}, "ok", True),
    "fail_if_header_not_matches: up": http({f"{HEADER}_not_matches": [{"header": "X-A", "regexp": "^1$"}]}, {"expect": {"headers": {"X-A": "^1$"}}}, "ok", True),
    "fail_if_header_not_matches: down": http({f"{HEADER}_not_matches": [{"header": "X-A", "regexp": "2"}]}, {"expect": {"headers": {"X-A": "2"}}}, "ok", False),
    "fail_if_header_not_matches, missing: down": http({f"{HEADER}_not_matches": [{"header": "X-B", "regexp": "."}]}, {"expect": {"headers": {"X-B": "."}}}, "ok", False),
    "fail_if_header_not_matches, allow_missing: up": http({f"{HEADER}_not_matches": [{"header": "X-B", "regexp": ".", "allow_missing": True}]}, {"expect": {"headers": {"X-B": {"matches": ".", "optional": True}}}}, "ok", True),
    "basic_auth: up": http({"basic_auth": {"username": "user", "password": "pass1234"}}, {"auth": {"basic": {"username": "user", "password": "pass1234"}}}, "wants-basic", True),
    "basic_auth: down": http({"basic_auth": {"username": "user", "password": "wrong123"}}, {"auth": {"basic": {"username": "user", "password": "wrong123"}}}, "wants-basic", False),
    "basic_auth.password_file: up": http({"basic_auth": {"username": "user", "password_file": "{folder}/password"}}, {"auth": {"basic": {"username": "user", "password": "${file:{folder}/password}"}}}, "wants-basic", True),
    "authorization: up": http({"authorization": {"credentials": "t0ken123"}}, {"auth": {"bearer": "t0ken123"}}, "wants-bearer", True),
    "authorization: down": http({"authorization": {"credentials": "wrong123"}}, {"auth": {"bearer": "wrong123"}}, "wants-bearer", False),
    "authorization.type: down": http({"authorization": {"type": "Token", "credentials": "t0ken123"}}, {"headers": {"Authorization": "Token t0ken123"}}, "wants-bearer", False),
    "oauth2: up": http({"oauth2": OAUTH}, {"auth": {"oauth2": OAUTH}}, "wants-bearer", True),
    "oauth2: down": http({"oauth2": WRONG_OAUTH}, {"auth": {"oauth2": WRONG_OAUTH}}, "wants-bearer", False),
    "proxy_url: up": http({"proxy_url": "http://127.0.0.1:{proxy}"}, {"proxy": "http://127.0.0.1:{proxy}"}, "ok", True),
    "proxy_url: down": http({"proxy_url": "http://127.0.0.1:{closed}"}, {"proxy": "http://127.0.0.1:{closed}"}, "ok", False),
    "proxy_url for https: up": http({"proxy_url": "http://127.0.0.1:{proxy}", "tls_config": {"ca_file": CA}}, {"proxy": "http://127.0.0.1:{proxy}", "tls": {"ca_file": CA}}, "ok", True, "https://127.0.0.1:{secure}"),
    "proxy_url for https: down": http({"proxy_url": "http://127.0.0.1:{proxy}"}, {"proxy": "http://127.0.0.1:{proxy}"}, "ok", False, "https://127.0.0.1:{secure}"),
    "proxy_connect_header: up": http({"proxy_url": "http://127.0.0.1:{strict}", "proxy_connect_header": {"X-Key": ["k"]}, "tls_config": {"ca_file": CA}}, {"proxy": {"url": "http://127.0.0.1:{strict}", "headers": {"X-Key": "k"}}, "tls": {"ca_file": CA}}, "ok", True, "https://127.0.0.1:{secure}"),
    "proxy_connect_header: down": http({"proxy_url": "http://127.0.0.1:{strict}", "tls_config": {"ca_file": CA}}, {"proxy": "http://127.0.0.1:{strict}", "tls": {"ca_file": CA}}, "ok", False, "https://127.0.0.1:{secure}"),
    "tls_config.ca_file: up": https({"ca_file": CA}, {"ca_file": CA}, True),
    "tls_config.ca_file: down": https({}, {}, False),
    "tls_config.insecure_skip_verify: up": https({"insecure_skip_verify": True}, {"verify": False}, True),
    "tls_config.server_name: up": https({"ca_file": CA, "server_name": "web.test"}, {"ca_file": CA, "server_name": "web.test"}, True),
    "tls_config.server_name: down": https({"ca_file": CA, "server_name": "no.test"}, {"ca_file": CA, "server_name": "no.test"}, False),
    "tls_config.cert_file: up": https({"ca_file": CA, "cert_file": OWN, "key_file": OWN}, {"ca_file": CA, "cert_file": OWN, "key_file": OWN}, True, "{mutual}"),
    "tls_config.cert_file: down": https({"ca_file": CA}, {"ca_file": CA}, False, "{mutual}"),
    "tls_config.min_version: up": https({"ca_file": CA, "min_version": "TLS12"}, {"ca_file": CA, "min_version": "1.2"}, True, "{tls12}"),
    "tls_config.min_version: down": https({"ca_file": CA, "min_version": "TLS13"}, {"ca_file": CA, "min_version": "1.3"}, False, "{tls12}"),
    "preferred_ip_protocol: up": http({"preferred_ip_protocol": "ip4"}, {"ip": [4, 6]}, "ok", True),
    "ip_protocol_fallback: up": http({"preferred_ip_protocol": "ip6", "ip_protocol_fallback": True}, {"ip": [6, 4]}, "ok", True),
    "ip_protocol_fallback: down": http({"preferred_ip_protocol": "ip6", "ip_protocol_fallback": False}, {"ip": 6}, "ok", False),
    "tcp: up": tcp({}, {}, True),
    "tcp: down": tcp({}, {}, False, "{closed}"),
    "tcp query_response: up": tcp({"query_response": EXPECTS}, {"dialogue": DIALOGUE}, True),
    "tcp query_response.send: down": tcp({"query_response": [EXPECTS[0], {"expect": "^999"}]}, {"dialogue": [*DIALOGUE[:2], {"expect": "^999"}]}, False),
    "tcp query_response.expect: down": tcp({"query_response": [{"expect": "^SSH"}]}, {"dialogue": [{"expect": "^SSH"}]}, False),
    "tcp starttls: up": tcp({"query_response": MAIL, "tls_config": {"ca_file": CA, "server_name": "web.test"}}, {"dialogue": OUR_MAIL, "tls": {"ca_file": CA, "server_name": "web.test"}}, True, "{mail}"),
    "tcp starttls: down": tcp({"query_response": MAIL}, {"dialogue": OUR_MAIL}, False, "{mail}"),
    "tcp tls: up": tcp({"tls": True, "tls_config": {"ca_file": CA}}, {"tls": {"ca_file": CA}}, True, "{secure}"),
    "tcp tls: down": tcp({"tls": True, "tls_config": {"ca_file": CA}}, {"tls": {"ca_file": CA}}, False),
    "tcp tls_config: down": tcp({"tls": True}, {"tls": True}, False, "{secure}"),
    "tcp source_ip_address: up": tcp({"source_ip_address": "127.0.0.9"}, {"source": "127.0.0.9"}, True),
    "tcp source_ip_address: down": tcp({"source_ip_address": "192.0.2.1"}, {"source": "192.0.2.1"}, False),
    "tcp preferred_ip_protocol: up": tcp({"preferred_ip_protocol": "ip4"}, {"ip": [4, 6]}, True, host="localhost"),
    "tcp ip_protocol_fallback: down": tcp({"preferred_ip_protocol": "ip6", "ip_protocol_fallback": False}, {"ip": 6}, False),
    "dns: up": dns({}, {}, True),
    "dns query_name, valid_rcodes: down": dns({"query_name": "nxdomain.test"}, {"name": "nxdomain.test"}, False),
    "dns valid_rcodes: up": dns({"query_name": "nxdomain.test", "valid_rcodes": ["NXDOMAIN"]}, {"name": "nxdomain.test", "expect": {"rcode": "NXDOMAIN"}}, True),
    "dns valid_rcodes: down": dns({"valid_rcodes": ["NXDOMAIN"]}, {"expect": {"rcode": "NXDOMAIN"}}, False),
    "dns no answers: up": dns({"query_name": "nothing1.test"}, {"name": "nothing1.test"}, True),
    "dns transport_protocol: up": dns({"transport_protocol": "tcp"}, {"transport": "tcp"}, True),
    "dns query_type: up": dns({"query_name": "text.test", "query_type": "TXT", "validate_answer_rrs": {"fail_if_none_matches_regexp": ["spf1"]}}, {"name": "text.test", "type": "TXT", "expect": {"answer": "spf1"}}, True),
    "dns query_type: down": dns({"query_type": "TXT", "validate_answer_rrs": {"fail_if_none_matches_regexp": ["spf1"]}}, {"type": "TXT", "expect": {"answer": "spf1"}}, False),
    "dns query_class: up": dns({"query_class": "CH"}, {"class": "CH"}, True),
    "dns recursion_desired: up": dns({"query_name": "norecursion.test", "recursion_desired": False}, {"name": "norecursion.test", "recursion": False}, True),
    "dns recursion_desired: down": dns({"query_name": "norecursion.test"}, {"name": "norecursion.test"}, False),
    "dns source_ip_address: up": dns({"source_ip_address": "127.0.0.9"}, {"source": "127.0.0.9"}, True),
    "dns source_ip_address: down": dns({"source_ip_address": "192.0.2.1"}, {"source": "192.0.2.1"}, False),
    "dns ip_protocol_fallback: down": dns({"preferred_ip_protocol": "ip6", "ip_protocol_fallback": False}, {"ip": 6}, False),
    "dns preferred_ip_protocol: up": dns({"preferred_ip_protocol": "ip4"}, {"ip": [4, 6]}, True),
    "dns dns_over_tls: up": Case("dns", {"query_name": "www.test", "query_type": "A", "dns_over_tls": True, "transport_protocol": "tcp", "tls_config": {"ca_file": CA}}, {"name": "www.test", "transport": "tls", "tls": {"ca_file": CA}}, "127.0.0.1:{dot}", True),
    "dns dns_over_tls: down": Case("dns", {"query_name": "www.test", "query_type": "A", "dns_over_tls": True, "transport_protocol": "tcp"}, {"name": "www.test", "transport": "tls"}, "127.0.0.1:{dot}", False),
    **{
        f"dns {section} {option}, {'/'.join(patterns)}: {'up' if up else 'down'}": records(section, option, patterns, key, up)
        for section, one, all_ in (("answer", "192.0.2.1", "192"), ("authority", "ns", "NS"), ("additional", "2.53", "192"))
        for option, key, patterns, up in (
            ("fail_if_matches_regexp", "lacks", ["zzz"], True),
            ("fail_if_matches_regexp", "lacks", ["zzz", one], False),
            ("fail_if_none_matches_regexp", "matches", [one], True),
            ("fail_if_none_matches_regexp", "matches", ["zzz"], False),
            ("fail_if_not_matches_regexp", "all_match", [all_], True),
            ("fail_if_not_matches_regexp", "all_match", ["zzz"], False),
        )
    },
    **{
        f"dns no records, {option}: {'up' if up else 'down'}": records("answer", option, ["."], key, up, "nothing1.test")
        for option, key, up in (
            ("fail_if_matches_regexp", "lacks", True), ("fail_if_none_matches_regexp", "matches", False),
            ("fail_if_not_matches_regexp", "all_match", False),
        )
    },
}  # fmt: skip


def filled(value: Any, names: dict[str, Any]) -> Any:
    """Put the servers' ports and our files in place of their names."""
    if isinstance(value, dict):
        return {key: filled(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, names) for item in value]
    if isinstance(value, str):
        for name, item in names.items():
            value = value.replace(f"{{{name}}}", str(item))
    return value


@dataclass(frozen=True)
class World:
    """Both exporters' configurations of all cases, and the other one running."""

    blackbox: httpx.AsyncClient
    known: LoadedInventory
    targets: list[str]
    modules: ModuleProber


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("parity")
    async with AsyncExitStack() as stack:
        names = await _servers(stack, folder)
        cases = list(CASES.values())
        modules = {
            f"m{n}": {"prober": c.kind, "timeout": _timeout(c), c.kind: filled(c.theirs, names)}
            for n, c in enumerate(cases)
        }
        (folder / "blackbox.yml").write_text(yaml.safe_dump({"modules": modules}))
        services = {}
        targets = [str(filled(case.target, names)) for case in cases]
        for number, case in enumerate(cases):
            where = {"http": "url", "tcp": "address", "dns": "server"}[case.kind]
            options = {where: targets[number], **filled(case.ours, names)}
            services[f"m{number}"] = {"probe": {"timeout": _timeout(case), case.kind: options}}
        known = await asyncio.to_thread(inventory_of, folder / "config", {"services": services})
        launcher = await Launcher.begin()
        stack.push_async_callback(launcher.end)
        (port,) = reserve_ports(1)
        argv = [
            "prometheus-blackbox-exporter",
            f"--config.file={folder}/blackbox.yml",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        await launcher.start(argv, folder / "log")
        client = await stack.enter_async_context(
            httpx.AsyncClient(verify=NO_TLS, base_url=f"http://127.0.0.1:{port}", trust_env=False)
        )

        await eventually(lambda: _healthy(client))
        prober = ModuleProber(Redactor())
        await prober.load(folder / "blackbox.yml")
        yield World(client, known, targets, prober)


def _timeout(case: Case) -> str:
    """Return a timeout that suffices on a busy machine, or a short one where the timeout is under test."""
    return "15s" if case.up else "2s"


async def _healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/-/healthy")).is_success
    except httpx.HTTPError:
        return False


async def _servers(stack: AsyncExitStack, folder: Path) -> dict[str, Any]:
    authority = Authority.made(folder / "ca.pem")
    authority.own.issue_cert("probe.test").private_key_and_cert_chain_pem.write_to_path(folder / "own.pem")
    (folder / "password").write_text("pass1234")
    context = authority.server("127.0.0.1", "web.test")
    mutual = authority.server("127.0.0.1", "web.test")
    mutual.verify_mode = ssl.CERT_REQUIRED
    authority.own.configure_trust(mutual)
    old = authority.server("127.0.0.1", "web.test")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    enter = stack.enter_async_context
    name_server = stack.enter_context(peers.name_server())

    async def over_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other = await asyncio.open_connection("127.0.0.1", name_server)
        await asyncio.gather(_pipe(reader, other), _pipe(other_reader, writer))

    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    return {
        "folder": folder,
        "closed": closed,
        "web": await enter(peers.web_server(pages)),
        "secure": await enter(peers.web_server(pages, context)),
        "mutual": await enter(peers.web_server(pages, mutual)),
        "tls12": await enter(peers.web_server(pages, old)),
        "old": await enter(peers.raw_server(old_http)),
        "greeter": await enter(peers.raw_server(greeter)),
        "mail": await enter(peers.mail_server(context)),
        "proxy": await enter(peers.raw_server(Proxy().handle)),
        "strict": await enter(peers.raw_server(Proxy(b"X-Key: k").handle)),
        "dns": name_server,
        "dot": await enter(peers.raw_server(over_tls, ssl=context)),
    }


@pytest.mark.needs("prometheus-blackbox-exporter")
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", CASES)
async def test_same_result_as_blackbox_exporter(world: World, name: str) -> None:
    number, up = list(CASES).index(name), CASES[name].up
    ours: ProbeResult = await probe_once(
        world.known.inventory.services[f"m{number}"], {}, Redactor(world.known.secrets)
    )
    assert ours.success == up, ours.message
    asked = {"module": f"m{number}", "target": world.targets[number], "debug": "true"}
    theirs = await world.blackbox.get("/probe", params=asked)
    assert (f"\nprobe_success {int(up)}\n" in theirs.text) is True, theirs.text


OURS_LACKS = {"probe_ip_addr_hash", "probe_expect_info"}  # of addresses, theirs publishes a hash of its own
# What both measure alike, whether or not a probe succeeds.
ALIKE = ("probe_success", "probe_http_ssl", "probe_dns_answer_rrs", "probe_tls_version_info")
OF_SUCCESSES = (
    "probe_http_status_code",
    "probe_http_redirects",
    "probe_http_version",
    "probe_ip_protocol",
    "probe_dns_query_succeeded",
)


@pytest.mark.needs("prometheus-blackbox-exporter")
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", CASES)
async def test_same_series_as_blackbox_exporter(world: World, name: str) -> None:
    number, up = list(CASES).index(name), CASES[name].up
    ours = await world.modules.probe(f"m{number}", world.targets[number], "", None)
    assert ours.result.success == up, ours.result.message
    asked = {"module": f"m{number}", "target": world.targets[number]}
    theirs = series((await world.blackbox.get("/probe", params=asked)).text)
    own = series(render(ours).decode())
    lacking = OURS_LACKS | ({"probe_ssl_last_chain_expiry_timestamp_seconds"} if "skip_verify" in name else set())
    assert {key for key, _ in theirs} - lacking - {key for key, _ in own} == set()
    same = ALIKE + (OF_SUCCESSES if up else ())
    expected = {key: value for key, value in theirs.items() if key[0] in same}
    assert {key: own[key] for key in expected if key in own} == expected


def series(text: str) -> dict[tuple[str, str], float]:
    """Return the samples of a page: values by name and labels."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    samples = (line.rpartition(" ") for line in lines)
    return {(name.partition("{")[0], name.partition("{")[2]): float(value) for name, _, value in samples}
