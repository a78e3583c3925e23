"""Build the situation that a decision depends on from the record."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, and_, bindparam, case, func, or_, select

from fleet.inventory.model import HostAlert, Remediable, RemediationStep
from fleet.shells import KILL_DELAY
from remediator.policy.approvals import describe_request
from remediator.policy.attempts import PastRestart, count_in_a_row, counted_since, find_queue_end, next_step
from remediator.policy.components import COMPONENT_DOWN
from remediator.policy.gates import BOOT_PATIENCE, BUDGET_WINDOW
from remediator.policy.situation import (
    CAPACITY,
    ActionHistory,
    ActionsInProgress,
    ComponentHistory,
    PastAction,
    Situation,
)
from remediator.record import maintenance, stops, storms
from remediator.record.automation import read_switch
from remediator.record.schema import actions, alerts, events, incidents
from remediator.record.transaction import Transaction

HOST_DOWN = "HostDown"
GIVEN_UP = ("attempts-used-up", "host-key-changed", "sudo-refused", "silenced")  # reasons
ACTIONS_READ = 20  # of a target, to tell stops and starts of Defib from those of others
NOTICED_WITHIN = 300.0  # seconds in which HostDown is resolved after the exporter has seen the host again
COMPONENT_HISTORY_READ = 1000  # automatic restarts of the components of a service
HISTORY_READ = 100  # incidents of a service for its attempts, and actions for its back-off

# Built once: every decision executes them, and building a statement takes longer than executing it.
_WAS_RUN = (actions.c.service == bindparam("of")) & actions.c.state.not_in(("queued", "cancelled"))
_SELECT_OUTAGES = (
    select(incidents.c.opened_at, incidents.c.down_at, incidents.c.closed_at, incidents.c.state)
    .where(incidents.c.service == bindparam("of"), incidents.c.labels.is_not(None))
    .order_by(incidents.c.opened_at.desc())
    .limit(HISTORY_READ)
)
_SELECT_LAST = select(
    func.max(actions.c.claimed_at).label("action_at"),
    func.max(case((actions.c.kind == "reset", actions.c.claimed_at))).label("reset_at"),
).where(_WAS_RUN)
_COUNT_ATTEMPTS = (
    select(actions.c.kind, func.count().label("number"))
    .where(_WAS_RUN, actions.c.component == "", actions.c.counts == 1, actions.c.claimed_at > bindparam("since"))
    .group_by(actions.c.kind)
)
_SELECT_COUNTED = (
    select(actions.c.claimed_at, actions.c.up_at, actions.c.ended_at, actions.c.state)
    .where(_WAS_RUN, actions.c.component == "", actions.c.counts == 1, actions.c.claimed_at > bindparam("since"))
    .where(actions.c.kind != "wake")
    .order_by(actions.c.claimed_at.desc())
    .limit(HISTORY_READ)
)
_SELECT_TRIES = (
    select(actions.c.incident_id, actions.c.claimed_at, actions.c.ended_at, actions.c.requested_by, actions.c.blocked)
    .where(_WAS_RUN, actions.c.component == "", actions.c.kind != "reset")
    .order_by(actions.c.claimed_at.desc())
    .limit(HISTORY_READ)
)
_SELECT_OF_COMPONENTS = (
    select(actions.c.component, actions.c.incident_id, actions.c.claimed_at, actions.c.ended_at, actions.c.counts)
    .where(_WAS_RUN, actions.c.component != "", actions.c.requested_by == "alert")
    .order_by(actions.c.claimed_at.desc())
    .limit(COMPONENT_HISTORY_READ)
)
_SELECT_PROGRESS = select(incidents.c.healing_since, incidents.c.starting_since).where(
    incidents.c.id == bindparam("number")
)
_SELECT_PAST_ACTIONS = (
    select(
        actions.c.claimed_at,
        actions.c.command,
        actions.c.command_ended_at,
        actions.c.ended_at,
        actions.c.before,
        actions.c.incident_id,
    )
    .where(
        or_(
            actions.c.service == bindparam("of"),
            and_(actions.c.host == bindparam("host"), actions.c.target == bindparam("target")),
        ),
        actions.c.state.not_in(("queued", "cancelled")),
        actions.c.kind != "reset",
        or_(actions.c.command.is_(None), actions.c.command != "failed", actions.c.exit_status.is_not(None)),
    )
    .order_by(actions.c.claimed_at.desc())
    .limit(ACTIONS_READ)
)
_SELECT_OBSERVED_STOP = (
    select(incidents.c.stopped_run, incidents.c.stopped_why)
    .where(
        incidents.c.service.in_(bindparam("services", expanding=True)),
        incidents.c.state == "open",
        incidents.c.stopped_why.is_not(None),
    )
    .order_by(incidents.c.id.desc())
)
_SELECT_RUNNING = select(
    actions.c.service, actions.c.host, actions.c.target, actions.c.kind, actions.c.claimed_at, actions.c.command,
    actions.c.up_at,
).where(actions.c.state == "running")  # fmt: skip
_SELECT_RECENT_CLAIMS = (
    select(actions.c.claimed_at)
    .where(actions.c.claimed_at > bindparam("since"), actions.c.counts == 1, actions.c.state != "queued")
    .order_by(actions.c.claimed_at)
)
_SELECT_WAITING = (
    select(incidents.c.service, incidents.c.reason, func.count(actions.c.id).label("tries"))
    .join(
        actions,
        and_(
            actions.c.incident_id == incidents.c.id,
            actions.c.requested_by == "alert",
            actions.c.state.not_in(("queued", "cancelled")),
        ),
        isouter=True,
    )
    .where(incidents.c.state == "open", incidents.c.reason.in_(sorted(CAPACITY)))
    .group_by(incidents.c.id)
)
_SELECT_FIRING = (
    select(alerts.c.name, incidents.c.labels.is_not(None).label("was_down"))
    .join(incidents, incidents.c.id == alerts.c.incident_id)
    .where(alerts.c.incident_id == bindparam("number"), alerts.c.status == "firing")
)
_SELECT_COMPONENT_ALERTS = select(alerts.c.labels).where(
    alerts.c.incident_id == bindparam("number"), alerts.c.status == "firing", alerts.c.name == COMPONENT_DOWN
)
_SELECT_HOSTS_DOWN = select(alerts.c.labels).where(alerts.c.status == "firing", alerts.c.name == HOST_DOWN)
_SELECT_HOSTS_BACK = select(alerts.c.labels, alerts.c.last_seen).where(
    alerts.c.status == "resolved", alerts.c.name == HOST_DOWN, alerts.c.last_seen > bindparam("since")
)
_SELECT_CHANGED = (
    select(events.c.kind, events.c.name)
    .where(
        events.c.host == bindparam("host"),
        events.c.kind.in_(("host", "service")),
        func.coalesce(events.c.last_at, events.c.at) > bindparam("since"),
    )
    .distinct()
)
_SELECT_HOST_STATE = (
    select(events.c.state)
    .where(events.c.host == bindparam("host"), events.c.kind == "host")
    .order_by(events.c.at.desc(), events.c.id.desc())
    .limit(1)
)
_SELECT_APPROVED = select(actions.c.kind, actions.c.step).where(
    actions.c.incident_id == bindparam("number"), actions.c.state == "queued", actions.c.approved_at.is_not(None)
)


def read_action_history(tx: Transaction, service: str, incident: int, window: float) -> ActionHistory:
    """Return the earlier actions on a service: its attempts and its back-off."""
    row = tx.execute(_SELECT_PROGRESS, {"number": incident}).first()
    healing_since, starting_since = (row.healing_since, row.starting_since) if row is not None else (None, None)
    of = {"of": service}
    last = tx.execute(_SELECT_LAST, of).one()
    if last.action_at is None:
        return ActionHistory(healing_since=healing_since, starting_since=starting_since)
    reset_at = last.reset_at
    since = _counted_since(tx, service, window, reset_at)
    counted = tx.execute(_COUNT_ATTEMPTS, of | {"since": since})
    tries = tx.execute(_SELECT_TRIES, of).all()
    in_incident = [
        row for row in tries if row.incident_id == incident and (reset_at is None or row.claimed_at > reset_at)
    ]
    return ActionHistory(
        attempts={row.kind: row.number for row in counted},
        components=_read_component_history(tx, service, incident, window, reset_at),
        tries=sum(1 for row in in_incident if row.requested_by == "alert"),
        last_ended=max((row.ended_at for row in tries if row.ended_at is not None), default=None),
        last_action=last.action_at,
        blocked=tries[0].blocked if tries and tries[0] in in_incident else None,
        healing_since=healing_since,
        starting_since=starting_since,
    )


def _counted_since(tx: Transaction, service: str, window: float, reset_at: float | None) -> float:
    """Return the time after which a service's attempts count."""
    outages = tx.execute(_SELECT_OUTAGES, {"of": service}).all()
    # An incident that was closed without an observed recovery does not show that the service was up.
    outage_times = [(row.opened_at, row.closed_at if row.state == "recovered" else None) for row in reversed(outages)]
    return max(counted_since(outage_times, window, tx.now), reset_at if reset_at is not None else float("-inf"))


