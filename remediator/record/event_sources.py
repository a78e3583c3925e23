"""The tables whose rows are events of the timeline: when each row happened, what it shows, and how it is filtered."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, Table, and_, case, func, literal, null, or_, select, true

from fleet.inventory.model import Inventory, Remediable
from remediator.record.audit import READING
from remediator.record.events import EVENT_KINDS, GAP
from remediator.record.schema import actions, audit, events, incidents, maintenance

KINDS = (*EVENT_KINDS, GAP, "incident", "action", "operation", "sign-in", "maintenance")
Condition = ColumnElement[bool]
_SIGN_INS = ("sign_in", "sign_out", "end session", "access")  # events of the audit log
_TEXTS = ("host", "name", "state", "operation", "detail", "by")
_NO_VALUES: Mapping[str, Any] = {
    **dict.fromkeys(_TEXTS, ""), "times": 1, "last_at": null(), "incident": null(), "action": null(),
}  # fmt: skip


@dataclass(frozen=True)
class EventFilter:
    """Which rows to return. Times are of the record's clock: from `since`, before `until`.

    Without `kinds`, rows of all kinds. `host` and `service` are names; gaps are shown for all of them. `text` is a part
    of any text of a row; the case of ASCII letters does not matter. `with_audit` and `with_evidence` say what the
    reader may see: the audit log, and what commands on hosts printed.
    """

    kinds: frozenset[str] = frozenset()
    host: str = ""
    service: str = ""
    text: str = ""
    since: float | None = None
    until: float | None = None
    with_audit: bool = False
    with_evidence: bool = False

    def includes(self, kinds: Iterable[str]) -> bool:
        return not self.kinds or not self.kinds.isdisjoint(kinds)


@dataclass(frozen=True)
class Source:
    """Rows of one table, ordered by `at` and the table's `id`; neither may change.

    `conditions` returns alternatives that exclude each other, one query each, so that each can use an index.
    """

    name: str
    table: Table
    kinds: Sequence[str]
    at: ColumnElement[float]
    columns: Mapping[str, Any]  # expressions, or the same value for every row
    conditions: Callable[[Inventory, EventFilter], Sequence[Condition]]
    has_evidence: bool = False  # `detail` is what commands on hosts printed

    def is_visible(self, wanted: EventFilter) -> bool:
        return wanted.includes(self.kinds) and (wanted.with_audit or self.table is not audit)

    def select(self, wanted: EventFilter) -> Select[Any]:
        """Return a query of all rows with the filter's text."""
        hidden = {"detail": ""} if self.has_evidence and not wanted.with_evidence else {}
        columns = {**_NO_VALUES, **self.columns, **hidden}
        expressions = {
            name: value if isinstance(value, ColumnElement) else literal(value) for name, value in columns.items()
        }
        query = select(
            self.at.label("at"), self.table.c.id, *(value.label(name) for name, value in expressions.items())
        )
        texts = [columns[name] for name in _TEXTS]
        # Also without a text, which is a part of every text.
        if any(wanted.text.lower() in text.lower() for text in texts if isinstance(text, str)):
            return query  # every row has it
        found = [text.contains(wanted.text, autoescape=True) for text in texts if not isinstance(text, str)]
        return query.where(or_(*found))


def _find_events(_inventory: Inventory, wanted: EventFilter) -> Sequence[Condition]:
    if not (wanted.kinds or wanted.host or wanted.service):
        return [true()]
    found = [events.c.kind == GAP] if wanted.includes([GAP]) else []
    kinds = ("service",) if wanted.service else EVENT_KINDS
    names = _equals(events.c.name, wanted.service) & _equals(events.c.host, wanted.host)
    return found + [(events.c.kind == kind) & names for kind in kinds if wanted.includes([kind])]


def _find_incidents(inventory: Inventory, wanted: EventFilter) -> Sequence[Condition]:
    of_host = incidents.c.service.in_(_list_services(inventory, wanted.host)) if wanted.host else true()
    return [_equals(incidents.c.service, wanted.service) & of_host]


def _find_actions(_inventory: Inventory, wanted: EventFilter) -> Sequence[Condition]:
    return [_equals(actions.c.service, wanted.service) & _equals(actions.c.host, wanted.host)]


def _find_started_actions(inventory: Inventory, wanted: EventFilter) -> Sequence[Condition]:
    # `claimed_at` of a queued action is when it was queued, and is set again when it starts. A reset has no duration.
    was_started = actions.c.state.not_in(("queued", "cancelled")) & (actions.c.kind != "reset")
    return [was_started & condition for condition in _find_actions(inventory, wanted)]


