"""Correct the alerts in the record by Alertmanager's list, the exporter's observations, and evidence for held ends."""

from collections.abc import Set as AbstractSet
from typing import Any

from sqlalchemy import Row, and_, select, update

from remediator.clients.alerts import WATCHDOG, AlertList
from remediator.incidents import resolution
from remediator.incidents.alert_limits import AlertLimits
from remediator.incidents.alert_starts import normalize_starts_at, read_starts
from remediator.incidents.intake import (
    add_alert,
    end_alert,
    is_copy_of_earlier,
    is_remediation_alert,
    known_receivers,
    recent_alerts,
    resolve_alert,
    set_doubt,
    set_firing,
)
from remediator.record import timestamps
from remediator.record.schema import alerts
from remediator.record.situations import HOST_DOWN
from remediator.record.transaction import Transaction

DEFAULT_RECEIVER = "defib"
CHANGED_TOGETHER = 200  # alerts changed by one transaction: other writers wait meanwhile
INHIBITING_EXPIRES = 5 * 3600.0  # seconds without a repetition of HostDown or ExporterDown; Alertmanager's is 4 h
_SELECT_LABELS_IN_DOUBT = select(alerts.c.labels).where(alerts.c.doubted_at.is_not(None))


def release_held_ends(tx: Transaction, watchdog_sent_at: float | None) -> int:
    """Resolve the alerts whose held end has evidence now; returns how many: at most CHANGED_TOGETHER."""
    released = 0
    for row in resolution.alerts_with_held_end(tx):
        if resolution.is_end_confirmed(tx, row.name, row.held_at, watchdog_sent_at):
            resolve_alert(tx, row, row.resolved_by, row.ends_at or "")
            released += 1
            if released == CHANGED_TOGETHER:
                break
    return released


def read_open_questions(tx: Transaction) -> tuple[bool, list[str]]:
    """Return whether an alert's end is held, and the services of which a resolved alert may fire again."""
    labels = tx.scalars(_SELECT_LABELS_IN_DOUBT).all()
    return bool(resolution.alerts_with_held_end(tx)), sorted({each.get("service", "") for each in labels})


def settle_doubts(tx: Transaction, service: str, *, down: bool) -> int:
    """Let the alerts in doubt of a service fire if it is `down`, else drop the doubts; returns how many fire."""
    rows = tx.execute(select(alerts).where(alerts.c.doubted_at.is_not(None))).all()
    in_doubt = [row for row in rows if row.labels.get("service", "") == service]
    for row in in_doubt:
        firing = [start for start, fires in read_starts(row).items() if fires]
        if down and row.status == "resolved":
            set_firing(tx, row, firing[0] if firing else None)
        elif row.status == "resolved":
            set_doubt(tx, row, dict.fromkeys(read_starts(row), False))
        else:
            tx.execute(update(alerts).where(alerts.c.id == row.id).values(doubted_at=None))
    return len(in_doubt) if down else 0


def record_watchdog(tx: Transaction, *, listed: bool) -> None:
    """Record whether Alertmanager has the Watchdog; without it, one that the webhook receives does not count."""
    if listed:
        timestamps.remove(tx, "watchdog-unlisted")
    elif timestamps.get(tx, "watchdog-unlisted") is None:
        timestamps.put(tx, "watchdog-unlisted", tx.now)


def reconcile(tx: Transaction, active: AbstractSet[str], listed: AbstractSet[str] | None, before: float) -> int:
    """Compare the alerts with Alertmanager's list: fingerprints that are `active`, and all that are `listed`.

    A resolved alert that is active fires again. A firing alert that is not listed is resolved, unless the list is
    incomplete (None). Alerts seen since `before` may be newer than the list and stay. Returns how many changed: at most
    CHANGED_TOGETHER are resolved, and as many fire again.
    """
    is_stale = and_(alerts.c.status == "firing", alerts.c.held_at.is_(None), alerts.c.last_seen < before)
    stale = tx.execute(select(alerts).where(is_stale)).all() if listed is not None else []
    unlisted = [row for row in stale if row.fingerprint not in (listed or ())][:CHANGED_TOGETHER]
    for row in unlisted:
        end_alert(tx, row, "reconciliation", "")
    firing_again = 0
    for fingerprint in active - _firing_fingerprints(tx):
        latest, *_ = recent_alerts(tx, fingerprint)
        if latest is not None and _was_ended_before(latest, before):
            if latest.status == "firing":
                starts = {**read_starts(latest), normalize_starts_at(latest.starts_at): True}
                values = {"starts": starts, "held_at": None, "resolved_by": None}
                tx.execute(update(alerts).where(alerts.c.id == latest.id).values(**values))
            else:
                set_firing(tx, latest)
            firing_again += 1
            if firing_again == CHANGED_TOGETHER:
                break
    return len(unlisted) + firing_again


