"""The doctor's checks of heartbeats, and their backups."""

import asyncio
import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from defib.demo.launcher import Launcher
from exporter.heartbeats.state import HeartbeatState
from exporter.heartbeats.store import HeartbeatStore
from fleet.inventory.model import Inventory
from remediator.record.database import Database
from tests.forked_defib import run_defib
from tests.integration.test_heartbeats import KEY, Heartbeats

NOBODY = "65534"


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Heartbeats]:
    async with Heartbeats.running(launcher, tmp_path) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for backups, beside a database of the remediator."""
    Database(f"sqlite:///{tmp_path}/record.db", Inventory()).close()
    (tmp_path / "to").mkdir()
    return tmp_path / "to"


async def examine(exporter: Heartbeats) -> dict[str, tuple[str, str]]:
    """Return the doctor's findings about heartbeats: result and detail by check."""
    config = str(exporter.folder / "config")
    done = await asyncio.to_thread(run_defib, "doctor", "--for", "exporter", "--json", "--config", config)
    assert "Traceback" not in done.stderr, done.stderr
    findings = json.loads(done.stdout)["findings"]
    return {each["check"]: (each["result"], each["detail"]) for each in findings if each["subject"] == "heartbeats"}


async def test_the_doctor_checks_the_database_and_the_listener(exporter: Heartbeats) -> None:
    address, database = f"127.0.0.1:{exporter.ping_port}", exporter.folder / "config" / ".." / "heartbeats.db"
    assert await examine(exporter) == {
        "database": ("pass", str(database)),
        "URLs": ("pass", f"http://{address}"),
        "listener": ("pass", f"http://{address}"),
    }
    await exporter.stop()
    findings = await examine(exporter)
    assert findings["listener"][0] == "fail"
    with socket.create_server(("127.0.0.1", exporter.ping_port)) as server:
        server.settimeout(60)
        asking = asyncio.create_task(examine(exporter))
        for _ in range(2):  # with http and https
            client, _ = await asyncio.to_thread(server.accept)
            client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            client.close()
        findings = await asking
    assert findings["listener"][0] == "fail"


async def test_without_heartbeats_the_doctor_checks_none(exporter: Heartbeats) -> None:
    exporter.write({})
    assert await examine(exporter) == {}


async def test_an_address_that_leads_nowhere_is_a_warning(exporter: Heartbeats) -> None:
    file = exporter.folder / "config" / "a.yaml"
    file.write_text(file.read_text().replace("127.0.0.1:" + str(exporter.ping_port), f"0.0.0.0:{exporter.ping_port}"))
    findings = await examine(exporter)
    assert findings["URLs"] == (
        "warn", f"URLs of pings begin with http://0.0.0.0:{exporter.ping_port}, which leads nowhere",
    )  # fmt: skip
    assert findings["listener"] == ("pass", f"http://127.0.0.1:{exporter.ping_port}")


async def defib(
    exporter: Heartbeats, *arguments: str, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    more = ("--config", str(exporter.folder / "config"))
    if not before:
        return await asyncio.to_thread(run_defib, *arguments, *more)
    argv = [*before, sys.executable, "-m", "defib", *arguments, *more]
    return await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=False)


def configure(exporter: Heartbeats, **heartbeats: Any) -> None:
    """Have a database of the remediator, and a ping key beside the database of heartbeats."""
    exporter.write()
    file = exporter.folder / "config" / "a.yaml"
    written = yaml.safe_load(file.read_text())
    del written["exporter"]["heartbeats"]["ping_key"]
    written["exporter"]["heartbeats"] |= {"database": "../state/heartbeats.db", **heartbeats}
    written["remediator"] = {"database": f"sqlite:///{exporter.folder}/record.db"}
    file.write_text(yaml.safe_dump(written))


def read_states(path: Path) -> dict[str, HeartbeatState]:
    store = HeartbeatStore(path)
    try:
        return store.read_states()
    finally:
        store.close()


