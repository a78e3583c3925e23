"""The `tcp` and `command` probes, against servers and over a real sshd."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from defib.demo.sshd import Sshd
from exporter.scheduler.probe_runner import probe_once
from runtime.errors import DefibError
from runtime.redaction import Redactor
from tests.integration import peers
from tests.integration.conftest import Handler, Serve
from tests.support import leaves_the_loop_free, loaded, patience, probed


def greeting(*lines: bytes, then: bytes = b"") -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines(lines)
        await writer.drain()
        await reader.readline()
        writer.write(then)
        await writer.drain()
        await reader.read()

    return handler


SMTP = greeting(b"220-hello\r\n220 ready\r\n", then=b"250 ok\r\n")


@pytest.mark.parametrize(
    ("handler", "dialogue", "reason", "message"),
    [
        (SMTP, [], None, ""),
        (SMTP, [{"expect": "^220 "}, {"send": "EHLO x\r\n"}, {"expect": "^250 "}], None, ""),
        (SMTP, [{"expect": "^220 "}, {"send": "EHLO x\r\n"}, {"expect": "^354 "}], "protocol", "step 3 of the dialogue: expected '^354 ', received '250 ok'"),
        (SMTP, [{"expect": "^SSH"}], "protocol", "step 1 of the dialogue: expected '^SSH', received '220 ready'"),
        (greeting(), [{"expect": "^SSH"}], "timeout", "step 1 of the dialogue: expected '^SSH', but received nothing in time"),
        (greeting(b"x" * 100_000), [{"expect": "^SSH"}], "protocol", ""),
        (SMTP, [{"expect": "^220 "}, {"starttls": True}], "tls", ""),
    ],
)  # fmt: skip
async def test_dialogues(
    serve: Serve, tmp_path: Path, handler: Handler, dialogue: Any, reason: str | None, message: str
) -> None:
    address = f"127.0.0.1:{await serve(handler)}"
    result = await probed(tmp_path, "tcp", {"address": address, "dialogue": dialogue}, patience(reason, "1s", message))
    assert (result.reason, message in result.message) == (reason, True), result.message


async def terminal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ask for a name and a password, as a console does, one byte in each packet."""

    async def say(text: bytes) -> None:
        for byte in text:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    await say(b"\xff\xfd\x18Welcome\r\nlogin: ")
    name = (await reader.readline()).strip()
    await say(b"Password: ")
    await reader.readline()
    await say(b"hello " + name + b"\r\n$ ")
    await reader.read()


