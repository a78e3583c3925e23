"""Prometheus metrics of the gateway. No label has the name of a model: clients could make up as many as they like."""

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fleet.inventory.gateway import PRIORITIES
from gateway.retreat import STATES
from runtime.metrics import ProgramMetrics

# How requests end: answered; refused by the upstream for its limit, or for lack of credit; answered with another 4xx;
# failed before or while the response was passed on; left by the client; refused by the gateway, for several reasons.
Outcome = Literal[
    "ok", "limited", "no_credit", "client_error", "upstream_error", "broken", "cancelled",
    "queue_full", "dropped", "timeout", "paused", "unavailable", "shutting_down",
]  # fmt: skip
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
# What people count: an outcome that is not here was a refusal of the gateway.
_KINDS: Mapping[str, str] = {
    "ok": "answered", "client_error": "answered", "limited": "limited", "no_credit": "limited",
    "upstream_error": "errors", "broken": "errors", "cancelled": "cancelled",
}  # fmt: skip
KINDS = ("answered", "limited", "refused", "errors", "cancelled")
_COUNTED_AS_OUTCOME = (*OUTCOMES, "upstream_failed")  # codes of errors of requests that have an outcome, too
_WAITS = (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
_UPSTREAM = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
_OVERHEAD = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)


@dataclass
class UpstreamState:
    """What the metrics show of an upstream, or together of those of one provider."""

    provider: str
    in_flight: int = 0
    depths: list[int] = field(default_factory=lambda: [0] * len(PRIORITIES))
    rate: float = 0.0
    base_rate: float = 0.0
    available: float = 0.0
    retreat: int = 0  # the index of the state in STATES
    is_open: bool = False
    pause: float = 0.0  # seconds

    def add(self, other: "UpstreamState") -> None:
        self.in_flight += other.in_flight
        self.depths = [one + two for one, two in zip(self.depths, other.depths, strict=True)]
        self.rate += other.rate
        self.base_rate += other.base_rate
        self.available += other.available
        self.retreat = max(self.retreat, other.retreat)
        self.is_open = self.is_open or other.is_open
        self.pause = max(self.pause, other.pause)


