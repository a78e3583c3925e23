"""Bursts: so many problems begin at once that a chat gets digests instead of a message for each.

The first digest is sent at once, the following ones at growing intervals. Each says how many have recovered and which
are still down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, select

from fleet.inventory.notify import NotificationKind
from remediator.record import timestamps
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


def find_burst(tx: Transaction, channel: str) -> Burst | None:
    """Return the burst of a channel, which may have begun with what was just added."""
    stored = timestamps.get(tx, "bursts")
    known = stored.detail.get(channel) if stored is not None else None
    if known is not None and tx.now - known["last"] < QUIET:
        return Burst(**known)
    is_recent = and_(
        notifications.c.channel == channel,
        notifications.c.kind.in_(_OPENING),
        notifications.c.created_at > tx.now - BURST_WINDOW,
    )
    begun = func.min(notifications.c.created_at).label("began")
    row = tx.execute(select(func.count().label("number"), begun).where(is_recent)).one()
    return Burst(row.began) if row.number > tx.inventory.notify.digest_over else None


def record_digest(tx: Transaction, channel: str, burst: Burst) -> None:
    """Record that a digest was sent."""
    stored = timestamps.get(tx, "bursts")
    known: Mapping[str, Any] = stored.detail if stored is not None else {}
    sent = {"began": burst.began, "digests": burst.digests + 1, "last": tx.now}
    timestamps.put(tx, "bursts", tx.now, **{**known, channel: sent})


def read_digest(tx: Transaction, channel: str, burst: Burst) -> Digest:
    """Return what became of the services that failed since a burst began."""
    is_of_burst = and_(
        notifications.c.channel == channel, notifications.c.kind == "down", notifications.c.created_at >= burst.began
    )
    of_burst = select(notifications.c.incident_id).where(is_of_burst)
    rows = tx.execute(
        select(incidents.c.service, incidents.c.state).where(incidents.c.id.in_(of_burst)).order_by(incidents.c.service)
    ).all()
    down = [row.service for row in rows if row.state == "open"]
    services = tx.inventory.services
    names = [services[name].title if name in services else name for name in down[:STILL_DOWN_SHOWN]]
    return Digest(len(rows), len(rows) - len(down), len(down), names)
