"""What the record knows about all services now: open incidents, actions, alerts, stops and maintenance."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import select

from remediator.record import maintenance, stops
from remediator.record.automation import AutomationSwitch, read_switch
from remediator.record.schema import actions, alerts, incidents
from remediator.record.transaction import Transaction

_SELECT_INCIDENTS = select(incidents).where(incidents.c.state == "open").order_by(incidents.c.opened_at)
_SELECT_ACTIONS = (
    select(actions.c.id, actions.c.service, actions.c.kind, actions.c.component, actions.c.state, actions.c.command)
    .where(actions.c.state.in_(("queued", "running")))
    .order_by(actions.c.id)
)
_SELECT_ALERTS = (
    select(alerts.c.name, incidents.c.service)
    .join(incidents, incidents.c.id == alerts.c.incident_id)
    .where(alerts.c.status == "firing")
    .order_by(alerts.c.name)
)


@dataclass(frozen=True)
class ActionInProgress:
    """An action that waits for approval, whose command runs, or whose effect is being verified."""

    id: int
    kind: str
    phase: Literal["queued", "running", "verifying"]
    component: str = ""  # that is restarted; empty: the whole service


@dataclass(frozen=True)
class Overview:
    """Facts by service, and what concerns all of them. Times are of the record's clock."""

    incidents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # rows of the open ones
    actions: Mapping[str, ActionInProgress] = field(default_factory=dict)
    alerts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names of those that are firing
    stops: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # rows of services stopped through Defib
    maintenance: tuple[Mapping[str, Any], ...] = ()
    automation: AutomationSwitch = field(default_factory=lambda: AutomationSwitch(enabled=True))

    @property
    def banners(self) -> tuple[object, ...]:
        """What pages show above everything else."""
        return self.automation, [dict(each) for each in self.maintenance]

    def services_that_differ(self, other: "Overview") -> set[str]:
        """Return the services about which two overviews differ, apart from maintenance."""
        found: set[str] = set()
        for mine, theirs in (
            (self.incidents, other.incidents),
            (self.actions, other.actions),
            (self.alerts, other.alerts),
            (self.stops, other.stops),
        ):
            found |= {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
        return found


def read_overview(tx: Transaction) -> Overview:
    names: dict[str, list[str]] = {}
    for row in tx.execute(_SELECT_ALERTS):
        names.setdefault(row.service, []).append(row.name)
    return Overview(
        {row["service"]: dict(row) for row in tx.execute(_SELECT_INCIDENTS).mappings()},
        {
            row.service: ActionInProgress(row.id, row.kind, _phase(row), row.component)
            for row in tx.execute(_SELECT_ACTIONS)
        },
        {name: tuple(dict.fromkeys(each)) for name, each in names.items()},
        stops.current(tx),
        tuple(maintenance.current(tx)),
        read_switch(tx),
    )


def _phase(row: Any) -> Literal["queued", "running", "verifying"]:
    if row.state == "queued":
        return "queued"
    return "running" if row.command is None else "verifying"
