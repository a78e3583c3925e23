"""Record the decisions about an incident, and notify of those that an operator must know."""

from collections.abc import Collection, Mapping
from itertools import takewhile
from typing import Any

from sqlalchemy import Row, bindparam, func, select, update

from remediator.incidents.lifecycle import notify_of_incident, set_person_needed
from remediator.incidents.timeline import add_event, last_decision_at
from remediator.policy.gates import GATES
from remediator.policy.situation import CAPACITY, NEEDS_PERSON, QUEUED, Decision, Observation
from remediator.record import notifications, storms
from remediator.record.schema import actions, incidents, timeline
from remediator.record.situations import read_queue
from remediator.record.transaction import Transaction

LONG_WAIT = 120.0  # seconds after which a wait is notified
PROBE_LIMIT = 1000  # characters
# Notified in another way, or shown by the card.
_NOT_NOTIFIED_AS_WAITING = ("approval", "target-busy", "stopped", "stopped-by-hand")
# These refusals may pass, so they must last before an operator is called.
_MAY_PASS = ("not-restartable", "sudo-refused")
_SELECT = select(incidents).where(incidents.c.id == bindparam("number"))
_UPDATE = update(incidents).where(incidents.c.id == bindparam("number"))
# The gates that are checked before the exporter's view of the service is needed, and `blind` itself.
_WITHOUT_OBSERVATION = [*takewhile(lambda name: name != "blind", GATES), "blind"]


def record_decision(tx: Transaction, incident: int, decision: Decision, observed: Observation | None = None) -> bool:
    """Record a decision and the probe it was based on; True if the decision changed or was notified."""
    row = tx.execute(_SELECT, {"number": incident}).one()
    _record_probe(tx, row, observed)
    if (row.verb, row.reason) == (decision.verb, decision.reason):
        if decision.reason in NEEDS_PERSON:
            return _notify_person_needed(tx, row, decision)
        return decision.verb == "wait" and _notify_wait(tx, row, decision)
    _store_decision(tx, row, decision)
    if decision.verb == "nothing":
        notifications.update_cards(tx, incident=incident)
    else:
        detail = {"verb": decision.verb, "reason": decision.reason, "detail": decision.detail}
        add_event(tx, incident, "decision", **detail)
    if decision.reason == "stopped-by-hand":
        content = {"service": row.service, "why": decision.detail}
        notify_of_incident(tx, incident, "stopped_by_hand", content)
    if decision.reason in NEEDS_PERSON:
        _notify_person_needed(tx, row, decision)
    return True


def _store_decision(tx: Transaction, row: Row[Any], decision: Decision) -> None:
    values: dict[str, Any] = {
        "verb": decision.verb,
        "reason": decision.reason,
        "detail": decision.detail or None,
        "queued_since": (row.queued_since or tx.now) if decision.reason in QUEUED else None,
    }
    first_seen = {"healing-itself": "healing_since", "starting": "starting_since"}.get(decision.reason or "")
    if first_seen is not None and getattr(row, first_seen) is None:
        values[first_seen] = tx.now
    tx.execute(_UPDATE, {"number": row.id, **values})


def _record_probe(tx: Transaction, row: Row[Any], observed: Observation | None) -> None:
    """Record the reason and message of the last failed probe."""
    if observed is None or not observed.reason:
        return
    probe = observed.summary[:PROBE_LIMIT]
    if probe != row.probe:
        tx.execute(_UPDATE, {"number": row.id, "probe": probe})


def _notify_person_needed(tx: Transaction, row: Row[Any], decision: Decision) -> bool:
    """Notify that an operator is needed, unless that was done; a reason that may pass must have lasted."""
    if row.person_needed_at is not None:
        return False
    if decision.reason in _MAY_PASS and not _has_lasted(tx, last_decision_at(tx, row.id, "refuse")):
        return False
    content = {"service": row.service, "reason": decision.reason, "why": decision.detail}
    set_person_needed(tx, row.id, content)
    return True