async def socks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the greeting of a client as a SOCKS 5 proxy does (RFC 1928), then echo what else comes."""
    await reader.readexactly(3)
    writer.write(b"\x05\x00")
    while data := await reader.read(100):
        writer.write(data)


LOGIN: list[dict[str, Any]] = [
    {"prompt": "login: $"}, {"send": "probe\n"}, {"prompt": "^Password: "}, {"send": "x\n"}, {"expect": "^hello probe$"},
]  # fmt: skip
GREETING: list[dict[str, Any]] = [{"send_bytes": "05 01\n00"}, {"expect_bytes": "0500"}]


@pytest.mark.parametrize(
    ("handler", "dialogue", "reason", "message"),
    [
        (terminal, [*LOGIN, {"prompt": "[$#] $"}], None, ""),
        (terminal, [{"prompt": "(lo)gin"}, {"prompt": "^: $"}, {"send": "{1}\n"}, {"prompt": "word: "}], None, ""),
        (terminal, [{"prompt": "^Welcome"}], "protocol", "step 1 of the dialogue: expected the prompt '^Welcome', received 'login: '"),
        (terminal, [*LOGIN, {"prompt": "^#"}], "protocol", "step 6 of the dialogue: expected the prompt '^#', received '$ '"),
        (terminal, [{"expect_bytes": "ff fd 18"}, {"expect": "^Welcome$"}, *LOGIN], None, ""),
        (terminal, [{"expect_bytes": "67696e3A"}, {"prompt": "^ $"}], None, ""),
        (greeting(b"SSH-2.0-x\r\n"), [{"prompt": "^SSH"}, {"prompt": "^-2"}, {"expect": r"^\.0-x$"}], None, ""),
        (greeting(), [{"prompt": "login"}], "timeout", "expected the prompt 'login', but received nothing in time"),
        (greeting(b"x" * 100_000), [{"prompt": "y"}], "protocol", "a line is longer than 65536 bytes"),
        (socks, GREETING, None, ""),
        (socks, [GREETING[0], {"expect_bytes": "05 ff"}], "protocol", "step 2 of the dialogue: expected the bytes 05 ff, received 05 00"),
        (socks, [*GREETING, {"send_bytes": "00" * 1000}, {"expect_bytes": "00" * 1000}], None, ""),
        (greeting(), [{"expect_bytes": "00"}], "timeout", "step 1 of the dialogue: expected the bytes 00, but received nothing in time"),
        (greeting(b"x" * 100_000), [{"expect_bytes": "00"}], "protocol", "not among the first 65536 bytes"),
    ],
)  # fmt: skip
async def test_prompts_and_bytes(
    serve: Serve, tmp_path: Path, handler: Handler, dialogue: Any, reason: str | None, message: str
) -> None:
    address = f"127.0.0.1:{await serve(handler)}"
    result = await probed(tmp_path, "tcp", {"address": address, "dialogue": dialogue}, patience(reason, "1s", message))
    assert (result.reason, message in result.message) == (reason, True), result.message


@pytest.mark.parametrize("step", [{"expect_bytes": "00" * 100}, {"prompt": "^never$"}])
async def test_a_peer_that_sends_single_bytes_does_not_block(tmp_path: Path, step: Any) -> None:
    async def drip(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0)

    async with peers.raw_server(drip) as port:
        options = {"address": f"127.0.0.1:{port}", "dialogue": [step]}
        await leaves_the_loop_free(lambda: probed(tmp_path, "tcp", options, "500ms"))


async def test_secrets_in_bytes_are_not_shown(serve: Serve, tmp_path: Path) -> None:
    digits = "70 61 73 73 77 6F 72 64"
    for written in (digits, digits.replace(" ", "").lower(), "password"):
        sent = {"send": "${SECRET}"} if written == "password" else {"send_bytes": "${SECRET}"}
        dialogue = [*GREETING, sent, {"expect_bytes": "00"}]
        options = {"address": f"127.0.0.1:{await serve(socks)}", "dialogue": dialogue}
        service = {"probe": {"timeout": "1s", "tcp": options}}
        (tmp_path / "defib.yaml").write_text(json.dumps({"services": {"it": service}}))
        known = await asyncio.to_thread(loaded, tmp_path, {"SECRET": written})
        result = await probe_once(known.inventory.services["it"], {}, Redactor(known.secrets))
        shown = f"{result.message} {result.details.evidence}".lower()
        assert result.reason == "protocol", shown
        assert "passw" not in shown.replace(" ", "")
        assert "70617373" not in shown.replace(" ", "")


async def test_closed_port(tmp_path: Path) -> None:
    assert (await probed(tmp_path, "tcp", {"address": "127.0.0.1:1"})).reason == "connect"


def _unreachable(kind: str, address: str) -> dict[str, Any]:
    options: dict[str, Any] = {"http": {"url": f"http://{address}/"}, "tcp": {"address": address}}[kind]
    return {**options, "expect": "unreachable"}


@pytest.mark.parametrize("kind", ["http", "tcp"])
async def test_what_must_be_unreachable(serve: Serve, tmp_path: Path, kind: str) -> None:
    closed = await probed(tmp_path, kind, _unreachable(kind, "127.0.0.1:1"))
    assert (closed.reason, closed.details.evidence["unreachable"]) == (
        None, "cannot connect to 127.0.0.1:1: Connection refused",
    )  # fmt: skip
    address = f"127.0.0.1:{await serve(SMTP)}"
    opened = await probed(tmp_path, kind, _unreachable(kind, address))
    assert (opened.reason, opened.message) == ("state", f"{address} accepts connections, expected unreachable")
    unknown = await probed(tmp_path, kind, _unreachable(kind, "no-such-host.invalid:1"))
    assert unknown.reason == "resolve"
    with full_backlog() as port:
        silent = await probed(tmp_path, kind, _unreachable(kind, f"127.0.0.1:{port}"), "1s")
        assert (silent.reason, silent.details.evidence["unreachable"]) == (None, "no answer")


@pytest.mark.parametrize("kind", ["http", "tcp", "icmp"])
async def test_a_local_address_of_the_other_ip_version_makes_nothing_unreachable(tmp_path: Path, kind: str) -> None:
    options = {"address": "127.0.0.1", "expect": "unreachable"} if kind == "icmp" else _unreachable(kind, "127.0.0.1:1")
    result = await probed(tmp_path, kind, {**options, "source": "::1"})
    assert result.reason == "error", result.message


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """A port that drops packets: its queue of connections is full, and nobody accepts any."""
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("http", {"url": "http://h/", "expect": "reachable"}, "expect"),
        ("http", {"url": "http://h/", "expect": {"unreachable": True, "status": 200}}, "excludes all other"),
        ("http", {"url": "http://h/", "proxy": "http://p:1", "expect": "unreachable"}, "through a proxy"),
        ("tcp", {"address": "h:1", "tls": True, "expect": "unreachable"}, "excludes tls and dialogue"),
        ("tcp", {"address": "h:1", "expect": "closed"}, "expect"),
        ("icmp", {"address": "h", "expect": {"unreachable": True, "replies": 1}}, "excludes all other"),
        ("http", {"url": "http://h/", "values": {"a": "$.a"}, "expect": "unreachable"}, "excludes values and before"),
        ("http", {"url": "http://h/", "values": {"a b": "$.a"}}, "values"),
        ("http", {"url": "http://h/", "values": {"a": "a"}}, "JSONPath"),
        ("http", {"url": "http://h/", "values": {"a": {"body": "[0-9]+"}}}, "needs one group"),
        ("http", {"url": "http://h/", "values": {"a": {"body": "(1)", "header": "A"}}}, "exactly one of"),
        ("http", {"url": "http://h/", "values": {f"v{n}": "$.a" for n in range(21)}}, "20"),
        ("command", {"run": ["a"], "values": {"a": "(1)(2)"}}, "needs one group"),
    ],
)
async def test_options_that_are_refused(tmp_path: Path, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DefibError, match=re.escape(message)):
        await probed(tmp_path, kind, options)


async def test_values_of_a_response(serve: Serve, tmp_path: Path) -> None:
    body = b'{"queue": {"length": 7}, "ok": true, "text": "2.5", "none": null, "big": 1e400, "list": [1, 2]}'

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 500 x\r\nX-Left: 42\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    values = {
        "queue": "$.queue.length", "ok": "$.ok", "text": "$.text", "none": "$.none", "big": "$.big", "list": "$.list",
        "first": "$.list[*]", "left": {"header": "x-left"}, "pattern": {"body": 'length": ([0-9]+)'},
        "absent": {"header": "X-None"},
    }  # fmt: skip
    url = f"http://127.0.0.1:{await serve(respond)}/"
    result = await probed(tmp_path, "http", {"url": url, "values": values})
    assert result.reason == "status"  # the values are those of what was answered
    assert result.details.values == {"queue": 7, "ok": 1, "text": 2.5, "first": 1, "left": 42, "pattern": 7}
    assert result.details.evidence["not found"] == "absent, big, list, none"


async def test_values_of_an_output(tmp_path: Path) -> None:
    values = {"seats": "free: ([0-9]+)", "used": "used: ([0-9]+)", "load": "^load (.*)$"}
    run = ["printf", "seats free: 3\nload -1.5e2"]
    result = await probed(tmp_path, "command", {"run": run, "values": {**values, "load": "load (.*)"}})
    assert result.details.values == {"seats": 3, "load": -150}


COMMANDS = [
    ({"run": ["echo", "all well"], "expect": {"stdout_matches": "well$"}}, None, ""),
    ({"run": ["echo", "all well"], "expect": {"stdout_lacks": "well"}}, "body", "must not"),
    ({"run": ["sh", "-c", "echo why >&2; exit 3"]}, "exit", "sh exited with status 3, expected 0: 'why'"),
    ({"run": ["sh", "-c", "exit 3"], "expect": {"exit": 3}}, None, ""),
    ({"run": ["no-such-program"]}, "shell", "no-such-program exited with status 127"),
    ({"run": ["sleep", "60"]}, "timeout", "within 1 s"),
    ({"run": ["echo", "$HOME;`id`"], "expect": {"stdout_matches": "^\\$HOME;`id`$"}}, None, ""),
]


@pytest.mark.parametrize(("options", "reason", "message"), COMMANDS)
async def test_local_commands(tmp_path: Path, options: Any, reason: str | None, message: str) -> None:
    result = await probed(tmp_path, "command", options, patience(reason, "1s"))
    assert (result.reason, message in result.message) == (reason, True), result.message


@pytest.mark.needs("sshd")
@pytest.mark.parametrize(("options", "reason", "message"), COMMANDS)
async def test_commands_over_ssh(host: Sshd, tmp_path: Path, options: Any, reason: str | None, message: str) -> None:
    ssh = {
        "user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts),
    }  # fmt: skip
    result = await probed(tmp_path, "command", options, "1s", {"address": "127.0.0.1", "ssh": ssh})
    assert (result.reason, message in result.message) == (reason, True), result.message


async def test_unreachable_host(tmp_path: Path) -> None:
    unreachable = {"address": "127.0.0.1", "ssh": {"port": 1, "user": "u"}}
    result = await probed(tmp_path, "command", {"run": ["true"]}, host=unreachable)
    assert result.reason == "shell"
