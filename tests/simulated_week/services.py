"""What the exporter publishes of services: its own schedule, debouncing and exposition, over made-up probe results."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from exporter.exposition.sample_lines import parse_lines
from exporter.exposition.service_series import ServiceSeries
from exporter.results import FailureReason, ProbeDetails, ProbeResult
from exporter.scheduler.early_probes import WITHIN as EARLY_WITHIN
from exporter.scheduler.schedule import Schedule, add_jitter
from exporter.service_state import ServiceState
from fleet.inventory.model import Service
from tests.simulated_week.events import DAY, KILLED_FOR, LIFETIME, MINUTE, PROBE_FAILS, START, Span, Week
from tests.simulated_week.scrapes import EXPORTER_LABELS, Scrapes
from tests.simulated_week.store import Labels, as_labels

MODEL_TAKES, USUALLY_TAKES, REFUSED_AFTER = 3.0, 0.08, 0.002  # seconds
VARIES = 0.25  # standard deviation of the logarithm of durations


@dataclass(frozen=True)
class Published:
    """What is published of a service from a time on, seconds since the week began."""

    since: float
    state: ServiceState
    last: ProbeResult | None
    failures: Mapping[FailureReason, int]


class SimulatedService:
    """The probes of one service. `host_lost_at` are the times at which the exporter loses the service's host."""

    def __init__(self, week: Week, service: Service, seed: int, host_lost_at: float | None) -> None:
        self._week, self._service, self._host_lost_at = week, service, host_lost_at
        self._random = random.Random(f"{seed} {service.id}")
        self._name, self._kind, self._timeout = service.id, service.probe.kind, service.probe.timeout
        self._has_failed = False

    def publish(self, begin: float, end: float) -> Iterator[Published]:
        """Yield what an exporter publishes that runs from `begin` to `end`."""
        options = self._service.probe
        reads_host = options.kind == "container"
        key = self._service.host if reads_host else self._service.id
        schedule = Schedule.for_key(key, options.every, options.retry_every)
        state, failures = ServiceState(), Counter[FailureReason]()
        yield Published(begin, state, None, {})
        due = at = schedule.first_due(START + begin)
        ended = START + begin
        while at < START + end:
            early = self._probed_early(ended, at, state)
            if early is not None:
                due = at = early
            result = self._probe(at - START)
            ended = at + result.duration
            state = state.after_result(result, fail_after=options.fail_after, recover_after=options.recover_after)
            if result.reason is not None:
                failures[result.reason] += 1
            yield Published(ended - START, state, result, dict(failures))
            due, _ = schedule.next_due(due, ended, stable=state.is_steadily_up)
            at = due if reads_host else add_jitter(due, options.every, self._random)

    def _probed_early(self, ended: float, at: float, state: ServiceState) -> float | None:
        """Return when the service is probed because its host was lost, if that is before its next probe."""
        if self._host_lost_at is None or not state.is_steadily_up:
            return None
        early = START + self._host_lost_at + self._random.uniform(0, EARLY_WITHIN)
        return early if ended < early < at else None

    def _probe(self, at: float) -> ProbeResult:
        reason, duration = self._find_outcome(at)
        details = ProbeDetails()
        if self._name in self._week.expires and reason in (None, "tls"):
            expiry = START + self._find_expiry(at)
            details.gauges["service_tls_certificate_expiry_timestamp_seconds"] = expiry
            details.gauges["service_tls_certificate_not_before_timestamp_seconds"] = expiry - LIFETIME
            if reason == "tls":
                details.gauges["service_tls_chain_expiry_timestamp_seconds"] = expiry
        if self._kind == "openai" and reason is None:
            details.gauges["service_llm_first_token_seconds"] = 0.4 * self._vary()
            details.gauges["service_llm_tokens_per_second"] = 45 / self._vary()
        return ProbeResult(reason is None, reason, "", START + at, duration, details)

    def _find_outcome(self, at: float) -> tuple[FailureReason | None, float]:
        """Return the reason, if the probe fails, and how long it takes."""
        reason = self._find_failure(at)
        # By chance, and singly.
        self._has_failed = reason is None and not self._has_failed and self._random.random() < PROBE_FAILS
        if self._has_failed:
            reason = "state" if self._kind == "container" else "timeout"
        if reason in ("connect", "state"):
            return reason, REFUSED_AFTER
        if reason in ("timeout", "shell"):
            return reason, self._timeout
        takes = MODEL_TAKES if self._kind == "openai" else USUALLY_TAKES
        by_day = 1 + 0.3 * math.sin(2 * math.pi * at / DAY)
        return reason, takes * by_day * self._vary()

    def _find_failure(self, at: float) -> FailureReason | None:
        """Return why the probe fails, if not by chance."""
        week, name = self._week, self._name
        is_container = self._kind == "container"
        host, dead = week.dead_host
        _, killed, killed_at = week.oom_kill
        if self._service.host == host and at in dead:
            return "shell" if is_container else "timeout"
        stopped = [*week.exited.get(name, ()), *week.redeploys[name]]
        if name == killed:
            stopped.append(Span(killed_at, killed_at + KILLED_FOR))
        if any(at in span for span in stopped):
            return "state" if is_container else "connect"
        if any(at in span for span in week.down.get(name, ())):
            return "timeout"
        return "tls" if name in week.expires and at >= self._find_expiry(at) else None

    def _vary(self) -> float:
        return math.exp(self._random.gauss(0, VARIES))

    def _find_expiry(self, at: float) -> float:
        renewals = [each for each in self._week.renewed[self._name] if each <= at]
        return renewals[-1] + LIFETIME if renewals else self._week.expires[self._name]


def list_series(
    week: Week,
    service: Service,
    scrapes: Scrapes,
    seed: int,
    host_lost_at: float | None,
    is_used: Callable[[str], bool],
) -> Iterator[tuple[Labels, list[float | None]]]:
    """Yield the series of a service that are used, with a value, or None, for each minute.

    If the service was down since the last scrape, that is shown: the shipped configuration scrapes every 15 seconds, and
    so sees a service that is down for half a minute.
    """
    simulated, series = SimulatedService(week, service, seed, host_lost_at), ServiceSeries(service)
    columns: dict[str, list[float | None]] = {}
    for begin, end in scrapes.exporter_runs:
        published = simulated.publish(begin, end)
        current, following = next(published), next(published, None)
        for minute in scrapes.minutes_between(begin, end):
            shown = None
            while following is not None and following.since <= minute * MINUTE:
                current, following = following, next(published, None)
                shown = current if shown is None or current.state.up is False else shown
            shown = current if shown is None or shown.state.up is not False else shown
            lines = series.render(shown.state, shown.last, shown.failures)
            for name, text in lines.items():
                if text and is_used(name):
                    for line in text.splitlines():
                        key, _, value = line.rpartition(" ")
                        if key not in columns:
                            columns[key] = [None] * scrapes.count
                        columns[key][minute] = float(value)
    for key, values in columns.items():
        (sample,) = parse_lines(f"{key} 0\n")
        yield as_labels(key.partition("{")[0], {**sample.labels, **EXPORTER_LABELS}), values