def execute(path: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as database, database:
        return database.execute(statement).fetchall()


async def url_of(exporter: Heartbeats, name: str) -> str:
    return str((await exporter.client.get(f"/api/v1/heartbeats/{name}/urls")).json()["url"])


async def test_a_backup_while_pings_arrive_restores_states_and_urls(exporter: Heartbeats, folder: Path) -> None:
    await exporter.stop()
    configure(exporter)
    await exporter.start()
    backup_url, moved_url = await url_of(exporter, "backup"), await url_of(exporter, "moved")
    assert (await exporter.ping(f"{backup_url}/3", "POST", content="disk full")).status_code == 200
    pinging = asyncio.Event()

    async def keep_pinging() -> None:
        while not pinging.is_set():
            await exporter.ping(moved_url)

    pings = asyncio.create_task(keep_pinging())
    done = await defib(exporter, "backup", str(folder), "--json")
    pinging.set()
    await pings
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)["heartbeats"]
    path = Path(written["path"])
    assert (path.name.startswith("heartbeats-2"), written["heartbeats"]) == (True, 6)
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_size) == (0o600, written["bytes"])
    refused = await defib(exporter, "restore", str(path))
    assert (refused.returncode, "another exporter uses the database" in refused.stderr) == (1, True)
    await exporter.ping(f"{backup_url}/4")
    await exporter.stop()
    # A new machine: another key, and a database with something else in it.
    (exporter.folder / "state" / "ping_key").write_text("another-key-of-a-new-machine\n")
    restored = await defib(exporter, "restore", str(path), "--json")
    assert restored.returncode == 0, restored.stderr
    answer = json.loads(restored.stdout)
    assert (answer["heartbeats"], answer["path"]) == (6, str(exporter.folder / "config" / "../state/heartbeats.db"))
    assert Path(answer["previous_ping_key"]).read_text() == "another-key-of-a-new-machine\n"
    assert (await asyncio.to_thread(read_states, Path(answer["previous"])))["backup"].exit_status == 4
    await exporter.start()
    assert await url_of(exporter, "backup") == backup_url
    failed = await exporter.until("backup", up=False, reason="failed")
    assert failed["last"]["message"] == "exit status 3; its output ends with: disk full"
    query = "SELECT name FROM sqlite_master WHERE type = 'table'"
    tables = {name for (name,) in await asyncio.to_thread(execute, exporter.folder / "state" / "heartbeats.db", query)}
    assert tables == {"clock", "heartbeats", "pings"}


async def test_a_backup_of_one_program(exporter: Heartbeats, folder: Path) -> None:
    await exporter.stop()
    configure(exporter)
    await exporter.start()
    done = await defib(exporter, "backup", str(folder / "a.db"), "--for", "exporter")
    assert (done.returncode, done.stdout.startswith(f"{folder}/a.db: 6 heartbeats, ")) == (0, True), done.stderr
    again = await defib(exporter, "backup", str(folder / "a.db"), "--for", "exporter")
    assert (again.returncode, again.stderr) == (1, f"defib: {folder}/a.db already exists; choose another name\n")
    done = await defib(exporter, "backup", str(folder / "b.db"), "--for", "remediator")
    assert done.returncode == 0, done.stderr
    done = await defib(exporter, "backup", str(folder / "c.db"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.db", "b.config.tar.gz", "b.db", "c.config.tar.gz", "c.db", "c.heartbeats.db",
    ]  # fmt: skip


async def test_old_backups_of_heartbeats_are_removed(exporter: Heartbeats, folder: Path) -> None:
    await exporter.stop()
    configure(exporter)
    await exporter.start()
    old = [folder / f"heartbeats-2026010{day}T030000.db" for day in range(1, 6)]
    for path in old:
        path.touch()
    done = await defib(exporter, "backup", str(folder), "--keep", "30d", "--json")
    answer = json.loads(done.stdout)
    assert answer["removed"] == [str(path) for path in old[:3]]
    # The next ones may have the same second in their names.
    for each in (answer, answer["heartbeats"], answer["configuration"]):
        Path(each["path"]).unlink()
    await exporter.stop()
    (exporter.folder / "state" / "heartbeats.db").unlink()
    done = await defib(exporter, "backup", str(folder), "--keep", "1s", "--json")
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["heartbeats"], answer["removed"]) == (1, None, [])
    assert "there is no database of heartbeats" in done.stderr
    assert Path(answer["path"]).is_file()


