"""Replay the policy over Prometheus' history: what the remediator would have decided. Times are Unix seconds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fleet.inventory.model import Inventory, Service
from fleet.json_client import JsonClient, parsing_response
from remediator.policy.attempts import counted_since
from remediator.policy.decisions import decide
from remediator.policy.gates import BUDGET_WINDOW
from remediator.policy.maintenance_windows import find_window
from remediator.policy.situation import ActionHistory, ActionsInProgress, Decision, Observation, Situation
from remediator.policy.storm import is_storm, services_in_group

MAX_STEP = 15.0  # seconds between two evaluations; fewer if the whole period then fits into one response
POINTS = 10_000  # of a series in one response; Prometheus returns at most 11,000
QUERY_TIMEOUT = 300.0  # seconds for a query and its response

Series = Mapping[tuple[str, ...], Mapping[float, float]]


@dataclass(frozen=True)
class History:
    """Samples of Prometheus by time: by the values of the labels named here, then by evaluation time."""

    times: Sequence[float]
    alerts: Series  # (alertname, service)
    hosts_down: Series  # (host,)
    up: Series  # (service,)
    success: Series  # (service,)
    failures: Series  # (service, reason), a counter


@dataclass(frozen=True)
class ReplayedDecision:
    """A decision that differs from the one before; `nothing` is the end of the alerts.

    If the verb is `act`, `reason` is the step.
    """

    at: float
    service: str
    verb: str
    reason: str
    detail: str


@dataclass
class _ServiceReplay:
    """What would have been done to a service so far."""

    attempts: list[tuple[float, str]] = field(default_factory=list)  # (time, step)
    outages: list[tuple[float, float | None]] = field(default_factory=list)  # (begin, end)
    tries: int = 0  # in this outage
    busy_until: float = float("-inf")
    last_ended: float | None = None
    last_decision: tuple[str, str | None] = ("nothing", None)
    failure_reason: str | None = None  # of the last failed probe


async def read_history(prometheus: JsonClient, inventory: Inventory, since: float, until: float) -> History:
    """Query Prometheus. Raises ClientError.

    Every sample between two evaluation times counts, so that an alert or an outage shorter than a step is seen.
    """
    names = sorted(
        {name for each in inventory.services.values() for name in inventory.remediation.for_service(each).alerts}
    )
    step = f"{int(_step(since, until))}s"

    async def query(expression: str, *labels: str) -> Series:
        return await _query_range(prometheus, f"max by ({', '.join(labels)}) ({expression})", labels, since, until)

    firing = f'ALERTS{{alertstate="firing",alertname=~"{"|".join(names)}"}}'
    alerts = await query(f"last_over_time({firing}[{step}]) or {firing}", "alertname", "service")
    groups = _groups_by_service(inventory)
    alerting = {service for _, service in alerts if service in inventory.services}
    related = {
        name for each in alerting for name in (*services_in_group(each, groups), *inventory.services[each].depends_on)
    }
    # The dot is the only character of service IDs that has a meaning in regular expressions and strings of PromQL.
    pattern = "|".join(name.replace(".", "[.]") for name in sorted(related))
    selector = f'{{job="defib-exporter",service=~"{pattern}"}}'
    hosts_down = 'ALERTS{alertstate="firing",alertname="HostDown"}'
    times = list(evaluation_times(since, until))
    if not alerting:
        return History(times, alerts, {}, {}, {}, {})
    return History(
        times,
        alerts,
        await query(f"last_over_time({hosts_down}[{step}]) or {hosts_down}", "host"),
        await query(_lowest(f"service_up{selector}", step), "service"),
        await query(_lowest(f"service_probe_success{selector}", step), "service"),
        await query(f"service_probe_failures_total{selector}", "service", "reason"),
    )


def _lowest(selector: str, step: str) -> str:
    """Return the query for the lowest sample within a step, or the last sample if there is none within it."""
    return f"min_over_time({selector}[{step}]) or {selector}"


def _groups_by_service(inventory: Inventory) -> dict[str, str]:
    hosts = {name: inventory.host_of(service) for name, service in inventory.services.items()}
    return {name: host.group if host is not None else "" for name, host in hosts.items()}


def evaluation_times(since: float, until: float) -> Iterator[float]:
    """Return the times at which the policy is evaluated."""
    step = _step(since, until)
    at = since - since % step
    while at <= until:
        yield at
        at += step


def _step(since: float, until: float) -> float:
    """Return the whole seconds between two evaluations."""
    return min(MAX_STEP, max(1.0, math.ceil((until - since) / (POINTS - 1))))


async def _query_range(
    prometheus: JsonClient, expression: str, labels: Sequence[str], since: float, until: float
) -> Series:
    """Return the series of a query by the values of `labels`, each by evaluation time. Raises ClientError."""
    series: dict[tuple[str, ...], dict[float, float]] = {}
    times = list(evaluation_times(since, until))
    for start in range(0, len(times), POINTS):
        part = times[start : start + POINTS]
        form = {"query": expression, "start": part[0], "end": part[-1], "step": _step(since, until)}
        response = await prometheus.request("POST", "/api/v1/query_range", QUERY_TIMEOUT, form=form)
        with parsing_response():
            for each in response["data"]["result"]:
                key = tuple(str(each["metric"].get(label, "")) for label in labels)
                series.setdefault(key, {}).update((float(at), float(value)) for at, value in each["values"])
    return series


def replay(inventory: Inventory, history: History) -> list[ReplayedDecision]:
    """Return the decisions of the policy, in order, as if automation had been on.

    Whether an attempt would have helped is unknown: it ends when the service came up, or fails when that took longer
    than `start_within`.
    """
    return _Replay(inventory, history).run()


class _Replay:
    def __init__(self, inventory: Inventory, history: History) -> None:
        self._inventory, self._history = inventory, history
        self._services = {service: _ServiceReplay() for _, service in history.alerts if service in inventory.services}
        groups = _groups_by_service(inventory)
        self._in_group = {service: services_in_group(service, groups) for service in self._services}
        self._alerts: dict[str, list[tuple[str, Mapping[float, float]]]] = {}  # (name, samples), by service
        for (name, service), samples in history.alerts.items():
            self._alerts.setdefault(service, []).append((name, samples))
        self._failures = {key: samples for key, samples in history.failures.items() if key[0] in self._services}

    def run(self) -> list[ReplayedDecision]:
        events: list[ReplayedDecision] = []
        before: float | None = None
        for at in self._history.times:
            if before is not None:  # the failures before the period are unknown
                self._update_failure_reasons(before, at)
            before = at
            for service, state in self._services.items():
                firing = frozenset(name for name, samples in self._alerts[service] if at in samples)
                if firing or state.last_decision[0] != "nothing":
                    event = self._decide(self._inventory.services[service], state, firing, at)
                    events += [event] if event is not None else []
        return events

    def _update_failure_reasons(self, before: float, at: float) -> None:
        """Set the reasons whose counters have increased between two evaluations."""
        for (service, reason), samples in self._failures.items():
            previous = samples.get(before)
            # A new series starts with the first failure for its reason.
            if at in samples and (samples[at] > previous if previous is not None else at == next(iter(samples))):
                self._services[service].failure_reason = reason

    def _decide(
        self, service: Service, state: _ServiceReplay, firing: frozenset[str], at: float
    ) -> ReplayedDecision | None:
        """Decide about a service; returns the decision if it is new."""
        _record_outage(state, at, firing=bool(firing))
        rules = self._inventory.remediation.for_service(service).model_copy(update={"automatic": True})
        situation = self._situation(service, state, firing, at)
        decision = decide(service, rules, situation)
        if decision.verb == "act" and decision.step is not None:
            kind = decision.step.kind
            state.attempts.append((at, kind))
            state.tries += 1
            state.busy_until = state.last_ended = self._end_of_attempt(service, at, rules.hold)
            state.last_decision = ("act", None)
            return ReplayedDecision(
                at, service.id, "act", kind, f"attempt {situation.history.attempts.get(kind, 0) + 1}"
            )
        return _record_decision(state, service.id, decision, at)

    def _end_of_attempt(self, service: Service, at: float, hold: float) -> float:
        """Return when an attempt that began at `at` would have been verified, or would have failed."""
        deadline = at + (service.control.start_within if service.control is not None else 0.0)
        ups = self._history.up.get((service.id,), {})
        later = (time for time in self._history.times if at < time <= deadline)
        return next((time + hold for time in later if ups.get(time) == 1.0), deadline)

    def _situation(self, service: Service, state: _ServiceReplay, firing: frozenset[str], at: float) -> Situation:
        inventory, history = self._inventory, self._history
        rules, host = inventory.remediation.for_service(service), inventory.host_of(service)
        success = (history.success.get((name,), {}).get(at) for name in self._in_group[service.id])
        probed = [value for value in success if value is not None]
        failing = probed.count(0.0)
        since = counted_since(state.outages, rules.window, at)
        counted = [kind for time, kind in state.attempts if time > since]
        all_attempts = (time for each in self._services.values() for time, _ in each.attempts)
        busy = [name for name, each in self._services.items() if each.busy_until > at]
        window = find_window(inventory, service.id, host, at)
        return Situation(
            at,
            firing,
            ActionHistory({kind: counted.count(kind) for kind in counted}, state.tries, state.last_ended),
            ActionsInProgress(
                target_busy=service.id in busy,
                on_host=sum(1 for name in busy if service.host and inventory.services[name].host == service.host),
                in_budget_window=tuple(sorted(time for time in all_attempts if time > at - BUDGET_WINDOW)),
            ),
            self._observation(service.id, state, at),
            scheduled=window.why if window is not None else "",
            host_down=host is not None and at in history.hosts_down.get((host.name,), {}),
            dependencies_down=tuple(name for name in service.depends_on if history.up.get((name,), {}).get(at) == 0.0),
            storm=(failing, len(probed)) if is_storm(rules, failing, len(probed)) else None,
        )

    def _observation(self, service: str, state: _ServiceReplay, at: float) -> Observation | None:
        up, success = (series.get((service,), {}).get(at) for series in (self._history.up, self._history.success))
        if up is None and success is None:
            return None
        return Observation(
            None if up is None else up == 1.0,
            None if success is None else success != 0.0,
            state.failure_reason if success == 0.0 else None,
        )


def _record_decision(state: _ServiceReplay, service: str, decision: Decision, at: float) -> ReplayedDecision | None:
    latest = (decision.verb, decision.reason)
    if latest == state.last_decision or decision.reason == "target-busy":
        return None
    state.last_decision = latest
    return ReplayedDecision(at, service, decision.verb, decision.reason or "", decision.detail)


def _record_outage(state: _ServiceReplay, at: float, *, firing: bool) -> None:
    is_open = bool(state.outages) and state.outages[-1][1] is None
    if firing and not is_open:
        state.outages.append((at, None))
        state.tries = 0
    elif not firing and is_open:
        state.outages[-1] = (state.outages[-1][0], at)
