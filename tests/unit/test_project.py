"""The project's own files agree with each other."""

import re
import tomllib
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from packaging.requirements import Requirement
from sqlalchemy import create_engine

from fleet.inventory.model import Inventory
from remediator.record.database import Database
from remediator.record.schema import metadata

ROOT = Path(__file__).parents[2]


def test_the_locks_hold_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock, declared in (
        ("requirements.lock", project["dependencies"]),
        ("requirements-dev.lock", project["dependencies"] + project["optional-dependencies"]["dev"]),
    ):
        locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ \\]+)", (ROOT / lock).read_text(), re.MULTILINE))
        for text in declared:
            wanted = Requirement(text)
            assert wanted.specifier.contains(locked[wanted.name]), text


def test_the_migrations_make_the_schema(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/a.db", Inventory())
    database.close()
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