def _firing_fingerprints(tx: Transaction) -> set[str]:
    """Return the fingerprints of the firing alerts whose end is not held."""
    is_firing = and_(alerts.c.status == "firing", alerts.c.held_at.is_(None))
    return set(tx.scalars(select(alerts.c.fingerprint).where(is_firing)))


def _was_ended_before(row: Row[Any], before: float) -> bool:
    """Whether an alert was resolved, or its end held, before a time."""
    if row.held_at is not None:
        return bool(row.held_at < before)
    return bool(row.status == "resolved" and row.last_seen < before)


def add_listed(tx: Transaction, listing: AlertList, before: float) -> int:
    """Add the active alerts that are routed to this remediator and that no webhook delivered.

    Returns how many: at most CHANGED_TOGETHER.
    """
    receivers = set(known_receivers(tx)) | listing.own_receivers or {DEFAULT_RECEIVER}
    added, firing, limits = 0, _firing_fingerprints(tx), AlertLimits(tx)
    for alert in listing.active:
        if alert.name == WATCHDOG or alert.fingerprint in firing:
            continue  # a listed Watchdog does not show that webhooks arrive
        start, routed_to = normalize_starts_at(alert.starts_at), listing.receivers.get(alert.fingerprint, frozenset())
        latest, *earlier = recent_alerts(tx, alert.fingerprint)
        is_new = latest is None or (
            latest.status == "resolved"
            and _was_ended_before(latest, before)
            and start not in read_starts(latest)
            and not is_copy_of_earlier(tx, alert, start, earlier)
        )
        if is_new and not routed_to.isdisjoint(receivers) and add_alert(tx, alert, start, limits):
            added += 1
            if added == CHANGED_TOGETHER:
                break
    return added


def open_missing_incidents(tx: Transaction) -> int:
    """Open incidents of alerts that fire already and whose service or runbook was added since; returns how many.

    At most CHANGED_TOGETHER.
    """
    is_without = and_(alerts.c.status == "firing", alerts.c.incident_id.is_(None), alerts.c.held_at.is_(None))
    rows = tx.execute(select(alerts).where(is_without)).all()
    found = [row for row in rows if tx.inventory.find_subject_of_alert(row.name, row.labels) is not None]
    for row in found[:CHANGED_TOGETHER]:
        set_firing(tx, row)
    return min(len(found), CHANGED_TOGETHER)


def resolve_recovered(tx: Transaction, up: AbstractSet[str], hosts_up: AbstractSet[str], before: float) -> int:
    """Resolve the alerts that the exporter shows to be over, where there is no Alertmanager to query.

    These are the alerts to act on of services that have long been `up`, and HostDown of `hosts_up`. HostDown and
    ExporterDown, which hold others back, are also resolved after INHIBITING_EXPIRES. Returns how many: at most
    CHANGED_TOGETHER.
    """
    stale = tx.execute(select(alerts).where(alerts.c.status == "firing", alerts.c.last_seen < before)).all()
    expired_before = tx.now - INHIBITING_EXPIRES
    recovered = [
        row
        for row in stale
        if (row.labels.get("service") in up and is_remediation_alert(row, tx.inventory))
        or (row.name == HOST_DOWN and row.labels.get("host") in hosts_up)
        or (row.name in (HOST_DOWN, resolution.EXPORTER_DOWN) and row.last_seen < expired_before)
    ]
    for row in recovered[:CHANGED_TOGETHER]:
        resolve_alert(tx, row, "reconciliation", "")
    return min(len(recovered), CHANGED_TOGETHER)
