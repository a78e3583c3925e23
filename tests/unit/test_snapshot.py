"""The snapshot of services: their states, and an exporter that is slow."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from fleet.json_client import ClientError
from remediator import snapshot
from remediator.clients.exporter import Exporter, ServiceChanges
from remediator.policy.service_states import ServiceState, find_state
from remediator.snapshot import SnapshotSource
from tests.support import inventory_of, new_record


@pytest.mark.parametrize(
    ("up", "is_stopped", "decision", "is_impaired", "state"),
    [
        (True, False, "", False, "up"),
        (True, False, "already-up", True, "degraded"),
        (False, False, "storm", True, "down"),
        (None, False, "", False, "unknown"),
        (None, False, "", True, "unknown"),
        (False, True, "stopped", True, "stopped"),
        (None, True, "", False, "stopped"),
        (False, False, "stopped-by-hand", True, "stopped"),
        (True, False, "stopped-by-hand", True, "degraded"),
    ],
)
def test_states(up: bool | None, is_stopped: bool, decision: str, is_impaired: bool, state: ServiceState) -> None:
    assert find_state(up, is_stopped=is_stopped, decision=decision, is_impaired=is_impaired) == state


class SlowExporter:
    """Answers after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, 0
        self.error: ClientError | None = None

    async def list_changes(self, cursor: str) -> ServiceChanges:
        self.asked += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return ServiceChanges("1", complete=not cursor, services=[{"id": "web", "up": True, "last": None}])


def source_of(exporter: SlowExporter, folder: Path) -> SnapshotSource:
    service: dict[str, Any] = {"probe": {"tcp": {"address": "127.0.0.1:1"}}}
    database = new_record(folder, inventory_of(folder / "config", {"services": {"web": service}}).inventory)
    return SnapshotSource(database, lambda: cast("Exporter", exporter))


async def test_a_long_answer_of_the_exporter_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "DEADLINE", 0.2)
    exporter = SlowExporter(0.5)
    source = await asyncio.to_thread(source_of, exporter, tmp_path)
    first = await source.get()  # a page does not wait
    assert (first.problems["exporter"].text, first.rows["web"].state) == ("no answer in time", "unknown")
    later = await source.read(patience=30)
    assert (dict(later.problems), later.rows["web"].state, exporter.asked) == ({}, "up", 1)


async def test_a_long_answer_that_fails_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "DEADLINE", 0.2)
    exporter = SlowExporter(0.5)
    exporter.error = ClientError("ReadError")
    source = await asyncio.to_thread(source_of, exporter, tmp_path)
    assert (await source.read(patience=30)).problems["exporter"].text == "ReadError"
    exporter.error, exporter.seconds = None, 0.0
    await source.refresh()
    assert (source.snapshot.rows["web"].state, exporter.asked) == ("up", 2)
