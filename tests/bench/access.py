"""Access control: what a check costs, and how much guessing passwords delays restarts and notifications."""

import asyncio
import base64
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bcrypt
import httpx
import uvloop
import yaml
from aiohttp.test_utils import make_mocked_request

from defib.demo import sshd
from defib.demo.feishu import SECRET, FeishuSimulator
from defib.demo.launcher import Launcher
from defib.demo.stack import Stack, reserve_ports
from runtime.access.audit import AuditEntry
from runtime.access.control import AccessControl
from runtime.access.roles import AccessRequirement
from runtime.access.sessions import Session, Sessions
from runtime.access.tokens import ApiToken, ApiTokens, ConfiguredTokens, create_secret, digest_of
from runtime.webconfig import WebConfigFile
from tests.bench.remediator import HEADERS
from tests.support import WEBHOOK_TOKEN, eventually

CHECK, RATIO = 0.0003, 1.5  # seconds; times the median without guessing
CHECKS, HELD = 5000, 1000  # checks that are measured; tokens and sessions that exist
ROUNDS, CONNECTIONS = 15, 200
# Guessing comes from other machines: it takes no CPU time from the remediator, nor from what measures it.
BESIDE = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:-1])) or "0", "nice", "-n", "19"]
# Guesses passwords over many connections, each as fast as the answers come.
GUESS = """
import asyncio, base64, itertools, sys
async def guess(port, connection):
    for number in itertools.count():
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while True:
                credential = base64.b64encode(f"user-{connection % 40}:{number}".encode()).decode()
                writer.write(f"GET /api/v1/identity HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nAuthorization: Basic {credential}\\r\\n\\r\\n".encode())
                head = await reader.readuntil(b"\\r\\n\\r\\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\\r\\n")[0])
                await reader.readexactly(length)
                number += 1
        except (OSError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.1)
async def main(port, connections):
    await asyncio.gather(*(guess(port, connection) for connection in range(connections)))
asyncio.run(main(*map(int, sys.argv[1:])))
"""


class _NoStorage:
    """Sessions that are not stored."""

    async def load(self) -> Iterable[Session]:
        return ()

    async def save(self, session: Session) -> None:
        """Do nothing."""

    async def delete(self, digests: Iterable[str]) -> None:
        """Do nothing."""


async def _write_nothing(_entry: AuditEntry) -> None:
    """Do nothing."""


def run() -> bool:
    return all([uvloop.run(_checks()), uvloop.run(_guessing())])


async def _checks() -> bool:
    """Measure the check of an API token and of a session, among many."""
    with tempfile.TemporaryDirectory() as name:
        users = Path(name) / "web.yml"
        hashed = bcrypt.hashpw(b"ann", bcrypt.gensalt(4)).decode()
        users.write_text(yaml.safe_dump({"basic_auth_users": {"ann": hashed}, "roles": {"ann": "operator"}}))
        web_config = WebConfigFile(users)
        tokens, sessions = ApiTokens(time.monotonic), Sessions(time.monotonic, _NoStorage())
        access = AccessControl(
            lambda: web_config.users, ConfiguredTokens(lambda _: None), write_audit=_write_nothing, now=time.monotonic,
            api_tokens=tokens, sessions=sessions,
        )  # fmt: skip
    secrets = [create_secret() for _ in range(HELD)]
    tokens.replace(ApiToken(f"t{n}", "operator", digest_of(secret), 0.0, "") for n, secret in enumerate(secrets))
    plain = make_mocked_request("GET", "/", headers={"Host": "127.0.0.1"})
    ids = [await access.start_session(plain, "ann", "password") for _ in range(HELD)]
    credential = base64.b64encode(b"ann:ann").decode()
    shown = {
        "an API token": {"Authorization": f"Bearer {secrets[-1]}"},
        "a session": {"Cookie": f"defib_session={ids[-1]}"},
        "a password that was accepted before": {"Authorization": f"Basic {credential}"},
    }
    took = {name: await _time_check(access, headers) for name, headers in shown.items()}
    good = max(took.values()) <= CHECK
    each = ", ".join(f"{name} {seconds * 1000:.3f} ms" for name, seconds in took.items())
    print(f"a check of access (at most {CHECK * 1000:g} ms): {each}: {'good' if good else 'TOO SLOW'}")
    return good


async def _time_check(access: AccessControl, headers: dict[str, str]) -> float:
    requests = [make_mocked_request("GET", "/", headers={"Host": "127.0.0.1", **headers}) for _ in range(CHECKS)]
    began = time.perf_counter()
    for request in requests:
        await access.check(request, AccessRequirement.OPERATOR)
    return (time.perf_counter() - began) / CHECKS