def notify_storm(tx: Transaction, incident: int, group: str, why: str) -> bool:
    """Notify at once of a storm that holds an incident; False if the storm was notified before."""
    if not storms.notice(tx, group):
        return False
    row = tx.execute(_SELECT, {"number": incident}).one()
    content = {"service": row.service, "group": group, "why": why}
    key = f"storm {group} {tx.now:.3f}"
    return notifications.notify(tx, "storm", key, row.labels or {}, content, incident=incident) > 0


def record_crash_loop(tx: Transaction, incident: int, why: str) -> bool:
    """Notify that an operator is needed because the target exits again and again; False if that was done."""
    row = tx.execute(_SELECT, {"number": incident}).one()
    if row.state != "open" or row.person_needed_at is not None:
        return False
    set_person_needed(tx, incident, {"service": row.service, "reason": "crash-loop", "why": why})
    return True


def _notify_wait(tx: Transaction, row: Row[Any], decision: Decision) -> bool:
    """Notify once of a wait that has lasted, and of when it ends if that is known."""
    if decision.reason in _NOT_NOTIFIED_AS_WAITING or not _has_lasted(tx, last_decision_at(tx, row.id, "wait")):
        return False
    content = {"service": row.service, "reason": decision.reason, "why": decision.detail, "until": decision.ends}
    if decision.reason == "blind":
        return notify_status_unknown(tx, row.id, content)
    if decision.reason in CAPACITY:
        queue = read_queue(tx)
        content |= {"queue": queue.waiting, "queue_ends": queue.ends}
    # A wait after another attempt is notified again.
    was_run = actions.c.state.not_in(("queued", "cancelled")) & (actions.c.counts == 1)
    attempts = tx.scalar(select(func.count()).select_from(actions).where(actions.c.incident_id == row.id, was_run))
    key = f"waiting incident {row.id} {decision.reason} {attempts}"
    return notify_of_incident(tx, row.id, "waiting", content, key)


def _has_lasted(tx: Transaction, since: float | None) -> bool:
    return since is not None and tx.now - since >= LONG_WAIT


def notify_status_unknown(tx: Transaction, incident: int, content: Mapping[str, Any]) -> bool:
    """Notify that the service's status is unknown, once until it was observed again."""
    reason = timeline.c.detail["reason"].as_string()
    was_observed = (timeline.c.event == "service_up") | (
        (timeline.c.event == "decision")
        & ((timeline.c.detail["verb"].as_string() == "act") | reason.not_in(_WITHOUT_OBSERVATION))
    )
    last = tx.scalar(select(func.max(timeline.c.id)).where(timeline.c.incident_id == incident, was_observed))
    return notify_of_incident(tx, incident, "blind", content, f"blind incident {incident} {last or 0}")


def notify_end_not_observed(tx: Transaction, incident: int, before: float) -> bool:
    """Notify that the alerts are resolved but the service's status has been unknown since `before`."""
    since = last_decision_at(tx, incident, "wait")
    if since is None or since > before:
        return False
    row = tx.execute(select(incidents.c.service, incidents.c.detail).where(incidents.c.id == incident)).one()
    return notify_status_unknown(tx, incident, {"service": row.service, "why": row.detail or ""})


def record_observed_stop(tx: Transaction, incident: int, run: str, why: str) -> None:
    """Record that somebody stopped the target after a run of it; empty if the host did not report a run."""
    tx.execute(update(incidents).where(incidents.c.id == incident).values(stopped_run=run, stopped_why=why))


def clear_observed_stop(tx: Transaction, services: Collection[str]) -> None:
    """Record that the target that these services share has run again."""
    is_open = incidents.c.service.in_(list(services)) & (incidents.c.state == "open")
    tx.execute(update(incidents).where(is_open).values(stopped_run=None, stopped_why=None))
