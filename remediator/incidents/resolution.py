"""When the end of an alert is believed: with Prometheus or the exporter gone, alerts end though nothing is over.

The end of an alert that is told of by itself is held until Prometheus is seen to have been there after it, and while
ExporterDown fires. The alerts to act on need none of that: their incident ends by a probe.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from fleet.inventory.model import Inventory
from remediator.record import timestamps
from remediator.record.schema import alerts

EXPORTER_DOWN = "ExporterDown"
# Alertmanager repeats the Watchdog for up to so long after Prometheus' death than it keeps another alert.
REPEATED_FOR = 90.0


def watchdog_is_over(connection: Connection) -> bool:
    """Whether Alertmanager has said that the Watchdog does not fire any more, which it always does."""
    seen, over = timestamps.get(connection, "watchdog"), timestamps.get(connection, "watchdog-over")
    return over is not None and (seen is None or over.at >= seen.at)


def is_believed(
    connection: Connection, name: str, ended_at: float, inventory: Inventory, watchdog_sent_at: float | None = None
) -> bool:
    """Whether an alert that ended at `ended_at` is over.

    `watchdog_sent_at` is when Prometheus last sent Alertmanager the Watchdog, where Alertmanager could be asked.
    """
    if name != EXPORTER_DOWN and _exporter_is_down(connection):
        return False
    heard = timestamps.get(connection, "watchdog")
    if heard is None or not inventory.remediator.watchdog:
        return True  # there is none to go by
    if watchdog_sent_at is not None and watchdog_sent_at > ended_at:
        return True
    return heard.at >= ended_at + REPEATED_FOR and not watchdog_is_over(connection)


def _exporter_is_down(connection: Connection) -> bool:
    firing = select(alerts.c.id).where(alerts.c.status == "firing", alerts.c.name == EXPORTER_DOWN).limit(1)
    return connection.scalar(firing) is not None


def held(connection: Connection) -> Sequence[Row[Any]]:
    """The alerts whose end waits for evidence, ExporterDown first: others wait for its end."""
    rows = connection.execute(select(alerts).where(alerts.c.status == "firing", alerts.c.held_at.is_not(None))).all()
    return sorted(rows, key=lambda row: (row.name != EXPORTER_DOWN, row.id))