def read_counted_restarts(tx: Transaction, service: str, window: float) -> list[PastRestart]:
    """Return the restarts of a service that count now, oldest first, and how long it was up after each."""
    of = {"of": service}
    since = _counted_since(tx, service, window, tx.execute(_SELECT_LAST, of).one().reset_at)
    rows = reversed(tx.execute(_SELECT_COUNTED, of | {"since": since}).all())
    outages = [row.down_at for row in tx.execute(_SELECT_OUTAGES, of) if row.down_at is not None]
    return [PastRestart(row.claimed_at, row.up_at, _find_next_failure(row, outages)) for row in rows]


def _find_next_failure(row: Row[Any], outages: Iterable[float]) -> float | None:
    """Return when the service was down again after an action: while it was verified, or in a later outage."""
    if row.up_at is None:
        return None
    if row.state != "succeeded" and row.ended_at is not None:
        return float(row.ended_at)
    return min((at for at in outages if at > row.up_at), default=None)


def _read_component_history(
    tx: Transaction, service: str, incident: int, window: float, reset_at: float | None
) -> dict[str, ComponentHistory]:
    """Return the automatic restarts of components since the last reset."""
    of_component: dict[str, list[Row[Any]]] = {}
    for row in tx.execute(_SELECT_OF_COMPONENTS, {"of": service}):
        if reset_at is None or row.claimed_at > reset_at:
            of_component.setdefault(row.component, []).append(row)
    return {
        name: ComponentHistory(
            count_in_a_row([(row.claimed_at, row.ended_at) for row in rows if row.counts], window, tx.now),
            sum(1 for row in rows if row.incident_id == incident),
            max((row.ended_at for row in rows if row.ended_at is not None), default=None),
        )
        for name, rows in of_component.items()
    }


