"""The health of what stands between a failure and a person: exporter, Prometheus, Alertmanager, record, channels."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from console.history import History
from fleet.inventory.endpoints import Endpoint
from fleet.json_client import ClientError
from remediator.clients.alertmanager import Alertmanager
from remediator.incidents import resolution
from remediator.record import queries, timestamps
from remediator.record.database import Database, StorageError
from remediator.record.transaction import Transaction
from remediator.snapshot import DEADLINE, SnapshotSource


@dataclass(frozen=True)
class PartHealth:
    """A part: the key of its name, whether it works (None: it is not configured), and what is seen."""

    name: str
    works: bool | None
    problem: str = ""
    age: float | None = None  # seconds since the last sign of it


async def read_pipeline(source: SnapshotSource, history: History, database: Database) -> list[PartHealth]:
    """Return the health of all parts, each within the deadline of a source."""
    inventory = database.inventory
    prometheus, alertmanager, watchdog = await asyncio.gather(
        _check_prometheus(history, inventory.remediator.prometheus_url),
        _check_alertmanager(inventory.remediator.alertmanager_url, inventory.remediator.watchdog),
        _check_watchdog(database, inventory.remediator.watchdog),
    )
    problems = source.snapshot.problems
    exporter, record = (
        PartHealth(name, name not in problems, problems[name].text if name in problems else "")
        for name in ("exporter", "record")
    )
    return [exporter, prometheus, alertmanager, watchdog, record]


async def read_deliveries(database: Database) -> Mapping[str, Mapping[str, Any]]:
    """Return the last delivery of each channel; none if the record cannot be read."""
    try:
        return await database.read_for_page(queries.last_deliveries, list(database.inventory.notify.channels))
    except StorageError:
        return {}


async def _check_prometheus(history: History, endpoint: Endpoint | None) -> PartHealth:
    if endpoint is None:
        return PartHealth("prometheus", None)
    try:
        await history.check()
    except ClientError as error:
        return PartHealth("prometheus", works=False, problem=str(error))
    return PartHealth("prometheus", works=True)


async def _check_alertmanager(endpoint: Endpoint | None, within: float) -> PartHealth:
    """Return whether Alertmanager has received the Watchdog lately, which Prometheus sends all the time."""
    if endpoint is None:
        return PartHealth("alertmanager", None)
    client = Alertmanager(endpoint)
    try:
        async with asyncio.timeout(DEADLINE):
            age = await client.watchdog_age()
    except (ClientError, TimeoutError) as error:
        return PartHealth("alertmanager", works=False, problem=str(error) or "no answer in time")
    finally:
        await client.close()
    return PartHealth("alertmanager", age is not None and age < within, age=age)


async def _check_watchdog(database: Database, within: float) -> PartHealth:
    """Return whether the Watchdog has arrived here lately."""
    received, resolved = None, False
    with contextlib.suppress(StorageError):
        received, resolved = await database.read_for_page(_read_watchdog)
    age = None if received is None else database.clock.now() - received.at
    return PartHealth("webhook", age is not None and age < within and not resolved, age=age)


def _read_watchdog(tx: Transaction) -> tuple[timestamps.Timestamp | None, bool]:
    return timestamps.get(tx, "watchdog"), resolution.is_watchdog_resolved(tx)
