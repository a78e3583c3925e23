"""Build a report from what the record and Prometheus know. Pure."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar
from zoneinfo import ZoneInfo

from fleet.inventory.model import Inventory
from remediator.policy.maintenance_windows import find_intervals
from remediator.reports.availability import combine
from remediator.reports.measurements import Measurements
from remediator.reports.past import MOST_ROWS, Past, PastIncident, PastRestart
from remediator.reports.report import Counts, Part, Report, ServiceReport, TeamReport

T = TypeVar("T")
LISTED: Mapping[str, int] = {"services": 1000, "teams": 200, "gpus": 200, "certificates": 200, "disks": 200}
NOTHING = Counts()
Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """The time between two Unix times."""

    start: float
    end: float


def build_report(inventory: Inventory, span: Span, past: Past, measured: Measurements) -> Report:
    """Return the report of a span."""
    services = _Services(inventory, span, past, measured).describe()
    omitted: dict[str, int] = {}

    def cut(name: str, entries: Iterable[T]) -> Sequence[T]:
        listed = list(entries)
        if len(listed) > LISTED[name]:
            omitted[name] = len(listed) - LISTED[name]
        return listed[: LISTED[name]]

    names = {name: service.title for name, service in inventory.services.items()}
    certificates = (replace(each, name=names[each.service]) for each in measured.certificates if each.service in names)
    missing: dict[Part, str] = dict(measured.missing)
    if not past.is_complete:
        missing["incidents"] = f"only the newest {MOST_ROWS} incidents and restarts are counted"
    return Report(
        start=span.start,
        end=span.end,
        total=services.total,
        teams=cut("teams", services.teams),
        services=cut("services", services.services),
        alerts_only=sum(not each.was_down for each in past.incidents),
        stopped=sum(each.was_down and each.stopped for each in past.incidents),
        gpu_count=measured.gpu_count,
        gpu_utilization=measured.gpu_utilization,
        gpus=cut("gpus", sorted(measured.gpus, key=lambda each: (-each.hours, each.host, each.container))),
        certificates=cut("certificates", sorted(certificates, key=lambda each: (each.expires, each.service))),
        disks=cut("disks", sorted(measured.disks, key=lambda each: (-(each.used or 0.0), each.host, each.mountpoint))),
        missing=missing,
        omitted=omitted,
    )


@dataclass(frozen=True)
class _Described:
    total: TeamReport
    teams: Sequence[TeamReport]
    services: Sequence[ServiceReport]


class _Services:
    """The services of the inventory, and those that were removed from it since they had an incident or a restart."""

    def __init__(self, inventory: Inventory, span: Span, past: Past, measured: Measurements) -> None:
        self._inventory, self._span, self._measured = inventory, span, measured
        self._incidents: defaultdict[str, list[PastIncident]] = defaultdict(list)
        for incident in past.incidents:
            if incident.was_down and not incident.stopped:
                self._incidents[incident.service].append(incident)
        self._restarts: defaultdict[str, list[PastRestart]] = defaultdict(list)
        for restart in past.restarts:
            self._restarts[restart.service].append(restart)
        self._maintenance = _find_maintenance(inventory, span, past)

    def describe(self) -> _Described:
        names = {*self._inventory.services, *self._incidents, *self._restarts}
        services = sorted(
            map(self._describe_service, names),
            key=lambda each: (-(each.down or 0.0), -each.counts.incidents, -each.counts.restarts, each.id),
        )
        by_team: defaultdict[str, list[ServiceReport]] = defaultdict(list)
        for each in services:
            by_team[each.team].append(each)
        teams = [self._describe_team(team, by_team[team]) for team in by_team]
        teams.sort(key=lambda each: (1.0 if each.availability is None else each.availability, each.team))
        return _Described(self._describe_team("", services), teams, services)

    def _describe_service(self, name: str) -> ServiceReport:
        service, availability = self._inventory.services.get(name), self._measured.availability.get(name)
        incidents, restarts = self._incidents.get(name, ()), self._restarts.get(name, ())
        team = service.team if service is not None else next((each.team for each in incidents if each.team), "")
        return ServiceReport(
            id=name,
            name=service.title if service is not None else name,
            team=team,
            host=service.host if service is not None else "",
            removed=service is None,
            availability=None if availability is None else availability.ratio,
            observed=0.0 if availability is None else availability.observed,
            maintenance=self._sum_maintenance(name),
            counts=_count(incidents, restarts, self._span),
        )

    def _describe_team(self, team: str, services: Sequence[ServiceReport]) -> TeamReport:
        names = [each.id for each in services if not each.removed]
        known = [self._measured.availability[name] for name in names if name in self._measured.availability]
        together = combine(known)
        return TeamReport(
            team,
            len(names),
            len(known),
            None if together is None else together.ratio,
            _count(
                list(chain.from_iterable(self._incidents.get(each.id, ()) for each in services)),
                list(chain.from_iterable(self._restarts.get(each.id, ()) for each in services)),
                self._span,
            ),
        )

    def _sum_maintenance(self, name: str) -> float:
        """Return for how many seconds of the span a service was in maintenance."""
        service = self._inventory.services.get(name)
        if service is None or not self._maintenance:
            return 0.0
        host = self._inventory.host_of(service)
        scopes = [("service", name), ("host", service.host), ("group", host.group if host is not None else "")]
        intervals = sorted(chain.from_iterable(self._maintenance.get(scope, ()) for scope in scopes))
        total, done = 0.0, self._span.start
        for start, end in intervals:  # which may overlap
            total += max(0.0, end - max(start, done))
            done = max(done, end)
        return total


def _find_maintenance(inventory: Inventory, span: Span, past: Past) -> dict[tuple[str, str], list[Interval]]:
    """Return the maintenance within the span, by the scope and the name."""
    found: defaultdict[tuple[str, str], list[Interval]] = defaultdict(list)
    for each in past.maintenance:
        found[each.scope, each.name].append((max(each.start, span.start), min(each.end, span.end)))
    zone = ZoneInfo(inventory.notify.timezone)
    for window in inventory.remediation.maintenance:
        found[window.kind, str(window.options)] += find_intervals(window, span.start, span.end, zone)
    return dict(found)


def _count(incidents: Sequence[PastIncident], restarts: Sequence[PastRestart], span: Span) -> Counts:
    if not incidents and not restarts:
        return NOTHING
    ended = [each for each in incidents if each.ended is not None and each.ended <= span.end]
    recovered = [each for each in ended if each.state == "recovered"]
    durations = [each.ended - each.began for each in recovered if each.ended is not None]
    automatic = [each for each in restarts if each.automatic]
    return Counts(
        incidents=len(incidents),
        began=sum(each.began >= span.start for each in incidents),
        open=len(incidents) - len(ended),
        recovered_by=Counter(each.recovered_by or "self" for each in recovered),
        unobserved=len(ended) - len(recovered),
        person_needed=sum(each.person_needed for each in incidents),
        recovery_median=statistics.median(durations) if durations else None,
        recovery_longest=max(durations, default=None),
        restarts=len(restarts),
        restarts_helped=sum(each.helped for each in restarts),
        automatic_restarts=len(automatic),
        automatic_restarts_helped=sum(each.helped for each in automatic),
    )