@pytest.mark.needs("root")
async def test_a_user_who_may_not_read_the_heartbeats_gets_the_rest(launcher: Launcher) -> None:
    with tempfile.TemporaryDirectory() as name:  # that others can reach, unlike tmp_path
        exporter, to = Heartbeats(launcher, Path(name)), Path(name) / "to"
        to.mkdir()
        configure(exporter)
        state, record = exporter.folder / "state", exporter.folder / "record.db"
        await asyncio.to_thread(read_states, state / "heartbeats.db")
        await asyncio.to_thread(lambda: Database(f"sqlite:///{record}", Inventory()).close())
        state.chmod(0o700)
        for path in (exporter.folder, *exporter.folder.glob("record.db*"), to):
            os.chown(path, int(NOBODY), int(NOBODY))
        before = ("setpriv", "--reuid", NOBODY, "--clear-groups")
        done = await defib(exporter, "backup", str(to), "--json", before=before)
        assert done.stdout, done.stderr
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["heartbeats"], Path(answer["path"]).is_file()) == (1, None, True)
        assert done.stderr == (
            f"defib: the heartbeats were not backed up: {name}/config/../state/heartbeats.db cannot be read; "
            "run the command as root, or as the exporter's user with --for exporter\n"
        )
        done = await defib(exporter, "backup", str(to / "a.db"), "--for", "remediator", before=before)
        assert (done.returncode, done.stderr) == (0, "")
        assert not list(to.glob("*heartbeats*"))


@pytest.fixture
def owned(launcher: Launcher) -> Iterator[Heartbeats]:
    """Databases of which another user owns the folder, and root runs commands."""
    with tempfile.TemporaryDirectory() as name:  # that others can reach, unlike tmp_path
        Path(name).chmod(0o755)
        exporter = Heartbeats(launcher, Path(name))
        configure(exporter, database="../state/heartbeats.db")
        file = exporter.folder / "config" / "a.yaml"
        file.write_text(file.read_text().replace(f"{name}/record.db", f"{name}/state/record.db"))
        state = exporter.folder / "state"
        read_states(state / "heartbeats.db")
        (state / "ping_key").write_text("the-ping-key-of-the-exporter\n")
        (state / "ping_key").chmod(0o600)
        Database(f"sqlite:///{state}/record.db", Inventory()).close()
        for path in (state, *state.iterdir()):
            os.chown(path, int(NOBODY), int(NOBODY))
        yield exporter


def owners(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_uid for path in folder.iterdir()}


@pytest.mark.needs("root")
async def test_root_leaves_and_restores_files_of_the_exporter_s_user(owned: Heartbeats, folder: Path) -> None:
    state = owned.folder / "state"
    done = await defib(owned, "backup", str(folder / "a.db"))
    assert done.returncode == 0, done.stderr
    assert set(owners(state).values()) == {int(NOBODY)}
    for path in state.iterdir():
        path.unlink()
    for name in ("a.db", "a.heartbeats.db"):
        restored = await defib(owned, "restore", str(folder / name))
        assert restored.returncode == 0, restored.stderr
    found = owners(state)
    assert set(found.values()) == {int(NOBODY)}
    assert {"record.db", "record.db.lock", "heartbeats.db", "heartbeats.db.lock", "ping_key"} <= found.keys()


