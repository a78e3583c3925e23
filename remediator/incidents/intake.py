"""Taking alerts in: a delivery becomes alerts, incidents and notices in one transaction.

What has one fingerprint is one alert, though several Prometheus servers fire it with several `startsAt`; it is over
when the last of them is.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, insert, select, update

from fleet.inventory.model import Inventory
from fleet.inventory.notify import NotificationKind
from remediator.clients.webhook import WATCHDOG, Alert, Listing, Status
from remediator.incidents import resolution
from remediator.incidents.lifecycle import became_down, is_quiet, keep_quiet, note, open_or_new
from remediator.notifications import outbox
from remediator.record import timestamps
from remediator.record.schema import alerts

LATE_COPY = 300.0  # seconds after an alert's end from which a firing copy is no late one any more
GATE_LASTS = 5 * 3600.0  # seconds without a repetition of an alert after which it is over; there is one every 4 h
RECEIVER_LASTS = 86400.0  # seconds that a receiver counts as ours after its last delivery
RECEIVER_NOTED = 3600.0  # seconds between two notes of the same receiver
HOST_DOWN = "HostDown"
RECENT = 5  # alerts of one fingerprint whose further starts are looked back over
# Made once: a delivery may hold thousands of alerts.
_KNOWN = select(alerts).where(
    alerts.c.fingerprint == bindparam("fingerprint"), alerts.c.starts_at == bindparam("starts_at")
)
_RECENT = (
    select(alerts)
    .where(alerts.c.fingerprint == bindparam("fingerprint"))
    .order_by(alerts.c.status == "resolved", alerts.c.id.desc())
    .limit(RECENT)
)
_NEW = insert(alerts)
_NUMBERED = select(alerts).where(alerts.c.id == bindparam("number"))
_FIRES = (
    update(alerts)
    .where(alerts.c.id == bindparam("number"))
    .values(
        status="firing", resolved_by=None, times=alerts.c.times + 1, incident_id=bindparam("incident"),
        last_seen=bindparam("now"), starts=bindparam("from"), held_at=None, doubted_at=None,
    )
)  # fmt: skip


def receive(
    connection: Connection, delivered: Sequence[Alert], inventory: Inventory, now: float, receiver: str = ""
) -> None:
    """Take a delivery in: renew or add alerts, change incidents, write notices; seeing one again changes nothing.

    `receiver` is the one of Alertmanager that it was delivered by.
    """
    if receiver:
        _note_receiver(connection, receiver, now)
    for alert in delivered:
        if alert.name != WATCHDOG:
            _take(connection, alert, inventory, now)
        else:
            timestamps.put(connection, "watchdog" if alert.status == "firing" else "watchdog-over", now)


def _note_receiver(connection: Connection, receiver: str, now: float) -> None:
    known = _receivers(connection, now)
    if now - known.get(receiver, float("-inf")) >= RECEIVER_NOTED:
        timestamps.put(connection, "receivers", now, names={**known, receiver: now})


def _receivers(connection: Connection, now: float) -> dict[str, float]:
    """The receivers that lead here, and when a delivery by each was last noted."""
    mark = timestamps.get(connection, "receivers")
    noted: Mapping[str, float] = mark.detail["names"] if mark is not None else {}
    return {name: at for name, at in noted.items() if now - at < RECEIVER_LASTS}


def _take(connection: Connection, alert: Alert, inventory: Inventory, now: float) -> None:
    start = start_of(alert.starts_at)
    last, *earlier = _recent(connection, alert.fingerprint)
    if last is None or start not in starts_of(last):
        if last is not None and _is_of(connection, alert, start, earlier):
            return  # a late copy of an alert that was followed by another
        if last is None or last.status == "resolved":
            _add(connection, alert, start, inventory, now)
            return
    if last.status == "firing":
        _go_on(connection, last, alert, start, inventory, now)
    elif alert.status == "firing":
        _fires_after_its_end(connection, last, start, inventory, now)
    elif last.doubted_at is not None:
        _doubt(connection, last, starts_after(starts_of(last), start, alert.status), now)


def _recent(connection: Connection, fingerprint: str) -> list[Row[Any] | None]:
    """The alerts of a fingerprint: the one that fires or was last, then those before it; None where there is none."""
    return list(connection.execute(_RECENT, {"fingerprint": fingerprint}).all()) or [None]


def _is_of(connection: Connection, alert: Alert, start: str, earlier: Sequence[Row[Any] | None]) -> bool:
    """Whether a copy belongs to an alert that was followed by another."""
    of = {"fingerprint": alert.fingerprint, "starts_at": alert.starts_at}
    return (
        any(row is not None and start in starts_of(row) for row in earlier)
        or connection.execute(_KNOWN, of).first() is not None
    )


def _add(connection: Connection, alert: Alert, start: str, inventory: Inventory, now: float) -> None:
    """Take in what was never seen before."""
    made = connection.execute(
        _NEW,
        {
            "fingerprint": alert.fingerprint,
            "starts_at": alert.starts_at,
            "status": alert.status,
            "resolved_by": "alertmanager" if alert.status == "resolved" else None,
            "times": 0,
            "name": alert.name,
            "labels": dict(alert.labels),
            "annotations": dict(alert.annotations),
            "ends_at": alert.ends_at,
            "first_seen": now,
            "last_seen": now,
            "starts": {start: alert.status == "firing"},
        },
    )
    if alert.status == "firing":
        known = connection.execute(_NUMBERED, {"number": made.lastrowid}).one()
        _fire(connection, known, inventory, now)


def _go_on(connection: Connection, known: Row[Any], alert: Alert, start: str, inventory: Inventory, now: float) -> None:
    """Take a further copy of an alert that fires."""
    starts = starts_after(starts_of(known), start, alert.status)
    if not any(starts.values()):
        if known.held_at is None:
            _end(connection, known, "alertmanager", alert.ends_at, inventory, now)
        return
    if alert.status == "resolved":
        connection.execute(update(alerts).where(alerts.c.id == known.id).values(starts=starts))
        return
    connection.execute(
        update(alerts)
        .where(alerts.c.id == known.id)
        .values(starts=starts, last_seen=now, held_at=None, resolved_by=None)
    )
    if known.incident_id is None and known.labels.get("service") in inventory.services:
        _fire(connection, known, inventory, now)  # its service came into the inventory meanwhile


def _fires_after_its_end(connection: Connection, known: Row[Any], start: str, inventory: Inventory, now: float) -> None:
    """A firing copy of an alert that has ended: a late copy, or the alert fires again with the same start."""
    if known.resolved_by == "reconciliation":
        _fire(connection, known, inventory, now, start)
    elif _to_act_on(known, inventory):
        # Who knows is the exporter; the engine asks it. That it is to be asked must not be lost.
        _doubt(connection, known, starts_after(starts_of(known), start, "firing"), now)
    elif now - known.last_seen >= LATE_COPY:
        _fire(connection, known, inventory, now, start)


def _doubt(connection: Connection, known: Row[Any], starts: Mapping[str, bool], now: float) -> None:
    """Keep by which `starts` an alert is said to fire that has ended; where there is none, nothing is in doubt."""
    values = {"starts": dict(starts), "doubted_at": now if any(starts.values()) else None}
    connection.execute(update(alerts).where(alerts.c.id == known.id).values(**values))


def start_of(starts_at: str) -> str:
    """A `startsAt` as it is compared: Alertmanager's webhook gives nanoseconds, its API milliseconds."""
    moment = _moment(starts_at)
    return starts_at if moment is None else moment.isoformat(timespec="milliseconds")