class GatewayMetrics(ProgramMetrics):
    """`list_states` returns the present states of the upstreams; `is_shared` whether several gateways count together.

    `is_shared` returns None if they need not.
    """

    def __init__(
        self,
        list_states: Callable[[], Iterable[UpstreamState]] = tuple,
        is_shared: Callable[[], bool | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.is_shared = is_shared
        registry = self.registry
        self.requests = Counter(
            "gateway_requests",
            "Requests by outcome.",
            ["provider", "client", "priority", "outcome"],
            registry=registry,
        )
        self.refused = Counter(
            "gateway_requests_refused",
            "Requests that the gateway has refused, by the code of its error.",
            ["client", "code"],
            registry=registry,
        )
        self.passed_through = Counter(
            "gateway_requests_passed_through",
            "Requests that were sent beyond the rate, since the queue was full.",
            ["provider", "client"],
            registry=registry,
        )
        self.queue_wait = Histogram(
            "gateway_queue_wait_seconds",
            "How long requests that were sent had waited for the upstream's limits.",
            ["provider", "priority"],
            buckets=_WAITS,
            registry=registry,
        )
        self.upstream_seconds = Histogram(
            "gateway_upstream_seconds",
            "Time from sending a request to the beginning of the response.",
            ["provider"],
            buckets=_UPSTREAM,
            registry=registry,
        )
        self.upstream_errors = Counter(
            "gateway_upstream_errors",
            "Failures of upstreams by status: 4xx and 5xx, or `connection` where there was no response.",
            ["provider", "status"],
            registry=registry,
        )
        self.retreats = Counter("gateway_retreats", "Cuts of the rate.", ["provider"], registry=registry)
        self.tokens = Counter(
            "gateway_tokens", "Tokens, counted by upstreams or estimated.", ["provider", "client"], registry=registry
        )
        self.overhead = Histogram(
            "gateway_overhead_seconds",
            "Time that the gateway itself took before it sent a request, without waiting.",
            buckets=_OVERHEAD,
            registry=registry,
        )
        registry.register(_States(list_states))
        registry.register(_SharedLimits(is_shared))

    def count_request(self, provider: str, client: str, priority: str, outcome: Outcome) -> None:
        self.requests.labels(provider, client, priority, outcome).inc()

    def sum_up(self) -> Mapping[str, Counts[str]]:
        """Return how many requests of each client ended how, by KINDS, since the start."""
        found: dict[str, Counts[str]] = {}
        for labels, number in _read(self.requests):
            found.setdefault(labels["client"], Counts())[_KINDS.get(labels["outcome"], "refused")] += number
        for labels, number in _read(self.refused):
            if labels["code"] not in _COUNTED_AS_OUTCOME:
                found.setdefault(labels["client"], Counts())["refused"] += number
        return found

    def count_passed_through(self) -> int:
        return sum(number for _, number in _read(self.passed_through))

    def begin_counting_refusals(self, providers: Iterable[str]) -> None:
        """Begin the series of 429 with 0: of a series that begins with 1, Prometheus sees no increase."""
        for provider in providers:
            self.upstream_errors.labels(provider, "429")

    def count_upstream_error(self, provider: str, status: int | None) -> None:
        known = status is not None and 400 <= status < 600  # noqa: PLR2004 - others would be further series
        text = "connection" if status is None else str(status) if known else "other"
        self.upstream_errors.labels(provider, text).inc()


def _read(counter: Counter) -> Iterator[tuple[Mapping[str, str], int]]:
    """Yield the labels and the value of each series."""
    for metric in counter.collect():
        yield from ((each.labels, round(each.value)) for each in metric.samples if each.name.endswith("_total"))


class _States(Collector):
    def __init__(self, list_states: Callable[[], Iterable[UpstreamState]]) -> None:
        self._list_states = list_states

    def describe(self) -> Iterable[Metric]:
        return list(_render([]))

    def collect(self) -> Iterator[Metric]:
        by_provider: dict[str, UpstreamState] = {}
        for state in self._list_states():
            by_provider.setdefault(state.provider, UpstreamState(state.provider)).add(state)
        yield from _render(list(by_provider.values()))


class _SharedLimits(Collector):
    def __init__(self, is_shared: Callable[[], bool | None]) -> None:
        self._is_shared = is_shared

    def collect(self) -> Iterator[Metric]:
        available = self._is_shared()
        family = GaugeMetricFamily(
            "gateway_shared_limits_available", "1 while several gateways count together in Redis."
        )
        if available is not None:
            family.add_metric([], float(available))
        yield family


def _render(states: list[UpstreamState]) -> Iterator[Metric]:
    gauges: list[tuple[str, str, Callable[[UpstreamState], float]]] = [
        ("gateway_in_flight", "Requests that were sent and are not answered.", lambda state: state.in_flight),
        ("gateway_rate_limit_per_minute", "The effective rate.", lambda state: state.rate),
        ("gateway_base_rate_per_minute", "The configured rate.", lambda state: state.base_rate),
        ("gateway_requests_available", "Requests that may be sent without waiting.", lambda state: state.available),
        ("gateway_breaker_open", "1 if an upstream fails and gets no requests.", lambda state: state.is_open),
        ("gateway_pause_seconds", "How long an upstream still wants no requests.", lambda state: state.pause),
    ]
    for name, help_, read in gauges:
        family = GaugeMetricFamily(name, help_, labels=["provider"])
        for state in states:
            family.add_metric([state.provider], float(read(state)))
        yield family
    depths = GaugeMetricFamily("gateway_queue_depth", "Requests that wait.", labels=["provider", "priority"])
    retreat = GaugeMetricFamily(
        "gateway_retreat_state", "1 for the present state of the rate.", labels=["provider", "state"]
    )
    for state in states:
        for priority, depth in zip(PRIORITIES, state.depths, strict=True):
            depths.add_metric([state.provider, priority], depth)
        for index, name in enumerate(STATES):
            retreat.add_metric([state.provider, name], float(index == state.retreat))
    yield from (depths, retreat)