def _read_actions(tx: Transaction, service: str, host: str, target: str, incident: int) -> list[PastAction]:
    """Return the last actions on a target that ran a command, newest first, for any service that shares it."""
    rows = tx.execute(_SELECT_PAST_ACTIONS, {"of": service, "host": host, "target": target})
    return [
        PastAction(
            row.claimed_at,
            row.command_ended_at if row.command_ended_at is not None else row.ended_at,
            row.command == "succeeded",
            str((row.before or {}).get("state", "")).startswith("failed"),
            row.incident_id == incident,
        )
        for row in rows
    ]


def _read_observed_stop(tx: Transaction, services: Iterable[str]) -> tuple[str, str]:
    """Return (run, why) of the stop of a target by somebody, as observed in an open incident of these services."""
    row = tx.execute(_SELECT_OBSERVED_STOP, {"services": list(services)}).first()
    return (row.stopped_run or "", row.stopped_why) if row is not None else ("", "")


def read_actions_in_progress(
    tx: Transaction, service: str, host: str, target: str = "", tries: int = 0
) -> ActionsInProgress:
    """Return the actions in progress, seen from an action on `target` for `service` on `host` after some `tries`."""
    running = tx.execute(_SELECT_RUNNING).all()

    def group_of(name: str) -> str | None:
        """Return the host group of what an incident is about; None if it is not in the inventory."""
        subject = tx.inventory.find_subject(name)
        host = tx.inventory.host_of(subject) if subject is not None else None
        return None if subject is None else host.group if host is not None else ""

    group = group_of(service)
    ahead = [
        (row.reason, waiting.host)
        for row in (tx.execute(_SELECT_WAITING) if tries else ())
        if row.tries < tries
        and row.service != service
        and (waiting := tx.inventory.find_subject(row.service)) is not None
    ]
    return ActionsInProgress(
        target_busy=any(row.service == service or (row.host, row.target) == (host, target) for row in running),
        on_host=sum(1 for row in running if host and row.host == host and _may_run_command(tx, row)),
        ahead_on_host=ahead.count(("host-busy", host)),
        ahead_in_fleet=sum(1 for reason, _ in ahead if reason == "fleet-busy"),
        in_flight=sum(1 for row in running if row.command is None),
        in_group=sum(
            1
            for row in running
            if row.up_at is None and (other := group_of(row.service)) is not None and (not group or other == group)
        ),
        in_budget_window=tuple(read_recent_claims(tx)),
    )


