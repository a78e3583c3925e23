"""The policy over Prometheus' history: what the remediator would have done. Times are Unix seconds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fleet.inventory.model import Inventory, Service
from remediator.clients.json_client import ClientError, JsonClient
from remediator.policy.attempts import counted_since
from remediator.policy.decisions import decide
from remediator.policy.gates import BUDGET_WINDOW
from remediator.policy.maintenance_windows import find_window
from remediator.policy.situation import Decision, Observation, Past, Present, Situation
from remediator.policy.storm import is_storm, services_in_group

STEP = 30.0  # seconds between two moments at most; fewer where the whole time then still fits into one answer
POINTS = 10_000  # of a series in one answer; Prometheus gives 11,000
ASKED_WITHIN = 60.0

Series = Mapping[tuple[str, ...], Mapping[float, float]]


@dataclass(frozen=True)
class History:
    """What Prometheus kept, by the moment: alerts by name and service, hosts down, and what the probes said."""

    moments: Sequence[float]
    alerts: Series  # (alertname, service)
    hosts_down: Series  # (host,)
    up: Series  # (service,)
    success: Series  # (service,)
    failures: Series  # (service, reason), a counter


@dataclass(frozen=True)
class Event:
    """A decision that differs from the one before, or the end of an alert (`nothing`)."""

    at: float
    service: str
    verb: str
    reason: str
    detail: str


@dataclass
class _Target:
    """What would have been done to a service so far."""

    attempts: list[tuple[float, str]] = field(default_factory=list)
    outages: list[tuple[float, float | None]] = field(default_factory=list)
    tries: int = 0  # in this outage
    busy_until: float = float("-inf")
    last_ended: float | None = None
    told: tuple[str, str | None] = ("nothing", None)
    reason: str | None = None  # of the last failure


async def history(peer: JsonClient, inventory: Inventory, since: float, until: float) -> History:
    """Ask Prometheus. Raises ClientError."""
    names = sorted(
        {name for each in inventory.services.values() for name in inventory.remediation.for_service(each).alerts}
    )
    told = f'ALERTS{{alertstate="firing",alertname=~"{"|".join(names)}"}}'
    alerts = await _ranges(peer, f"max by (alertname, service) ({told})", ("alertname", "service"), since, until)
    groups = _groups(inventory)
    alerted = {service for _, service in alerts if service in inventory.services}
    near = sorted(
        {name for service in alerted for name in (*services_in_group(service, groups), *_needs(inventory, service))}
    )
    # Service identifiers hold no character that a regular expression or a string of PromQL would read, but the dot.
    of = f'{{job="defib-exporter",service=~"{"|".join(name.replace(".", "[.]") for name in near)}"}}'

    async def ask(query: str, *labels: str) -> Series:
        return await _ranges(peer, query, labels, since, until) if near else {}

    return History(
        list(moments(since, until)),
        alerts,
        await ask('max by (host) (ALERTS{alertstate="firing",alertname="HostDown"})', "host"),
        await ask(f"max by (service) (service_up{of})", "service"),
        await ask(f"max by (service) (service_probe_success{of})", "service"),
        await ask(f"max by (service, reason) (service_probe_failures_total{of})", "service", "reason"),
    )


def _groups(inventory: Inventory) -> dict[str, str]:
    hosts = {name: inventory.host_of(service) for name, service in inventory.services.items()}
    return {name: host.group if host is not None else "" for name, host in hosts.items()}


def _needs(inventory: Inventory, service: str) -> list[str]:
    return inventory.services[service].depends_on


def moments(since: float, until: float) -> Iterator[float]:
    """The times that are looked at."""
    step = _step(since, until)
    at = since - since % step
    while at <= until:
        yield at
        at += step


def _step(since: float, until: float) -> float:
    return min(STEP, max(1.0, math.ceil((until - since) / (POINTS - 1))))


async def _ranges(peer: JsonClient, query: str, labels: Sequence[str], since: float, until: float) -> Series:
    """The series of a query by the values of `labels`, each by the moment."""
    found: dict[tuple[str, ...], dict[float, float]] = {}
    times = list(moments(since, until))
    for start in range(0, len(times), POINTS):
        part = times[start : start + POINTS]
        form = {"query": query, "start": part[0], "end": part[-1], "step": _step(since, until)}
        answer = await peer.request("POST", "/api/v1/query_range", ASKED_WITHIN, form=form)
        try:
            for series in answer["data"]["result"]:
                key = tuple(str(series["metric"].get(label, "")) for label in labels)
                found.setdefault(key, {}).update((float(at), float(value)) for at, value in series["values"])
        except (KeyError, TypeError, ValueError) as error:
            raise ClientError("an answer of Prometheus that is not understood") from error
    return found


def replay(inventory: Inventory, known: History) -> list[Event]:
    """What the policy would have decided, in order; automation is taken to be on.

    An attempt that was not made cannot be seen to help: it is over when the service came up, or has failed when that
    took longer than `start_within`.
    """
    targets = {service: _Target() for _, service in known.alerts if service in inventory.services}
    groups = _groups(inventory)
    near = {service: services_in_group(service, groups) for service in targets}
    failures = [
        (targets[service], reason, values, min(values, default=0.0))
        for (service, reason), values in known.failures.items()
        if service in targets
    ]
    events: list[Event] = []
    for number, at in enumerate(known.moments):
        for target, reason, values, began in failures:
            before = values.get(known.moments[number - 1]) if number else None
            # A series that begins has failed for the first time; what was there before we look tells nothing.
            if at in values and (values[at] > before if before is not None else number > 0 and at == began):
                target.reason = reason
        for service, target in targets.items():
            firing = frozenset(alert for (alert, of), values in known.alerts.items() if of == service and at in values)
            if firing or target.told[0] != "nothing":
                event = _decided(inventory, known, targets, inventory.services[service], firing, near[service], at)
                events += [event] if event is not None else []
    return events


def _decided(
    inventory: Inventory,
    known: History,
    targets: Mapping[str, _Target],
    service: Service,
    firing: frozenset[str],
    near: Sequence[str],
    at: float,
) -> Event | None:
    target = targets[service.id]
    _note_outage(target, at, firing=bool(firing))
    rules = inventory.remediation.for_service(service).model_copy(update={"automatic": True})
    situation = _situation(inventory, known, targets, service, firing, near, at)
    decision = decide(service, rules, situation)
    if decision.verb == "act" and decision.step is not None:
        target.attempts.append((at, decision.step.kind))
        target.tries += 1
        target.busy_until = target.last_ended = _ends(known, service, at, rules.hold)
        used = situation.past.attempts.get(decision.step.kind, 0) + 1
        target.told = ("act", None)
        return Event(at, service.id, "act", decision.step.kind, f"attempt {used}")
    return _news(target, service.id, decision, at)


def _news(target: _Target, name: str, decision: Decision, at: float) -> Event | None:
    now = (decision.verb, decision.reason)
    if now == target.told or decision.reason == "target-busy":
        return None
    target.told = now
    return Event(at, name, decision.verb, decision.reason or "", decision.detail)


def _note_outage(target: _Target, at: float, *, firing: bool) -> None:
    is_open = bool(target.outages) and target.outages[-1][1] is None
    if firing and not is_open:
        target.outages.append((at, None))
        target.tries = 0
    elif not firing and is_open:
        target.outages[-1] = (target.outages[-1][0], at)


def _ends(known: History, service: Service, at: float, hold: float) -> float:
    """When an attempt that began at `at` would have been verified, or given up."""
    deadline = at + (service.control.start_within if service.control is not None else 0.0)
    ups = known.up.get((service.id,), {})
    later = [moment for moment in known.moments if at < moment <= deadline]
    return next((moment + hold for moment in later if ups.get(moment) == 1.0), deadline)


def _situation(
    inventory: Inventory,
    known: History,
    targets: Mapping[str, _Target],
    service: Service,
    firing: frozenset[str],
    near: Sequence[str],
    at: float,
) -> Situation:
    rules, target = inventory.remediation.for_service(service), targets[service.id]
    host = inventory.host_of(service)
    probed = [known.success[(name,)][at] for name in near if at in known.success.get((name,), {})]
    failing = probed.count(0.0)
    since = counted_since(target.outages, rules.window, at)
    counted = [kind for moment, kind in target.attempts if moment > since]
    claimed = sorted(moment for each in targets.values() for moment, _ in each.attempts if moment > at - BUDGET_WINDOW)
    busy = [name for name, each in targets.items() if each.busy_until > at]
    scheduled = find_window(inventory, service.id, host, at)
    return Situation(
        at,
        firing,
        Past({kind: counted.count(kind) for kind in counted}, target.tries, target.last_ended),
        Present(
            target_busy=service.id in busy,
            on_host=sum(1 for name in busy if service.host and inventory.services[name].host == service.host),
            in_budget_window=tuple(claimed),
        ),
        _observed(known, service.id, target, at),
        scheduled=scheduled.why if scheduled is not None else "",
        host_down=host is not None and at in known.hosts_down.get((host.name,), {}),
        dependencies_down=tuple(name for name in service.depends_on if known.up.get((name,), {}).get(at) == 0.0),
        storm=(failing, len(probed)) if is_storm(rules, failing, len(probed)) else None,
    )  # fmt: skip


def _observed(known: History, service: str, target: _Target, at: float) -> Observation | None:
    up, success = (series.get((service,), {}).get(at) for series in (known.up, known.success))
    if up is None and success is None:
        return None
    failed = success == 0.0
    return replace(
        Observation(None if up is None else up == 1.0, None if success is None else not failed, None),
        reason=target.reason if failed else None,
    )
