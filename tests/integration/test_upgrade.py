"""Records of earlier versions: migrated with their data."""

import asyncio
import json
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, insert, select

from remediator.incidents import acknowledgement
from remediator.notifications import deliveries, outbox
from remediator.notifications.channels.feishu import RetryState
from remediator.notifications.outbox import Batch
from remediator.record.database import MIGRATIONS, Database
from remediator.record.event_pages import page_of_events
from remediator.record.event_sources import EventFilter
from remediator.record.events import StateChange, store_copied
from remediator.record.schema import button_presses, notifications
from remediator.record.schema import deliveries as delivery_rows
from remediator.record.transaction import Transaction
from tests.integration.test_outbox import APP
from tests.support import inventory_of

NOTIFY = {
    "channels": {"app": {"feishu_app": APP}, "ops": {"feishu": {"webhook": "http://f/"}}},
    "routes": [{"channels": ["app", "ops"]}],
}


def migrate(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def record_of_0008(url: str) -> None:
    """Create a record of schema 0008 with a card, a notification that was refused, deliveries and a button press."""
    engine = create_engine(url)
    with engine.begin() as connection:
        migrate(connection, "0008")
        run = connection.exec_driver_sql
        run("INSERT INTO incidents (id, service, state, opened_at, labels) VALUES (1, 'web', 'open', 5.0, '{}')")
        row: dict[str, Any] = {
            "kind": "down", "topic": "", "severity": "critical", "incident_id": 1, "content": json.dumps({"labels": {}}),
            "created_at": 5.0, "pending_since": 5.0, "tries": 1, "not_before": 5.0, "version": 0, "signed_again": 0,
            "degraded": 0, "renewed": 0, "card": 0, "about": "down incident 1",
        }  # fmt: skip
        for number, more in enumerate(
            [
                {"channel": "app", "state": "sent", "card": 1, "message_id": "om_1", "message_at": 5.0, "answer": "0: success"},
                {"channel": "ops", "state": "pending", "degraded": 2, "answer": "9499: malformed"},
                {"channel": "app", "state": "sent", "kind": "alert", "about": "alert a", "topic": "A", "told_in": 1, "renewed": 1},
            ],
            1,
        ):  # fmt: skip
            values = {"id": number, **row, **more}
            run(
                f"INSERT INTO notifications ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",  # noqa: S608 - constants
                tuple(values.values()),
            )
        for number, outcome in enumerate(["sent", "again", "degrade", "sign again", "dead", "unknown"], 1):
            run(
                "INSERT INTO deliveries (id, notice_id, bot, at, outcome, answer) VALUES (?, 2, 'b', 5.0, ?, 'x')",
                (number, outcome),
            )
        run(
            "INSERT INTO button_presses (event_id, at, channel, open_id, who, answer, about)"
            " VALUES ('e', 5.0, 'app', 'ou_x', 'ann', 'restart', '{\"incident\": 1}')"
        )
    engine.dispose()


async def test_a_record_of_0008_keeps_its_notifications(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/record.db"
    await asyncio.to_thread(record_of_0008, url)
    inventory = (await asyncio.to_thread(inventory_of, tmp_path / "config", {"notify": NOTIFY})).inventory
    database = await asyncio.to_thread(Database, url, inventory)

    def read(tx: Transaction, table: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in tx.execute(select(table)).mappings()]

    card, refused, alert = await database.read(read, notifications)
    assert (card["key"], card["response"], card["retry_state"]) == ("down incident 1", "0: success", None)
    assert (alert["group_key"], alert["sent_with"], alert["replacements"]) == ("A", 1, 1)
    assert RetryState.parse(refused["retry_state"]) == RetryState(simplified=2)
    rows = await database.read(read, delivery_rows)
    assert [row["outcome"] for row in rows] == ["sent", "retry", "resend", "resend", "reject", "unknown"]
    assert {(row["notification_id"], row["response"]) for row in rows} == {(2, "x")}
    (press,) = await database.read(read, button_presses)
    assert (press["button"], press["ids"]) == ("restart", {"incident": 1})

    # What was pending is sent as it was to be, and the card is updated.
    batch = await database.write(outbox.choose_batch, "ops")
    assert isinstance(batch, Batch)
    assert (batch.ids, batch.retry_state) == ([2], {"degraded": 2, "signed_again": 0})
    assert await database.write(deliveries.reserve_delivery, batch) == 7
    await database.write(acknowledgement.acknowledge_incident, 1, "ann")
    (card, *_) = await database.read(read, notifications)
    assert (card["state"], card["message_id"], card["version"]) == ("pending", "om_1", 1)

    def add_twice(tx: Transaction) -> None:
        same = {name: value for name, value in card.items() if name != "id"}
        tx.execute(insert(notifications).prefix_with("OR IGNORE").values(**same))

    await database.write(add_twice)
    assert len(await database.read(read, notifications)) == 3
    await asyncio.to_thread(database.close)


def record_of_0010(url: str) -> None:
    """Create a record of schema 0010 with a closed incident, its action, maintenance that ended early, and a sign-in."""
    engine = create_engine(url)
    with engine.begin() as connection:
        migrate(connection, "0010")
        for statement in (
            "INSERT INTO incidents (id, service, state, opened_at, closed_at) VALUES (1, 'web', 'recovered', 5.0, 9.0)",
            (
                "INSERT INTO actions (id, incident_id, service, host, kind, requested_by, asked_by, overruled, state, counts,"
                " claimed_at, ended_at) VALUES (1, 1, 'web', 'h', 'restart', 'alert', 'ServiceDown', '[]', 'succeeded', 1, 6.0, 8.0)"
            ),
            (
                "INSERT INTO maintenance (id, scope, name, reason, asked_by, begun_at, until, ended_at)"
                " VALUES (1, 'host', 'h', 'disks', 'bob', 1.0, 90.0, 3.0)"
            ),
            (
                "INSERT INTO audit (at, event, name, verified, means, address, target, outcome, detail, count)"
                " VALUES (4.0, 'sign_in', 'ann', 1, 'console', '', '', 'done', '', 1)"
            ),
        ):
            connection.exec_driver_sql(statement)
    engine.dispose()


async def test_the_timeline_of_a_record_of_0010_begins_with_what_it_has(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/record.db"
    await asyncio.to_thread(record_of_0010, url)
    inventory = (await asyncio.to_thread(inventory_of, tmp_path / "config", {})).inventory
    database = await asyncio.to_thread(Database, url, inventory)
    change = StateChange(7.0, "service", "h", "web", "up", "")
    await database.write(store_copied, [change], cursor="c", asked_at=7.0, gap=False)
    page = await database.read(page_of_events, EventFilter(with_audit=True), None, 50)
    assert [(row["at"], row["kind"], row["state"]) for row in page.rows] == [
        (9.0, "incident", "recovered"), (8.0, "action", "succeeded"), (7.0, "service", "up"), (6.0, "action", "started"),
        (5.0, "incident", "opened"), (4.0, "sign-in", "done"), (3.0, "maintenance", "ended"), (1.0, "maintenance", "started"),
    ]  # fmt: skip
    await asyncio.to_thread(database.close)