@pytest.mark.needs("root")
@pytest.mark.parametrize("name", ["ping_key", "heartbeats.db", "heartbeats.db-wal", "record.db"])
async def test_a_backup_by_root_follows_no_links_to_files_of_others(owned: Heartbeats, folder: Path, name: str) -> None:
    """The exporter's user could let root read what it may not read itself."""
    secret = folder / "secret"
    secret.write_text("a-secret-of-another-user\n")
    secret.chmod(0o600)
    link = owned.folder / "state" / name
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    done = await defib(owned, "backup", str(folder / "a.db"))
    assert done.returncode == 1, done.stdout
    assert secret.read_text() == "a-secret-of-another-user\n"
    for path in folder.glob("a.*.db"):
        assert b"a-secret-of-another-user" not in path.read_bytes()


@pytest.mark.needs("root")
@pytest.mark.parametrize("name", ["a.db", "a.heartbeats.db"])
@pytest.mark.parametrize("suffix", [".lock", ".part", "", "-wal", "-journal"])
@pytest.mark.parametrize("is_there", [True, False])
async def test_a_restore_by_root_changes_no_files_of_others(
    owned: Heartbeats, folder: Path, name: str, suffix: str, is_there: bool
) -> None:
    """The exporter's user could become the owner of any file."""
    assert (await defib(owned, "backup", str(folder / "a.db"))).returncode == 0
    other, state = folder / "other", owned.folder / "state"
    if is_there:
        other.write_text("of root\n")
        other.chmod(0o600)
    link = state / f"{'record' if name == 'a.db' else 'heartbeats'}.db{suffix}"
    link.unlink(missing_ok=True)
    link.symlink_to(other)
    await defib(owned, "restore", str(folder / name))
    assert other.exists() is is_there
    if is_there:
        assert (other.read_text(), other.stat().st_uid) == ("of root\n", 0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("PRAGMA user_version = 99", "was written by a newer version of Defib (schema 99); install that version"),
        ("CREATE TRIGGER extra AFTER INSERT ON pings BEGIN SELECT 1; END", "its extra is not that of the schema"),
        ("DROP TABLE clock", "its clock is not that of the schema"),
        ("INSERT INTO heartbeats VALUES ('a', 'x')", "the state of a is not readable"),
        ("INSERT INTO heartbeats VALUES ('a', '{\"last_ping\": 1}')", "the state of a is not readable"),
        ("CREATE TABLE backup_ping_key (ping_key TEXT NOT NULL)", "has no ping key"),
        (
            "CREATE TABLE backup_ping_key AS SELECT 'the-ping-key-of-the' || char(10) || 'exporter' AS ping_key",
            "its ping key must have at least 16 characters, only letters, digits, `-` and `_`",
        ),
    ],
)
async def test_a_backup_that_is_none_is_refused(
    tmp_path: Path, folder: Path, launcher: Launcher, change: str, problem: str
) -> None:
    exporter = Heartbeats(launcher, tmp_path)
    configure(exporter)
    path = folder / "a.db"
    await asyncio.to_thread(read_states, path)
    await asyncio.to_thread(execute, path, change)
    refused = await defib(exporter, "restore", str(path))
    assert (refused.returncode, problem in refused.stderr) == (1, True), refused.stderr
    assert not (tmp_path / "state").exists()


async def test_a_ping_key_of_the_configuration_is_not_in_the_backup(exporter: Heartbeats) -> None:
    await exporter.ping(f"/{KEY}/backup")
    path = exporter.folder / "a.db"
    done = await defib(exporter, "backup", str(path), "--for", "exporter")
    assert done.returncode == 0, done.stderr
    assert KEY.encode() not in path.read_bytes()
    await exporter.stop()
    restored = await defib(exporter, "restore", str(path))
    assert restored.returncode == 0, restored.stderr
    assert not (exporter.folder / "ping_key").exists()
    await exporter.start()
    await exporter.until("backup", up=True)
