"""The timeline of an incident: every event with its time and details."""

from typing import Any, Literal

from sqlalchemy import func, insert, select

from remediator.record import notifications
from remediator.record.schema import timeline
from remediator.record.transaction import Transaction

TimelineEvent = Literal[
    "incident_opened",
    "incident_closed",  # with `state`, and `by` if it recovered
    "alert_firing",
    "alert_resolved",
    "alert_end_held",  # the end of an alert is held until Prometheus is seen to work
    "decision",  # with `verb`: act, wait, refuse
    "caution",  # what could not be checked before an action
    "action_queued",
    "action_approved",
    "action_cancelled",
    "action_started",
    "command_ended",
    "service_up",  # the first successful probe after an action's command
    "alert_over",  # the end of a host's alert after a runbook's command
    "action_ended",
    "attempts_reset",
    "person_needed",
    "acknowledged",
    "silenced",
    "note",  # with `text`
]
_INSERT = insert(timeline)


def add_event(tx: Transaction, incident: int, event: TimelineEvent, **detail: Any) -> None:
    """Add an event to the timeline, and update the incident's cards."""
    tx.execute(_INSERT, {"incident_id": incident, "at": tx.now, "event": event, "detail": detail})
    if event != "incident_opened":  # a new incident has no cards
        notifications.update_cards(tx, incident=incident)


def last_decision_at(tx: Transaction, incident: int, verb: Literal["act", "wait", "refuse"]) -> float | None:
    """Return when the last decision with this verb was recorded."""
    is_match = (timeline.c.event == "decision") & (timeline.c.detail["verb"].as_string() == verb)
    at: float | None = tx.scalar(select(func.max(timeline.c.at)).where(timeline.c.incident_id == incident, is_match))
    return at


def count_events(tx: Transaction, incident: int, event: TimelineEvent) -> int:
    """Return how many events of a kind an incident has."""
    is_match = (timeline.c.incident_id == incident) & (timeline.c.event == event)
    count: int = tx.scalar(select(func.count()).where(is_match))
    return count
