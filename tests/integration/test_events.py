"""Events: copied from an exporter over HTTP, and the timeline of everything that happened, over the API."""

import asyncio
import csv
import io
import json
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from pydantic import SecretStr
from sqlalchemy import func, insert, select, text

from defib.demo.launcher import Launcher
from defib.demo.stack import Stack
from fleet.inventory.endpoints import Endpoint
from fleet.inventory.model import RemediationStep
from fleet.json_client import ClientError
from remediator.clients.exporter import Exporter
from remediator.engine import event_copier
from remediator.engine.event_copier import EventCopier
from remediator.engine.housekeeping import _delete_old
from remediator.http import events_api
from remediator.incidents import actions, intake, lifecycle
from remediator.metrics import RemediatorMetrics
from remediator.policy.situation import ActionHistory, ActionsInProgress, Situation
from remediator.record import audit, event_pages, maintenance
from remediator.record.database import Database, StorageError
from remediator.record.event_pages import Position, page_of_events
from remediator.record.event_sources import EventFilter
from remediator.record.schema import events
from remediator.record.transaction import Transaction
from runtime.access.audit import AuditEntry, write_to_log
from runtime.access.control import AccessControl, WebUsers
from runtime.access.roles import UserRole
from runtime.access.tokens import API_TOKEN_PREFIX, ApiToken, ApiTokens, ConfiguredTokens, digest_of
from runtime.redaction import Redactor
from runtime.tokens import ConfiguredToken
from runtime.web import create_application
from runtime.webconfig import WebConfigFile
from tests.forked_defib import run_defib
from tests.integration.peers import web_server
from tests.integration.ring_exporter import TOKEN, RingExporter
from tests.integration.test_record import DOWN, alert, configuration_of
from tests.support import NO_TLS, ClockedHarness, eventually, inventory_of

# aiohttp warns once in a process of names that runtime.access uses.
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use web.RequestKey")
START = datetime(2026, 11, 24, 10, 0, tzinfo=UTC).timestamp()
ROLES: tuple[UserRole, ...] = ("viewer", "operator", "admin")
SECRET = "s3cret-of-the-fleet"


def token_of(role: UserRole) -> str:
    return f"{API_TOKEN_PREFIX}{role}"


