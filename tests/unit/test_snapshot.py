"""The snapshot of services: their states, and an exporter that is slow."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from fleet.inventory.endpoints import Endpoint
from fleet.json_client import ClientError
from remediator import snapshot
from remediator.clients.exporter import Exporter, ServiceChanges
from remediator.policy.service_states import ServiceState, find_state
from remediator.snapshot import SnapshotSource
from runtime.tokens import ConfiguredToken
from tests.integration.peers import web_server
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


LAST = {
    "success": False, "reason": "timeout", "message": "m", "started_at": "2026-11-29T10:00:00Z", "duration_seconds": 0.1,
}  # fmt: skip
SERVICE: dict[str, Any] = {
    "id": "web", "up": False, "since": "2026-11-29T10:00:00Z", "unchanged_for_seconds": 5, "recent": "..x",
    "components_down": [], "digest": "d", "host_up": None, "paused": False, "last": LAST,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, ""),
        ({"more": object}, ""),  # of a later version
        ({"id": None}, "services.0.id"),
        ({"up": "yes"}, "services.0.up"),
        ({"since": "yesterday"}, "services.0.since"),
        ({"since": 12}, "services.0.since"),
        ({"since": "9999-12-31T23:59:59-23:00"}, "services.0.since"),
        ({"since": "2026-11-29T10:00:00"}, "services.0.since"),
        ({"last": []}, "services.0.last"),
        ({"last": {**LAST, "started_at": "now"}}, "services.0.last.started_at"),
        ({"last": {**LAST, "duration_seconds": "long"}}, "services.0.last.duration_seconds"),
        ({"last": {**LAST, "duration_seconds": float("nan")}}, "services.0.last.duration_seconds"),
        ({"last": {**LAST, "reason": 7}}, "services.0.last.reason"),
        ({"last": {**LAST, "message": {}}}, "services.0.last.message"),
        ({"recent": 7}, "services.0.recent"),
        ({"components_down": [None]}, "services.0.components_down.0"),
        ({"unchanged_for_seconds": "x"}, "services.0.unchanged_for_seconds"),
    ],
)
async def test_a_malformed_answer_is_a_source_that_cannot_be_read(changed: dict[str, Any], problem: str) -> None:
    body = json.dumps({"cursor": "1", "complete": True, "services": [{**SERVICE, **changed}]}, default=str)

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=body, content_type="application/json")

    async with web_server(answer) as port:
        exporter = Exporter(Endpoint(url=f"http://127.0.0.1:{port}"), ConfiguredToken("exporter.token"))
        try:
            if problem:
                with pytest.raises(ClientError, match=re.escape(problem)):
                    await exporter.list_changes("")
            else:
                assert len((await exporter.list_changes("")).services) == 1
        finally:
            await exporter.close()
