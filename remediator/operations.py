"""Operations: what operators can do, one method each. The HTTP API, chat buttons and the console call these.

Every operation is recorded in the audit log with who requested it, and raises an OperationError if it cannot be done.
"""

import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from fleet.inventory.model import Remediable, Service, is_host_alert
from fleet.json_client import ClientError, HttpStatusError
from fleet.pings import PingKind
from fleet.shells import CompletedCommand, ShellError
from remediator.clients.alertmanager import Alertmanager
from remediator.engine import reminders
from remediator.engine.engine import Engine
from remediator.execution.controls.runner import UnknownComponentError, UnknownVerbError, Verb
from remediator.incidents import acknowledgement, actions
from remediator.incidents.actions import Claim
from remediator.incidents.timeline import add_event, count_events
from remediator.notifications.channels import SendResult
from remediator.notifications.sender import Sender
from remediator.policy.situation import LOCKS, OVERRULABLE, Decision, Observation
from remediator.record import audit, automation, maintenance, queries, storms
from remediator.record.audit import AuditLog
from remediator.record.automation import AutomationSwitch
from remediator.record.database import Database, StorageError
from remediator.record.maintenance import MaintenanceScope
from remediator.record.queries import Subject
from remediator.record.transaction import Transaction
from runtime.access.audit import AuditEntry
from runtime.access.roles import Identity
from runtime.errors import DefibError
from runtime.shared_reads import SharedReads

T = TypeVar("T")
MAX_NOTES = 100  # of an incident
MAX_MAINTENANCE = 500  # in effect at a time: every page shows them
MAX_PAUSED = 200  # services, hosts and groups whose probing is paused
STORM_OVERRULED_FOR = 3600.0  # seconds
EXPLAIN_TIMEOUT = 15.0  # seconds
TEST_PAUSE = 5.0  # seconds between test messages to a channel: they do not wait for its limits
log = structlog.get_logger()


