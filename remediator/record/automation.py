"""The automation switch, which an operator sets."""

from dataclasses import dataclass

from remediator.record import timestamps
from remediator.record.transaction import Transaction


@dataclass(frozen=True)
class AutomationSwitch:
    """Whether automation is enabled, and who set the switch last, when and why."""

    enabled: bool
    at: float | None = None
    by: str = ""
    reason: str = ""


def read_switch(tx: Transaction) -> AutomationSwitch:
    """Return the switch; enabled if it was never set."""
    stored = timestamps.get(tx, "automation")
    return AutomationSwitch(enabled=True) if stored is None else AutomationSwitch(at=stored.at, **stored.detail)


def write_switch(tx: Transaction, *, enabled: bool, by: str, reason: str) -> None:
    timestamps.put(tx, "automation", tx.now, enabled=enabled, by=by, reason=reason)
