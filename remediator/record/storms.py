"""Storms that were notified, and those in which a person lets automation continue, by host group."""

from remediator.record import timestamps
from remediator.record.transaction import Transaction

OVER_AFTER = 300.0  # seconds after its last decision in which a storm of the same group is the same storm
STORED_EVERY = 60.0


def notice(tx: Transaction, group: str) -> bool:
    """Record that a storm holds services of a group; True if it has just begun."""
    stored = timestamps.get(tx, "storms")
    known: dict[str, float] = dict(stored.detail["last"]) if stored is not None else {}
    last = known.get(group, float("-inf"))
    if tx.now - last >= STORED_EVERY:
        current = {name: at for name, at in known.items() if tx.now - at < OVER_AFTER}
        timestamps.put(tx, "storms", tx.now, last={**current, group: tx.now})
    return tx.now - last >= OVER_AFTER


def overrule(tx: Transaction, group: str, until: float, by: str, reason: str) -> None:
    """Let automation continue in a storm of a group until a time."""
    stored = timestamps.get(tx, "storms-overruled")
    known = stored.detail["groups"] if stored is not None else {}
    current = {name: each for name, each in known.items() if each["until"] > tx.now}
    groups = {**current, group: {"until": until, "by": by, "reason": reason}}
    timestamps.put(tx, "storms-overruled", tx.now, groups=groups)


def is_overruled(tx: Transaction, group: str) -> bool:
    """Whether a person lets automation continue in a storm of a group."""
    stored = timestamps.get(tx, "storms-overruled")
    known = stored.detail["groups"] if stored is not None else {}
    return group in known and bool(known[group]["until"] > tx.now)