class OperationError(DefibError):
    """The operation was not done. `code` identifies the reason for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class InvalidOperationError(OperationError):
    """The request is wrong, whatever the state of the fleet."""


class NotFoundError(OperationError):
    """There is no such service, component, incident, alert, action or maintenance."""


class ConflictError(OperationError):
    """The present state does not allow it."""


class UnavailableError(OperationError):
    """A part of Defib, or another server, cannot be used now."""

    retryable = True


class HostUnreachableError(OperationError):
    """The host cannot be reached."""

    retryable = True


@dataclass(frozen=True)
class Acknowledgement:
    by: str
    at: float


class Operations:
    def __init__(self, engine: Engine, sender: Sender, database: Database, audit_log: AuditLog) -> None:
        self._engine, self._sender, self._database, self._audit_log = engine, sender, database, audit_log
        self._tested_at: dict[str, float] = {}  # by channel
        self._explanations = SharedReads(running=8, waiting=40)  # each asks the host of the service

    async def start_action(
        self, service_id: str, verb: Verb, overruled: Collection[str], by: Identity, reason: str = ""
    ) -> Claim:
        """Start, stop or restart a service; `overruled` are the gates that do not hold it. The reason is recorded."""
        async with self._audit_log.recording_refusal(by, verb, service_id):
            return await self._start(service_id, verb, overruled, by, reason)

    async def restart_component(
        self, service_id: str, component: str, overruled: Collection[str], by: Identity, reason: str = ""
    ) -> Claim:
        """Restart one component that the service's control lists; everything else is as in `start_action`."""
        async with self._audit_log.recording_refusal(by, "restart", service_id, f"component {component}"):
            return await self._start(service_id, "restart", overruled, by, reason, component)

    async def _start(
        self,
        service_id: str,
        verb: Verb,
        overruled: Collection[str],
        by: Identity,
        reason: str,
        component: str = "",
    ) -> Claim:
        service = self.get_controlled_service(service_id)
        unknown = sorted({*overruled} - OVERRULABLE)
        if unknown:
            gates = ", ".join(sorted(OVERRULABLE))
            message = f"cannot overrule {', '.join(unknown)}; possible are {gates}"
            raise InvalidOperationError("bad_request", message)
        try:
            claimed = await self._engine.act_for_operator(service, verb, overruled, by, reason, component)
        except UnknownVerbError as error:
            raise InvalidOperationError("unknown_verb", str(error)) from error
        except UnknownComponentError as error:
            raise NotFoundError("unknown_component", str(error)) from error
        except StorageError as error:
            raise _not_stored("nothing was started") from error
        if claimed == "stopping":
            raise UnavailableError("stopping", "the remediator is shutting down")
        if isinstance(claimed, Decision):
            raise _held(claimed)
        assert isinstance(claimed, Claim)  # noqa: S101 - the last of the possible types
        return claimed

    async def read_from_host(self, service_id: str, verb: Verb, by: Identity) -> CompletedCommand:
        """Run the `status` or `logs` command of a service's control."""
        async with self._audit_log.recording_refusal(by, verb, service_id):
            service = self.get_controlled_service(service_id)
            try:
                completed = await self._engine.executor.run_command(service, verb)
            except UnknownVerbError as error:
                raise InvalidOperationError("unknown_verb", str(error)) from error
            except ShellError as error:
                raise HostUnreachableError("unreachable", str(error)) from error
        await self._audit_log.write(AuditEntry.of(by, verb, service_id))
        return completed

    async def probe_now(self, service_id: str, by: Identity) -> Observation:
        """Probe a service outside of its schedule."""
        async with self._audit_log.recording_refusal(by, "probe", service_id):
            service = self.get_service(service_id)
            try:
                observed = await self._engine.exporter.probe(service.id, service.probe.timeout)
            except ClientError as error:
                raise UnavailableError("exporter_unavailable", f"cannot query the exporter: {error}") from error
        await self._audit_log.write(AuditEntry.of(by, "probe", service_id))
        return observed

    async def reveal_ping_urls(self, service_id: str, by: Identity) -> Mapping[str, str]:
        """Return the URLs of a heartbeat by name: who has one that is no badge's can send pings."""
        async with self._audit_log.recording_refusal(by, "read ping URL", service_id):
            with _asking_about_heartbeats():
                urls = await self._engine.exporter.read_ping_urls(self.find_heartbeat(service_id))
        await self._audit_log.write(AuditEntry.of(by, "read ping URL", service_id))
        return urls

    async def ping(
        self, service_id: str, kind: PingKind, exit_status: int | None, message: str, by: Identity
    ) -> PingKind:
        """Send a ping of a heartbeat in the name of a person; returns its kind, which the exit status may decide."""
        async with self._audit_log.recording_refusal(by, "ping", service_id):
            name = self.find_heartbeat(service_id)
            if exit_status is not None and kind not in ("success", "fail"):
                raise InvalidOperationError("bad_request", f"exit_status: a ping of the kind {kind} has none")
            with _asking_about_heartbeats():
                sent = await self._engine.exporter.ping(name, kind, exit_status, message, by.label)
        detail = sent if exit_status is None else f"{sent}, exit status {exit_status}"
        await self._audit_log.write(AuditEntry.of(by, "ping", service_id, detail=detail))
        return sent

    async def remove_heartbeat(self, name: str, by: Identity) -> None:
        """Remove a heartbeat that a job has created."""
        async with self._audit_log.recording_refusal(by, "remove heartbeat", name):
            if name in self._database.inventory.services:
                raise ConflictError("in_inventory", f"the inventory has the heartbeat {name!r}: remove it there")
            with _asking_about_heartbeats():
                await self._engine.exporter.remove_heartbeat(self.find_heartbeat(name))
        await self._audit_log.write(AuditEntry.of(by, "remove heartbeat", name))

    async def reset_attempts(self, service_id: str, by: Identity) -> int:
        """Give a service or an alert of a host all its attempts again; returns the id of the reset."""

        def work(tx: Transaction) -> int:
            alert = tx.inventory.host_alerts.get(service_id)
            return actions.reset_attempts(tx, alert or self.get_controlled_service(service_id), by.label)

        number = await self._change(by, "reset", service_id, work)
        log.info("attempts_reset", service=service_id, by=by.label)
        self._engine.wake()
        return number

    async def continue_in_storm(self, service_id: str, by: Identity, reason: str = "") -> tuple[str, float]:
        """Let automation continue in the storm of a service's host group; returns the group and until when."""
        until = self._database.clock.now() + STORM_OVERRULED_FOR

        def work(tx: Transaction) -> str:
            host = tx.inventory.host_of(self.get_subject(service_id))
            group = host.group if host is not None else ""
            storms.overrule(tx, group, until, by.label, reason)
            return group

        group = await self._change(by, "continue in storm", service_id, work, detail=reason)
        log.warning("storm_overruled", group=group, by=by.label, reason=reason)
        self._engine.wake()
        return group, until

    async def explain(self, service_id: str) -> dict[str, Any]:
        """Return the state of every gate of a service or an alert of a host; times are of the record's clock."""
        service = self.get_subject(service_id)
        try:
            return await self._explanations.read(service_id, lambda: self._engine.explain(service), EXPLAIN_TIMEOUT)
        except StorageError as error:
            raise _not_readable() from error
        except TimeoutError as error:
            raise UnavailableError("busy", str(error) or "no answer in time") from error

    async def approve(self, action: int, by: Identity) -> None:
        """Approve a queued action."""

        def work(tx: Transaction) -> None:
            outcome = actions.approve_action(tx, action, by.label)
            if outcome == "unknown":
                raise NotFoundError("unknown_action", f"there is no action {action}")
            if outcome == "not-queued":
                raise ConflictError("not_queued", f"action {action} is not waiting for approval")

        await self._change(by, "approve", f"action {action}", work)
        log.info("action_approved", action=action, by=by.label)
        self._engine.wake()

    async def acknowledge(self, subject: Subject, number: int, by: Identity) -> Acknowledgement:
        """Acknowledge an incident or an alert. The first acknowledgement counts and is returned."""
        acknowledge = (
            acknowledgement.acknowledge_incident if subject == "incident" else acknowledgement.acknowledge_alert
        )

        def work(tx: Transaction) -> Acknowledgement:
            row = acknowledge(tx, number, by.label)
            if row is None:
                raise NotFoundError(f"unknown_{subject}", f"there is no {subject} {number}")
            if row.acknowledged_by is None:
                raise ConflictError("over", f"{subject} {number} has ended")
            return Acknowledgement(row.acknowledged_by, row.acknowledged_at)

        acknowledged = await self._change(by, "acknowledge", f"{subject} {number}", work)
        log.info("acknowledged", subject=subject, number=number, by=acknowledged.by)
        self._engine.wake(())
        return acknowledged

    async def add_note(self, incident: int, text: str, by: Identity) -> None:
        """Add a note to the timeline of an incident, which may have ended."""

        def work(tx: Transaction) -> None:
            if queries.find_row(tx, "incident", incident) is None:
                raise NotFoundError("unknown_incident", f"there is no incident {incident}")
            if count_events(tx, incident, "note") >= MAX_NOTES:
                raise ConflictError(
                    "too_many_notes", f"incident {incident} has {MAX_NOTES} notes, the most it can have"
                )
            add_event(tx, incident, "note", by=by.label, text=text)

        await self._change(by, "note", f"incident {incident}", work, detail=text)

    async def acknowledge_message(self, notification: int, by: Identity) -> None:
        """Acknowledge everything in the message of a notification that has not ended."""

        def work(tx: Transaction) -> None:
            if not acknowledgement.acknowledge_message(tx, notification, by.label):
                raise ConflictError("over", "everything in the message has ended")

        await self._change(by, "acknowledge", f"notification {notification}", work)
        self._engine.wake(())

    async def silence(self, subject: Subject, number: int, seconds: float, by: Identity, comment: str) -> float:
        """Silence and acknowledge an alert or an incident's service; returns when the silence ends, in Unix time."""
        target = f"{subject} {number}"
        async with self._audit_log.recording_refusal(by, "silence", target):
            silence, until = await self._create_silence(subject, number, seconds, by, comment)
            try:
                await self._database.write_with_priority(
                    _record_silence, number if subject == "incident" else None, silence, by, target
                )
            except StorageError as error:
                raise _not_stored(f"silence {silence} was created in Alertmanager, but not recorded") from error
        log.info("silenced", subject=subject, number=number, by=by.label, silence=silence)
        with contextlib.suppress(ConflictError, NotFoundError):  # it may have ended meanwhile
            await self.acknowledge(subject, number, by)
        self._engine.wake()
        return until

    async def _create_silence(
        self, subject: Subject, number: int, seconds: float, by: Identity, comment: str
    ) -> tuple[str, float]:
        """Create a silence in Alertmanager; returns its id and when it ends, in Unix time."""
        row = await self._read(queries.find_row, subject, number)
        if row is None:
            raise NotFoundError(f"unknown_{subject}", f"there is no {subject} {number}")
        if (row.state != "open") if subject == "incident" else (row.status != "firing"):
            raise ConflictError("over", f"{subject} {number} has ended")
        labels = _labels_of_incident(row.service) if subject == "incident" else dict(row.labels)
        endpoint = self._database.inventory.remediator.alertmanager_url
        if endpoint is None:
            raise ConflictError("not_silenced", "remediator.alertmanager_url is not set")
        clock = self._database.clock
        begins = clock.unix(clock.now())
        alertmanager = Alertmanager(endpoint)
        try:
            return await alertmanager.silence(labels, begins, begins + seconds, by.label, comment), begins + seconds
        except ClientError as error:
            raise UnavailableError("not_silenced", str(error)) from error
        finally:
            await alertmanager.close()

    async def test_channel(self, name: str, by: Identity) -> SendResult:
        """Send a test message to a channel; returns its answer."""
        now = self._database.clock.now()
        async with self._audit_log.recording_refusal(by, "test channel", name):
            if name not in self._database.inventory.notify.channels:
                raise NotFoundError("unknown_channel", f"the inventory has no channel {name!r}")
            if now - self._tested_at.get(name, float("-inf")) < TEST_PAUSE:
                raise ConflictError("too_soon", f"a test message was sent to {name} less than {TEST_PAUSE:g} s ago")
            self._tested_at[name] = now
        result = await self._sender.send_test(name, by.label)
        await self._audit_log.write(AuditEntry.of(by, "test channel", name, detail=result.outcome))
        return result

    async def switch_automation(self, *, enabled: bool, by: Identity, reason: str) -> AutomationSwitch:
        """Switch automation on or off, and notify if that changes it."""

        def work(tx: Transaction) -> AutomationSwitch:
            return set_automation(tx, enabled=enabled, by=by.label, reason=reason)

        event = f"automation {'on' if enabled else 'off'}"
        switched = await self._change(by, event, "", work, detail=reason)
        log.warning("automation_switched", enabled=enabled, by=by.label, reason=reason)
        self._engine.wake()
        return switched

    async def begin_maintenance(
        self,
        scope: MaintenanceScope,
        name: str,
        *,
        seconds: float,
        reason: str,
        by: Identity,
        notify: bool = False,
        pause_probing: bool = False,
    ) -> tuple[int, float]:
        """Begin maintenance of a service, host or group; returns its id and its end by the record's clock."""
        until = self._database.clock.now() + seconds

        def work(tx: Transaction) -> int:
            if maintenance.count_current(tx) >= MAX_MAINTENANCE:
                raise ConflictError("too_many_maintenances", f"{MAX_MAINTENANCE} maintenances are in effect: end some")
            names: dict[str, Collection[str]] = {
                "service": tx.inventory.services, "host": tx.inventory.hosts,
                "group": {host.group for host in tx.inventory.hosts.values() if host.group},
            }  # fmt: skip
            if name not in names[scope]:
                raise NotFoundError(f"unknown_{scope}", f"the inventory has no {scope} {name!r}")
            if pause_probing and len(maintenance.paused_scopes(tx)) >= MAX_PAUSED:
                raise ConflictError("too_many_pauses", f"probing is paused by {MAX_PAUSED} maintenances already")
            return maintenance.begin(
                tx, scope, name, until=until, reason=reason, by=by.label, notify=notify, pause_probing=pause_probing
            )

        detail = f"{reason}; probing is paused" if pause_probing else reason
        number = await self._change(by, "begin maintenance", f"{scope} {name}", work, detail=detail)
        log.warning("maintenance_begun", scope=scope, name=name, by=by.label, reason=reason)
        self._engine.wake()
        return number, until

    async def end_maintenance(self, number: int, by: Identity) -> None:
        """End maintenance before its time."""

        def work(tx: Transaction) -> None:
            if not maintenance.end(tx, number):
                raise NotFoundError("unknown_maintenance", f"maintenance {number} is not in effect")

        await self._change(by, "end maintenance", f"maintenance {number}", work)
        log.warning("maintenance_ended", number=number, by=by.label)
        self._engine.wake()

    async def reload(self, reload: Callable[[], Awaitable[None]], by: Identity) -> None:
        """Load the configuration again. Raises what made it fail."""
        async with self._audit_log.recording_refusal(by, "reload", ""):
            await reload()
        await self._audit_log.write(AuditEntry.of(by, "reload"))

    def get_service(self, service_id: str) -> Service:
        """Return a service of the inventory. Raises NotFoundError."""
        service = self._database.inventory.services.get(service_id)
        if service is None:
            raise NotFoundError("unknown_service", f"the inventory has no service {service_id!r}")
        return service

    def find_heartbeat(self, name: str) -> str:
        """Return the ID of a service that reports itself, or that a job may have created. Raises NotFoundError."""
        inventory = self._database.inventory
        service = inventory.services.get(name)
        if service is None and not inventory.exporter.heartbeats.may_create(name):
            raise NotFoundError("unknown_service", f"the inventory has no service {name!r}")
        if service is not None and not service.probe.is_reported:
            raise NotFoundError("unknown_heartbeat", f"service {name!r} has another probe than `heartbeat`")
        return name

    def get_subject(self, subject: str) -> Remediable:
        """Return a service of the inventory, or an alert of a host with runbooks. Raises NotFoundError."""
        return self._database.inventory.host_alerts.get(subject) or self.get_service(subject)

    def get_controlled_service(self, service_id: str) -> Service:
        """Return a service that has a control. Raises NotFoundError and InvalidOperationError."""
        service = self.get_service(service_id)
        if service.control is None:
            raise InvalidOperationError("no-control", f"service {service_id!r} has no `control` in the inventory")
        return service

    async def _change(
        self, by: Identity, event: str, target: str, work: Callable[[Transaction], T], *, detail: str = ""
    ) -> T:
        """Run `work` and store the audit log's entry about it in one transaction; record that it was refused."""
        entry = self._audit_log.mask(AuditEntry.of(by, event, target, detail=detail))

        def work_and_record(tx: Transaction) -> T:
            result = work(tx)
            audit.add(tx, entry)
            return result

        async with self._audit_log.recording_refusal(by, event, target):
            try:
                return await self._database.write_with_priority(work_and_record)
            except StorageError as error:
                raise _not_stored("nothing was changed") from error

    async def _read(self, work: Any, *args: Any) -> Any:
        try:
            return await self._database.read(work, *args)
        except StorageError as error:
            raise _not_readable() from error


