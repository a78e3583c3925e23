"""`defib backup` of the configuration: what the archive contains, and what happens if it is not complete."""

import gzip
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from defib import backups, config_archive
from defib.backups import Sources
from fleet.inventory.model import Inventory
from remediator.record.database import Database
from runtime.database_files import BackupError
from tests.support import write

NOBODY = "65534"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read, with a database and a configuration, and a folder `to` for backups."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        Database(f"sqlite:///{path}/record.db", Inventory()).close()
        write(path / "config", defib=f"remediator: {{database: 'sqlite:///{path}/record.db'}}", team__hosts="hosts: {}")
        (path / "config" / "secrets").mkdir(mode=0o700)
        (path / "config" / "secrets" / "token").write_text("a secret")
        (path / "config" / "secrets" / "token").chmod(0o400)
        (path / "to").mkdir()
        yield path


def defib(folder: Path, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [*before, sys.executable, "-m", "defib", "backup", str(folder / "to"), "--config", str(folder / "config")]
    return subprocess.run([*argv, *arguments], capture_output=True, text=True, check=False, cwd="/")


def unpacked(path: Path, to: Path) -> Path:
    """Extract an archive as the documentation says."""
    to.mkdir()
    subprocess.run(["tar", "--extract", "--gzip", "--file", path, "--directory", to], check=True)
    return to


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_the_archive_restores_the_configuration(folder: Path, tmp_path: Path) -> None:
    done = defib(folder, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads(done.stdout)
    path = Path(written["configuration"]["path"])
    assert sorted((folder / "to").iterdir()) == sorted([path, Path(written["path"])])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert written["configuration"] == {"path": str(path), "files": 3, "bytes": path.stat().st_size, "missing": []}
    restored = unpacked(path, tmp_path / "restored")
    assert subprocess.run(["diff", "--recursive", folder / "config", restored], check=False).returncode == 0
    for name, mode in (("secrets", 0o700), ("secrets/token", 0o400)):
        assert stat.S_IMODE((restored / name).stat().st_mode) == mode


def test_links_are_stored_as_links_and_only_files_are_read(folder: Path) -> None:
    config, outside = folder / "config", folder / "outside"
    outside.mkdir()
    (outside / "key").write_text("not for the backup")
    (config / "team" / "away").symlink_to(outside)
    (config / "key").symlink_to(outside / "key")
    (config / "gone").symlink_to("nowhere")
    os.link(config / "defib.yaml", config / "second.txt")
    os.mkfifo(config / "pipe")
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(config / "socket"))
        done = defib(folder, "--json")
    assert done.returncode == 0, done
    path = Path(json.loads(done.stdout)["configuration"]["path"])
    with tarfile.open(path) as tar:
        entries = {each.name: each for each in tar.getmembers()}
        second = tar.extractfile("second.txt")
        assert second is not None
        assert second.read() == (config / "defib.yaml").read_bytes()
    assert list(entries) == [
        "defib.yaml", "gone", "key", "second.txt", "secrets", "secrets/token", "team", "team/away", "team/hosts.yaml",
    ]  # fmt: skip
    assert [(name, entries[name].linkname) for name in entries if entries[name].issym()] == [
        ("gone", "nowhere"), ("key", str(outside / "key")), ("team/away", str(outside)),
    ]  # fmt: skip
    assert b"not for the backup" not in gzip.decompress(path.read_bytes())


def test_the_same_configuration_gives_the_same_archive(folder: Path) -> None:
    for name in ("a", "b"):
        config_archive.archive(folder / "config", folder / name, lambda _path: False)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


def test_a_configuration_directory_that_is_a_link(folder: Path) -> None:
    (folder / "config").rename(folder / "config-1")
    (folder / "config").symlink_to("config-1")
    done = defib(folder)
    (path,) = (folder / "to").glob("config-*.tar.gz")
    assert f"\n{path}: 3 files, {path.stat().st_size} bytes\n" in done.stdout
    assert "defib.yaml" in names_in(path)


def test_databases_and_backups_in_the_directory_are_left_out(folder: Path) -> None:
    config = folder / "config"
    Database(f"sqlite:///{config}/record.db", Inventory()).close()
    write(config, defib=f"remediator: {{database: 'sqlite:///{config}/record.db'}}")
    (config / "record.db-wal").touch()
    (config / "defib-20260101T030000.db").touch()
    (config / "config-20260101T030000.tar.gz").touch()
    written = backups.back_up(Sources(f"sqlite:///{config}/record.db", None, config), config)
    assert written.configuration is not None
    names = names_in(written.configuration.path)
    assert names == ["defib.yaml", "secrets", "secrets/token", "team", "team/hosts.yaml"]


@pytest.mark.needs("root")
def test_files_that_cannot_be_read_are_named_and_the_rest_is_written(folder: Path) -> None:
    """As another user: the database and all else are backed up, and no earlier archive is removed."""
    config, to = folder / "config", folder / "to"
    (config / "exporter.env").write_text("KEY=secret")
    (config / "exporter.env").chmod(0o600)
    (config / "secrets").chmod(0o755)
    for path in (folder, *folder.glob("record.db*"), to):
        os.chown(path, int(NOBODY), int(NOBODY))
    old = [to / f"{name}" for day in range(1, 6) for name in (f"config-2026010{day}T030000.tar.gz",)]
    older = [to / f"defib-2026010{day}T030000.db" for day in range(1, 6)]
    for path in [*old, *older]:
        path.touch()
    before = ("setpriv", "--reuid", NOBODY, "--clear-groups")
    done = defib(folder, "--json", "--keep", "30d", before=before)
    assert done.stdout, done.stderr
    written = json.loads(done.stdout)
    assert (done.returncode, written["incidents"]) == (1, 0)
    reasons = ["exporter.env: Permission denied", "secrets/token: Permission denied"]
    assert written["configuration"]["missing"] == reasons
    archive = written["configuration"]["path"]
    assert done.stderr == (
        f"defib: {archive} lacks what cannot be read ({'; '.join(reasons)}): run the command as a user who can, or root\n"
    )
    assert names_in(Path(archive)) == ["defib.yaml", "secrets", "team", "team/hosts.yaml"]
    assert written["removed"] == [str(path) for path in older[:3]]
    assert Path(written["path"]).is_file()


@pytest.mark.needs("root")
def test_root_leaves_no_files_beside_the_database_that_its_user_cannot_open(folder: Path) -> None:
    for path in (folder, *folder.glob("record.db*")):
        os.chown(path, int(NOBODY), int(NOBODY))
    assert defib(folder).returncode == 0
    owners = {path.name: path.stat().st_uid for path in folder.glob("record.db*")}
    assert set(owners.values()) == {int(NOBODY)}, owners


def test_a_configuration_that_is_too_large_is_refused(folder: Path) -> None:
    """A sparse file; the database is backed up nevertheless."""
    with (folder / "config" / "team" / "core.dump").open("wb") as file:
        file.truncate(config_archive.SIZE_LIMIT + 1)
    done = defib(folder, "--json")
    written = json.loads(done.stdout)
    assert (done.returncode, written["configuration"]) == (1, None)
    assert done.stderr == (
        f"defib: the configuration was not backed up: {folder}/config has more than 100 MiB, which team/core.dump exceeds; "
        "move what is not configuration out of that directory\n"
    )
    assert [path.name for path in (folder / "to").iterdir()] == [Path(written["path"]).name]


def test_an_archive_with_a_chosen_name(folder: Path) -> None:
    sources = Sources(f"sqlite:///{folder}/record.db", None, folder / "config")
    to = folder / "to" / "before-upgrade.db"
    written = backups.back_up(sources, to)
    assert written.configuration is not None
    assert written.configuration.path == folder / "to" / "before-upgrade.config.tar.gz"
    to.unlink()
    with pytest.raises(BackupError, match=r"before-upgrade.config.tar.gz already exists"):
        backups.back_up(sources, to)