def starts_of(known: Row[Any]) -> Mapping[str, bool]:
    """By the `startsAt` of an alert, whether it still fires."""
    return known.starts or {start_of(known.starts_at): known.status == "firing"}


def starts_after(starts: Mapping[str, bool], start: str, status: Status) -> dict[str, bool]:
    """The starts of an alert after a copy of it: it is over when none of them fires any more.

    Alertmanager merges the copies that it gets of an alert under the earliest start. So one that comes later with an
    earlier start stands for those that were there.
    """
    firing = [each for each, fires in starts.items() if fires]
    merged = start not in starts and bool(firing) and all(_is_before(start, each) for each in firing)
    return {**(dict.fromkeys(starts, False) if merged else starts), start: status == "firing"}


def _is_before(one: str, other: str) -> bool:
    first, second = _moment(one), _moment(other)
    return first is not None and second is not None and first < second


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None


def _fire(connection: Connection, known: Row[Any], inventory: Inventory, now: float, start: str | None = None) -> None:
    """Let an alert fire, for the first time or again: its service has an incident, and people are told."""
    service = inventory.services.get(known.labels.get("service", ""))
    incident = open_or_new(connection, service, now) if service else None
    starts = {**starts_of(known), start or start_of(known.starts_at): True}
    connection.execute(_FIRES, {"number": known.id, "incident": incident, "now": now, "from": starts})
    if service is not None and incident is not None:
        note(connection, incident, now, "firing", alert=known.name, starts_at=known.starts_at)
    about: str
    kind: NotificationKind
    if service is not None and incident is not None and known.name in inventory.remediation.for_service(service).alerts:
        became_down(connection, incident, known.labels, now)
        about, kind = outbox.about_incident(incident), "down"
    else:
        about, kind = outbox.about_alert(known.fingerprint, known.starts_at, known.times + 1), "alert"
    if service is not None and incident is not None and keep_quiet(connection, incident, service.id):
        return
    outbox.tell(
        connection, inventory.notify, kind, about, known.labels, _content(known), now, incident=incident, alert=known.id
    )


