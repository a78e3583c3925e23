"""The engine: decides about every open incident, starts actions, and closes incidents whose service recovered."""

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import structlog

from fleet.inventory.digests import digests_differ
from fleet.inventory.model import HostAlert, Inventory, Remediable, Remediation, RunbookStep, Service
from fleet.json_client import ClientError
from remediator.clients.alertmanager import Alertmanager
from remediator.clients.exporter import Exporter
from remediator.engine.alert_reconciler import AlertReconciler
from remediator.engine.event_copier import EventCopier
from remediator.engine.observer import AlertLookup, ServiceObserver
from remediator.engine.probe_pauser import ProbePauser
from remediator.execution.controls import find_options
from remediator.execution.controls.runner import TargetState, UnknownVerbError, Verb
from remediator.execution.executor import Executor
from remediator.incidents import actions, decisions, lifecycle
from remediator.incidents.actions import Claim, Evidence
from remediator.metrics import RemediatorMetrics
from remediator.notifications.outbox import Batch
from remediator.notifications.sender import Sender
from remediator.policy import attempts, crash_loop
from remediator.policy.decisions import DECIDE_AGAIN, decide, explain
from remediator.policy.situation import Decision, Observation, Situation
from remediator.record import audit
from remediator.record.database import Database, StorageError
from remediator.record.transaction import Transaction
from runtime.access.audit import AuditEntry
from runtime.access.roles import Identity
from runtime.redaction import Redactor

COALESCE_FOR = 0.01  # seconds in which changes are collected before incidents are looked at
# Holds that the end of an action may release.
RELEASED_BY_ACTIONS = ("target-busy", "host-busy", "fleet-busy", "dependency-down", "storm")
DOWN_WITHOUT_ALERT = 60.0  # seconds for which a service may be down without a firing alert before that is notified
CHECK_CLOSE_AGAIN = 5.0
MAY_END_EARLIER = ("healing-itself", "starting")  # what a host reports changes at any time
CLAIM_AGAIN = 1.0  # seconds after the record changed during a claim
READ_PROBE_TIMEOUT, READ_PROBE_PAUSE = 2.0, 15.0
log = structlog.get_logger()


