"""What the record knows that a decision depends on."""

from collections.abc import Iterable
from dataclasses import replace

from sqlalchemy import Connection, and_, func, or_, select

from fleet.inventory.model import Inventory, RemediationStep
from remediator.incidents.lifecycle import firing_names, host_is_down
from remediator.policy import BUDGET_WINDOW, Done, Past, Present, Situation, next_step, since_refill
from remediator.record import stops, switches
from remediator.record.schema import actions, incidents

DONE = 20  # actions on a target that are looked back over for a stop or start of our own
HISTORY = 100  # incidents of a target that are looked back over for its budget, and tries for its back-off


def past_of(connection: Connection, service: str, incident: int, window: float) -> Past:
    """What was tried on a target, for its budget and its back-off."""
    outages = connection.execute(
        select(incidents.c.opened_at, incidents.c.closed_at, incidents.c.state)
        .where(incidents.c.service == service, incidents.c.labels.is_not(None))
        .order_by(incidents.c.opened_at.desc())
        .limit(HISTORY)
    ).all()
    done = (actions.c.service == service) & actions.c.state.not_in(("queued", "cancelled"))
    reset = connection.scalar(select(func.max(actions.c.claimed_at)).where(done, actions.c.kind == "reset"))
    # Where nobody saw it up, nothing says that it was.
    up_between = [(row.opened_at, row.closed_at if row.state == "recovered" else None) for row in reversed(outages)]
    since = max(since_refill(up_between, window), reset if reset is not None else float("-inf"))
    counted = connection.execute(
        select(actions.c.kind, func.count())
        .where(done, actions.c.counts == 1, actions.c.claimed_at > since)
        .group_by(actions.c.kind)
    )
    tried = connection.execute(
        select(
            actions.c.incident_id, actions.c.claimed_at, actions.c.ended_at, actions.c.requested_by, actions.c.blocked
        )
        .where(done, actions.c.kind != "reset")
        .order_by(actions.c.claimed_at.desc())
        .limit(HISTORY)
    ).all()
    of_incident = [row for row in tried if row.incident_id == incident and (reset is None or row.claimed_at > reset)]
    left_alone = connection.execute(
        select(incidents.c.healing_since, incidents.c.starting_since).where(incidents.c.id == incident)
    ).first()
    return Past(
        attempts={kind: int(count) for kind, count in counted},
        tries=sum(1 for row in of_incident if row.requested_by == "alert"),
        last_ended=max((row.ended_at for row in tried if row.ended_at is not None), default=None),
        last_action=connection.scalar(select(func.max(actions.c.claimed_at)).where(done)) or 0.0,
        blocked=tried[0].blocked if tried and tried[0] in of_incident else None,
        healing_since=left_alone.healing_since if left_alone is not None else None,
        starting_since=left_alone.starting_since if left_alone is not None else None,
    )


def done_to(connection: Connection, service: str, host: str, target: str, incident: int) -> list[Done]:
    """The last actions on a target, whichever service they were for, the newest first; not what ran nothing."""
    rows = connection.execute(
        select(
            actions.c.claimed_at,
            actions.c.command,
            actions.c.command_ended_at,
            actions.c.ended_at,
            actions.c.before,
            actions.c.incident_id,
        )
        .where(
            or_(actions.c.service == service, and_(actions.c.host == host, actions.c.target == target)),
            actions.c.state.not_in(("queued", "cancelled")),
            actions.c.kind != "reset",
            or_(actions.c.command.is_(None), actions.c.command != "failed", actions.c.exit_status.is_not(None)),
        )
        .order_by(actions.c.claimed_at.desc())
        .limit(DONE)
    )
    return [
        Done(
            row.claimed_at,
            row.command_ended_at if row.command_ended_at is not None else row.ended_at,
            row.command == "succeeded",
            str((row.before or {}).get("state", "")).startswith("failed"),
            row.incident_id == incident,
        )
        for row in rows
    ]


def _stop_seen(connection: Connection, services: Iterable[str]) -> tuple[str, str]:
    """After which run of a target somebody was seen to have stopped it, and what said so; of services that share it."""
    row = connection.execute(
        select(incidents.c.stopped_run, incidents.c.stopped_why)
        .where(
            incidents.c.service.in_(list(services)),
            incidents.c.state == "open",
            incidents.c.stopped_why.is_not(None),
        )
        .order_by(incidents.c.id.desc())
    ).first()
    return (row.stopped_run or "", row.stopped_why) if row is not None else ("", "")


