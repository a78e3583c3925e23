"""Bursts: so many problems begin at once that a chat gets digests instead of a message for each.

The first digest is sent at once, the following ones at growing intervals. Each says how many have recovered and which
are still down. Foreign alerts, of no service or host in the inventory, have bursts of their own, so that they delay
nothing else. Critical problems are in digests only if more than `notify.digest_over` of these begin within a minute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, select

from fleet.inventory.notify import NotificationKind
from remediator.record import timestamps
from remediator.record.notifications import SEVERITY_RANK
from remediator.record.schema import incidents, notifications
from remediator.record.transaction import Transaction

BURST_WINDOW = 60.0  # seconds in which more problems than `notify.digest_over` begin on a channel
FIRST_INTERVAL, LONGEST_INTERVAL = 60.0, 300.0  # seconds between two digests
QUIET = 600.0  # seconds without a digest after which a burst is over
STILL_DOWN_SHOWN = 20
# Kinds that a digest contains: what begins and ends, and what needs no person.
DIGESTED: frozenset[NotificationKind] = frozenset(
    {
        "down", "restarted", "could_not_restart", "waiting", "blind", "recovered", "unobserved", "reminder", "alert",
        "alert_over",
    }
)  # fmt: skip
_OPENING: tuple[NotificationKind, ...] = ("down", "alert")


@dataclass(frozen=True)
class Burst:
    """A burst of a channel; times are of the record's clock."""

    began: float
    digests: int = 0
    last: float = 0.0  # when the last digest was sent
    critical: bool = False  # its digests contain critical problems, too
    foreign: bool = False  # of foreign alerts

    @property
    def next_digest(self) -> float:
        """When the next digest may be sent."""
        if not self.digests:
            return self.began
        return self.last + min(LONGEST_INTERVAL, FIRST_INTERVAL * 2.0 ** (self.digests - 1))


@dataclass(frozen=True)
class Digest:
    """How many services failed in a burst, and what became of them; `still_down` names the first that are down."""

    total: int
    recovered: int
    down: int
    still_down: Sequence[str]


def find_burst(tx: Transaction, channel: str, *, foreign: bool = False) -> Burst | None:
    """Return the burst of a channel, which may have begun with what was just added."""
    known = _read_bursts(tx, foreign=foreign).get(channel)
    burst = Burst(**known, foreign=foreign) if known is not None and tx.now - known["last"] < QUIET else None
    if burst is not None and burst.critical:
        return burst
    is_recent = and_(
        notifications.c.channel == channel,
        notifications.c.kind.in_(_OPENING),
        notifications.c.created_at > tx.now - BURST_WINDOW,
        notifications.c.foreign_alert == int(foreign),
    )
    row = tx.execute(
        select(
            func.count().label("number"),
            func.count().filter(notifications.c.severity == "critical").label("critical"),
            func.min(notifications.c.created_at).label("began"),
        ).where(is_recent)
    ).one()
    limit = tx.inventory.notify.digest_over
    if row.critical > limit:  # the first digest of the critical ones is sent at once
        return Burst(row.began if burst is None else burst.began, critical=True, foreign=foreign)
    return Burst(row.began, foreign=foreign) if burst is None and row.number > limit else burst


def _read_bursts(tx: Transaction, *, foreign: bool) -> Mapping[str, Any]:
    stored = timestamps.get(tx, _name(foreign=foreign))
    return stored.detail if stored is not None else {}


def _name(*, foreign: bool) -> timestamps.TimestampName:
    return "foreign-bursts" if foreign else "bursts"


def record_digest(tx: Transaction, channel: str, burst: Burst) -> None:
    """Record that a digest was sent."""
    known = _read_bursts(tx, foreign=burst.foreign)
    sent = {"began": burst.began, "digests": burst.digests + 1, "last": tx.now, "critical": burst.critical}
    timestamps.put(tx, _name(foreign=burst.foreign), tx.now, **{**known, channel: sent})


def read_digest(tx: Transaction, channel: str, burst: Burst) -> Digest:
    """Return what became of the services that failed since a burst began; the most severe first."""
    is_of_burst = and_(
        notifications.c.channel == channel, notifications.c.kind == "down", notifications.c.created_at >= burst.began
    )
    rank = func.min(SEVERITY_RANK)
    rows = tx.execute(
        select(incidents.c.service, incidents.c.state)
        .join(notifications, notifications.c.incident_id == incidents.c.id)
        .where(is_of_burst)
        .group_by(incidents.c.id)
        .order_by(rank, incidents.c.service)
    ).all()
    down = [row.service for row in rows if row.state == "open"]
    services = tx.inventory.services
    names = [services[name].title if name in services else name for name in down[:STILL_DOWN_SHOWN]]
    return Digest(len(rows), len(rows) - len(down), len(down), names)