def _content(known: Row[Any]) -> dict[str, Any]:
    return {"annotations": known.annotations, "starts_at": known.starts_at}


def _end(connection: Connection, known: Row[Any], by: str, ends_at: str, inventory: Inventory, now: float) -> None:
    """Take the end of an alert, or hold it until there is evidence."""
    if _to_act_on(known, inventory) or resolution.is_believed(connection, known.name, now, inventory):
        _resolve(connection, known, by, ends_at, inventory, now)
        return
    values = {"held_at": now, "resolved_by": by, "ends_at": ends_at, "starts": dict.fromkeys(starts_of(known), False)}
    connection.execute(update(alerts).where(alerts.c.id == known.id).values(**values))
    if known.incident_id is not None:
        note(connection, known.incident_id, now, "end-held", alert=known.name, by=by, ends_at=ends_at)


def release(connection: Connection, inventory: Inventory, watchdog_sent_at: float | None, now: float) -> int:
    """Take the ends for which there is evidence now; how many those were."""
    released = 0
    for row in resolution.held(connection):
        if resolution.is_believed(connection, row.name, row.held_at, inventory, watchdog_sent_at):
            _resolve(connection, row, row.resolved_by, row.ends_at or "", inventory, now)
            released += 1
    return released


def held_or_doubted(connection: Connection) -> tuple[bool, list[str]]:
    """Whether the end of an alert waits for evidence, and the services of which firing copies are in doubt."""
    doubted = connection.scalars(select(alerts.c.labels).where(alerts.c.doubted_at.is_not(None))).all()
    return bool(resolution.held(connection)), sorted({labels.get("service", "") for labels in doubted})


def settle_doubts(connection: Connection, service: str, inventory: Inventory, now: float, *, down: bool) -> int:
    """Let the alerts of a service fire that are in doubt, where it is `down`; else those were late copies."""
    rows = connection.execute(select(alerts).where(alerts.c.doubted_at.is_not(None))).all()
    settled = [row for row in rows if row.labels.get("service", "") == service]
    for row in settled:
        said = [start for start, fires in starts_of(row).items() if fires]
        if down and row.status == "resolved":
            _fire(connection, row, inventory, now, said[0] if said else None)
        elif row.status == "resolved":
            _doubt(connection, row, dict.fromkeys(starts_of(row), False), now)
        else:
            connection.execute(update(alerts).where(alerts.c.id == row.id).values(doubted_at=None))
    return len(settled) if down else 0


def _resolve(connection: Connection, known: Row[Any], by: str, ends_at: str, inventory: Inventory, now: float) -> None:
    connection.execute(
        update(alerts)
        .where(alerts.c.id == known.id)
        .values(
            status="resolved", resolved_by=by, ends_at=ends_at, last_seen=now, held_at=None,
            starts=dict.fromkeys(starts_of(known), False),
        )
    )  # fmt: skip
    if known.incident_id is not None:
        note(connection, known.incident_id, now, "resolved", alert=known.name, by=by, ends_at=ends_at)
    outbox.changed(connection, now, alert=known.id)
    outbox.outgrown(connection, now, alert=known.id)
    if known.incident_id is not None and is_quiet(connection, known.incident_id, "alert_over"):
        return
    about = outbox.about_alert(known.fingerprint, known.starts_at, known.times)
    channels = inventory.notify.follow_up_channels(outbox.told(connection, about), known.labels, "alert_over")
    outbox.put(
        connection, inventory.notify, channels, "alert_over", f"{about} over", known.labels, _content(known), now,
        incident=known.incident_id, alert=known.id,
    )  # fmt: skip


