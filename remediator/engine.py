"""The work of the remediator: decides about every open incident, has the actor act, closes what is over."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import structlog

from fleet.model import Inventory, Remediation, Service
from remediator import actions, incidents, intake
from remediator.acting import Actor
from remediator.actions import Claim
from remediator.database import Database, StorageError
from remediator.metrics import Metrics
from remediator.notices.outbox import Notice
from remediator.notices.sender import Sender
from remediator.peers import Alertmanager, Exporter, PeerError
from remediator.policy import DECIDE_AGAIN, Decision, Observation, Past, Present, Situation, decide, group_of, is_storm
from runtime.redaction import Redactor

RECONCILE_FIRST = 5.0
RECONCILE_EVERY = 60.0
SETTLED = 10.0  # an alert seen this lately may be newer than Alertmanager's list
REMEMBERS_AFTER = 300.0
LONG_UP = 300.0
UNOBSERVED_AFTER = 600.0  # how long an incident without alerts may wait for the exporter's word
LISTING_HOLDS = 0.5
DETAILS_WITHIN = 2.0
log = structlog.get_logger()


class Engine:
    """Attends to each open incident in a task of its own; what is decided and done is in the record first."""

    def __init__(
        self,
        database: Database,
        inventory: Inventory,
        exporter: Exporter,
        alertmanager: Alertmanager | None,
        sender: Sender,
        metrics: Metrics,
        redact: Redactor,
    ) -> None:
        self._database, self.inventory = database, inventory
        self._exporter, self._alertmanager = exporter, alertmanager
        self._sender = sender
        self.actor = Actor(database, inventory, exporter, metrics, redact, self.wake)
        self._wake = asyncio.Event()
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._look_at: dict[str, float] = {}  # by service: the loop's time at which to decide again
        self._news: set[str] = set()  # services of which something changed while they were attended to
        self._listing_lock = asyncio.Lock()
        self._listed: Mapping[str, Observation] | None = None
        self._listed_at = float("-inf")

    def wake(self) -> None:
        """Something changed: decide again about everything, and send what there is to tell."""
        self._look_at.clear()
        self._news.update(self._busy())
        self._wake.set()
        self._sender.wake()

    async def take(self, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None) -> None:
        """Go on with another inventory and other peers."""
        self.inventory, self._exporter, self._alertmanager = inventory, exporter, alertmanager
        await self.actor.take(inventory, exporter)
        self.wake()

    async def run(self) -> None:
        """Take up what a crash left, then attend to open incidents until cancelled."""
        async with asyncio.TaskGroup() as group:
            await self.actor.begin(group)
            group.create_task(self._reconcile_always(), name="reconcile")
            while True:
                self._wake.clear()
                await self._attend_to_all(group)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_next_look()):
                        await self._wake.wait()

    async def drain(self) -> None:
        """Begin nothing more, and wait for what cannot be left half done."""
        await self.actor.drain()
        await self._sender.drain()

    def _busy(self) -> list[str]:
        return [service for service, task in self._attending.items() if not task.done()]

    def _until_next_look(self) -> float:
        now = asyncio.get_running_loop().time()
        busy = set(self._busy())  # these wake us at their end
        return max(0.0, min([DECIDE_AGAIN, *(at - now for name, at in self._look_at.items() if name not in busy)]))

    async def _attend_to_all(self, group: asyncio.TaskGroup) -> None:
        try:
            open_now = await self._database.run(incidents.open_incidents)
        except StorageError as error:
            log.error("the record cannot be read", error=str(error))  # noqa: TRY400 - it is its own explanation
            return
        now = asyncio.get_running_loop().time()
        services = {service for _, service in open_now}
        for gone in self._look_at.keys() - services:
            del self._look_at[gone]
        for incident, service in open_now:
            busy = service in self._attending and not self._attending[service].done()
            if not busy and self._look_at.get(service, 0.0) <= now:
                self._look_at[service] = now + DECIDE_AGAIN
                self._attending[service] = group.create_task(self._attend(incident, service), name=f"attend {service}")

    async def _attend(self, incident: int, service: str) -> None:
        """Bring an incident as far as it goes now."""
        try:
            again = await self._advance(incident, service)
        except StorageError as error:
            log.error("the record cannot be written", service=service, error=str(error))  # noqa: TRY400
            again = DECIDE_AGAIN
        except Exception:  # one broken incident must not end the others
            log.exception("attending broke", service=service, incident=incident)
            again = DECIDE_AGAIN
        if service in self._news:
            self._news.discard(service)
            again = 0.0
        self._look_at[service] = asyncio.get_running_loop().time() + again
        self._wake.set()

    async def _advance(self, incident: int, service_id: str) -> float:
        """Decide, and act if that is the decision; returns the seconds after which to decide again."""
        service = self.inventory.services.get(service_id)
        decision, situation = await self._decision(incident, service_id, service)
        if decision.verb == "act" and service is not None:
            return await self._try_to_act(incident, service, situation)
        await self._keep(incident, service_id, decision)
        if decision.verb == "nothing":
            return await self._settle(incident, service_id, service, situation)
        return _pause(decision)

    async def _keep(self, incident: int, service: str, decision: Decision) -> None:
        if await self._database.run(incidents.decided, incident, decision, time.time()):
            log.info(
                "decided", service=service, incident=incident, verb=decision.verb,
                reason=decision.reason, detail=decision.detail or None,
            )  # fmt: skip
            self._sender.wake()

    async def _decision(self, incident: int, service_id: str, service: Service | None) -> tuple[Decision, Situation]:
        """What to do by what the exporter last saw; only *act* is worth a fresh probe."""
        situation = await self._situation(incident, service_id, service)
        rules = self.inventory.remediation.of(service)
        return decide(service, rules, situation), situation

    async def _situation(self, incident: int, service_id: str, service: Service | None) -> Situation:
        everything = await self._listing()
        rules = self.inventory.remediation.of(service)
        known = everything or {}
        groups = {
            name: host.group if (host := self.inventory.host_of(each)) else ""
            for name, each in self.inventory.services.items()
        }
        near = [known[name] for name in group_of(service_id, groups) if name in known]
        failing = sum(1 for each in near if each.success is False)
        blank = Situation(
            time.time(),
            frozenset(),
            Past(),
            Present(),
            known.get(service_id),
            dependencies_down=tuple(
                name for name in (service.depends_on if service else ()) if name in known and known[name].up is False
            ),
            storm=(failing, len(near)) if is_storm(rules, failing, len(near)) else None,
        )
        return await self._database.run(
            actions.situation_now,
            incident,
            service_id,
            service.host if service else "",
            blank,
            rules,
            time.time(),
        )

    async def _listing(self) -> Mapping[str, Observation] | None:
        """What the exporter says of all services; decisions of one moment share one answer."""
        async with self._listing_lock:
            loop = asyncio.get_running_loop()
            if loop.time() - self._listed_at >= LISTING_HOLDS:
                self._listed = None
                with contextlib.suppress(PeerError):
                    self._listed = await self._exporter.observe_all()
                self._listed_at = loop.time()
            return self._listed

    async def details(self, notice: Notice) -> Mapping[str, Any]:
        """What a notice of a service that went down can say of it when it is sent."""
        if notice.kind != "down":
            return {}
        with contextlib.suppress(PeerError, TimeoutError):
            async with asyncio.timeout(DETAILS_WITHIN):
                seen = await self._exporter.observe(str(notice.content["labels"].get("service", "")))
                return {"probe": f"{seen.reason}: {seen.message}"} if seen.reason else {}
        return {}

    async def _try_to_act(self, incident: int, service: Service, situation: Situation) -> float:
        proof_at = time.time()
        observed: Observation | None = None
        with contextlib.suppress(PeerError):
            observed = await self._exporter.probe(service.id, service.probe.timeout)
        situation = replace(situation, observed=observed, now=time.time())
        rules = self.inventory.remediation.of(service)
        decision = decide(service, rules, situation)
        if decision.verb == "act":
            inventory, now = self.inventory, time.time()
            claimed = await self.actor.act(
                service,
                "restart",
                lambda connection: actions.claim(
                    connection, incident, service, situation, inventory, proof_at=proof_at, now=now
                ),
            )
            if claimed == "stopping" or isinstance(claimed, Claim):
                return DECIDE_AGAIN
            return 1.0  # the record moved on meanwhile: decide again by what it says now
        await self._keep(incident, service.id, decision)
        return _pause(decision)

    async def _settle(self, incident: int, service_id: str, service: Service | None, situation: Situation) -> float:
        """No alert fires any more: close the incident once the exporter has said `up` for `hold`."""
        now = time.time()
        rules = self.inventory.remediation.of(service)
        seen = situation.observed
        if seen is not None and seen.up and seen.since is not None:
            left = seen.since + rules.hold - now
            if left > 0:
                return left
            await self._close(incident, service_id, "recovered", rules)
        elif seen is None or seen.up is None:
            waited = now - await self._database.run(incidents.quiet_since, incident)
            if service is None or waited >= UNOBSERVED_AFTER:
                await self._close(incident, service_id, "unobserved", rules)
        return DECIDE_AGAIN

    async def _close(self, incident: int, service: str, state: incidents.Closed, rules: Remediation) -> None:
        if await self._database.run(incidents.close, incident, state, rules.alerts, time.time()):
            log.info("incident closed", service=service, incident=incident, state=state)
            self._sender.wake()

    async def _reconcile_always(self) -> None:
        await asyncio.sleep(RECONCILE_FIRST)
        while True:
            try:
                changed = await self._reconcile()
                if changed:
                    log.info("alerts were not as Alertmanager has them", alerts=changed)
                    self.wake()
            except (PeerError, StorageError) as error:
                log.warning("not reconciled", error=str(error))
            except Exception:  # the next round may do better
                log.exception("reconciling broke")
            await asyncio.sleep(RECONCILE_EVERY)

    async def _reconcile(self) -> int:
        """Hold what we believe to fire against who knows; returns how many alerts changed."""
        now = time.time()
        if self._alertmanager is not None:
            seen = await self._alertmanager.alerts(now)
            if seen.up_for < REMEMBERS_AFTER:
                return 0  # it keeps alerts in memory only, and Prometheus may not have told it again yet
            return await self._database.run(
                intake.reconcile, seen.active, seen.listed, now - SETTLED, self.inventory, now
            )
        # Nobody else can be asked: what the exporter has seen up for long is over.
        services = await self._exporter.observe_all()
        up = {
            name for name, each in services.items() if each.up and each.since is not None and now - each.since > LONG_UP
        }
        return await self._database.run(intake.presume_over, up, now - LONG_UP, self.inventory, now)


def _pause(decision: Decision) -> float:
    """Seconds after which to decide again."""
    return max(0.0, decision.until - time.time()) if decision.until else DECIDE_AGAIN
