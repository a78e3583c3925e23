"""Pause probing: tell the exporter what not to probe, again and again, since it forgets that after a minute."""

import asyncio
import contextlib

import httpx
import structlog

from fleet.json_client import ClientError, HttpStatusError
from remediator.clients.exporter import Exporter
from remediator.record import maintenance
from remediator.record.database import Database, StorageError
from runtime.logs import LimitedLog

SEND_EVERY = 10.0  # seconds
PAUSE_FOR = 60.0  # seconds after which the exporter probes again if it hears nothing
log = structlog.get_logger()
limited_log = LimitedLog()


class ProbePauser:
    """Sends the scopes of the maintenance in which probing is paused, as long as there is any."""

    def __init__(self, database: Database, exporter: Exporter) -> None:
        self._database, self._exporter = database, exporter
        self._may_be_paused = True  # by an earlier process
        self._requested = asyncio.Event()

    def reload(self, exporter: Exporter) -> None:
        self._exporter, self._may_be_paused = exporter, True
        self.request()

    def request(self) -> None:
        """Send soon: maintenance may have begun or ended."""
        self._requested.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            self._requested.clear()
            try:
                await self._send()
            except (ClientError, StorageError) as error:
                limited_log.warning("probing_not_paused", error=str(error))
            except Exception:  # the next round may succeed
                if limited_log.admits("probing_not_paused"):
                    log.exception("probing_not_paused")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SEND_EVERY):
                    await self._requested.wait()

    async def _send(self) -> None:
        scopes = await self._database.read(maintenance.paused_scopes)
        if not scopes and not self._may_be_paused:
            return
        self._may_be_paused = True  # also if this fails: it may have arrived
        try:
            await self._exporter.pause(scopes, PAUSE_FOR)
        except HttpStatusError as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise
            if scopes:
                limited_log.warning("probing_not_paused", error="the exporter is of an earlier version")
        self._may_be_paused = bool(scopes)
