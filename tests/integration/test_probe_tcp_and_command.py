"""The `tcp` and `command` probes, against servers and over a real sshd."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from defib.demo.sshd import Sshd
from tests.integration.conftest import Handler, Serve
from tests.support import patience, probed


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


async def test_closed_port(tmp_path: Path) -> None:
    assert (await probed(tmp_path, "tcp", {"address": "127.0.0.1:1"})).reason == "connect"


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
