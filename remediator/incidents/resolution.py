"""Whether the end of an alert is believed: if Prometheus or the exporter fails, alerts resolve without a recovery.

The end of a notify-only alert is held until Prometheus was seen to work after it, and while ExporterDown fires. The
alerts to act on need no such evidence, because a probe closes their incident.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, select

from remediator.record import timestamps
from remediator.record.schema import alerts
from remediator.record.transaction import Transaction

EXPORTER_DOWN = "ExporterDown"
# Alertmanager repeats the Watchdog for this much longer after Prometheus fails than it keeps other alerts.
WATCHDOG_OUTLASTS = 90.0  # seconds


def is_watchdog_resolved(tx: Transaction) -> bool:
    """Whether Alertmanager reported the Watchdog, which always fires, as resolved, or does not have it.

    Who has the token of the webhook can send a Watchdog while Prometheus does not work.
    """
    if timestamps.get(tx, "watchdog-unlisted") is not None:
        return True
    firing, resolved = timestamps.get(tx, "watchdog"), timestamps.get(tx, "watchdog-resolved")
    return resolved is not None and (firing is None or resolved.at >= firing.at)


def is_end_confirmed(tx: Transaction, name: str, ended_at: float, watchdog_sent_at: float | None = None) -> bool:
    """Whether an alert that ended at `ended_at` is resolved.

    `watchdog_sent_at` is when Prometheus last sent the Watchdog to Alertmanager, if Alertmanager could be queried.
    """
    if name != EXPORTER_DOWN and _is_exporter_down(tx):
        return False
    received = timestamps.get(tx, "watchdog")
    if received is None or not tx.inventory.remediator.watchdog:
        return True  # without a Watchdog there is no evidence to wait for
    if watchdog_sent_at is not None and watchdog_sent_at > ended_at:
        return True
    return received.at >= ended_at + WATCHDOG_OUTLASTS and not is_watchdog_resolved(tx)


def _is_exporter_down(tx: Transaction) -> bool:
    is_firing = select(alerts.c.id).where(alerts.c.status == "firing", alerts.c.name == EXPORTER_DOWN).limit(1)
    return tx.scalar(is_firing) is not None


def alerts_with_held_end(tx: Transaction) -> Sequence[Row[Any]]:
    """Return the alerts whose end is held, ExporterDown first because it holds others."""
    rows = tx.execute(select(alerts).where(alerts.c.status == "firing", alerts.c.held_at.is_not(None))).all()
    return sorted(rows, key=lambda row: (row.name != EXPORTER_DOWN, row.id))