def _find_maintenance(inventory: Inventory, wanted: EventFilter) -> Sequence[Condition]:
    """Return a condition for maintenance of the service or a service of the host, of the host, and of its group."""
    if not (wanted.host or wanted.service):
        return [true()]
    service = inventory.find_subject(wanted.service)
    host_name = wanted.host or (service.host if service is not None else "")
    host = inventory.hosts.get(host_name)
    services = [wanted.service] if wanted.service else _list_services(inventory, wanted.host)
    names = {"service": services, "host": [host_name], "group": [host.group] if host is not None else []}
    return [or_(*((maintenance.c.scope == scope) & maintenance.c.name.in_(found) for scope, found in names.items()))]


def _find_audit_entries(inventory: Inventory, wanted: EventFilter) -> Sequence[Condition]:
    conditions: list[Condition] = [audit.c.event.not_in(READING)]
    if not wanted.includes(["operation"]):
        conditions.append(audit.c.event.in_(_SIGN_INS))
    if not wanted.includes(["sign-in"]):
        conditions.append(audit.c.event.not_in(_SIGN_INS))
    if wanted.service:
        conditions.append(audit.c.target == wanted.service)
    if wanted.host:
        conditions.append(audit.c.target.in_([*_list_services(inventory, wanted.host), f"host {wanted.host}"]))
    return [and_(*conditions)]


def _equals(column: ColumnElement[str], value: str) -> Condition:
    """Return a condition that holds for all rows if the filter has no value."""
    return column == value if value else true()


def _list_services(inventory: Inventory, host: str) -> list[str]:
    """Return the services of a host, and its alerts that have runbooks."""
    subjects: dict[str, Remediable] = {**inventory.services, **inventory.host_alerts}
    return [name for name, subject in subjects.items() if subject.host == host]


_OF_ACTIONS: Mapping[str, Any] = {
    "kind": "action", "host": actions.c.host, "name": actions.c.service, "operation": actions.c.kind,
    "by": case(
        (actions.c.requested_by == "person", actions.c.asked_by), else_=func.coalesce(actions.c.approved_by, "defib")
    ),
    "incident": actions.c.incident_id, "action": actions.c.id,
}  # fmt: skip
_OF_MAINTENANCE: Mapping[str, Any] = {
    "kind": "maintenance", "host": case((maintenance.c.scope == "host", maintenance.c.name), else_=""),
    "name": maintenance.c.name, "detail": maintenance.c.scope + ": " + maintenance.c.reason,
}  # fmt: skip
# Their order is part of positions: add new ones at the end.
SOURCES = (
    Source(
        "event", events, (*EVENT_KINDS, GAP), events.c.at,
        {name: events.c[name] for name in ("kind", "host", "name", "state", "detail", "times", "last_at")},
        _find_events,
    ),
    Source(
        "incident-opened", incidents, ("incident",), incidents.c.opened_at,
        {
            "kind": "incident", "name": incidents.c.service, "state": "opened",
            "detail": func.coalesce(incidents.c.probe, ""), "incident": incidents.c.id,
        },
        _find_incidents,
    ),
    Source(
        "incident-closed", incidents, ("incident",), incidents.c.closed_at,
        {
            "kind": "incident", "name": incidents.c.service, "state": incidents.c.state,
            "by": func.coalesce(incidents.c.recovered_by, ""), "incident": incidents.c.id,
        },
        _find_incidents,
    ),
    Source(
        "action-started", actions, ("action",), actions.c.claimed_at,
        {
            **_OF_ACTIONS, "state": "started",
            "detail": case(
                (actions.c.component != "", "component " + actions.c.component),
                (actions.c.requested_by == "alert", actions.c.asked_by),
                else_="",
            ),
        },
        _find_started_actions,
    ),
    Source(
        "action-ended", actions, ("action",), actions.c.ended_at,
        {**_OF_ACTIONS, "state": actions.c.state, "detail": func.coalesce(actions.c.why, "")},
        _find_actions, has_evidence=True,
    ),
    Source(
        "maintenance-started", maintenance, ("maintenance",), maintenance.c.begun_at,
        {**_OF_MAINTENANCE, "state": "started", "by": maintenance.c.asked_by},
        _find_maintenance,
    ),
    Source(
        "maintenance-ended", maintenance, ("maintenance",), func.coalesce(maintenance.c.ended_at, maintenance.c.until),
        {**_OF_MAINTENANCE, "state": "ended"},
        _find_maintenance,
    ),
    Source(
        "audit", audit, ("operation", "sign-in"), audit.c.at,
        {
            "kind": case((audit.c.event.in_(_SIGN_INS), "sign-in"), else_="operation"), "name": audit.c.target,
            "state": audit.c.outcome, "operation": audit.c.event, "detail": audit.c.detail, "by": audit.c.name,
            "times": audit.c.count, "action": audit.c.action_id,
        },
        _find_audit_entries,
    ),
)  # fmt: skip