def _may_run_command(tx: Transaction, row: Row[Any]) -> bool:
    """Whether the command of a running action may be running: one that was interrupted may be, until its timeout.

    A service has come up soon after it, but an alert may be resolved much later.
    """
    subject = tx.inventory.find_subject(row.service)
    runbook = subject.find_runbook(row.kind) if isinstance(subject, HostAlert) else None
    if row.command == "unknown" and runbook is not None:
        return bool(tx.now <= row.claimed_at + runbook.timeout + KILL_DELAY)
    return row.command in (None, "unknown")


def read_recent_claims(tx: Transaction) -> Sequence[float]:
    """Return when the actions of the last ten minutes that count towards their limit began, oldest first."""
    return tx.scalars(_SELECT_RECENT_CLAIMS, {"since": tx.now - BUDGET_WINDOW}).all()


@dataclass(frozen=True)
class Queue:
    """How many services wait for a limit of their host or of the fleet, and when the last of them can be restarted."""

    waiting: int
    ends: float


def read_queue(tx: Transaction) -> Queue:
    is_waiting = and_(incidents.c.state == "open", incidents.c.reason.in_(sorted(CAPACITY)))
    waiting = int(tx.scalar(select(func.count()).select_from(incidents).where(is_waiting)) or 0)
    limit = tx.inventory.remediation.actions_per_10m
    return Queue(waiting, find_queue_end(limit, BUDGET_WINDOW, waiting, read_recent_claims(tx), tx.now))


def add_recorded_facts(tx: Transaction, incident: int, service: str, situation: Situation) -> Situation:
    """Return `situation` with everything that the record knows, as of this transaction."""
    entry = tx.inventory.find_subject(service)
    rules = tx.inventory.remediation.for_service(entry)
    host = tx.inventory.host_of(entry) if entry is not None else None
    host_name, group = (host.name, host.group) if host is not None else ("", "")
    target = entry.target if entry is not None else ""
    past_actions = _read_actions(tx, service, host_name, target, incident)
    run, why = _read_observed_stop(tx, tx.inventory.services_sharing_target(entry) if entry is not None else [service])
    history = replace(
        read_action_history(tx, service, incident, rules.window), actions=past_actions, stopped_run=run, stopped_why=why
    )
    if past_actions:
        history = replace(history, last_action=max(history.last_action, past_actions[0].began))
    step = next_step(entry, rules, history) if entry is not None else None
    held = maintenance.find_maintenance(tx, service, host_name, group)
    is_overruled = situation.storm is not None and storms.is_overruled(tx, group)
    # A host that answers is not down, even if its alert has not been resolved yet.
    answers = situation.other_is_up or (situation.observed is not None and bool(situation.observed.host_up))
    return replace(
        situation,
        now=tx.now,
        firing=firing_names(tx, incident, rules.alerts),
        alerting_components=_alerting_components(tx, incident, entry),
        history=history,
        in_progress=read_actions_in_progress(tx, service, host_name, target, history.tries),
        stopped=stops.describe_stop(tx, service),
        automation=read_switch(tx).enabled,
        storm=None if is_overruled else situation.storm,
        maintenance=held.why if held is not None else "",
        maintenance_ends=tx.now + held.remaining if held is not None else situation.maintenance_ends,
        approved=_is_approved(tx, incident, entry, step),
        host_down=bool(host_name) and not answers and is_host_down(tx, host_name),
        host_up_for=_find_host_up_for(tx, host_name, answers=answers) if host_name else None,
    )


def outage_began_at(row: Row[Any]) -> float:
    """Return when the outage of an incident's row began, or when the incident was opened if there was none."""
    return float(row.down_at if row.down_at is not None else row.opened_at)