def present_of(connection: Connection, service: str, host: str, now: float, target: str = "") -> Present:
    """What is under way, as far as it matters to an action on `target`, for `service`, at `host`."""
    running = connection.execute(
        select(actions.c.service, actions.c.host, actions.c.target, actions.c.command).where(
            actions.c.state == "running"
        )
    ).all()
    recent = connection.scalars(
        select(actions.c.claimed_at)
        .where(actions.c.claimed_at > now - BUDGET_WINDOW, actions.c.counts == 1, actions.c.state != "queued")
        .order_by(actions.c.claimed_at)
    ).all()
    return Present(
        target_busy=any(row.service == service or (row.host, row.target) == (host, target) for row in running),
        # What needs no host is held by its own lock alone.
        on_host=sum(1 for row in running if host and row.host == host),
        in_flight=sum(1 for row in running if row.command is None),
        in_budget_window=tuple(recent),
    )


def situation_now(
    connection: Connection, incident: int, service: str, inventory: Inventory, situation: Situation, now: float
) -> Situation:
    """`situation` with everything that the record knows brought up to date."""
    known = inventory.services.get(service)
    rules = inventory.remediation.for_service(known)
    host = inventory.host_of(known) if known is not None else None
    name, group = (host.name, host.group) if host is not None else ("", "")
    target = known.target if known is not None else ""
    done = done_to(connection, service, name, target, incident)
    run, why = _stop_seen(connection, inventory.services_sharing_target(known) if known is not None else [service])
    past = replace(past_of(connection, service, incident, rules.window), done=done, stopped_run=run, stopped_why=why)
    if done:
        past = replace(past, last_action=max(past.last_action, done[0].began))
    step = next_step(known, rules, past) if known is not None else None
    held = switches.maintenance_of(connection, service, name, group, now)
    return replace(
        situation,
        now=now,
        firing=firing_names(connection, incident, rules.alerts),
        past=past,
        present=present_of(connection, service, name, now, target),
        stopped=stops.of(connection, service),
        automation=switches.automation(connection).enabled,
        maintenance=held.why if held is not None else "",
        maintenance_ends=now + held.left if held is not None else situation.maintenance_ends,
        approved=_approved(connection, incident, step),
        # Whatever became of the alert's end: a host whose shell answers is not down.
        host_down=bool(name)
        and not (situation.observed is not None and situation.observed.host_up)
        and host_is_down(connection, name),
    )


def known_to_fail(connection: Connection, services: Iterable[str], inventory: Inventory, now: float) -> set[str]:
    """Those of some failing services that no storm has taken: in maintenance, stopped on purpose, or given up."""
    known = {*breakers(connection), *_stopped(connection)}.intersection(services)
    under_way = {(each["scope"], each["name"]) for each in switches.maintenances(connection, now)}
    for name in services:
        service = inventory.services.get(name)
        host = inventory.host_of(service) if service is not None else None
        of_it = {("service", name)}
        if host is not None:
            of_it |= {("host", host.name), ("group", host.group)}
        if of_it & under_way:
            known.add(name)
    return known


def breakers(connection: Connection) -> list[str]:
    """The services whose attempts are used up, and which are still down."""
    used_up = (incidents.c.state == "open") & (incidents.c.reason == "attempts-used-up")
    return list(connection.scalars(select(incidents.c.service).where(used_up)))


def _stopped(connection: Connection) -> list[str]:
    """The services that a person stopped, through Defib or on their hosts."""
    # Whatever holds it now, such as a storm.
    seen = (incidents.c.reason == "stopped-by-hand") | incidents.c.stopped_why.is_not(None)
    on_host = (incidents.c.state == "open") & seen
    return [*stops.all_of(connection), *connection.scalars(select(incidents.c.service).where(on_host))]


def _approved(connection: Connection, incident: int, step: RemediationStep | None) -> bool:
    """Whether a person has approved just this step; what it was changed to meanwhile they have not."""
    if step is None:
        return False
    row = connection.execute(
        select(actions.c.kind, actions.c.step).where(
            actions.c.incident_id == incident, actions.c.state == "queued", actions.c.approved_at.is_not(None)
        )
    ).first()
    return row is not None and row.kind == step.kind and row.step == step.model_dump()
