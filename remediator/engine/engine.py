"""The work of the remediator: decides about every open incident, has the actor act, closes what is over."""

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import structlog

from fleet.inventory.digests import digests_differ
from fleet.inventory.model import Inventory, Remediation, Service
from remediator import policy
from remediator.clients.peers import Alertmanager, Exporter, PeerError
from remediator.clients.webhook import WATCHDOG
from remediator.engine.observer import REMEMBERS_AFTER, Observer
from remediator.execution.controls.context import Facts, UnknownVerb, Verb
from remediator.execution.executor import Actor, probed
from remediator.incidents import actions, intake, lifecycle
from remediator.incidents.actions import Claim, Seen
from remediator.metrics import Metrics
from remediator.notifications.outbox import Batch
from remediator.notifications.sender import Sender
from remediator.policy import DECIDE_AGAIN, Decision, Observation, Situation, decide
from remediator.record import stops
from remediator.record.database import Database, StorageError
from remediator.record.stops import Stop
from runtime.redaction import Redactor

TOGETHER = 0.01  # seconds: what changes within them is looked at in one go
BY_ACTIONS = ("target-busy", "host-busy", "fleet-busy", "dependency-down")
RECONCILE_FIRST = 5.0
RECONCILE_EVERY = 60.0
RECONCILE_PAUSE = 2.0  # seconds between two rounds at least
SETTLED = 10.0  # an alert seen this lately may be newer than Alertmanager's list
LONG_UP = 300.0
DOWN_UNALARMED = 60.0  # how long a service may be down without an alert before people are told
SETTLE_AGAIN = 5.0
STOPS_EVERY = 5.0
DETAILS_WITHIN, DETAILS_AGAIN = 2.0, 15.0
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
        self._sender, self._metrics = sender, metrics
        self._observer = Observer(database, inventory, exporter, alertmanager)
        self.actor = Actor(database, inventory, exporter, metrics, redact, self._acted)
        self._wake = asyncio.Event()
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._look_at: dict[str, float] = {}  # by service: the loop's time at which to decide again
        self._held: set[str] = set()  # services that wait for what an action's end may give them
        self._due: set[str] = set()  # services to decide about now, whatever stands there
        self._all = True
        self._ask_details_from = 0.0
        self._delivered = asyncio.Event()  # set: alerts may have ended, or fire again
        self._mismatched: frozenset[str] = frozenset()
        self._compare = asyncio.Event()  # set: reconcile now
        self._news: set[str] = set()  # services of which something changed while they were attended to

    def wake(self, services: Collection[str] | None = None) -> None:
        """Something changed for these services, or for all: decide again, and send what there is to tell."""
        busy = self._busy()
        if services is None:
            self._all = True
            self._news.update(busy)
        else:
            self._due.update(services)
            self._news.update(busy.intersection(services))
        self._wake.set()
        self._delivered.set()
        self._sender.wake()

    def _acted(self, service: str) -> None:
        """An action on a service has come to something."""
        self.wake({service, *self._held})

    async def take(self, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None) -> None:
        """Go on with another inventory and other peers."""
        self.inventory, self._exporter, self._alertmanager = inventory, exporter, alertmanager
        self._observer.take(inventory, exporter, alertmanager)
        await self.actor.take(inventory, exporter)
        self.reconcile_soon()
        self.wake()

    def reconcile_soon(self) -> None:
        """Compare with the exporter and with Alertmanager now, not at the next turn."""
        self._compare.set()

    async def run(self) -> None:
        """Take up what a crash left, then attend to open incidents until cancelled."""
        async with asyncio.TaskGroup() as group:
            await self.actor.begin(group)
            group.create_task(self._reconcile_always(), name="reconcile")
            group.create_task(self._follow_up_always(), name="follow up")
            group.create_task(self._watch_stops(), name="watch stops")
            while True:
                self._wake.clear()
                await self._attend_to_all(group)
                await asyncio.sleep(TOGETHER)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_next_look()):
                        await self._wake.wait()

    async def drain(self) -> None:
        """Begin nothing more, and wait for what cannot be left half done."""
        await self.actor.drain()
        await self._sender.drain()

    def _busy(self) -> set[str]:
        return set(self._attending)

    def _until_next_look(self) -> float:
        now = asyncio.get_running_loop().time()
        busy = self._busy()  # these wake us at their end
        return max(0.0, min([DECIDE_AGAIN, *(at - now for name, at in self._look_at.items() if name not in busy)]))

    async def _attend_to_all(self, group: asyncio.TaskGroup) -> None:
        """Attend to all open incidents that something has changed for, or whose time has come."""
        now = asyncio.get_running_loop().time()
        wanted = None if self._all else self._due | {name for name, at in self._look_at.items() if at <= now}
        self._all, self._due = False, set()
        try:
            open_now = dict(await self._database.run(lifecycle.open_incidents, wanted))
        except StorageError as error:
            log.error("the record cannot be read", error=str(error))  # noqa: TRY400 - it is its own explanation
            self._all = True
            self._look_at.clear()
            return
        for gone in (self._look_at.keys() if wanted is None else wanted) - open_now.keys():
            self._look_at.pop(gone, None)
        for service, incident in open_now.items():
            if service not in self._attending:
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
        del self._attending[service]
        self._wake.set()

    async def _advance(self, incident: int, service_id: str) -> float:
        """Decide, and act if that is the decision; returns the seconds after which to decide again."""
        service = self.inventory.services.get(service_id)
        rules = self.inventory.remediation.for_service(service)
        # What the exporter saw last decides first; only *act* is worth a fresh probe.
        situation = await self._observer.situation(incident, service_id)
        decision = decide(service, rules, situation)
        if decision.verb == "act" and service is not None:
            return await self._try_to_act(incident, service, situation)
        if decision.verb == "nothing":
            return await self._settle(incident, service_id, service, situation)
        await self._keep(incident, service_id, decision, situation)
        return self._pause(decision)

    async def _keep(self, incident: int, service_id: str, decision: Decision, situation: Situation) -> None:
        service = self.inventory.services.get(service_id)
        now, notify = self._database.clock.now(), self.inventory.notify
        (self._held.add if decision.reason in BY_ACTIONS else self._held.discard)(service_id)
        changed = await self._database.run(lifecycle.decided, notify, incident, decision, now, situation.observed)
        if service is not None and decision.reason == "approval":
            step = policy.next_step(service, self.inventory.remediation.for_service(service), situation.past)
            if step is not None:
                changed |= await self._database.run(
                    actions.queue, notify, incident, service, step, replace(situation, now=now)
                )
        elif decision.reason == "blind" and not situation.firing:
            # What is held though its alerts are over would look as if it were well.
            down = situation.observed is not None and situation.observed.up is False
            patience = DOWN_UNALARMED if down else 0.0
            changed |= await self._database.run(lifecycle.tell_of_unseen_end, notify, incident, now - patience, now)
        elif decision.reason == "stopped-by-hand" and situation.withheld:
            await self._database.run(lifecycle.keep_stop, incident, "", situation.withheld)
        elif decision.reason == "stopped-by-hand" and situation.stopped_by_hand:
            await self._database.run(lifecycle.keep_stop, incident, situation.run, situation.stopped_by_hand)
        if changed:
            log.info(
                "decided", service=service_id, incident=incident, verb=decision.verb,
                reason=decision.reason, detail=decision.detail or None,
            )  # fmt: skip
            self._sender.wake()

    async def _forget_stop(self, service: Service, situation: Situation) -> None:
        """Forget a stop that was seen, once its host tells of another run."""
        past, stopped = situation.past, situation.stopped_by_hand or situation.withheld
        if past.stopped_why and situation.run not in ("", past.stopped_run) and not stopped:
            await self._database.run(lifecycle.forget_stop, self.inventory.services_sharing_target(service))

    async def explain(self, service: Service) -> dict[str, Any]:
        """Every gate of a service's next action as it stands now, and when it is decided about next."""
        found = await self._database.run(lifecycle.open_of, service.id)
        situation, facts = await asyncio.gather(
            self._observer.situation(found or 0, service.id), self.actor.facts(service)
        )
        situation = _as_it_stands(situation, facts)
        rules = self.inventory.remediation.for_service(service)
        # Where nothing fires, it is told what would be if the service were down and its alert fired.
        firing = situation.firing or frozenset(rules.alerts[:1])
        silenced, gone, caution = await self._observer.looked_up(service, firing)
        situation = replace(situation, silenced=silenced, gone=gone and bool(situation.firing))
        decision = decide(service, rules, situation)
        if decision.verb == "nothing" and found is not None:
            decision = _unseen(service, situation.observed) or decision
        step = policy.next_step(service, rules, situation.past)
        look_at = self._look_at.get(service.id)
        left = None if look_at is None else max(0.0, look_at - asyncio.get_running_loop().time())
        gates = policy.explain(service, rules, replace(situation, firing=firing))
        return {
            "service": service.id,
            "incident": found,
            "firing": sorted(situation.firing),
            "decision": {"verb": decision.verb, "reason": decision.reason, "detail": decision.detail},
            "next_step": step.kind if step is not None else None,
            "attempts": dict(situation.past.attempts),
            "gates": [
                {
                    "gate": each.name,
                    "open": each.held is None,
                    "detail": each.held.detail if each.held is not None else "",
                    "until": each.held.until if each.held is not None else None,
                }
                for each in gates
            ],
            "caution": caution,
            "decided_again_in_seconds": left,
        }

    async def details(self, batch: Batch) -> Mapping[str, Any]:
        """What a message of a service that is down can say of it when it is sent."""
        loop = asyncio.get_running_loop()
        if batch.form != "one" or batch.first.kind != "down" or loop.time() < self._ask_details_from:
            return {}
        try:
            async with asyncio.timeout(DETAILS_WITHIN):
                seen = await self._exporter.observe(str(batch.first.content["labels"].get("service", "")))
        except (PeerError, TimeoutError):
            self._ask_details_from = loop.time() + DETAILS_AGAIN  # people are not to wait for it each time
            return {}
        return {"probe": f"{seen.reason}: {seen.message}"} if seen.reason else {}

    async def _try_to_act(self, incident: int, service: Service, situation: Situation) -> float:
        """Have everyone asked afresh, at once, who may speak against it; then claim and begin."""
        proof_at = self._database.clock.now()
        situation, (silenced, gone, caution), (seen, facts), down = await asyncio.gather(
            self._observer.probed(service, situation),
            self._observer.looked_up(service, situation.firing),
            self.actor.look(service),
            self._observer.dependencies_down(service),
        )
        situation = replace(_as_it_stands(situation, facts), silenced=silenced, gone=gone, dependencies_down=down)
        await self._forget_stop(service, situation)
        rules = self.inventory.remediation.for_service(service)
        decision = decide(service, rules, situation)
        if decision.verb != "act" or decision.step is None:
            await self._keep(incident, service.id, decision, situation)
            return self._pause(decision)
        if situation.observed is not None:
            doubts = (caution, facts.unseen, facts.unsure) if facts is not None else (caution,)
            said = "; ".join(filter(None, doubts))
            seen = replace(seen, texts={"probe before": probed(situation.observed), **(seen.texts or {})}, said=said)
        inventory, now, step = self.inventory, self._database.clock.now(), decision.step
        claimed = await self.actor.act(
            service,
            "restart" if step.recreate is None else step,
            lambda connection: actions.claim(
                connection, incident, service, situation, inventory, proof_at=proof_at, before=seen, now=now
            ),
        )
        if isinstance(claimed, Decision):
            await self._keep(incident, service.id, claimed, situation)
            return self._pause(claimed)
        if claimed == "stopping" or isinstance(claimed, Claim):
            return DECIDE_AGAIN
        return 1.0  # the record moved on meanwhile: decide again by what it says now

    async def act_for_person(
        self, service: Service, verb: Verb, overruled: Collection[str], by: str
    ) -> Claim | Decision | str:
        """Begin what a person asked for, or tell what holds it back. Raises UnknownVerb and StorageError."""
        if service.control is None or verb not in service.control.options.verbs:
            raise UnknownVerb(f"the service's control has no `{verb}`")
        situation = await self._observer.of(service.id)
        seen = Seen()
        if verb in ("stop", "restart"):
            seen, _ = await self.actor.look(service)
        if verb in ("start", "restart"):
            situation = replace(situation, dependencies_down=await self._observer.dependencies_down(service))
        inventory, now = self.inventory, self._database.clock.now()
        return await self.actor.act(
            service,
            verb,
            lambda connection: actions.claim_for_person(
                connection, service, verb, inventory, situation, overruled=overruled, by=by, before=seen, now=now
            ),
        )

    async def _settle(self, incident: int, service_id: str, service: Service | None, situation: Situation) -> float:
        """No alert fires any more: close the incident once a probe made after that shows the service up for `hold`.

        Whatever cannot be seen is not over.
        """
        rules = self.inventory.remediation.for_service(service)
        if service is None:
            await self._keep(incident, service_id, Decision("nothing"), situation)
            await self._close(incident, service_id, "unobserved", rules)
            return SETTLE_AGAIN
        seen = situation.observed
        if seen is not None and seen.up and seen.unchanged_for is not None:
            left = rules.hold - seen.unchanged_for
            if left > 0:
                await self._keep(incident, service_id, Decision("nothing"), situation)
                return left
            situation = await self._observer.probed(service, situation)
            seen = situation.observed
        held = _unseen(service, seen)
        if held is None and seen is not None and seen.up and seen.success:
            await self._close(incident, service_id, "recovered", rules)
        else:
            await self._keep(incident, service_id, held or Decision("nothing"), situation)
        return SETTLE_AGAIN

    async def _close(self, incident: int, service: str, state: lifecycle.Closed, rules: Remediation) -> None:
        now = self._database.clock.now()
        closed = await self._database.run(lifecycle.close, self.inventory.notify, incident, state, rules.alerts, now)
        if closed is not None:
            log.info("incident closed", service=service, incident=incident, state=state)
            if closed.by is not None:
                self._metrics.recovery.labels(closed.by).observe(closed.lasted)
            self._sender.wake()

    def _pause(self, decision: Decision) -> float:
        """Seconds after which to decide again."""
        return max(0.0, decision.until - self._database.clock.now()) if decision.until else DECIDE_AGAIN

    async def _watch_stops(self) -> None:
        """Forget that a person stopped a service once it is up again, whoever started it."""
        while True:
            await asyncio.sleep(STOPS_EVERY)
            try:
                for stop in await self._database.run(stops.ended):
                    service = self.inventory.services.get(stop.service)
                    if service is not None and await self._runs_again(service, stop):
                        await self._database.run(stops.remove, [service.id])
                        log.info("runs again", service=service.id)
                        self.wake({service.id})
            except (PeerError, StorageError) as error:
                log.warning("what was stopped is not looked at", error=str(error))
            except Exception:  # the next round may do better
                log.exception("looking at what was stopped broke")

    async def _runs_again(self, service: Service, stop: Stop) -> bool:
        """Whether a service that was stopped has been up for `hold` since. Raises PeerError."""
        seen = await self._exporter.observe(service.id)
        if not seen.up or seen.unchanged_for is None:
            return False
        now, wanted = self._database.clock.now(), self.inventory.remediation.for_service(service).hold
        if seen.unchanged_for > now - stop.at and service.control is not None:
            wanted += service.control.start_within  # it was never seen down: it may be stopping still
        if min(seen.unchanged_for, now - stop.ended) < wanted:
            return False
        return bool((await self._exporter.probe(service.id, service.probe.timeout)).success)

    async def _reconcile_always(self) -> None:
        await asyncio.sleep(RECONCILE_FIRST)
        while True:
            self._compare.clear()
            try:
                await self._compare_configurations()
                changed = await self._reconcile()
                if changed:
                    log.info("alerts were not as Alertmanager has them", alerts=changed)
                    self.wake()
            except (PeerError, StorageError) as error:
                log.warning("not reconciled", error=str(error))
            except Exception:  # the next round may do better
                log.exception("reconciling broke")
            await asyncio.sleep(RECONCILE_PAUSE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_EVERY - RECONCILE_PAUSE):
                    await self._compare.wait()

    async def _compare_configurations(self) -> None:
        """Count the services of which the exporter has another configuration, and log them when they change."""
        names = await self._observer.mismatched()
        if names is None:
            return
        self._metrics.config_mismatch.set(len(names))
        if names != self._mismatched:
            self._mismatched = names
            event = "the exporter has another configuration" if names else "the exporter has the same configuration"
            log.warning(event, services=len(names), first=sorted(names)[:5])
            self.wake()

    async def _reconcile(self) -> int:
        """Hold what we believe to fire against who knows; returns how many alerts changed."""
        if self._alertmanager is None:
            return await self._presume_over()
        listing = await self._alertmanager.alerts()
        now = self._database.clock.now()
        # It keeps alerts in memory only: soon after its start Prometheus may not have told it all of them again.
        listed = listing.listed if listing.up_for >= REMEMBERS_AFTER else None
        active = {alert.fingerprint for alert in listing.active if alert.name != WATCHDOG}
        before = now - SETTLED
        taken = await self._database.run(intake.take_listed, listing, before, self.inventory, now)
        return taken + await self._database.run(intake.reconcile, active, listed, before, self.inventory, now)

    async def _presume_over(self) -> int:
        """Take what the exporter shows to be over, since nobody else can be asked."""
        seen, now, services = await self._exporter.observe_all(), self._database.clock.now(), self.inventory.services
        up = {name for name, each in seen.items() if each.up and (each.unchanged_for or 0.0) > LONG_UP}
        hosts_up = {services[name].host for name, each in seen.items() if name in services and each.host_up}
        hosts_up |= {services[name].host for name in up if name in services}
        return await self._database.run(intake.presume_over, up, hosts_up - {""}, now - LONG_UP, self.inventory, now)

    async def _follow_up_always(self) -> None:
        """Find evidence for ends of alerts that wait for it, and for alerts of which a firing copy is in doubt."""
        while True:
            self._delivered.clear()
            waits = False
            try:
                waits = await self._follow_up()
            except StorageError as error:
                log.warning("no evidence is looked for", error=str(error))
                waits = True
            except Exception:  # the next round may do better
                log.exception("looking for evidence broke")
                waits = True
            if waits:
                await asyncio.sleep(SETTLE_AGAIN)
            else:
                await self._delivered.wait()

    async def _follow_up(self) -> bool:
        """Look once; whether something waits on."""
        held, doubted = await self._database.run(intake.held_or_doubted)
        if held:
            sent_at = await self._watchdog_sent_at()
            now = self._database.clock.now()
            if await self._database.run(intake.release, self.inventory, sent_at, now):
                self.wake()
        for service in doubted:
            await self._settle_doubts(service)
        if held or doubted:
            held, doubted = await self._database.run(intake.held_or_doubted)
        return bool(held or doubted)

    async def _watchdog_sent_at(self) -> float | None:
        """When Prometheus last sent Alertmanager the Watchdog; None where that is not to be had."""
        if self._alertmanager is None:
            return None
        try:
            ago = await self._alertmanager.watchdog_sent_ago()
        except PeerError:
            return None
        # A date in a header has whole seconds.
        return None if ago is None else self._database.clock.now() - ago - 1.0

    async def _settle_doubts(self, name: str) -> None:
        """Ask the exporter whether a service is down of which an alert fires again that had ended."""
        service = self.inventory.services.get(name)
        up: bool | None = True  # nobody asks about a service that was removed
        if service is not None:
            with contextlib.suppress(PeerError):
                up = None
                up = (await self._exporter.probe(name, service.probe.timeout)).up
        if up is None:
            return  # it is asked again
        now = self._database.clock.now()
        if await self._database.run(intake.settle_doubts, name, self.inventory, now, down=not up):
            self.wake({name})


def _unseen(service: Service, seen: Observation | None) -> Decision | None:
    """The decision to hold an incident whose alerts are over though nothing shows that its service is up."""
    if seen is None:
        why = "the exporter cannot be asked"
    elif digests_differ(service.digest, seen.digest):
        why = "the exporter has another configuration of this service"
    elif seen.up is None:
        why = "the exporter has not decided yet"
    elif seen.up:
        return None
    else:
        why = "the exporter says that it is down: see that Prometheus and Alertmanager are there"
    return Decision("wait", "blind", detail=f"its alerts are over, but {why}")


def _as_it_stands(situation: Situation, facts: Facts | None) -> Situation:
    """The same situation with what the host says of the target."""
    if facts is None:
        return situation
    return replace(
        situation, healing=facts.healing, age=facts.age, run=facts.started or facts.state, withheld=facts.withheld,
        stopped_by_hand=facts.stopped, stopped_for=facts.stopped_for, unseen=facts.unseen, refused=facts.refused,
    )  # fmt: skip