async def _guessing() -> bool:
    """Measure the time from an alert to its restart and its notification, with and without guessing beside it."""
    launcher, feishu = await Launcher.begin(), FeishuSimulator()
    await feishu.start()
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            folder = Path(name)
            stack = await _start(launcher, folder, feishu)
            quiet, guessed = [], []
            await _one(stack, folder, feishu, 0)  # connects to the host
            for number in range(ROUNDS):
                quiet.append(await _one(stack, folder, feishu, 2 * number + 1))
                port = str(stack.ports["remediator"])
                guesser = subprocess.Popen([*BESIDE, sys.executable, "-c", GUESS, port, str(CONNECTIONS)])  # noqa: ASYNC220
                await asyncio.sleep(1.5)
                guessed.append(await _one(stack, folder, feishu, 2 * number + 2))
                guesser.kill()
                guesser.wait()
    finally:
        await feishu.stop()
        await launcher.end()
    ratios = [statistics.median(each) / statistics.median(base) for each, base in zip(
        zip(*guessed, strict=True), zip(*quiet, strict=True), strict=True
    )]  # fmt: skip
    good = bool(max(ratios) <= RATIO)
    print(
        f"with {CONNECTIONS} connections that guess passwords: to the restart {ratios[0]:.2f} times, to the notification {ratios[1]:.2f}"
        f" times the median without (at most {RATIO:g}; {ROUNDS} rounds each, without:"
        f" {statistics.median(each[0] for each in quiet) * 1000:.0f} and {statistics.median(each[1] for each in quiet) * 1000:.0f} ms):"
        f" {'good' if good else 'TOO SLOW'}"
    )
    return good


async def _start(launcher: Launcher, folder: Path, feishu: FeishuSimulator) -> Stack:
    (port,) = reserve_ports(1)
    host = await sshd.start(launcher, folder / "sshd", port, {"PATH": "/usr/bin:/bin"})
    (folder / "restarts").touch()
    ssh: dict[str, Any] = {
        "user": host.user, "port": host.port, "key_file": str(host.key_file), "known_hosts": str(host.known_hosts),
    }  # fmt: skip
    services = {
        f"down-{n}": {
            "host": "h",
            "probe": {"every": "5s", "fail_after": 1, "command": {"run": ["test", "-e", f"{folder}/{n}.up"]}},
            "control": {"command": {"restart": ["sh", "-c", f"echo {n} >> {folder}/restarts; touch {folder}/{n}.up"]}},
            "on_failure": "restart",
        }
        for n in range(2 * ROUNDS + 1)
    }
    users = {f"user-{n}": bcrypt.hashpw(b"right", bcrypt.gensalt(10)).decode() for n in range(20)}
    (folder / "web.yml").write_text(yaml.safe_dump({"basic_auth_users": users}))
    stack = Stack(launcher, folder, webhook_token=WEBHOOK_TOKEN)
    stack.options = {"remediator": ["--web.config.file", f"{folder}/web.yml"]}
    stack.configuration(
        {
            "hosts": {"h": {"address": "127.0.0.1", "ssh": ssh}},
            "services": services,
            "remediation": {"hold": "100ms", "storm": {"at_least": 1000}, "actions_per_10m": 1000},
            "notify": {
                "language": "en", "channels": {"ops": {"feishu": {"webhook": feishu.webhook, "secret": SECRET}}},
                "routes": [{"channels": ["ops"], "states": ["down"]}],
            },
        }
    )  # fmt: skip
    path = folder / "config" / "defib.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "alertmanager_url" not in line))
    await stack.start_program("exporter")
    await stack.start_program("remediator")
    os.sched_setaffinity(stack.pids["remediator"], sorted(os.sched_getaffinity(0))[-1:])
    return stack


async def _one(stack: Stack, folder: Path, feishu: FeishuSimulator, number: int) -> tuple[float, float]:
    """Return the seconds from an alert to the first line of its restart, and to its notification."""
    restarted, sent = len((folder / "restarts").read_text().split()), len(feishu.received)
    alert = {
        "status": "firing", "labels": {"alertname": "ServiceDown", "service": f"down-{number}", "severity": "critical"},
        "annotations": {}, "startsAt": "2026-11-24T00:00:00Z", "endsAt": "", "fingerprint": str(number),
    }  # fmt: skip
    took = [0.0, 0.0]
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        began = time.perf_counter()
        url = f"{stack.url('remediator')}/webhook/alertmanager"
        answer = await client.post(url, json={"version": "4", "alerts": [alert]}, headers=HEADERS)
        assert answer.status_code == 200, answer.text
        while not all(took):
            if not took[0] and len((folder / "restarts").read_text().split()) > restarted:
                took[0] = time.perf_counter() - began
            if not took[1] and len(feishu.received) > sent:
                took[1] = time.perf_counter() - began
            await asyncio.sleep(0.001)

        async def is_idle() -> bool:
            actions = (await stack.get("remediator", "/api/v1/actions"))["actions"]
            return all(each["state"] != "running" for each in actions)

        await eventually(is_idle, 60)
        alert["status"] = "resolved"
        await client.post(url, json={"version": "4", "alerts": [alert]}, headers=HEADERS)
    return took[0], took[1]
