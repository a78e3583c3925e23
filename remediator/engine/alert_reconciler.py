"""Background work on alerts and stops: compare with Alertmanager and the exporter, and settle open questions."""

import asyncio
import contextlib
from collections.abc import Callable, Collection

import structlog

from fleet.inventory.model import Inventory, Service
from fleet.json_client import ClientError
from remediator.clients.alertmanager import Alertmanager
from remediator.clients.alerts import WATCHDOG
from remediator.clients.exporter import Exporter
from remediator.engine.observer import COMPLETE_AFTER, ServiceObserver
from remediator.incidents import reconciliation
from remediator.metrics import RemediatorMetrics
from remediator.record import stops
from remediator.record.database import Database, StorageError
from remediator.record.stops import Stop
from remediator.record.transaction import Transaction

FIRST_RECONCILIATION = 5.0  # seconds after the start
RECONCILE_EVERY = 60.0
RECONCILE_PAUSE = 2.0  # seconds between two reconciliations at least
SETTLED_AFTER = 10.0  # seconds; an alert received since may be newer than Alertmanager's list
LONG_UP = 300.0  # seconds after which a service that is up has no firing alert
QUESTIONS_EVERY = 5.0
COALESCE_FOR = 0.05  # seconds in which alerts are collected before open questions are read
STOPS_EVERY = 5.0
log = structlog.get_logger()


