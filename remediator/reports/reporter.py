"""Read what a report needs, off the event loop or in pieces, and build it."""

import asyncio

from fleet.inventory.endpoints import Endpoint
from remediator.clients.prometheus import Prometheus
from remediator.record.database import Database
from remediator.reports.building import Span, build_report
from remediator.reports.measurements import PARTS, Measurements, measure
from remediator.reports.past import read_past
from remediator.reports.report import Report
from runtime.errors import StartError
from runtime.shared_reads import SharedReads

PATIENCE = 240.0  # seconds
SHARED_FOR = 10.0  # seconds for which the same report serves all callers


class Reporter:
    """Makes one report after another; those who ask for the same one share it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reads = SharedReads(running=1, waiting=10, shared_for=SHARED_FOR)

    async def report_last(self, span: float) -> Report:
        """Return the report of the last `span` seconds. Raises StorageError, and TimeoutError if there are too many."""
        return await self._reads.read(span, lambda: self._report_last(span), PATIENCE)

    async def _report_last(self, span: float) -> Report:
        clock = self._database.clock
        now = clock.unix(clock.now())
        return await self.report(now - span, now)

    async def report(self, start: float, end: float) -> Report:
        """Return the report of the time between two Unix times. Raises StorageError."""
        inventory = self._database.inventory
        past, measured = await asyncio.gather(
            read_past(self._database, start, end),
            _measure(inventory.remediator.prometheus_url, start, end, len(inventory.services)),
        )
        return await asyncio.to_thread(build_report, inventory, Span(start, end), past, measured)


async def _measure(endpoint: Endpoint | None, start: float, end: float, services: int) -> Measurements:
    if endpoint is None:
        return Measurements(missing=dict.fromkeys(PARTS, "remediator.prometheus_url is not set"))
    try:
        client = await asyncio.to_thread(Prometheus, endpoint)
    except StartError as error:  # such as a certificate file that is gone
        return Measurements(missing=dict.fromkeys(PARTS, str(error)))
    try:
        return await measure(client, start, end, services)
    finally:
        await client.close()