class Engine:
    """Handles each open incident in a task of its own. Decisions and actions are recorded before they take effect."""

    def __init__(
        self,
        database: Database,
        exporter: Exporter,
        alertmanager: Alertmanager | None,
        sender: Sender,
        metrics: RemediatorMetrics,
        redact: Redactor,
    ) -> None:
        inventory = database.inventory
        self._database, self._exporter, self._sender, self._metrics = database, exporter, sender, metrics
        self._observer = ServiceObserver(database, inventory, exporter, alertmanager)
        self._reconciler = AlertReconciler(database, exporter, alertmanager, self._observer, metrics, self.wake)
        self._event_copier = EventCopier(database, exporter, metrics)
        self._probe_pauser = ProbePauser(database, exporter)
        self.executor = Executor(database, inventory, exporter, metrics, redact, self._on_action_progress)
        self._wake = asyncio.Event()
        self._handling: dict[str, asyncio.Task[None]] = {}  # by service
        self._decide_at: dict[str, float] = {}  # by service: the event loop's time
        self._released_by_actions: set[str] = set()  # services whose hold an action's end may release
        self._due: set[str] = set()  # services to decide about now
        self._all_due = True
        self._changed_meanwhile: set[str] = set()  # services that changed while they were handled
        self._probe_read_from = 0.0
        self._restarts_seen: dict[str, int] = {}  # by service: the host's count when it was first seen to restart it

    @property
    def inventory(self) -> Inventory:
        """The inventory in force."""
        return self._database.inventory

    @property
    def exporter(self) -> Exporter:
        """The client in use, which a reload replaces."""
        return self._exporter

    def wake(self, services: Collection[str] | None = None) -> None:
        """Decide again about these services, or about all, and send new notifications."""
        handling = set(self._handling)
        if services is None:
            self._all_due = True
            self._changed_meanwhile.update(handling)
            self._probe_pauser.request()
        else:
            self._due.update(services)
            self._changed_meanwhile.update(handling.intersection(services))
        self._wake.set()
        self._reconciler.check_open_questions()
        self._event_copier.request()
        self._sender.wake()

    def _on_action_progress(self, service: str) -> None:
        self.wake({service, *self._released_by_actions})

    async def reload(self, inventory: Inventory, exporter: Exporter, alertmanager: Alertmanager | None) -> None:
        """Use another inventory and other clients from now on."""
        self._database.inventory, self._exporter = inventory, exporter
        self._observer.reload(inventory, exporter, alertmanager)
        self._reconciler.reload(exporter, alertmanager)
        self._event_copier.reload(exporter)
        self._probe_pauser.reload(exporter)
        await self.executor.reload(inventory, exporter)
        self.wake()

    def reconcile_soon(self) -> None:
        """Compare the alerts with Alertmanager as soon as possible."""
        self._reconciler.request()

    async def run(self) -> None:
        """Resume interrupted actions, then handle open incidents until cancelled."""
        async with asyncio.TaskGroup() as group:
            await self.executor.start(group)
            self._reconciler.start(group)
            group.create_task(self._event_copier.run(), name="copy events")
            group.create_task(self._probe_pauser.run(), name="pause probing")
            while True:
                self._wake.clear()
                await self._start_handling(group)
                await asyncio.sleep(COALESCE_FOR)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_next_decision()):
                        await self._wake.wait()

    async def drain(self) -> None:
        """Start nothing more, and wait for commands and sends in progress."""
        await self.executor.drain()
        await self._sender.drain()

    def _until_next_decision(self) -> float:
        now = asyncio.get_running_loop().time()
        due_in = (at - now for name, at in self._decide_at.items() if name not in self._handling)
        return max(0.0, min([DECIDE_AGAIN, *due_in]))

    async def _start_handling(self, group: asyncio.TaskGroup) -> None:
        """Start a task for every open incident that is due and not being handled."""
        now = asyncio.get_running_loop().time()
        due = None if self._all_due else self._due | {name for name, at in self._decide_at.items() if at <= now}
        self._all_due, self._due = False, set()
        try:
            incidents = await self._database.read(lifecycle.open_incidents, due)
        except StorageError as error:
            log.error("incidents_not_read", error=str(error))  # noqa: TRY400 - no traceback needed
            self._all_due = True
            self._decide_at.clear()
            return
        for closed in (self._decide_at.keys() if due is None else due) - incidents.keys():
            self._decide_at.pop(closed, None)
        for service, incident in incidents.items():
            if service not in self._handling:
                self._decide_at[service] = now + DECIDE_AGAIN
                self._handling[service] = group.create_task(self._handle(incident, service), name=f"handle {service}")

    async def _handle(self, incident: int, service: str) -> None:
        """Decide about an incident once, and set when to decide again."""
        try:
            pause = await self._advance(incident, service)
        except StorageError as error:
            log.error("incident_not_stored", service=service, error=str(error))  # noqa: TRY400 - no traceback needed
            pause = DECIDE_AGAIN
        except Exception:  # one incident must not end the others
            log.exception("incident_processing_failed", service=service, incident=incident)
            pause = DECIDE_AGAIN
        if service in self._changed_meanwhile:
            self._changed_meanwhile.discard(service)
            pause = 0.0
        self._decide_at[service] = asyncio.get_running_loop().time() + pause
        del self._handling[service]
        self._wake.set()

    async def _advance(self, incident: int, service_id: str) -> float:
        """Decide, and act if that is the decision; returns the seconds after which to decide again."""
        service = self.inventory.find_subject(service_id)
        rules = self.inventory.remediation.for_service(service)
        # The exporter's last observation decides first; only `act` needs a fresh probe.
        situation = await self._observer.collect_situation(incident, service_id)
        decision = decide(service, rules, situation)
        if decision.reason == "storm" and service is not None and not situation.storm_steps:
            state = await self.executor.read_target_state(service)
            if state is not None and state.exited:  # then it is no fault of the network
                self._observer.note_exited(service_id)
                situation = await self._observer.collect_situation(incident, service_id)
                decision = decide(service, rules, situation)
        if decision.verb == "act" and service is not None:
            return await self._act(incident, service, situation)
        if decision.reason == "approval" and service is not None:
            # Nobody is asked about, and nothing is approved for, an alert that Alertmanager does not have.
            lookup = await self._observer.look_up_alerts(service, situation.firing)
            situation = replace(situation, gone=lookup.gone)
            decision = decide(service, rules, situation)
        if decision.verb == "nothing":
            return await self._close_if_recovered(incident, service_id, service, situation)
        await self._record_decision(incident, service_id, decision, situation)
        return self._pause(decision)

    async def _record_decision(self, incident: int, service_id: str, decision: Decision, situation: Situation) -> None:
        service, write = self.inventory.find_subject(service_id), self._database.write
        can_be_released = decision.reason in RELEASED_BY_ACTIONS
        (self._released_by_actions.add if can_be_released else self._released_by_actions.discard)(service_id)
        changed = await write(decisions.record_decision, incident, decision, situation.observed)
        if service is not None and decision.reason == "approval":
            step = attempts.next_step(service, self.inventory.remediation.for_service(service), situation.history)
            if step is not None:
                changed |= await write(actions.queue_action, incident, service, step, situation)
        elif decision.reason == "alert-gone":
            changed |= await write(lifecycle.cancel_queued_actions, incident)
        elif decision.reason == "storm" and service is not None:
            host = self.inventory.host_of(service)
            group = host.group if host is not None else ""
            changed |= await write(decisions.notify_storm, incident, group, decision.detail)
        elif decision.reason == "blind" and not situation.firing:
            is_down = situation.observed is not None and situation.observed.up is False
            before = self._database.clock.now() - (DOWN_WITHOUT_ALERT if is_down else 0.0)
            changed |= await write(decisions.notify_end_not_observed, incident, before)
        elif decision.reason == "stopped-by-hand" and situation.withheld:
            await write(decisions.record_observed_stop, incident, "", situation.withheld)
        elif decision.reason == "stopped-by-hand" and situation.stopped_by_hand:
            await write(decisions.record_observed_stop, incident, situation.run, situation.stopped_by_hand)
        if changed:
            log.info(
                "decision", service=service_id, incident=incident, verb=decision.verb, reason=decision.reason,
                detail=decision.detail or None,
            )  # fmt: skip
            self._sender.wake()

    async def _act(self, incident: int, service: Remediable, situation: Situation) -> float:
        """Probe the service, check everything that may hold the action in parallel, then claim and start it."""
        probed_at = self._database.clock.now()
        situation, lookup, (evidence, state), down = await asyncio.gather(
            self._observer.probe_for_action(service, situation),
            self._observer.look_up_alerts(service, situation.firing),
            self.executor.collect_evidence(service),
            self._observer.find_dependencies_down(service),
        )
        situation = replace(
            _with_target_state(situation, state),
            muted_components=_find_muted(situation, lookup),
            silenced=lookup.silenced,
            gone=lookup.gone,
            dependencies_down=down,
        )
        await self._clear_observed_stop(service, situation)
        await self._notice_crash_loop(incident, service, state)
        decision = decide(service, self.inventory.remediation.for_service(service), situation)
        step = decision.step
        if decision.verb != "act" or step is None:
            await self._record_decision(incident, service.id, decision, situation)
            return self._pause(decision)
        doubts = [lookup.caution, *((state.unseen, state.unsure) if state is not None else ())]
        texts = evidence.texts or {}
        if situation.observed is not None and not isinstance(service, HostAlert):
            texts = {"probe before": situation.observed.summary, **texts}
        if isinstance(step, RunbookStep):
            texts = {"command": step.runbook.command, **texts}
        evidence = replace(evidence, texts=texts, caution="; ".join(filter(None, doubts)))
        claimed = await self.executor.execute(
            service,
            "restart" if step.restart is not None else step,
            lambda tx: actions.claim_action(tx, incident, service, situation, probed_at=probed_at, evidence=evidence),
        )
        if isinstance(claimed, Decision):
            await self._record_decision(incident, service.id, claimed, situation)
            return self._pause(claimed)
        return DECIDE_AGAIN if claimed == "stopping" or isinstance(claimed, Claim) else CLAIM_AGAIN

    async def _notice_crash_loop(self, incident: int, service: Remediable, state: TargetState | None) -> None:
        """Notify of a target that its host restarts again and again: waiting for the host does not help."""
        if state is None or not state.healing or state.restarts is None:
            self._restarts_seen.pop(service.id, None)
            return
        first = self._restarts_seen.setdefault(service.id, state.restarts)
        if not crash_loop.is_crash_loop(first, state.restarts):
            return
        if await self._database.write(decisions.record_crash_loop, incident, state.healing):
            log.warning("crash_loop", service=service.id, incident=incident, restarts=state.restarts)
            self._sender.wake()

    async def _clear_observed_stop(self, service: Remediable, situation: Situation) -> None:
        """Remove an observed stop of the target if its host reports another run."""
        history, stopped = situation.history, situation.stopped_by_hand or situation.withheld
        if history.stopped_why and situation.run not in ("", history.stopped_run) and not stopped:
            await self._database.write(decisions.clear_observed_stop, self.inventory.services_sharing_target(service))

    async def act_for_operator(
        self,
        service: Service,
        verb: Verb,
        overruled: Collection[str],
        by: Identity,
        reason: str = "",
        component: str = "",
    ) -> Claim | Decision | str:
        """Start an operator's action on a service or one of its components, or return what holds it.

        Raises UnknownVerbError, UnknownComponentError and StorageError.
        """
        if verb not in find_options(service, component).verbs:
            raise UnknownVerbError(f"the control of service {service.id!r} does not support `{verb}`")
        situation = await self._observer.observe_service(service.id)
        evidence = Evidence()
        if verb in ("stop", "restart"):
            evidence, _ = await self.executor.collect_evidence(service)
        if verb in ("start", "restart"):
            situation = replace(situation, dependencies_down=await self._observer.find_dependencies_down(service))

        def claim(tx: Transaction) -> Claim | Decision:
            claimed = actions.claim_operator_action(
                tx,
                service,
                verb,
                situation,
                overruled=overruled,
                by=by.label,
                evidence=evidence,
                reason=reason,
                component=component,
            )
            if isinstance(claimed, Claim):
                what = f"component {component}" if component else ""
                overruled_gates = f"overruled {', '.join(sorted(overruled))}" if overruled else ""
                detail = "; ".join(filter(None, (what, reason, overruled_gates)))
                audit.add(tx, AuditEntry.of(by, verb, service.id, detail=detail, action=claimed.id))
            return claimed

        return await self.executor.execute(service, verb, claim)

    async def _close_if_recovered(
        self, incident: int, service_id: str, service: Remediable | None, situation: Situation
    ) -> float:
        """Close an incident without firing alerts after a probe shows that the service has been up for `hold`.

        A status that is unknown is no recovery. The end of a host's alert is one. Returns the seconds after which to
        decide again.
        """
        rules = self.inventory.remediation.for_service(service)
        if service is None:
            await self._record_decision(incident, service_id, Decision("nothing"), situation)
            await self._close(incident, service_id, "unobserved", rules)
            return CHECK_CLOSE_AGAIN
        if isinstance(service, HostAlert):
            await self._record_decision(incident, service_id, Decision("nothing"), situation)
            await self._close(incident, service_id, "recovered", rules)
            return CHECK_CLOSE_AGAIN
        observed = situation.observed
        if observed is not None and observed.up and observed.unchanged_for is not None:
            left = rules.hold - observed.unchanged_for
            if left > 0:
                await self._record_decision(incident, service_id, Decision("nothing"), situation)
                return left
            situation = await self._observer.probe(service, situation)
            observed = situation.observed
        held = _wait_until_seen_up(service, observed)
        if held is None and observed is not None and observed.up and observed.success:
            await self._close(incident, service_id, "recovered", rules, observed.unchanged_for)
        else:
            await self._record_decision(incident, service_id, held or Decision("nothing"), situation)
        return CHECK_CLOSE_AGAIN

    async def _close(
        self,
        incident: int,
        service: str,
        state: lifecycle.ClosedState,
        rules: Remediation,
        up_for: float | None = None,
    ) -> None:
        closed = await self._database.write(lifecycle.close, incident, state, rules.alerts, up_for)
        if closed is not None:
            log.info("incident_closed", service=service, incident=incident, state=state)
            if closed.recovered_by is not None:
                self._metrics.recovery.labels(closed.recovered_by).observe(closed.duration)
            self._sender.wake()

    def _pause(self, decision: Decision) -> float:
        """Return the seconds after which to decide again."""
        if not decision.until:
            return DECIDE_AGAIN
        left = max(0.0, decision.until - self._database.clock.now())
        return min(left, DECIDE_AGAIN) if decision.reason in MAY_END_EARLIER else left

    async def explain(self, service: Remediable) -> dict[str, Any]:
        """Return every gate of a service's next action and the decision; times are of the record's clock.

        If no alert is firing, the gates are those that would apply if the service's alert fired.
        """
        incident = await self._database.read(lifecycle.find_open, service.id)
        situation, state = await asyncio.gather(
            self._observer.collect_situation(incident or 0, service.id), self.executor.read_target_state(service)
        )
        situation = _with_target_state(situation, state)
        rules = self.inventory.remediation.for_service(service)
        firing = situation.firing or frozenset(rules.alerts[:1])
        lookup = await self._observer.look_up_alerts(service, firing)
        situation = replace(
            situation, silenced=lookup.silenced, gone=lookup.gone and bool(situation.firing),
            muted_components=_find_muted(situation, lookup),
        )  # fmt: skip
        decision = decide(service, rules, situation)
        if decision.verb == "nothing" and incident is not None and not isinstance(service, HostAlert):
            decision = _wait_until_seen_up(service, situation.observed) or decision
        step = decision.step or attempts.next_step(service, rules, situation.history)
        decide_at = self._decide_at.get(service.id)
        left = None if decide_at is None else max(0.0, decide_at - asyncio.get_running_loop().time())
        gates = explain(service, rules, replace(situation, firing=firing))
        return {
            "service": service.id,
            "incident": incident,
            "up": situation.observed.is_up if situation.observed is not None else None,
            "firing": sorted(situation.firing),
            "decision": {"verb": decision.verb, "reason": decision.reason, "detail": decision.detail},
            "next_step": step.kind if step is not None else None,
            "component": decision.component,
            "attempts": dict(situation.history.attempts),
            "gates": [
                {"gate": each.name, "open": each.closed is None, **(asdict(each.closed) if each.closed else _OPEN)}
                for each in gates
            ],
            "caution": lookup.caution,
            "decided_again_in_seconds": left,
        }

    async def read_failed_probe(self, batch: Batch) -> Mapping[str, Any]:
        """Return the last failed probe for a message about one service that is down, if the exporter responds."""
        loop = asyncio.get_running_loop()
        if batch.form != "one" or batch.first.kind != "down" or loop.time() < self._probe_read_from:
            return {}
        try:
            async with asyncio.timeout(READ_PROBE_TIMEOUT):
                observed = await self._exporter.observe(str(batch.first.content["labels"].get("service", "")))
        except (ClientError, TimeoutError):
            self._probe_read_from = loop.time() + READ_PROBE_PAUSE  # notifications must not wait for it each time
            return {}
        return {"probe": observed.summary} if observed.reason else {}