@contextlib.contextmanager
def _asking_about_heartbeats() -> Iterator[None]:
    """Translate the errors of the exporter."""
    try:
        yield
    except HttpStatusError as error:
        if error.code == "unknown_heartbeat":
            message = "the exporter has no such heartbeat: reload it, if the inventory has it"
            raise NotFoundError(error.code, message) from error
        if error.code == "too_many_pings":
            raise ConflictError(error.code, "the heartbeat has received too many pings in a minute") from error
        raise UnavailableError("exporter_unavailable", f"cannot query the exporter: {error}") from error
    except ClientError as error:
        raise UnavailableError("exporter_unavailable", f"cannot query the exporter: {error}") from error


def _labels_of_incident(service: str) -> dict[str, str]:
    """Return the labels of all alerts of an incident."""
    if not is_host_alert(service):
        return {"service": service}
    alert, _, host = service.partition("@")
    return {"alertname": alert, "host": host}


def _not_readable() -> UnavailableError:
    return UnavailableError("not_stored", "cannot read the record")


def _not_stored(consequence: str) -> UnavailableError:
    return UnavailableError("not_stored", f"cannot write to the record; {consequence}")


class GateClosedError(ConflictError):
    """A gate holds the action."""


def _held(decision: Decision) -> GateClosedError:
    reason = decision.reason or ""
    detail = f": {decision.detail}" if decision.detail else ""
    if reason in LOCKS:
        return GateClosedError(reason, f"{reason}: another action is in progress{detail}; see /api/v1/actions")
    return GateClosedError(reason, f"held by {reason}{detail}; overrule it by this name")


def set_automation(tx: Transaction, *, enabled: bool, by: str, reason: str) -> AutomationSwitch:
    """Set the automation switch, and notify if that changes it."""
    if enabled is not automation.read_switch(tx).enabled:
        automation.write_switch(tx, enabled=enabled, by=by, reason=reason)
        reminders.notify_automation_switched(tx, enabled=enabled, by=by, reason=reason)
    return automation.read_switch(tx)


def _record_silence(tx: Transaction, incident: int | None, silence: str, by: Identity, target: str) -> None:
    if incident is not None:
        add_event(tx, incident, "silenced", by=by.label, silence=silence)
    audit.add(tx, AuditEntry.of(by, "silence", target, detail=silence))
