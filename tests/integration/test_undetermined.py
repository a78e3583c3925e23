"""What could not be checked is not down: every kind of probe, every way in which it cannot be carried out, no restart."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from exporter.probes import PROBES
from fleet.inventory.model import Remediation
from remediator.policy.decisions import decide
from remediator.policy.situation import ActionHistory, ActionsInProgress, Observation, Situation
from tests.integration.peers import Authority
from tests.support import eventually, inventory_of, probed

UNREACHABLE = {"address": "127.0.0.1", "ssh": {"port": 1, "user": "u", "known_hosts": "/dev/null"}}
ON_HOST: Mapping[str, Any] = {
    "container": {"name": "web"}, "unit": {"name": "nginx"}, "program": {"name": "web"}, "port": {"listening": 80},
    "command": {"run": ["true"]}, "file": {"path": "/backups/*"},
}  # fmt: skip
TOOLS = {"container": "docker", "unit": "systemctl", "program": "supervisorctl"}
WAYS = {
    "hangs": "exec sleep 300",
    "is not there": "echo not found >&2; exit 127",
    "may not": "echo 'permission denied' >&2; exit 1",
    "is killed": "kill -KILL $$",
}
ADDRESSED: Mapping[str, Mapping[str, Any]] = {
    "http": {"url": "https://{}/"}, "openai": {"url": "https://{}/", "model": "m", "prompt": "p"},
    "status": {"url": "https://{}/", "up_when": "any", "components": {"each": "$", "name": "$", "up": {"$": 1}}},
    "websocket": {"url": "wss://{}/"}, "tcp": {"address": "{}", "tls": True}, "tls": {"address": "{}"},
    "grpc": {"address": "{}", "tls": True}, "dns": {"server": "{}", "name": "a.test", "transport": "tls"},
    "icmp": {"address": "{}"}, "udp": {"address": "{}", "dialogue": [{"send": "x"}, {"expect": "."}]},
}  # fmt: skip


def addressed(kind: str, address: str) -> Any:
    return {
        key: value.format(address.partition(":")[0] if kind == "icmp" else address) if isinstance(value, str) else value
        for key, value in ADDRESSED[kind].items()
    }


def restarted(folder: Path, reason: str | None) -> bool:
    """Whether the policy, as it is shipped, would restart a service whose probe failed so."""
    written = {
        "host": "h", "probe": {"http": {"url": "http://h/"}}, "on_failure": "restart",
        "control": {"command": {"restart": ["true"]}},
    }  # fmt: skip
    known = inventory_of(
        folder / "policy", {"hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"it": written}}
    )
    seen = Observation(up=False, success=False, reason=reason)
    situation = Situation(1000.0, frozenset({"ServiceDown"}), ActionHistory(), ActionsInProgress(), seen)
    return decide(known.inventory.services["it"], Remediation(), situation).verb == "act"


async def not_restarted(folder: Path, kind: str, options: Any, timeout: str = "30s", host: Any = None) -> None:
    result = await probed(folder / "probe", kind, options, timeout, host)
    assert not result.success
    assert result.reason in ("resolve", "tls", "shell", "error"), (result.reason, result.message)
    assert not await asyncio.to_thread(restarted, folder, result.reason)


def test_a_service_that_is_down_would_be_restarted(tmp_path: Path) -> None:
    assert restarted(tmp_path, "connect")


def test_no_kind_is_forgotten() -> None:
    assert set(PROBES) == {*ON_HOST, *ADDRESSED, "python", "heartbeat"}


async def test_a_heartbeat_without_pings_is_not_down(tmp_path: Path) -> None:
    await not_restarted(tmp_path, "heartbeat", {"every": "1m"})


@pytest.mark.parametrize("kind", ON_HOST)
async def test_the_host_cannot_be_reached(tmp_path: Path, kind: str) -> None:
    await not_restarted(tmp_path, kind, ON_HOST[kind], host=UNREACHABLE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TOOLS)
async def test_the_host_s_tool_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    tool = tmp_path / "bin" / TOOLS[kind]
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{WAYS[way]}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    await not_restarted(tmp_path, kind, ON_HOST[kind], "2s" if way == "hangs" else "30s")


@pytest.mark.parametrize("kind", ADDRESSED)
async def test_the_name_cannot_be_resolved(tmp_path: Path, kind: str) -> None:
    await not_restarted(tmp_path, kind, addressed(kind, "nowhere.invalid:443"))


def _wants_a_certificate(options: Any, folder: Path, kind: str) -> Any:
    more = {"dialogue": [{"send": "hello\r\n"}, {"expect": "hello"}]} if kind == "tcp" else {}
    return {**options, "tls": {"ca_file": str(folder / "ca.pem")}, **more}


@pytest.mark.needs("prometheus-blackbox-exporter")
@pytest.mark.parametrize("kind", ["http", "openai", "status", "tcp"])
async def test_the_server_wants_a_certificate_of_the_client(launcher: Launcher, tmp_path: Path, kind: str) -> None:
    """A server in Go sends an alert after the handshake of TLS 1.3."""
    authority = await asyncio.to_thread(Authority.made, tmp_path / "ca.pem")
    own: trustme.LeafCert = authority.own.issue_cert("127.0.0.1")
    own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    pem = str(tmp_path / "own.pem")
    tls = {"cert_file": pem, "key_file": pem, "client_auth_type": "RequireAnyClientCert"}
    (tmp_path / "web.yml").write_text(yaml.safe_dump({"tls_server_config": tls}))
    (tmp_path / "modules.yml").write_text("modules: {}")
    (port,) = reserve_ports(1)
    argv = [
        "prometheus-blackbox-exporter", f"--config.file={tmp_path}/modules.yml", f"--web.config.file={tmp_path}/web.yml",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    await launcher.start(argv, tmp_path / "log")

    async def listening() -> bool:
        return (await probed(tmp_path / "port", "tcp", {"address": f"127.0.0.1:{port}"})).success

    await eventually(listening)
    await not_restarted(tmp_path, kind, _wants_a_certificate(addressed(kind, f"127.0.0.1:{port}"), tmp_path, kind))


@pytest.mark.parametrize("code", ["raise OSError('no route')", "import nothing.at.all", "import os; os.abort()", "def"])
async def test_a_function_of_the_user_breaks(tmp_path: Path, code: str) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "mine.py").write_text(f"def check(context):\n    {code}\n")
    await not_restarted(tmp_path, "python", {"call": "mine:check"})
