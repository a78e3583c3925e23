"""Pings of the watcher outside (`remediator.dead_man`), which notifies somebody when they stop.

They are sent only while a failure of a service would reach somebody: the Watchdog arrives, the exporter answers, the
record can be read, and a channel works.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import httpx
import structlog

from remediator.incidents import resolution
from remediator.metrics import RemediatorMetrics
from remediator.notifications.channels.http import send_request
from remediator.record import queries, timestamps
from remediator.record.database import Database, StorageError
from remediator.record.transaction import Transaction
from remediator.snapshot import SnapshotSource

UNCONFIGURED_WAIT = 5.0  # seconds until a reload is noticed
PATIENCE = 5.0  # seconds for the exporter's answer beyond the snapshot's deadline
WORKING = ("sent", "resend")  # outcomes of deliveries
PingOutcome = Literal["sent", "failed", "withheld"]
OUTCOMES: tuple[PingOutcome, ...] = ("sent", "failed", "withheld")
log = structlog.get_logger()


@dataclass(frozen=True)
class Pipeline:
    """What stands between a failure and a person. `unreadable` are problems of the exporter and the record, by name.

    `watchdog_age` is in seconds, None if none was ever received; `outcomes` are those of the last deliveries.
    """

    unreadable: Mapping[str, str] = field(default_factory=dict)
    watchdog_age: float | None = None
    watchdog_resolved: bool = False
    channels: tuple[str, ...] = ()
    outcomes: Mapping[str, str] = field(default_factory=dict)


def find_problem(pipeline: Pipeline, watchdog_within: float) -> str:
    """Return why a failure would reach nobody; empty if it would. With 0 seconds, the Watchdog is not required."""
    for name, problem in pipeline.unreadable.items():
        return f"{name}: {problem}"
    if watchdog_within and (problem := _find_watchdog_problem(pipeline, watchdog_within)):
        return f"Watchdog: {problem}"
    if not pipeline.channels:
        return "channels: none is configured"
    if all(pipeline.outcomes.get(name, "sent") not in WORKING for name in pipeline.channels):
        return f"channels: the last message failed on each of {', '.join(pipeline.channels)}"
    return ""


def _find_watchdog_problem(pipeline: Pipeline, within: float) -> str:
    if pipeline.watchdog_resolved:
        return "Alertmanager reported it as resolved, or does not have it"
    if pipeline.watchdog_age is None:
        return "none was received"
    return f"none was received for {pipeline.watchdog_age:.0f} s" if pipeline.watchdog_age >= within else ""


async def run_dead_man(
    database: Database, snapshot: SnapshotSource, client: httpx.AsyncClient, metrics: RemediatorMetrics
) -> None:
    """Ping while that is configured, until cancelled; each outcome is counted, and logged when it changes."""
    last: tuple[PingOutcome, str] | None = None
    while True:
        settings = database.inventory.remediator.dead_man
        if settings is None:
            last = None
            await asyncio.sleep(UNCONFIGURED_WAIT)
            continue
        for outcome in OUTCOMES:  # increase() needs a first value
            metrics.dead_man_pings.labels(outcome)
        outcome, why = await _ping(database, snapshot, client, settings.url.get_secret_value())
        metrics.dead_man_pings.labels(outcome).inc()
        if (outcome, why) != last:
            level = log.info if outcome == "sent" else log.warning
            level(f"dead_man_ping_{outcome}", reason=why or None)
        last = outcome, why
        await asyncio.sleep(settings.every)


async def _ping(
    database: Database, snapshot: SnapshotSource, client: httpx.AsyncClient, url: str
) -> tuple[PingOutcome, str]:
    """Send a ping if the pipeline works; returns the outcome, and why it is not `sent`."""
    problem = find_problem(await _read_pipeline(database, snapshot), database.inventory.remediator.watchdog)
    if problem:
        return "withheld", problem
    reply = await send_request(client, "GET", url, b"", {})
    if reply.error:
        return "failed", reply.error
    return ("sent", "") if httpx.codes.is_success(reply.status) else ("failed", f"HTTP {reply.status}")


async def _read_pipeline(database: Database, snapshot: SnapshotSource) -> Pipeline:
    seen = await snapshot.read(PATIENCE)
    unreadable = {name: each.text for name, each in seen.problems.items()}
    try:
        return await database.read(_read, unreadable)
    except StorageError as error:
        return Pipeline({**unreadable, "record": str(error)})


def _read(tx: Transaction, unreadable: Mapping[str, str]) -> Pipeline:
    received = timestamps.get(tx, "watchdog")
    channels = tuple(tx.inventory.notify.channels)
    return Pipeline(
        unreadable,
        tx.now - received.at if received is not None else None,
        resolution.is_watchdog_resolved(tx),
        channels,
        queries.last_outcomes(tx, channels),
    )
