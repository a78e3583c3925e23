"""`defib backup` and `defib restore` while the database is in use."""

import asyncio
import contextlib
import json
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from sqlalchemy import insert, update

from fleet.inventory.model import Inventory
from remediator.record import backup
from remediator.record.database import Database
from remediator.record.schema import api_tokens, incidents, sessions
from remediator.record.transaction import Transaction
from runtime import database_files
from runtime.database_files import BackupError, DatabaseBusyError
from tests.forked_defib import run_defib
from tests.support import write


def defib(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_defib(*arguments, "--config", str(config))


def insert_incident(tx: Transaction, service: str) -> None:
    tx.execute(insert(incidents).values(service=service, state="open", opened_at=1.0))


def store(database: Database, service: str) -> None:
    asyncio.run(database.write(insert_incident, service))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    written = {"remediator": {"database": f"sqlite:///{tmp_path}/record.db"}}
    (folder / "defib.yaml").write_text(yaml.safe_dump(written))
    return folder


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path}/record.db", Inventory())
    yield made
    with contextlib.suppress(RuntimeError):  # a test may have closed it
        made.close()


def services(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as there:
        return [name for (name,) in there.execute("SELECT service FROM incidents ORDER BY id")]


@pytest.mark.parametrize("left", ["gone", "empty"])
def test_restore_removes_the_write_ahead_log_of_the_lost_database(
    config: Path, database: Database, tmp_path: Path, left: str
) -> None:
    """The database is lost, but not its write-ahead log, which SQLite would apply to a restored file."""
    store(database, "web")
    assert defib(config, "backup", str(tmp_path / "kept.db")).returncode == 0
    store(database, "later")
    path = tmp_path / "record.db"
    beside = {ending: Path(f"{path}{ending}").read_bytes() for ending in ("-wal", "-shm")}
    database.close()
    for ending, content in beside.items():
        Path(f"{path}{ending}").write_bytes(content)
    path.write_bytes(b"") if left == "empty" else path.unlink()
    done = defib(config, "restore", str(tmp_path / "kept.db"))
    assert done.returncode == 0, done.stderr
    assert not any(Path(f"{path}{ending}").exists() for ending in beside)
    assert services(path) == ["web"]
    (aside,) = tmp_path.glob("record.db.before-*-wal")
    assert str(aside).removesuffix("-wal") in done.stdout
    assert aside.read_bytes() == beside["-wal"]


@pytest.mark.needs("root")
@pytest.mark.parametrize("command", ["backup", "restore", "doctor"])
def test_missing_permissions_are_reported(command: str) -> None:
    """Run as a user without access to the folder of the database."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        config = write(folder / "config", defib=f"remediator: {{database: 'sqlite:///{closed}/record.db'}}")
        named = [] if command == "doctor" else [str(closed / "kept.db")]
        argv = ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-m", "defib", command, *named]
        done = subprocess.run([*argv, "--config", config], capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "Permission denied" in done.stdout + done.stderr


def test_backup_to_a_missing_folder(config: Path, database: Database, tmp_path: Path) -> None:
    store(database, "web")
    done = defib(config, "backup", str(tmp_path / "backups"))
    assert (done.returncode, "there is no folder" in done.stderr) == (1, True)
    assert not (tmp_path / "backups").exists()


def test_backup_removes_partial_files_of_a_killed_backup(config: Path, database: Database, tmp_path: Path) -> None:
    store(database, "web")
    (tmp_path / "backups").mkdir()
    for name in (".defib.db.part", ".defib.db.part-journal", ".config.tar.gz.part"):
        (tmp_path / "backups" / name).write_bytes(b"half")
    assert defib(config, "backup", str(tmp_path / "backups")).returncode == 0
    _, kept = sorted((tmp_path / "backups").iterdir())
    assert services(kept) == ["web"]


def test_a_locked_database_is_not_waited_for_forever(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_files, "LOCKED_TIMEOUT", 0.5)
    store(database, "web")
    database.close()
    path = tmp_path / "record.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("PRAGMA journal_mode=DELETE")
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BackupError, match="locked"):
            backup.back_up(f"sqlite:///{path}", tmp_path / "kept.db")
        with pytest.raises(DatabaseBusyError):
            backup.check(path)
    assert not list(tmp_path.glob(".*part*"))


def test_a_file_without_a_schema_version_is_refused(config: Path, database: Database, tmp_path: Path) -> None:
    store(database, "web")
    assert defib(config, "backup", str(tmp_path / "kept.db")).returncode == 0
    with closing(sqlite3.connect(tmp_path / "kept.db")) as kept:
        kept.execute("DELETE FROM alembic_version")
        kept.commit()
    database.close()
    done = defib(config, "restore", str(tmp_path / "kept.db"))
    assert (done.returncode, "is not a database of Defib" in done.stderr, "Traceback" in done.stderr) == (
        1,
        True,
        False,
    )


def test_backup_and_restore_of_a_database_in_use(config: Path, database: Database, tmp_path: Path) -> None:
    store(database, "web")
    done = defib(config, "backup", str(tmp_path / "kept.db"))
    assert (done.returncode, done.stdout.startswith(f"{tmp_path}/kept.db: 1 incident, ")) == (0, True), done.stderr
    assert stat.S_IMODE((tmp_path / "kept.db").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.glob("*kept*")) == ["kept.config.tar.gz", "kept.db"]
    store(database, "later")
    refused = defib(config, "restore", str(tmp_path / "kept.db"))
    assert (refused.returncode, "another remediator uses the database" in refused.stderr) == (1, True)
    database.close()
    restored = defib(config, "restore", str(tmp_path / "kept.db"))
    assert restored.returncode == 0, restored.stderr
    assert services(tmp_path / "record.db") == ["web"]
    aside = min(tmp_path.glob("record.db.before-*"), key=lambda path: len(path.name))
    assert services(aside) == ["web", "later"]
    again = Database(f"sqlite:///{tmp_path}/record.db", Inventory())
    store(again, "after")
    again.close()


def test_backup_to_a_folder_is_named_by_the_time(config: Path, database: Database, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    assert defib(config, "backup", str(folder)).returncode == 0
    archive, made = sorted(folder.iterdir())
    assert made.name.startswith("defib-2")
    assert archive.name == f"config{made.stem.removeprefix('defib')}.tar.gz"


def test_a_restore_gives_nobody_access_again(config: Path, database: Database, tmp_path: Path) -> None:
    """Sessions have ended, and tokens that were revoked since the backup stay revoked."""

    def add_access(tx: Transaction) -> None:
        times = {"created_at": 1.0, "last_used_at": 1.0}
        tx.execute(insert(sessions).values(
            digest="d", user="ann", method="password", credential="", groups=[], address="", browser="", **times
        ))  # fmt: skip
        for name in ("kept", "revoked"):
            tx.execute(
                insert(api_tokens).values(name=name, role="viewer", digest=name, created_at=1.0, created_by="ann")
            )

    asyncio.run(database.write(add_access))
    defib(config, "backup", str(tmp_path / "backup.db"))
    asyncio.run(
        database.write(
            lambda tx: tx.execute(update(api_tokens).where(api_tokens.c.name == "revoked").values(revoked_at=2.0))
        )
    )
    database.close()
    restored = defib(config, "restore", str(tmp_path / "backup.db"))
    assert restored.stdout.splitlines()[1:] == ["API tokens in force: kept; revoke those that should not be"], restored
    with closing(sqlite3.connect(tmp_path / "record.db")) as there:
        assert there.execute("SELECT name FROM api_tokens").fetchall() == [("kept",)]
        assert there.execute("SELECT * FROM sessions").fetchall() == []
    # A new record has revoked nothing, and of a damaged one nothing is known.
    for suffix in ("", ".lock"):
        (tmp_path / f"record.db{suffix}").unlink()
    Database(f"sqlite:///{tmp_path}/record.db", Inventory()).close()
    restored = defib(config, "restore", str(tmp_path / "backup.db"))
    assert restored.stdout.splitlines()[1].startswith("API tokens in force: kept, revoked; "), restored
    (tmp_path / "record.db").write_bytes(b"damaged")
    restored = defib(config, "restore", str(tmp_path / "backup.db"))
    assert restored.stdout.splitlines()[1].startswith("API tokens in force: kept, revoked; "), restored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("CREATE TRIGGER t AFTER INSERT ON incidents BEGIN DELETE FROM audit; END", "its t is not that of the schema"),
        ("DROP TABLE stops; CREATE VIEW stops AS SELECT 1", "its stops is not that of the schema"),
        ("DROP TABLE stops", "its stops is not that of the schema"),
        ("ALTER TABLE stops DROP COLUMN reason", "its stops is not that of the schema"),
        (
            "ALTER TABLE api_tokens ADD COLUMN g TEXT GENERATED ALWAYS AS (nullif(name, 'ci')) NOT NULL ON CONFLICT IGNORE",
            "its api_tokens is not that of the schema",
        ),
        ("CREATE VIEW sqlitex_stops AS SELECT 1", "its sqlitex_stops is not that of the schema"),
        ("CREATE INDEX more ON incidents (state)", "its more is not that of the schema"),
        ("INSERT INTO alembic_version VALUES ('0001')", "it has 2 schema versions"),
        ("DELETE FROM alembic_version", "it has 0 schema versions"),
        ("UPDATE alembic_version SET version_num = '9999'", "was written by a newer version of Defib (schema 9999)"),
    ],
)
def test_a_backup_with_another_schema_is_refused(
    config: Path, database: Database, tmp_path: Path, change: str, message: str
) -> None:
    defib(config, "backup", str(tmp_path / "backup.db"))
    database.close()
    with closing(sqlite3.connect(tmp_path / "backup.db")) as there:
        there.executescript(change)
    refused = defib(config, "restore", str(tmp_path / "backup.db"))
    assert (refused.returncode, message in refused.stderr, refused.stdout) == (1, True, ""), refused


def test_restore_of_a_lost_database(config: Path, database: Database, tmp_path: Path) -> None:
    store(database, "web")
    assert defib(config, "backup", str(tmp_path / "kept.db")).returncode == 0
    database.close()
    for path in tmp_path.glob("record.db*"):
        if path.suffix != ".lock":
            path.unlink()
    assert defib(config, "restore", str(tmp_path / "kept.db")).returncode == 0
    assert services(tmp_path / "record.db") == ["web"]
    Database(f"sqlite:///{tmp_path}/record.db", Inventory()).close()


def test_an_invalid_backup_is_refused_and_nothing_changes(config: Path, database: Database, tmp_path: Path) -> None:
    store(database, "web")
    good = tmp_path / "good.db"
    assert defib(config, "backup", str(good)).returncode == 0
    over = defib(config, "backup", str(good))
    assert (over.returncode, "already exists" in over.stderr) == (1, True)
    database.close()
    (tmp_path / "text.db").write_text("not a database, but rather long for a text" * 100)
    (tmp_path / "empty.db").touch()
    (tmp_path / "cut.db").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    newer = tmp_path / "newer.db"
    newer.write_bytes(good.read_bytes())
    with closing(sqlite3.connect(newer)) as there:
        there.execute("UPDATE alembic_version SET version_num = '9999'")
        there.commit()
    before = services(tmp_path / "record.db")
    for name, said in (
        ("none.db", "there is no file"), ("text.db", "is not a database of Defib"), ("empty.db", "is not a database of Defib"),
        ("cut.db", "damaged"), ("newer.db", "newer version of Defib"),
    ):  # fmt: skip
        done = defib(config, "restore", str(tmp_path / name))
        assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
        assert said in done.stderr or (name == "cut.db" and "is not a database" in done.stderr), done.stderr
        assert services(tmp_path / "record.db") == before
    unwritable = defib(config, "backup", str(tmp_path / "nowhere" / "kept.db"))
    assert (unwritable.returncode, "cannot copy" in unwritable.stderr) == (1, True), unwritable.stderr


def test_backup_without_a_database(config: Path, tmp_path: Path) -> None:
    done = defib(config, "backup", str(tmp_path / "kept.db"))
    assert (done.returncode, "there is no database" in done.stderr, [path.name for path in tmp_path.iterdir()]) == (
        1,
        True,
        ["config"],
    )


def test_old_backups_are_removed_after_a_new_one(config: Path, database: Database, tmp_path: Path) -> None:
    """Only files that are named as backups, and never the newest 3 of each kind."""
    store(database, "web")
    folder = tmp_path / "backups"
    folder.mkdir()
    old = [folder / f"defib-2026010{day}T030000.db" for day in range(1, 6)]
    archives = [folder / f"config-2026010{day}T030000.tar.gz" for day in range(3, 7)]
    others = [folder / name for name in ("defib-before-upgrade.db", "config-20260101T030000.tar", "notes.txt")]
    for path in [*old, *archives, *others]:
        path.touch()
    (folder / "defib-20250101T030000.db").mkdir()
    done = defib(config, "backup", str(folder), "--keep", "30d", "--json")
    written = json.loads(done.stdout)
    assert written["removed"] == [str(path) for path in [*archives[:2], *old[:3]]], done.stderr
    assert sorted(folder.iterdir()) == sorted(
        [*old[3:], *archives[2:], *others, Path(written["path"]), Path(written["configuration"]["path"]),
         folder / "defib-20250101T030000.db"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("to", "keep", "message"),
    [
        ("kept.db", "30d", "old backups are removed from a folder only"),
        (".", "a month", "argument --keep: 'a month' is not a duration"),
    ],
)
def test_an_age_that_cannot_be_kept(
    config: Path, database: Database, tmp_path: Path, to: str, keep: str, message: str
) -> None:
    store(database, "web")
    done = defib(config, "backup", str(tmp_path / to), "--keep", keep)
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    assert not list(tmp_path.glob("defib-*.db"))


def test_a_backup_that_fails_removes_nothing(config: Path, tmp_path: Path) -> None:
    old = [tmp_path / f"defib-2026010{day}T030000.db" for day in range(1, 6)]
    for path in old:
        path.touch()
    done = defib(config, "backup", str(tmp_path), "--keep", "30d")
    assert (done.returncode, "there is no database" in done.stderr) == (1, True)
    assert all(path.exists() for path in old)
