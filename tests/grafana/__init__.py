"""What Grafana shows in the tables of the dashboards, by its own code, which runs in Node."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
INSTALLED = FOLDER / "node_modules" / ".package-lock.json"


@dataclass(frozen=True)
class ShownTable:
    """A table as a person sees it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    frames: int  # the panel shows the first one only

    def column(self, name: str) -> list[str]:
        return [row[self.columns.index(name)] for row in self.rows]


async def show_tables(panels: Sequence[tuple[Any, Mapping[str, Any]]]) -> list[ShownTable]:
    """Return what table panels show with the answers of Prometheus to their queries, by `refId`."""
    assert INSTALLED.is_file(), f"run `make {INSTALLED.relative_to(FOLDER.parents[1])}` first"
    asked = json.dumps([{"panel": panel, "answers": answers} for panel, answers in panels])
    node = await asyncio.create_subprocess_exec(
        "node", "show.cjs", cwd=FOLDER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await node.communicate(asked.encode())
    assert node.returncode == 0
    return [ShownTable(**each) for each in json.loads(output)]
