"""The exporter process as seen by users and Prometheus."""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import bcrypt
import httpx
import pytest
import yaml

from defib.demo.launcher import Launcher
from runtime import webconfig
from runtime.errors import StartError
from tests.integration.conftest import write_certificate
from tests.integration.exporter_process import Exporter
from tests.support import eventually, write

SERVICES = {
    "up": {"probe": {"every": "200ms", "tcp": {"address": "127.0.0.1:{port}"}}, "provider": "p"},
    "down": {"probe": {"every": "200ms", "tcp": {"address": "127.0.0.1:1"}}},
    "rare": {"probe": {"every": "1h", "tcp": {"address": "127.0.0.1:{port}"}}},
}


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Exporter]:
    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made = Exporter(launcher, tmp_path)
    made.configure(json.loads(json.dumps(SERVICES).replace("{port}", str(port))))
    yield made
    await made.client.aclose()
    server.close()


async def test_metrics_page(exporter: Exporter) -> None:
    await exporter.start()
    labels = 'service="up",host="",provider="p",category="other"'

    async def decided() -> bool:
        return (
            await exporter.value(f"service_up{{{labels}}}") == 1
            and await exporter.value('service_up{service="down"') == 0
        )

    await eventually(decided)
    assert (await exporter.value('service_probe_failures_total{service="down"') or 0) >= 2
    openmetrics = await exporter.client.get(
        "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert openmetrics.headers["Content-Type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")
    assert openmetrics.headers["Content-Encoding"] == "gzip"
    assert (await exporter.client.get("/-/healthy")).status_code == 200


async def test_probe_now_updates_the_state(exporter: Exporter) -> None:
    await exporter.start()
    answer = await exporter.client.post("/api/v1/services/rare/probe")
    assert answer.json().keys() == {
        "service", "success", "up", "reason", "message", "duration_seconds", "phases", "started_at",
        "digest", "host_up",
    }  # fmt: skip
    assert (answer.json()["success"], answer.json()["up"], answer.json()["reason"]) == (True, True, None)
    assert await exporter.value('service_probes_total{service="rare"') == 1
    missing = await exporter.client.post("/api/v1/services/nothing/probe")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_service")


@pytest.mark.parametrize("by", ["signal", "request"])
async def test_a_reload_keeps_unchanged_services(exporter: Exporter, by: str) -> None:
    await exporter.start()
    await exporter.client.post("/api/v1/services/rare/probe")
    before = await exporter.service("rare")
    unchanged_for = before.pop("unchanged_for_seconds")

    async def counted() -> bool:
        return (await exporter.value('service_probes_total{service="up"') or 0) >= 2

    await eventually(counted)
    written = yaml.safe_load((exporter.folder / "config" / "a.yaml").read_text())["services"]
    del written["down"]
    written["up"]["provider"] = "q"
    written["new"] = written["rare"]
    exporter.configure(written)
    if by == "signal":
        os.kill(exporter.pid, signal.SIGHUP)
    else:
        assert (await exporter.client.post("/-/reload")).status_code == 200

    async def listed() -> bool:
        answer = (await exporter.client.get("/api/v1/services")).json()
        return {service["id"] for service in answer["services"]} == {"up", "rare", "new"}

    await eventually(listed)
    after = await exporter.service("rare")
    assert after.pop("unchanged_for_seconds") > unchanged_for
    assert after == before
    assert await exporter.value('service_probes_total{service="down"') is None
    assert (await exporter.value('service_probes_total{service="up",host="",provider="q"') or 0) >= 2


async def test_a_bad_configuration_is_refused_at_a_reload(exporter: Exporter) -> None:
    await exporter.start()
    write(exporter.folder / "config", b="servces: {}")
    answer = await exporter.client.post("/-/reload")
    assert answer.status_code == 400
    assert "b.yaml:1: servces: unknown key; did you mean services?" in answer.json()["error"]["message"]
    os.kill(exporter.pid, signal.SIGHUP)

    async def refused() -> bool:
        return (exporter.folder / "log").read_text().count("configuration_reload_refused") == 2

    await eventually(refused)
    assert await exporter.value("defib_config_last_reload_successful") == 0
    assert len((await exporter.client.get("/api/v1/services")).json()["services"]) == 3


async def test_hosts_for_node_exporter(exporter: Exporter) -> None:
    hosts = {
        "gpu-01": {"address": "10.0.0.11", "group": "gpu", "labels": {"rack": "a3"}},
        "v6": {"address": "2001:db8::1"},
    }
    exporter.configure({}, hosts=hosts)
    await exporter.start()
    answer = await exporter.client.get("/api/v1/sd/node-exporter")
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json() == [
        {"targets": ["10.0.0.11:9100"], "labels": {"rack": "a3", "host": "gpu-01", "group": "gpu"}},
        {"targets": ["[2001:db8::1]:9100"], "labels": {"host": "v6", "group": ""}},
    ]


async def test_no_burst_after_a_suspension(exporter: Exporter) -> None:
    """Services that were due during a suspension are probed at spread times, not all at the same time."""
    came: list[float] = []
    loop = asyncio.get_running_loop()

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(loop.time())
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    tcp = {"address": f"127.0.0.1:{server.sockets[0].getsockname()[1]}"}
    exporter.configure({f"s{n}": {"probe": {"every": "4s", "retry_every": "4s", "tcp": tcp}} for n in range(200)})
    await exporter.start()

    async def all_up() -> bool:
        return len(came) >= 200

    await eventually(all_up)
    os.kill(exporter.pid, signal.SIGSTOP)
    await asyncio.sleep(8)
    os.kill(exporter.pid, signal.SIGCONT)
    went_on = loop.time()

    async def all_again() -> bool:
        return sum(at > went_on for at in came) >= 200

    await eventually(all_again)
    server.close()
    at_once = max(sum(begin <= at < begin + 0.5 for at in came) for begin in came if begin > went_on)
    assert at_once < 100
    assert (await exporter.value("defib_exporter_probes_skipped_total") or 0) >= 100


async def test_changes_are_refused_until_the_token_file_exists(exporter: Exporter) -> None:
    written = yaml.safe_load((exporter.folder / "config" / "a.yaml").read_text())["services"]
    database = {"database": f"sqlite:///{exporter.folder}/record.db"}
    exporter.configure(written, exporter={}, remediator=database)
    await exporter.start()
    del exporter.client.headers["Authorization"]
    token = exporter.folder / "token"
    for path in ("/api/v1/services/up/probe", "/-/reload"):
        refused = await exporter.client.post(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
        assert "no local token" in refused.json()["error"]["message"]
    assert f"there is no token file {token}" in (exporter.folder / "log").read_text()
    token.write_text("later\n")
    token.chmod(0o644)  # others may have read it
    exporter.client.headers["Authorization"] = "Bearer later"
    assert (await exporter.client.post("/-/reload")).status_code == 401
    token.chmod(0o600)

    async def accepted() -> bool:
        return (await exporter.client.post("/-/reload")).status_code == 200

    await eventually(accepted)


async def test_users_in_the_web_configuration(exporter: Exporter) -> None:
    hashed = (await asyncio.to_thread(bcrypt.hashpw, b"secret", bcrypt.gensalt(4))).decode()
    web = exporter.folder / "web.yml"
    web.write_text(yaml.safe_dump({"basic_auth_users": {"prometheus": hashed}}))
    await exporter.start("--web.config.file", str(web))
    del exporter.client.headers["Authorization"]
    assert (await exporter.client.get("/-/healthy")).status_code == 200
    for auth, status in ((None, 401), (("prometheus", "wrong"), 401), (("nobody", "secret"), 401), (("prometheus", "secret"), 200)):  # fmt: skip
        assert (await exporter.client.get("/metrics", auth=auth)).status_code == status
    answer = await exporter.client.post("/api/v1/services/up/probe", auth=("prometheus", "secret"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")  # it has no role


async def test_an_operator_pauses_probing_for_a_minute_at_most(exporter: Exporter) -> None:
    """Longer ones are maintenance, which the remediator records."""
    hashed = (await asyncio.to_thread(bcrypt.hashpw, b"secret", bcrypt.gensalt(4))).decode()
    web = exporter.folder / "web.yml"
    roles = {"olga": "operator", "ada": "admin"}
    web.write_text(yaml.safe_dump({"basic_auth_users": dict.fromkeys(roles, hashed), "roles": roles}))
    await exporter.start("--web.config.file", str(web))
    token = {"Authorization": exporter.client.headers.pop("Authorization")}

    async def pause(seconds: float, **how: Any) -> int:
        body = {"scopes": [{"scope": "service", "name": "up"}], "seconds": seconds}
        return (await exporter.client.put("/api/v1/pauses", json=body, **how)).status_code

    assert [await pause(seconds, auth=("olga", "secret")) for seconds in (60, 60.1, 3600)] == [200, 403, 403]
    assert [await pause(3600, auth=("ada", "secret")), await pause(3600, headers=token)] == [200, 200]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("basic_auth_users: {ann: $2y$10$Vb1t1aVYrHqzZ1bJ0xX1UO}", "the password of 'ann' is not a bcrypt hash"),
        (
            "basic_auth_users: {ann: secret}",
            "the password of 'ann' is not a bcrypt hash; make one with htpasswd -nBC 10",
        ),
        ("basic_auth_users: {ann: $2y$99$" + 53 * "a" + "}", "the password of 'ann' is not a bcrypt hash"),
        ("basic_users: {}", "web.yml: basic_users: unknown key"),
        ("a:\n\tb: c", "web.yml:2: invalid YAML: a tab is used for indentation; use spaces"),
    ],
)
def test_errors_in_a_web_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "web.yml").write_text(text)
    with pytest.raises(StartError, match=re.escape(message)):
        webconfig.load(tmp_path / "web.yml")


async def test_tls_in_the_web_configuration(exporter: Exporter, certificate: Path) -> None:
    web = exporter.folder / "web.yml"
    web.write_text(yaml.safe_dump({"tls_server_config": {"cert_file": certificate.name, "key_file": certificate.name}}))
    context = await asyncio.to_thread(ssl.create_default_context, cafile=str(certificate))
    async with httpx.AsyncClient(
        verify=context, trust_env=False, base_url=f"https://localhost:{exporter.port}"
    ) as client:
        await exporter.client.aclose()
        exporter.client = client
        extensions = {"sni_hostname": "web.test"}

        async def is_ready() -> bool:
            try:
                return (await client.get("/-/ready", extensions=extensions)).is_success
            except httpx.HTTPError:
                return False

        exporter.is_ready = is_ready  # type: ignore[method-assign] # this test has its own
        await exporter.start("--web.config.file", str(web))
        assert "https://127.0.0.1" in (exporter.folder / "log").read_text()
        # A renewed certificate is used for new connections, and an open one stays.
        address = ("127.0.0.1", exporter.port)
        before = await asyncio.to_thread(ssl.get_server_certificate, address)
        await asyncio.to_thread(write_certificate, certificate)

        async def is_renewed() -> bool:
            return await asyncio.to_thread(ssl.get_server_certificate, address) != before

        await eventually(is_renewed)
        assert (await client.get("/-/ready", extensions=extensions)).is_success
        # One that cannot be loaded changes nothing.
        await asyncio.to_thread(certificate.write_text, "nonsense")

        async def is_refused() -> bool:
            return "web_configuration_refused" in (exporter.folder / "log").read_text()

        await eventually(is_refused)
        assert await asyncio.to_thread(ssl.get_server_certificate, address)


async def test_it_stops_cleanly(exporter: Exporter) -> None:
    await exporter.start()
    await exporter.launcher.kill(exporter.pid, signal.SIGTERM)
    log = (exporter.folder / "log").read_text()
    assert '"event": "server_stopped"' in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("servces: {}", [], "a.yaml:1: servces: unknown key; did you mean services?"),
        ("exporter: {token: '${GONE}'}", [], "a.yaml:1: exporter.token: the environment variable GONE is not set"),
        ("{}", ["--listen", "nonsense"], "--listen must be ADDRESS:PORT, not 'nonsense'"),
        ("{}", ["--web.config.file", "/nowhere"], "web configuration: cannot read /nowhere"),
    ],
)
def test_errors_at_startup(tmp_path: Path, text: str, arguments: list[str], message: str) -> None:
    write(tmp_path, a=text)
    done = subprocess.run(
        [sys.executable, "-m", "defib", "exporter", "--config", tmp_path, *arguments],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "listening" not in done.stdout


def test_occupied_port(tmp_path: Path) -> None:
    write(tmp_path, a="{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "defib", "exporter", "--config", tmp_path, "--listen", address],
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"cannot listen on {address}" in done.stderr