def firing_names(tx: Transaction, incident: int, alerts_to_act_on: Iterable[str]) -> frozenset[str]:
    """Return the names of the alerts that keep an incident open.

    These are `alerts_to_act_on`, or any alert if none of those ever fired in the incident.
    """
    to_act_on = frozenset(alerts_to_act_on)
    rows = tx.execute(_SELECT_FIRING, {"number": incident})
    return frozenset(row.name for row in rows if not row.was_down or row.name in to_act_on)


def _alerting_components(tx: Transaction, incident: int, service: Remediable | None) -> frozenset[str]:
    """Return the components that may be restarted automatically and about which an alert is firing."""
    if service is None or not service.automatic_components:
        return frozenset()
    rows = tx.scalars(_SELECT_COMPONENT_ALERTS, {"number": incident})
    return frozenset(labels.get("component", "") for labels in rows)


def _find_host_up_for(tx: Transaction, host: str, *, answers: bool) -> float | None:
    """Return the seconds since HostDown was resolved for a host; None if that was not recently.

    A host that `answers` while HostDown still fires has just come back. The exporter must have seen a change, too: an
    alert alone may be forged.
    """
    if answers and is_host_down(tx, host):
        up_for: float | None = 0.0
    else:
        rows = tx.execute(_SELECT_HOSTS_BACK, {"since": tx.now - BOOT_PATIENCE})
        up_for = min((tx.now - row.last_seen for row in rows if row.labels.get("host") == host), default=None)
    return up_for if up_for is not None and _has_changed(tx, host) else None


def _has_changed(tx: Transaction, host: str) -> bool:
    """Whether the host, or two of its services, changed their states around the end of HostDown.

    A host that was down for long, and whose return has not been copied yet, has changed just now.
    """
    if tx.scalars(_SELECT_HOST_STATE, {"host": host}).first() == "down":
        return True
    changed = tx.execute(_SELECT_CHANGED, {"host": host, "since": tx.now - BOOT_PATIENCE - NOTICED_WITHIN}).all()
    return any(row.kind == "host" for row in changed) or len(changed) > 1


def is_host_down(tx: Transaction, host: str) -> bool:
    return any(labels.get("host") == host for labels in tx.scalars(_SELECT_HOSTS_DOWN))


def expected_failures(tx: Transaction, services: Iterable[str]) -> set[str]:
    """Return those of some failing services that are no sign of a storm.

    They are in maintenance or silenced, were stopped on purpose, or were given up.
    """
    services = list(services)
    expected = {*_given_up_services(tx), *_stopped_services(tx)}.intersection(services)
    in_maintenance = {(row["scope"], row["name"]) for row in maintenance.current(tx)}
    for name in services:
        service = tx.inventory.services.get(name)
        host = tx.inventory.host_of(service) if service is not None else None
        scopes = {("service", name)}
        if host is not None:
            scopes |= {("host", host.name), ("group", host.group)}
        if scopes & in_maintenance:
            expected.add(name)
    return expected


def services_without_attempts(tx: Transaction) -> list[str]:
    """Return the services that are down and whose attempts are used up."""
    used_up = (incidents.c.state == "open") & (incidents.c.reason == "attempts-used-up")
    return list(tx.scalars(select(incidents.c.service).where(used_up)))


def _given_up_services(tx: Transaction) -> list[str]:
    """Return the services that are silenced, or for which Defib does nothing more."""
    given_up = (incidents.c.state == "open") & incidents.c.reason.in_(GIVEN_UP)
    return list(tx.scalars(select(incidents.c.service).where(given_up)))


def _stopped_services(tx: Transaction) -> list[str]:
    """Return the services that somebody stopped, through Defib or on their hosts."""
    # The latest decision may have another reason, such as a storm.
    is_stopped = (incidents.c.reason == "stopped-by-hand") | incidents.c.stopped_why.is_not(None)
    on_hosts = select(incidents.c.service).where(incidents.c.state == "open", is_stopped)
    return [*stops.current(tx), *tx.scalars(on_hosts)]


def _is_approved(tx: Transaction, incident: int, service: Remediable | None, step: RemediationStep | None) -> bool:
    """Whether an operator approved this step. An approval of another step, or with another control, does not count."""
    if service is None or step is None:
        return False
    row = tx.execute(_SELECT_APPROVED, {"number": incident}).first()
    return row is not None and row.kind == step.kind and row.step == describe_request(service, step)