def acknowledge(connection: Connection, alert: int, by: str, now: float) -> Row[Any] | None:
    """Take a person's word that they look after an alert; the alert as it is then, or None where there is none."""
    mine = and_(alerts.c.id == alert, alerts.c.status == "firing", alerts.c.acknowledged_at.is_(None))
    values = {"acknowledged_by": by, "acknowledged_at": now}
    if connection.execute(update(alerts).where(mine).values(**values)).rowcount:
        outbox.changed(connection, now, alert=alert)
    return connection.execute(select(alerts).where(alerts.c.id == alert)).first()


def reconcile(
    connection: Connection,
    active: AbstractSet[str],
    listed: AbstractSet[str] | None,
    before: float,
    inventory: Inventory,
    now: float,
) -> int:
    """Hold what we believe against Alertmanager's list: fingerprints that are `active`, and all that are `listed`.

    What we hold to be over and is active fires again. What we believe to fire and is not listed is over, unless the
    list is not whole (None). Alerts seen since `before` are left alone: they may be newer than the list. Returns how
    many changed.
    """
    firing = and_(alerts.c.status == "firing", alerts.c.held_at.is_(None), alerts.c.last_seen < before)
    stale = connection.execute(select(alerts).where(firing)).all() if listed is not None else []
    over = [row for row in stale if row.fingerprint not in (listed or ())]
    for row in over:
        _end(connection, row, "reconciliation", "", inventory, now)
    again = 0
    for fingerprint in active - _firing(connection):
        last, *_ = _recent(connection, fingerprint)
        if last is not None and _wrongly_over(last, before):
            if last.status == "firing":
                values = {"starts": {**starts_of(last), start_of(last.starts_at): True}, "held_at": None}
                connection.execute(update(alerts).where(alerts.c.id == last.id).values(**values, resolved_by=None))
            else:
                _fire(connection, last, inventory, now)
            again += 1
    return len(over) + again


def _firing(connection: Connection) -> set[str]:
    """The fingerprints of the alerts that fire, and whose end is not held."""
    firing = and_(alerts.c.status == "firing", alerts.c.held_at.is_(None))
    return set(connection.scalars(select(alerts.c.fingerprint).where(firing)))


def _wrongly_over(last: Row[Any], before: float) -> bool:
    """Whether an alert that is active has ended here, or is about to."""
    if last.held_at is not None:
        return bool(last.held_at < before)
    return bool(last.status == "resolved" and last.last_seen < before)


def take_listed(connection: Connection, listing: Listing, before: float, inventory: Inventory, now: float) -> int:
    """Take in what Alertmanager lists as active and routed to us, and was never delivered; how many those were."""
    ours = set(_receivers(connection, now)) | listing.ours or {"defib"}
    taken, firing = 0, _firing(connection)
    for alert in listing.active:
        if alert.name == WATCHDOG or alert.fingerprint in firing:
            continue  # that the Watchdog is listed does not show that it comes here
        start, receivers = start_of(alert.starts_at), listing.receivers.get(alert.fingerprint, frozenset())
        last, *earlier = _recent(connection, alert.fingerprint)
        unseen = last is None or (
            last.status == "resolved"
            and _wrongly_over(last, before)
            and start not in starts_of(last)
            and not _is_of(connection, alert, start, earlier)
        )
        if unseen and not receivers.isdisjoint(ours):
            _add(connection, alert, start, inventory, now)
            taken += 1
    return taken


def _to_act_on(known: Row[Any], inventory: Inventory) -> bool:
    service = inventory.services.get(known.labels.get("service", ""))
    return service is not None and known.name in inventory.remediation.for_service(service).alerts


def presume_over(
    connection: Connection,
    up: AbstractSet[str],
    hosts_up: AbstractSet[str],
    before: float,
    inventory: Inventory,
    now: float,
) -> int:
    """Resolve what the exporter shows to be over; for where no Alertmanager can be asked.

    That is the alerts to act on of services that have long been `up`, and HostDown of `hosts_up`. HostDown and
    ExporterDown hold others back: they are over, too, where they were not repeated for GATE_LASTS.
    """
    stale = connection.execute(select(alerts).where(alerts.c.status == "firing", alerts.c.last_seen < before)).all()
    over = [
        row
        for row in stale
        if (row.labels.get("service") in up and _to_act_on(row, inventory))
        or (row.name == HOST_DOWN and row.labels.get("host") in hosts_up)
        or (row.name in (HOST_DOWN, resolution.EXPORTER_DOWN) and row.last_seen < now - GATE_LASTS)
    ]
    for row in over:
        _resolve(connection, row, "reconciliation", "", inventory, now)
    return len(over)