class AlertReconciler:
    """Runs three loops; `wake` is called with the services whose alerts or stops changed, or None for all."""

    def __init__(
        self,
        database: Database,
        exporter: Exporter,
        alertmanager: Alertmanager | None,
        observer: ServiceObserver,
        metrics: RemediatorMetrics,
        wake: Callable[[Collection[str] | None], None],
    ) -> None:
        self._database, self._observer, self._metrics, self._wake = database, observer, metrics, wake
        self._exporter, self._alertmanager = exporter, alertmanager
        self._requested = asyncio.Event()  # reconcile now
        self._alerts_changed = asyncio.Event()  # there may be new open questions
        self._mismatched: frozenset[str] = frozenset()
        self._watchdog_listed: bool | None = None  # None: not compared since the start

    @property
    def _inventory(self) -> Inventory:
        return self._database.inventory

    def reload(self, exporter: Exporter, alertmanager: Alertmanager | None) -> None:
        self._exporter, self._alertmanager = exporter, alertmanager
        self.request()

    def request(self) -> None:
        """Reconcile as soon as possible."""
        self._requested.set()

    def check_open_questions(self) -> None:
        """Look for open questions: alerts were received."""
        if self._watchdog_listed is False:
            self.request()  # one of them may be the Watchdog
        self._alerts_changed.set()

    def start(self, group: asyncio.TaskGroup) -> None:
        group.create_task(self._reconcile_periodically(), name="reconcile")
        group.create_task(self._settle_questions(), name="settle questions")
        group.create_task(self._watch_stops(), name="watch stops")

    async def _reconcile_periodically(self) -> None:
        await asyncio.sleep(FIRST_RECONCILIATION)
        while True:
            self._requested.clear()
            try:
                await self._compare_configurations()
                changed = await self._change_all(reconciliation.open_missing_incidents) + await self._reconcile()
                if changed:
                    log.info("alerts_reconciled", alerts=changed)
                    self._wake(None)
            except (ClientError, StorageError) as error:
                log.warning("reconciliation_failed", error=str(error))
            except Exception:  # the next round may succeed
                log.exception("reconciliation_failed")
            await asyncio.sleep(RECONCILE_PAUSE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_EVERY - RECONCILE_PAUSE):
                    await self._requested.wait()

    async def _compare_configurations(self) -> None:
        """Count and log the services whose configuration differs in the exporter."""
        names = await self._observer.find_mismatched_services()
        if names is None:
            return
        self._metrics.config_mismatch.set(len(names))
        if names != self._mismatched:
            self._mismatched = names
            event = "configuration_mismatch" if names else "configuration_mismatch_resolved"
            log.warning(event, services=len(names), first=sorted(names)[:5])
            self._wake(None)

    async def _reconcile(self) -> int:
        """Compare the record's alerts with Alertmanager, or the exporter; returns how many changed."""
        if self._alertmanager is None:
            await self._record_watchdog(listed=True)  # nothing can contradict the webhook
            return await self._resolve_recovered()
        listing = await self._alertmanager.alerts()
        # Alertmanager keeps alerts in memory: after its start, Prometheus must send all of them again.
        listed = listing.fingerprints if listing.uptime >= COMPLETE_AFTER else None
        if listing.has_watchdog or listed is not None:
            required = self._inventory.remediator.watchdog > 0
            await self._record_watchdog(listed=listing.has_watchdog or not required)
        active = {alert.fingerprint for alert in listing.active if alert.name != WATCHDOG}
        before = self._database.clock.now() - SETTLED_AFTER
        added = await self._change_all(lambda tx: reconciliation.add_listed(tx, listing, before))
        return added + await self._change_all(lambda tx: reconciliation.reconcile(tx, active, listed, before))

    async def _record_watchdog(self, *, listed: bool) -> None:
        if listed != self._watchdog_listed:
            await self._database.write(lambda tx: reconciliation.record_watchdog(tx, listed=listed))
            if not listed:
                log.warning(
                    "watchdog_not_in_alertmanager", hint="check Prometheus, and `alerting` in its configuration"
                )
            self._watchdog_listed = listed

    async def _resolve_recovered(self) -> int:
        """Resolve the alerts of what the exporter observes to be up."""
        observations, services = await self._exporter.observe_all(), self._inventory.services
        up = {name for name, each in observations.items() if each.up and (each.unchanged_for or 0.0) > LONG_UP}
        responding = {name for name, each in observations.items() if each.host_up} | up
        hosts_up = {services[name].host for name in responding if name in services} - {""}
        before = self._database.clock.now() - LONG_UP
        return await self._change_all(lambda tx: reconciliation.resolve_recovered(tx, up, hosts_up, before))

    async def _change_all(self, change: Callable[[Transaction], int]) -> int:
        """Run `change`, in several transactions if it changes many alerts; returns how many. Raises StorageError."""
        total = changed = await self._database.write(change)
        while changed >= reconciliation.CHANGED_TOGETHER:
            changed = await self._database.write(change)
            total += changed
        return total

    async def _settle_questions(self) -> None:
        """Find evidence for held ends of alerts, and ask the exporter about resolved alerts that may fire again."""
        while True:
            self._alerts_changed.clear()
            try:
                is_open = await self._settle_once()
            except StorageError as error:
                log.warning("settling_failed", error=str(error))
                is_open = True
            except Exception:  # the next round may succeed
                log.exception("settling_failed")
                is_open = True
            if is_open:
                await asyncio.sleep(QUESTIONS_EVERY)
            else:
                await self._alerts_changed.wait()
                await asyncio.sleep(COALESCE_FOR)

    async def _settle_once(self) -> bool:
        """Return whether a question is still open."""
        has_held_end, doubted_services = await self._database.read(reconciliation.read_open_questions)
        if not has_held_end and not doubted_services:
            return False
        if has_held_end:
            sent_at = await self._watchdog_sent_at()
            while released := await self._database.write(reconciliation.release_held_ends, sent_at):
                self._wake(None)
                if released < reconciliation.CHANGED_TOGETHER:
                    break
        for service in doubted_services:
            await self._settle_doubts(service)
        has_held_end, doubted_services = await self._database.read(reconciliation.read_open_questions)
        return bool(has_held_end or doubted_services)

    async def _watchdog_sent_at(self) -> float | None:
        """Return when Prometheus last sent Alertmanager the Watchdog; None if that is unknown."""
        if self._alertmanager is None:
            return None
        try:
            age = await self._alertmanager.watchdog_age()
        except ClientError:
            return None
        # The Date header has whole seconds.
        return None if age is None else self._database.clock.now() - age - 1.0

    async def _settle_doubts(self, name: str) -> None:
        """Ask the exporter whether a service is down whose resolved alert was received as firing."""
        service = self._inventory.services.get(name)
        up: bool | None = True  # a removed service is not down
        if service is not None:
            up = None
            with contextlib.suppress(ClientError):
                up = (await self._exporter.probe(name, service.probe.timeout)).up
        if up is None:
            return
        firing = await self._database.write(reconciliation.settle_doubts, name, down=not up)
        if firing:
            self._wake({name})

    async def _watch_stops(self) -> None:
        """Remove the stop of a service that is up again, whoever started it."""
        while True:
            await asyncio.sleep(STOPS_EVERY)
            try:
                for stop in await self._database.read(stops.completed):
                    service = self._inventory.services.get(stop.service)
                    if service is not None and await self._is_up_again(service, stop):
                        await self._database.write(stops.remove, [service.id])
                        log.info("stopped_service_up_again", service=service.id)
                        self._wake({service.id})
            except (ClientError, StorageError) as error:
                log.warning("stopped_services_not_checked", error=str(error))
            except Exception:  # the next round may succeed
                log.exception("stopped_services_not_checked")

    async def _is_up_again(self, service: Service, stop: Stop) -> bool:
        """Whether a stopped service has been up for `hold` since. Raises ClientError."""
        observed = await self._exporter.observe(service.id)
        if not observed.up or observed.unchanged_for is None:
            return False
        now, required = self._database.clock.now(), self._inventory.remediation.for_service(service).hold
        if observed.unchanged_for > now - stop.at and service.control is not None:
            required += service.control.start_within  # never seen down: it may still be stopping
        if min(observed.unchanged_for, now - stop.ended) < required:
            return False
        return bool((await self._exporter.probe(service.id, service.probe.timeout)).success)
