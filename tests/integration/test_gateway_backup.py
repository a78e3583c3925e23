"""`defib backup` and `defib restore` of what a gateway has learned and counted."""

import json
import signal
import stat
from pathlib import Path

import pytest

from tests.forked_defib import run_defib
from tests.integration.model_api import NIM_429, Gateway, ModelApi, whole
from tests.support import eventually, write


async def test_the_state_of_a_gateway_is_backed_up_and_restored(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    config, state, kept = gateway.folder / "config", gateway.folder / "state", gateway.folder / "kept.json"
    api.respond = whole(NIM_429, "429 Too Many Requests")
    await gateway.chat()
    assert (await gateway.status())["rate_per_minute"] == 750

    async def is_stored() -> bool:
        return state.exists() and b"750" in state.read_bytes()

    await eventually(is_stored, 60)
    done = run_defib("backup", "--config", str(config), "--for", "gateway", str(kept))
    assert (done.returncode, done.stdout.startswith(f"{kept}: 1 client, ")) == (0, True), done.stderr
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    again = run_defib("backup", "--config", str(config), "--for", "gateway", str(kept))
    assert (again.returncode, "already exists; choose another name" in again.stderr) == (1, True)
    refused = run_defib("restore", "--config", str(config), str(kept))
    assert (refused.returncode, "another gateway uses" in refused.stderr) == (1, True)

    await gateway.client.post("/api/v1/upstreams/api/reset", headers={"Authorization": "Bearer a-token-for-admins"})
    await gateway.launcher.kill(gateway.pid, signal.SIGTERM)
    assert b"750" not in state.read_bytes()
    restored = run_defib("restore", "--config", str(config), "--json", str(kept))
    assert restored.returncode == 0, restored.stderr
    assert json.loads(restored.stdout)["clients"] == 1
    assert b"750" not in Path(json.loads(restored.stdout)["previous"]).read_bytes()
    await gateway.start()
    assert (await gateway.status())["rate_per_minute"] == 750
    shown = (await gateway.client.get("/status", headers={"Authorization": "Bearer a-token-for-admins"})).json()
    assert shown["clients"]["anonymous"]["today"]["requests"] == 1


STATE = {"version": 1, "rates": {}, "budgets": {"day": 1, "used": {}}}


def test_a_backup_of_everything_has_the_state(tmp_path: Path) -> None:
    text = f"""
        remediator: {{database: 'sqlite:///{tmp_path}/record.db'}}
        gateway: {{state_file: {tmp_path}/config/state, upstreams: {{own: {{url: 'http://h/v1'}}}}}}
        """
    config = write(tmp_path / "config", a=text)
    (tmp_path / "backups").mkdir()
    (config / "state").write_text(json.dumps(STATE))
    done = run_defib("backup", "--config", str(config), str(tmp_path / "backups"))
    assert "there is no database" in done.stderr  # of the record
    assert not list((tmp_path / "backups").iterdir())
    for_gateway = run_defib("backup", "--config", str(config), "--for", "gateway", "--json", str(tmp_path / "backups"))
    assert for_gateway.returncode == 0, for_gateway.stderr
    (made,) = (tmp_path / "backups").iterdir()
    assert made.name.startswith("gateway-2")
    assert made.suffix == ".json"
    size = len(json.dumps(STATE))
    assert json.loads(for_gateway.stdout)["gateway"] == {"path": str(made), "clients": 0, "bytes": size}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "is not the state of a gateway"),
        ('{"version": 1, "rates": []', "is not the state of a gateway"),
        (json.dumps({**STATE, "version": 2}), "was written by another version of Defib"),
    ],
)
def test_what_is_no_state_is_refused_and_nothing_changes(tmp_path: Path, content: str, problem: str) -> None:
    config = write(tmp_path / "config", a=f"gateway: {{state_file: {tmp_path}/state}}")
    (tmp_path / "state").write_text("before")
    (tmp_path / "kept.json").write_text(content)
    done = run_defib("restore", "--config", str(config), str(tmp_path / "kept.json"))
    assert (done.returncode, problem in done.stderr) == (1, True), done.stderr
    assert (tmp_path / "state").read_text() == "before"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "gateway.state_file is not set"),
        ("{state_file: ../state}", "there is no state of the gateway"),
    ],
)
def test_a_gateway_without_state_has_no_backup(tmp_path: Path, text: str, problem: str) -> None:
    config = write(tmp_path / "config", a=f"gateway: {text}")
    done = run_defib("backup", "--config", str(config), "--for", "gateway", str(tmp_path))
    assert (done.returncode, problem in done.stderr) == (1, True), done.stderr