class Harness(ClockedHarness):
    """A record, an exporter to copy from, and the API; all clocks stand at `now` until it is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, inventory_of(folder / "config", configuration_of("web", "db")).inventory, at=START)
        self.ring = RingExporter(lambda: self.now)
        self.metrics = RemediatorMetrics()

    async def start(self, stack: AsyncExitStack) -> None:
        port = await stack.enter_async_context(web_server(self.ring.handle))
        exporter = Exporter(
            Endpoint(url=f"http://127.0.0.1:{port}"), ConfiguredToken("exporter.token", SecretStr(TOKEN))
        )
        stack.push_async_callback(exporter.close)
        self.copier = EventCopier(self.database, exporter, self.metrics)
        tokens = ApiTokens(lambda: 0)
        tokens.replace([ApiToken(role, role, digest_of(token_of(role)), 0, "ann") for role in ROLES])
        access = AccessControl(
            WebUsers, ConfiguredTokens(lambda _: None), write_audit=write_to_log, now=lambda: 0, api_tokens=tokens
        )
        app = create_application(access, WebConfigFile(None), ready=lambda: True)
        events_api.add_routes(app, self.database, Redactor([SECRET]))
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.client = await stack.enter_async_context(httpx.AsyncClient(verify=NO_TLS, base_url=base, trust_env=False))

    async def copy(self) -> None:
        await self.copier._copy_round()

    async def ask(self, role: UserRole = "admin", method: str = "GET", **parameters: Any) -> httpx.Response:
        names = {name.rstrip("_"): value for name, value in parameters.items()}
        headers = {"Authorization": f"Bearer {token_of(role)}"}
        return await self.client.request(method, "/api/v1/events", params=names, headers=headers)

    async def page(self, role: UserRole = "admin", **parameters: Any) -> dict[str, Any]:
        answer = await self.ask(role, **parameters)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def rows(self, role: UserRole = "admin", **parameters: Any) -> list[dict[str, Any]]:
        return list((await self.page(role, **parameters))["events"])

    async def all_rows(self, limit: int, **parameters: Any) -> list[dict[str, Any]]:
        """Read page by page."""
        page = await self.page(limit=limit, **parameters)
        rows = list(page["events"])
        while page["next"] is not None:
            page = await self.page(limit=limit, before=page["next"], **parameters)
            rows += page["events"]
        return rows


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    made = await asyncio.to_thread(Harness, tmp_path)
    async with AsyncExitStack() as stack:
        await made.start(stack)
        yield made
    await asyncio.to_thread(made.database.close)


def shown(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def time_of(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


async def test_events_are_copied_once(harness: Harness) -> None:
    harness.ring.add("web", "down", detail="connect: refused", ago=90)
    harness.ring.add("gpu-0", "lost", kind="gpu", ago=80)
    await harness.copy()
    await harness.copy()
    harness.ring.add("web", "up")
    await harness.copy()
    rows = await harness.rows()
    assert rows[-1] == {
        "id": "event-1", "at": time_of(START - 90), "last_at": None, "kind": "service", "host": "h", "name": "web",
        "state": "down", "operation": "", "detail": "connect: refused", "by": "", "times": 1, "incident": None,
        "action": None,
    }  # fmt: skip
    assert shown(rows, "kind", "name", "state") == [
        ("service", "web", "up"), ("gpu", "gpu-0", "lost"), ("service", "web", "down"),
    ]  # fmt: skip
    assert [each.get("after") for each in harness.ring.requests] == [None, "1/2", "1/2"]


async def test_changes_within_a_minute_keep_their_order_and_many_are_one_row(harness: Harness) -> None:
    for second, state in enumerate(["down", "up", "down", "up", "down"]):
        harness.ring.add("web", state, ago=80 - 10 * second, detail=f"number {second}")
        harness.ring.add("db", "down", ago=80 - 10 * second, host="g" if second % 2 else "h")
        await harness.copy()  # with and without the row in the same page
    harness.ring.add("web", "up", ago=10)  # 70 s after the first
    harness.ring.add("web", "down", ago=5)
    await harness.copy()
    web_rows = await harness.rows(service="web")
    assert shown(web_rows, "at", "last_at", "state", "times", "detail") == [
        (time_of(START - 5), None, "down", 1, ""),
        (time_of(START - 10), None, "up", 1, ""),
        (time_of(START - 50), time_of(START - 40), "down", 2, "number 4"),
        (time_of(START - 60), None, "down", 1, "number 2"),
        (time_of(START - 70), None, "up", 1, "number 1"),
        (time_of(START - 80), None, "down", 1, "number 0"),
    ]
    assert shown(await harness.rows(service="db"), "host", "times") == [("g", 2), ("h", 3)]


async def test_a_service_that_flaps_for_an_hour_is_four_rows_a_minute(harness: Harness) -> None:
    for minute in range(60):
        for second in range(60):
            harness.ring.add("web", "up" if second % 2 else "down", ago=3600 - 60 * minute - second)
        await harness.copy()
    rows = await harness.rows(limit=1000)
    assert (len(rows), sum(row["times"] for row in rows)) == (240, 3600)


async def test_a_gap_is_shown_where_events_were_lost(harness: Harness) -> None:
    harness.ring.add("web", "down")
    await harness.copy()
    harness.now += 600
    harness.ring.restart()
    harness.ring.add("db", "down", ago=30)
    await harness.copy()
    await harness.copy()
    rows = await harness.rows()
    assert shown(rows, "kind", "name", "at", "last_at") == [
        ("service", "db", time_of(START + 570), None),
        ("gap", "exporter", time_of(START), time_of(START + 570)),
        ("service", "web", time_of(START), None),
    ]
    assert shown(await harness.rows(host="h", service="db"), "kind") == [("service",), ("gap",)]
    # Restarts soon after each other, without events, are one gap.
    for _ in range(2):
        harness.now += 20
        harness.ring.restart()
        await harness.copy()
    gap, first = await harness.rows(kind="gap")
    assert shown([gap], "times", "at", "last_at") == [(2, time_of(START + 600), time_of(START + 640))]
    assert first["last_at"] == time_of(START + 570)
    assert harness.metrics.registry.get_sample_value("defib_remediator_event_gaps_total") == 3
    harness.ring.ring = type(harness.ring.ring)(maxlen=5)
    for number in range(20):
        harness.ring.add(f"n{number}", "down")
    await harness.copy()
    assert shown(await harness.rows(limit=6), "name")[-1] == ("exporter",)


async def test_an_exporter_without_events_is_not_an_error(harness: Harness) -> None:
    harness.ring.supported = False
    assert await harness.copier._copy_round() is False
    harness.ring.add("web", "down")
    harness.ring.supported = True
    assert await harness.copier._copy_round() is True
    assert len(await harness.rows()) == 1


@pytest.mark.parametrize("ahead", [3600, -3600])
async def test_the_exporter_s_clock_may_be_wrong(harness: Harness, ahead: float) -> None:
    harness.ring.clock = lambda: harness.now + ahead
    harness.ring.add("web", "down", ago=30)
    await harness.copy()
    (row,) = await harness.rows()
    assert abs(datetime.fromisoformat(row["at"]).timestamp() - (START - 30)) <= 1


async def test_an_event_is_never_in_the_future(harness: Harness) -> None:
    harness.ring.add("web", "down", ago=-50)
    harness.ring.add("db", "down", ago=START + 1e9)
    await harness.copy()
    assert shown(await harness.rows(), "name", "at") == [
        ("web", time_of(START)), ("db", "1970-01-01T00:00:00Z"),
    ]  # fmt: skip


async def test_rows_and_cursor_are_stored_together_or_not_at_all(harness: Harness) -> None:
    def run(tx: Transaction, statement: str) -> None:
        tx.execute(text(statement))

    await harness.database.write(
        run, "CREATE TRIGGER full BEFORE INSERT ON timestamps BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
    harness.ring.add("web", "down")
    with pytest.raises(StorageError, match="disk full"):
        await harness.copy()
    assert await harness.rows() == []
    await harness.database.write(run, "DROP TRIGGER full")
    await harness.copy()
    await harness.copy()
    assert shown(await harness.rows(), "times") == [(1,)]


async def test_a_thousand_events_a_second_stay_bounded(harness: Harness) -> None:
    """For a minute, of services that are all different: the oldest are deleted, and a ring that is too small has gaps."""
    settings = harness.inventory.remediator
    limited = settings.model_copy(update={"events": settings.events.model_copy(update={"max_entries": 2000})})
    harness.inventory = harness.inventory.model_copy(update={"remediator": limited})
    number = 0
    for _ in range(12):
        for _ in range(5000):
            harness.ring.add(f"n{number}", "down")
            number += 1
        harness.now += 5
        before = len(harness.ring.requests)
        await harness.copy()
        assert len(harness.ring.requests) - before <= event_copier.PAGES_PER_ROUND

    def count(tx: Transaction) -> int:
        return int(tx.scalar(select(func.count()).select_from(events)))

    assert await harness.database.read(count) == 2000
    assert (await harness.rows(limit=1))[0]["name"] == f"n{number - 1}"
    assert harness.metrics.registry.get_sample_value("defib_remediator_events_copied_total") == number
    # A burst larger than the ring.
    for number in range(30_000):
        harness.ring.add(f"m{number}", "down")
    await harness.copy()
    assert len(await harness.rows(kind="gap")) == 0  # older than the newest 2,000 rows
    assert await harness.database.read(count) == 2000


async def test_old_events_are_deleted(harness: Harness) -> None:
    harness.ring.add("web", "down", ago=91 * 86400)
    harness.ring.add("web", "up", ago=89 * 86400)
    await harness.copy()
    await _delete_old(harness.database, harness.now - 90 * 86400)
    assert shown(await harness.rows(), "state") == [("up",)]


NAMES = ["网页服务", "💥", "a\x00\x1b[31m\n\u202eb", "\ud800", "=cmd|' /C calc'!A0", "x" * 5000]


async def test_names_of_any_characters(harness: Harness) -> None:
    for name in NAMES:
        harness.ring.add(name, "down", kind="container", detail=SECRET)
    await harness.copy()
    rows = await harness.rows(limit=1000)
    assert [row["name"] for row in reversed(rows)] == [*NAMES[:3], "?", NAMES[4], "x" * 200]
    assert {row["detail"] for row in rows} == {"***"}
    assert shown(await harness.rows(text="网页"), "name") == [("网页服务",)]
    assert (await harness.ask(text="\x00")).status_code == 200
    assert (await harness.client.get("/api/v1/events?text=%ED%A0%80")).status_code == 401
    headers = {"Authorization": f"Bearer {token_of('viewer')}"}
    assert (await harness.client.get("/api/v1/events?text=%ED%A0%80&before=%ED", headers=headers)).status_code == 400
    assert (await harness.client.get("/api/v1/events?text=%ED%A0%80&host=%FF", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"at": "2026-11-24T10:00:00"}, {"at": "soon"}, {"at": 5}, {"name": None}, {"kind": ["service"]}, {"state": {}},
    ],
)  # fmt: skip
async def test_a_malformed_event_is_an_error_that_changes_nothing(harness: Harness, change: dict[str, Any]) -> None:
    harness.ring.add("web", "down")
    harness.ring.ring[0] |= change
    with pytest.raises(ClientError, match="does not have the expected fields"):
        await harness.copy()
    assert await harness.rows() == []


async def test_events_of_an_unknown_kind_are_left_out(harness: Harness) -> None:
    harness.ring.add("web", "down", kind="satellite")
    harness.ring.add("restart", "done", kind="operation")
    harness.ring.add("web", "down")
    await harness.copy()
    assert shown(await harness.rows(), "id", "kind") == [("event-1", "service")]


async def test_the_loop_copies_soon_and_survives_errors(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_copier, "COPY_PAUSE", 0.01)
    monkeypatch.setattr(event_copier, "COPY_EVERY", 0.05)
    monkeypatch.setattr(event_copier, "LONGEST_PAUSE", 0.2)
    harness.ring.token = "another"
    task = asyncio.create_task(harness.copier.run())
    try:

        async def was_refused_again() -> bool:
            return harness.ring.refused >= 2

        await eventually(was_refused_again)
        harness.ring.token = TOKEN
        harness.ring.add("web", "down")
        await eventually(harness.rows)
        harness.ring.add("db", "down")
        harness.copier.request()
        await eventually(lambda: harness.rows(service="db"))
    finally:
        task.cancel()


async def do_everything(harness: Harness) -> None:
    """An outage with an automatic restart, a restart by a person, maintenance, and a sign-in, 10 s after each other."""
    write = harness.database.write
    situation = Situation(harness.now, frozenset({"ServiceDown"}), ActionHistory(), ActionsInProgress(), DOWN)

    async def then(work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        harness.now += 10
        return await write(work, *arguments, **more)

    await then(intake.receive_alerts, [alert()])
    claimed = await then(
        actions.claim_action, 1, harness.inventory.services["web"], situation,
        probed_at=harness.now, evidence=actions.Evidence(),
    )  # fmt: skip
    assert isinstance(claimed, actions.Claim)
    await then(actions.end_action, claimed, actions.Ending("failed", why="printed by the command"))
    await then(intake.receive_alerts, [alert(status="resolved")])
    assert await then(lifecycle.close, 1, "recovered", ["ServiceDown"])
    claimed = await then(
        actions.claim_operator_action, harness.inventory.services["db"], "stop", situation,
        overruled=(), by="ann", evidence=actions.Evidence(),
    )  # fmt: skip
    await write(audit.add, AuditEntry("stop", "ann", "console", "10.0.0.7", "db", action=claimed.id))
    await then(maintenance.begin, "host", "h", until=harness.now + 25, reason="new disks", by="bob")
    await then(audit.add, AuditEntry("sign_in", "ann", "console", "10.0.0.7"))
    await then(audit.add, AuditEntry("logs", "ann", "console", "10.0.0.7", "db"))
    harness.now += 10  # the maintenance has ended


EVERYTHING = [
    ("maintenance", "h", "", "ended", "", "host: new disks"),
    ("sign-in", "", "sign_in", "done", "ann", ""),
    ("maintenance", "h", "", "started", "bob", "host: new disks"),
    ("operation", "db", "stop", "done", "ann", ""),
    ("action", "db", "stop", "started", "ann", ""),
    ("incident", "web", "", "recovered", "person", ""),
    ("action", "web", "restart", "failed", "defib", "printed by the command"),
    ("action", "web", "restart", "started", "defib", "ServiceDown"),
    ("incident", "web", "", "opened", "", "connect: "),
]
NAMED = ("kind", "name", "operation", "state", "by", "detail")


async def test_the_timeline_has_everything(harness: Harness) -> None:
    await do_everything(harness)
    rows = await harness.rows()
    found = shown(rows, *NAMED)
    assert [
        row if row[:4] != ("incident", "web", "", "recovered") else (*row[:4], "person", "") for row in found
    ] == EVERYTHING
    assert shown(rows, "incident", "action")[3:8] == [(None, 2), (None, 2), (1, None), (1, 1), (1, 1)]
    assert [row["at"] for row in rows] == sorted((row["at"] for row in rows), reverse=True)
    by_kind = {
        kind: [row for row in rows if row["kind"] == kind]
        for kind in ("incident", "action", "maintenance", "sign-in", "operation")
    }
    for kind, expected in by_kind.items():
        assert await harness.rows(kind=kind) == expected
    assert await harness.rows(kind=["incident", "sign-in,operation"]) == [
        row for row in rows if row["kind"] in ("incident", "sign-in", "operation")
    ]
    assert shown(await harness.rows(service="db"), "kind") == [
        ("maintenance",),
        ("maintenance",),
        ("operation",),
        ("action",),
    ]
    assert shown(await harness.rows(service="web"), "kind") == [
        ("maintenance",),
        ("maintenance",),
        *[("incident",), ("action",)],
        ("action",),
        ("incident",),
    ]
    assert len(await harness.rows(host="h")) == 8  # not the sign-in
    assert await harness.rows(host="other") == []
    assert shown(await harness.rows(text="DISKS"), "state") == [("ended",), ("started",)]
    assert shown(await harness.rows(text="100%_"), "state") == []
    since, until = rows[5]["at"], rows[2]["at"]
    assert await harness.rows(from_=since, to=until) == rows[3:6]
    assert await harness.all_rows(2) == rows
    assert await harness.all_rows(1, kind="action") == by_kind["action"]


async def test_what_a_role_may_not_read_is_not_shown_and_not_found(harness: Harness) -> None:
    await do_everything(harness)
    hidden_from: dict[UserRole, tuple[str, ...]] = {
        "viewer": ("operation", "sign-in"),
        "operator": ("operation", "sign-in"),
        "admin": (),
    }
    for role, kinds in hidden_from.items():
        rows = await harness.rows(role)
        assert [row["kind"] for row in rows] == [row[0] for row in EVERYTHING if row[0] not in kinds]
        assert "sign_in" not in json.dumps(rows) or not kinds
        for kind in ("operation", "sign-in"):
            assert bool(await harness.rows(role, kind=kind)) is (kind not in kinds)
    found_by: dict[UserRole, int] = {"viewer": 0, "operator": 1}
    for role, found in found_by.items():
        assert len(await harness.rows(role, text="printed by")) == found
        assert ("printed by" in (await harness.ask(role, format="csv")).text) is bool(found)
    assert (await harness.client.get("/api/v1/events")).status_code == 401


async def test_an_action_that_waits_for_approval_is_shown_when_it_starts(harness: Harness) -> None:
    situation = Situation(harness.now, frozenset({"ServiceDown"}), ActionHistory(), ActionsInProgress(), DOWN)
    web_ = harness.inventory.services["web"]
    await harness.database.write(intake.receive_alerts, [alert()])
    await harness.database.write(actions.queue_action, 1, web_, RemediationStep.model_validate("restart"), situation)
    assert await harness.rows(kind="action") == []
    await harness.database.write(lifecycle.cancel_queued_actions, 1)
    assert shown(await harness.rows(kind="action"), "state") == [("cancelled",)]


def add_rows(tx: Transaction, first: int, count: int, at: float) -> None:
    """Add rows of several sources, many at the same time."""
    for number in range(first, first + count):
        when = at + number // 7
        tx.execute(
            insert(events).values(at=when, kind="service", host="h", name=f"n{number}", state="up", detail="", times=1)
        )
        audit.add(tx, AuditEntry("reload", f"n{number}", "cli", "", at=when))


async def test_pages_skip_and_repeat_nothing_while_rows_are_added(harness: Harness) -> None:
    harness.now += 1000
    await harness.database.write(add_rows, 0, 50, START)
    existing = [row["id"] for row in await harness.rows(limit=1000)]
    assert len(existing) == 100
    seen: list[str] = []
    before: dict[str, Any] = {}
    added = 1000
    while True:
        page = await harness.page(limit=3, **before)
        seen += [row["id"] for row in page["events"]]
        if page["next"] is None:
            break
        before = {"before": page["next"]}
        # Newer ones, older ones, and some at the very same time.
        for at in (harness.now, START - 1000, datetime.fromisoformat(page["events"][-1]["at"]).timestamp()):
            if added < 1100:
                await harness.database.write(add_rows, added, 1, at - added // 7)
                added += 1
    assert len(seen) == len(set(seen))
    assert [each for each in seen if each in existing] == existing


async def test_a_text_is_searched_in_parts(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_pages, "SCAN", 10)
    harness.now += 1000
    await harness.database.write(add_rows, 0, 100, START)
    first = await harness.page(text="n1")
    assert first["next"] is not None
    rows = await harness.all_rows(50, text="n1")
    assert sorted(shown(rows, "name", "by")) == sorted(
        [pair for n in range(100) if str(n).startswith("1") for pair in ((f"n{n}", ""), ("", f"n{n}"))]
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"limit": "0"}, "`limit` must be a number from 1 to 1000"),
        ({"limit": "1001"}, "`limit` must be a number from 1 to 1000"),
        ({"limit": "٣"}, "`limit` must be a number from 1 to 1000"),
        ({"limit": "10001", "format": "csv"}, "`limit` must be a number from 1 to 10000"),
        ({"before": "17"}, "`before` must be `next` of the page before"),
        ({"before": "nan_0_1"}, "`before` must be `next` of the page before"),
        ({"before": "1.0_0_99999999999999999999"}, "`before` must be `next` of the page before"),
        ({"before": f"1.0_{'9' * 150}_1"}, ""),
        ({"kind": "incident,bug"}, "unknown kind 'bug'; there are service, host, container, unit, program, gpu, gap,"),
        ({"from": "2026-11-24T10:00:00"}, "`from` must be a time with its zone, such as 2026-11-24T18:00:00Z"),
        ({"to": "yesterday"}, "`to` must be a time with its zone"),
        ({"from": "2026-11-24T10:00:00Z", "to": "2026-11-24T10:00:00Z"}, "`from` must be before `to`"),
        ({"format": "xlsx"}, "`format` must be json or csv"),
        (
            {"hosts": "h"},
            "unknown parameter `hosts`; there are limit, before, kind, host, service, text, from, to, format",
        ),
        ({"host": ["a", "b"]}, "`host` is given 2 times"),
        ({"text": "x" * 201}, "`text` has more than 200 characters"),
    ],
)
async def test_bad_parameters(harness: Harness, parameters: dict[str, Any], message: str) -> None:
    answer = await harness.ask("viewer", **parameters)
    if message:
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]["message"]
    else:
        assert answer.status_code == 200, answer.text


async def test_empty_parameters_are_those_of_a_form(harness: Harness) -> None:
    harness.ring.add("web", "down")
    await harness.copy()
    names = ("limit", "before", "kind", "host", "service", "text", "from", "to", "format")
    assert len(await harness.rows("viewer", **dict.fromkeys(names, ""))) == 1
    assert (await harness.ask(method="HEAD")).text == ""


async def test_a_csv_export(harness: Harness) -> None:
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "＝1", '网页,"x"\n2', "\x1b[31m", "plain"]
    for name in names:
        harness.ring.add(name, "down", kind="unit", detail=f"={SECRET}")
    await harness.copy()
    answer = await harness.ask("viewer", format="csv")
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="events.csv"'
    assert answer.content.startswith(b"\xef\xbb\xbfat,last_at,kind,")
    rows = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig"), newline="")))
    assert [row["name"] for row in reversed(rows)] == [
        "'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\t=1", "\\r=1", "'＝1", '网页,"x"\n2', "\\x1b[31m", "plain",
    ]  # fmt: skip
    assert {row["detail"] for row in rows} == {"'=***"}
    assert (rows[0]["times"], rows[0]["action"]) == ("1", "")
    head = await harness.ask("viewer", method="HEAD", format="csv")
    assert (head.status_code, head.content, head.headers["Content-Type"]) == (200, b"", "text/csv; charset=utf-8")


async def test_a_csv_export_has_at_most_ten_thousand_rows(harness: Harness) -> None:
    harness.now += 10_000
    await harness.database.write(add_rows, 0, 5500, START)
    lines = (await harness.ask(format="csv")).text.splitlines()
    assert len(lines) == 1 + 10_000
    assert len(set(lines)) == len(lines)
    assert len((await harness.ask(format="csv", limit=1500)).text.splitlines()) == 1 + 1500
    assert len((await harness.ask("viewer", format="csv")).text.splitlines()) == 1 + 5500


async def test_an_export_that_fails_is_not_taken_for_a_whole_one(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.now += 10_000
    await harness.database.write(add_rows, 0, 3000, START)
    read = harness.database.read
    calls = 0

    async def read_twice(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise StorageError("gone")
        return await read(*arguments)

    monkeypatch.setattr(harness.database, "read", read_twice)
    with pytest.raises(httpx.RemoteProtocolError):
        await harness.ask(format="csv")


async def test_positions_are_text(harness: Harness) -> None:
    position = Position(harness.now + 0.1234567, 7, 12)
    assert Position.parse(position.format()) == position
    page = await harness.database.read(page_of_events, EventFilter(), position, 10)
    assert (page.rows, page.next) == ([], None)


async def start_remediator(stack: Stack) -> Path:
    probe = {"command": {"run": ["true"]}}
    config = stack.configuration(
        {"hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"web": {"host": "h", "probe": probe}}}
    )
    await stack.start_program("remediator")
    return config


async def served(launcher: Launcher, folder: Path, serve: Callable[[Stack, RingExporter], Awaitable[None]]) -> None:
    """Run a remediator beside an exporter whose events it copies."""
    stack = Stack(launcher, folder)
    ring = RingExporter(lambda: datetime.now(UTC).timestamp(), token=stack.token)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", ring.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", stack.ports["exporter"]).start()
    try:
        await serve(stack, ring)
    finally:
        await runner.cleanup()
        await stack.client.aclose()


WRONG = {
    "id": "web", "up": "perhaps", "since": 7, "unchanged_for_seconds": "x", "recent": 3, "components_down": [None],
    "last": {"started_at": "soon", "duration_seconds": "long", "reason": [], "success": False, "message": {}},
    "failures": [{"started_at": None, "reason": 3, "message": []}], "results": [{"started_at": "x"}], "components": [7],
    "certificate": {"not_after": 4},
}  # fmt: skip
MALFORMED: dict[str, Any] = {
    "/api/v1/services": {"cursor": "1", "complete": True, "services": [WRONG]},
    "/api/v1/services/web": WRONG,
    "/api/v1/hosts": {"hosts": [{"name": None, "problems": [{}], "cpu": "x"}]},
    "/api/v1/hosts/h": {"name": "h", "problems": [None], "disks": 7},
}


@pytest.mark.parametrize("empty", [False, True])
async def test_pages_while_the_answers_of_the_exporter_are_malformed(
    launcher: Launcher, tmp_path: Path, empty: bool
) -> None:
    """They are those of an exporter that cannot be read."""

    async def serve(stack: Stack, ring: RingExporter) -> None:
        ring.answers = {path: {} for path in MALFORMED} if empty else MALFORMED
        await start_remediator(stack)
        client, url = stack.client, stack.url("remediator")
        overview = (await client.get(f"{url}/api/v1/overview")).json()
        assert [each["source"] for each in overview["problems"]] == ["exporter"], overview
        for path in ("", "services/web", "services/web/checks", "hosts", "hosts/h", "incidents", "settings", "wall"):
            answer = await client.get(f"{url}/{path}")
            assert answer.status_code == 200, (path, answer.text)
            assert path in ("services/web/checks", "incidents", "settings") or "exporter" in answer.text, path

    await served(launcher, tmp_path, serve)


async def test_a_remediator_that_is_killed_while_it_copies_loses_and_doubles_nothing(
    launcher: Launcher, tmp_path: Path
) -> None:
    async def serve(stack: Stack, ring: RingExporter) -> None:
        for number in range(6000):
            ring.add(f"n{number}", "down")
        await start_remediator(stack)
        for _ in range(3):
            wanted = len(ring.requests) + 2

            async def asked(wanted: int = wanted) -> bool:
                return len(ring.requests) >= wanted

            await eventually(asked)
            await launcher.kill(stack.pids["remediator"], signal.SIGKILL)
            await stack.start_program("remediator")

        async def has_all() -> bool:
            page = await stack.get("remediator", "/api/v1/events?kind=service&limit=1")
            return bool(page["events"]) and page["events"][0]["name"] == "n5999"

        await eventually(has_all)
        answer = await stack.client.get(f"{stack.url('remediator')}/api/v1/events?kind=service,gap&format=csv")
        rows = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig"), newline="")))
        assert sorted((row["name"], row["times"]) for row in rows) == sorted((f"n{n}", "1") for n in range(6000))

    await served(launcher, tmp_path, serve)


async def test_the_command(launcher: Launcher, tmp_path: Path) -> None:
    async def serve(stack: Stack, ring: RingExporter) -> None:
        ring.add("web", "down", detail="connect: refused\x1b[31m\nforged", ago=30)
        ring.add("web", "up", ago=20)
        for second in range(6):
            ring.add("db", "up" if second % 2 else "down", ago=15 - second)
        ring.add("h", "down", kind="host")
        config = await start_remediator(stack)

        async def defib(*arguments: str) -> subprocess.CompletedProcess[str]:
            done = await asyncio.to_thread(run_defib, "list", "events", *arguments, "--config", str(config))
            assert "Traceback" not in done.stderr, done.stderr
            return done

        async def copied() -> bool:
            return bool((await stack.get("remediator", "/api/v1/events?kind=host"))["events"])

        await eventually(copied)
        lines = (await defib()).stdout.splitlines()
        *others, last = [line for line in lines if "db" in line]
        assert [line.split(": ")[1] for line in others] == ["down", "up", "down"]
        assert re.search(r"db: up \[the last of 3, at [-0-9]+ [0-9:]+\]$", last)
        assert [line[21:] for line in lines if "db" not in line] == [
            "service      h web: down (connect: refused\\x1b[31m\\nforged)",
            "service      h web: up",
            "host         h: down",
        ]
        listed = json.loads((await defib("--json", "--kind", "service", "--kind", "host", "--limit", "1")).stdout)
        assert shown(listed["events"], "kind", "name") == [("host", "h")]
        assert (await defib("--service", "nothing")).stdout == "no events\n"
        wrong = await defib("--kind", "bug")
        assert (wrong.returncode, "unknown kind 'bug'; there are service, host," in wrong.stderr) == (1, True)

    await served(launcher, tmp_path, serve)


async def test_an_empty_record_has_no_events(tmp_path: Path) -> None:
    database = await asyncio.to_thread(
        Database, f"sqlite:///{tmp_path}/r.db", (await asyncio.to_thread(inventory_of, tmp_path / "c", {})).inventory
    )
    page = await database.read(page_of_events, EventFilter(with_audit=True), None, 50)
    assert (page.rows, page.next) == ([], None)
    await asyncio.to_thread(database.close)
