"""Copy the exporter's events into the record, since the exporter keeps only the last ones, in memory."""

import asyncio
import contextlib
from collections.abc import Sequence

import structlog

from fleet.json_client import ClientError
from remediator.clients.exporter import Exporter, ExporterEvents
from remediator.metrics import RemediatorMetrics
from remediator.record import events
from remediator.record.database import Database, StorageError
from remediator.record.events import EVENT_KINDS, StateChange
from runtime.logs import LimitedLog

COPY_EVERY = 5.0  # seconds
COPY_PAUSE = 1.0  # seconds between two rounds at least
LONGEST_PAUSE = 60.0  # seconds between rounds while they fail, or the exporter has no events
PAGE_SIZE = 500  # events copied by one transaction: other writers wait meanwhile
PAGES_PER_ROUND = 20
STORE_POSITION_EVERY = 60.0  # seconds after which the position is stored though nothing happened, for the next gap
# Seconds by which the exporter's clock may differ without being corrected: its Date header has whole seconds.
CLOCK_TOLERANCE = 2.0
log = structlog.get_logger()
limited_log = LimitedLog()


class EventCopier:
    """Copies in rounds. The record has the position, so that a round continues where the last stored page ended."""

    def __init__(self, database: Database, exporter: Exporter, metrics: RemediatorMetrics) -> None:
        self._database, self._exporter, self._metrics = database, exporter, metrics
        self._requested = asyncio.Event()

    def reload(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self.request()

    def request(self) -> None:
        """Copy soon: something happened."""
        self._requested.set()

    async def run(self) -> None:
        """Copy until cancelled."""
        pause = COPY_PAUSE
        while True:
            self._requested.clear()
            try:
                supported = await self._copy_round()
                pause = COPY_PAUSE if supported else LONGEST_PAUSE
            except (ClientError, StorageError) as error:
                limited_log.warning("events_not_copied", error=str(error))
                pause = _longer(pause)
            except Exception:  # the next round may succeed
                if limited_log.admits("events_not_copied"):
                    log.exception("events_not_copied")
                pause = _longer(pause)
            await asyncio.sleep(pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, COPY_EVERY - pause)):
                    await self._requested.wait()

    async def _copy_round(self) -> bool:
        """Copy what the exporter has, at most so many pages; False if it has no events: it is an older version."""
        for _ in range(PAGES_PER_ROUND):
            position = await self._database.read(events.read_position)
            asked_at = self._database.clock.now()
            cursor = position.detail["cursor"] if position is not None else None
            page = await self._exporter.read_events(cursor, PAGE_SIZE)
            if page is None:
                return False
            is_news = bool(page.events) or page.gap or page.cursor != cursor
            if is_news or position is None or asked_at - position.at >= STORE_POSITION_EVERY:
                await self._store(page, asked_at)
            if len(page.events) < PAGE_SIZE:
                return True
        self.request()  # there are more
        return True

    async def _store(self, page: ExporterEvents, asked_at: float) -> None:
        await self._database.write(
            events.store_copied, self._convert(page), cursor=page.cursor, asked_at=asked_at, gap=page.gap
        )
        self._metrics.events_copied.inc(len(page.events))
        if page.gap:
            self._metrics.event_gaps.inc()
            limited_log.warning("events_lost", hint="the exporter was restarted, or had too many events")

    def _convert(self, page: ExporterEvents) -> Sequence[StateChange]:
        """Return the changes with times of the record's clock, also if the exporter's clock is wrong.

        Events of kinds that this version does not know are left out.
        """
        clock = self._database.clock
        now = clock.now()
        system_time = clock.unix(now)
        ahead = page.date - system_time  # how far the exporter's clock is ahead
        # The same for the whole page, so that events keep their order.
        shift = now - (system_time + (ahead if abs(ahead) > CLOCK_TOLERANCE else 0.0))
        return [
            StateChange(
                min(max(event.at + shift, 0.0), now),
                event.kind, event.host, event.name, event.state, event.detail,
            )
            for event in page.events
            if event.kind in EVENT_KINDS
        ]  # fmt: skip


def _longer(pause: float) -> float:
    """Return the pause after another failure."""
    return min(max(COPY_EVERY, 2 * pause), LONGEST_PAUSE)