_OPEN = {"detail": "", "until": None}


def _wait_until_seen_up(service: Service, observed: Observation | None) -> Decision | None:
    """Return the decision for an incident without firing alerts whose service is not seen up; None if it is up."""
    if observed is None:
        why = "cannot connect to the exporter"
    elif digests_differ(service.digest, observed.digest):
        why = "the exporter has a different configuration of this service"
    elif observed.up is None and observed.paused:
        return Decision("wait", "maintenance", detail="its alerts are resolved, but probing is paused")
    elif observed.up is None:
        why = "the exporter has no result yet"
    elif observed.up:
        return None
    else:
        why = "the exporter says that the service is down: check Prometheus and Alertmanager"
    return Decision("wait", "blind", detail=f"its alerts are resolved, but {why}")


def _find_muted(situation: Situation, lookup: AlertLookup) -> frozenset[str]:
    active = lookup.active_components
    return situation.alerting_components - active if active is not None else frozenset()


def _with_target_state(situation: Situation, state: TargetState | None) -> Situation:
    if state is None:
        return situation
    return replace(
        situation, healing=state.healing, age=state.age, run=state.started or state.state, withheld=state.withheld,
        stopped_by_hand=state.stopped, stopped_for=state.stopped_for, unseen=state.unseen, refused=state.refused,
    )  # fmt: skip
