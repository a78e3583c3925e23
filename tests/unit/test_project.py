"""The project's own files are consistent."""

import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from packaging.requirements import Requirement
from sqlalchemy import create_engine

from fleet.inventory.model import Inventory
from remediator.record.database import Database
from remediator.record.schema import metadata

ROOT = Path(__file__).parents[2]


def test_the_lock_files_satisfy_the_declared_dependencies() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed, extras = settings["project"]["dependencies"], settings["project"]["optional-dependencies"]
    every = locked("requirements.lock")
    for name in extras.keys() - {"dev"}:
        added = locked(f"requirements-{name}.lock")
        assert not added.keys() & locked("requirements.lock").keys()  # both files are installed together
        check_satisfied(extras[name], added | locked("requirements.lock"))
        assert all(every.setdefault(package, version) == version for package, version in added.items())
    check_satisfied(needed, locked("requirements.lock"))
    check_satisfied(settings["build-system"]["requires"], locked("requirements-build.lock"))
    development = locked("requirements-dev.lock")
    check_satisfied([*needed, *chain.from_iterable(extras.values())], development)
    assert every.items() <= development.items()  # tests run with what is installed


def locked(lock: str) -> dict[str, str]:
    """Return the versions of a lock file. Each must have a hash."""
    text = (ROOT / lock).read_text()
    hashed = re.findall(r"^([^\s#=]+)==([^\s;\\]+)[^\n]*\\\n    --hash=sha256:\w{64}", text, re.MULTILINE)
    assert len(hashed) == len(re.findall(r"^[^\s#]", text, re.MULTILINE)), lock
    return dict(hashed)


def check_satisfied(declared: Iterable[str], versions: Mapping[str, str]) -> None:
    for text in declared:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[requirement.name]), text


def test_every_package_is_installed() -> None:
    """By the image and by the script: a package that is left out is missing when a program starts."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {each.removesuffix("*") for each in settings["tool"]["setuptools"]["packages"]["find"]["include"]}
    dockerfile, ignored = ((ROOT / name).read_text().splitlines() for name in ("Dockerfile", ".dockerignore"))
    assert packages <= {line.split()[1] for line in dockerfile if line.startswith("COPY ") and "--" not in line}
    assert packages <= {line[1:] for line in ignored if line.startswith("!")}
    lists = re.findall(r"(?:find|cp -r) (.+)", (ROOT / "deploy/install.sh").read_text())
    assert [packages - set(each.split()) for each in lists if "remediator" in each] == [set(), set()]


def test_nothing_is_installed_without_hashes() -> None:
    """Neither packages nor what builds Defib, which pip would otherwise download in an isolated build."""
    for name in ("Dockerfile", "deploy/install.sh", "Makefile"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        commands = re.findall(r"pip\"? (?:install|wheel) .*?(?=&&|$)", text, re.MULTILINE)
        assert len(commands) >= 3, name
        for command in commands:
            is_ours = "--no-deps" in command and ("--no-build-isolation" in command or "--no-index" in command)
            assert "--require-hashes" in command or is_ours, command


def test_the_migrations_create_the_schema(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/a.db", Inventory())
    database.close()
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    for name in (".env.example", "docs/operations.md"):
        assert set(re.findall(r"defib:(\d+\.\d+\.\d+)", (ROOT / name).read_text())) == {version}


def test_every_package_is_typed_and_is_shipped_with_the_licence() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.removesuffix("*") for name in settings["tool"]["setuptools"]["packages"]["find"]["include"]]
    for package in packages:
        assert (ROOT / package / "py.typed").exists()
        assert "py.typed" in settings["tool"]["setuptools"]["package-data"][package]
    assert [(ROOT / name).exists() for name in settings["project"]["license-files"]] == [True]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_git_ignores_secrets_and_nothing_that_is_tracked() -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False).stdout

    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == ""
    private = ["config/hosts.yaml", "alerts/secrets/webhook_token", ".env", "defib.db", "backups/defib-1.db"]
    assert git("check-ignore", *private).split() == private
