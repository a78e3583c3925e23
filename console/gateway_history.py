"""Charts of the gateway, from its metrics in Prometheus."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from console.charts import Chart, Lines
from console.history import CHART_POINTS, SHORTEST_STEP, ChartGroup, History, name_lines
from fleet.inventory.gateway import PRIORITIES
from fleet.json_client import ClientError
from remediator.clients.prometheus import Series

LINES_SHOWN = 5  # of a chart: there are as many colours
UPSTREAMS_SHOWN = 4
# Outcomes of `gateway_requests_total`.
_SENT = "ok|limited|no_credit|client_error|upstream_error|broken"
_REFUSED = "queue_full|dropped|timeout|paused|unavailable|shutting_down"
_THROUGHPUT: Mapping[str, str] = {
    "requests": ".*", "answered": "ok|client_error", "limited": "limited|no_credit", "errors": "upstream_error|broken",
    "refused": _REFUSED,
}  # fmt: skip
_QUANTILES: Mapping[str, float] = {"p50": 0.5, "p95": 0.95}


async def read_gateway(history: History, span: float) -> ChartGroup:
    """Return the charts for the last `span` seconds."""
    return await history.share(("gateway", span), lambda: _read(history, span))


async def _read(history: History, span: float) -> ChartGroup:
    end = time.time()
    start, step = end - span, max(SHORTEST_STEP, span / CHART_POINTS)
    within = f"[{max(step, 2 * SHORTEST_STEP):.0f}s]"  # at least some scrapes
    makers = (_throughput, _clients, _rates, _limited, _latency, _waiting)
    made = [maker(within) for maker in makers]
    try:
        found = await asyncio.gather(*(history.query_ranges(start, end, step, *expressions) for expressions, _ in made))
    except ClientError as error:
        return ChartGroup(problem=str(error))
    charts = [chart for (_, draw), series in zip(made, found, strict=True) for chart in draw(series)]
    return ChartGroup(start, end, [each for each in charts if each.lines])


# The expressions of charts, and what makes the charts of their series.
_Made = tuple[Sequence[str], Callable[[list[list[Series]]], list[Chart]]]


def _per_minute(selector: str, within: str, by: str = "") -> str:
    """Return a number of events per minute, which is 0 while the gateway runs without such events."""
    group = f" by ({by})" if by else ""
    return f"60 * sum{group} (rate({selector}{within})) or 0 * sum{group} (gateway_in_flight)"


def _throughput(within: str) -> _Made:
    expressions = [
        _per_minute(f'gateway_requests_total{{outcome=~"{outcomes}"}}', within) for outcomes in _THROUGHPUT.values()
    ]

    def draw(found: list[list[Series]]) -> list[Chart]:
        return [Chart("throughput", "per_minute", _one_each(found, _THROUGHPUT))]

    return expressions, draw


def _clients(within: str) -> _Made:
    expression = f'60 * sum by (client) (rate(gateway_requests_total{{outcome=~"{_SENT}"}}{within}))'

    def draw(found: list[list[Series]]) -> list[Chart]:
        lines = sorted(name_lines(found[0], "client"), key=lambda line: -sum(value for _, value in line[1]))
        return [Chart("clients", "per_minute", lines[:LINES_SHOWN])]

    return [expression], draw


def _rates(within: str) -> _Made:
    """What was sent, and what may be sent, one chart for each provider."""
    expressions = [
        _per_minute(f'gateway_requests_total{{outcome=~"{_SENT}"}}', within, "provider"),
        f"min by (provider) (min_over_time(gateway_rate_limit_per_minute{within}))",
        f"max by (provider) (max_over_time(gateway_base_rate_per_minute{within}))",
    ]
    names = ("sent", "effective_rate", "base_rate")

    def draw(found: list[list[Series]]) -> list[Chart]:
        providers = sorted({each.labels.get("provider", "") for each in found[1]})
        return [
            Chart("rate", "per_minute", _one_each(_of_provider(found, name), names), name if providers[1:] else "")
            for name in providers[:UPSTREAMS_SHOWN]
        ]

    return expressions, draw


def _limited(within: str) -> _Made:
    expression = _per_minute('gateway_upstream_errors_total{status="429"}', within, "provider")

    def draw(found: list[list[Series]]) -> list[Chart]:
        return [Chart("limited", "per_minute", name_lines(found[0], "provider")[:LINES_SHOWN])]

    return [expression], draw


def _latency(within: str) -> _Made:
    bucket = f"sum by (le) (rate(gateway_upstream_seconds_bucket{within}))"
    expressions = [f"histogram_quantile({quantile}, {bucket})" for quantile in _QUANTILES.values()]

    def draw(found: list[list[Series]]) -> list[Chart]:
        return [Chart("upstream_latency", "seconds", _one_each(found, _QUANTILES))]

    return expressions, draw


def _waiting(within: str) -> _Made:
    bucket = f"sum by (le, priority) (rate(gateway_queue_wait_seconds_bucket{within}))"

    def draw(found: list[list[Series]]) -> list[Chart]:
        lines = dict(name_lines(found[0], "priority"))
        return [Chart("waiting", "seconds", [(name, lines[name]) for name in PRIORITIES if name in lines])]

    return [f"histogram_quantile(0.95, {bucket})"], draw


def _of_provider(found: list[list[Series]], name: str) -> list[list[Series]]:
    return [[each for each in series if each.labels.get("provider", "") == name] for series in found]


def _one_each(found: Sequence[Sequence[Series]], names: Sequence[str] | Mapping[str, object]) -> Lines:
    """Return the only series of each result under a name, in this order, which decides about the colours."""
    pairs = zip(names, found, strict=True)
    return [(name, each.points) for name, series in pairs for each in series[:1] if each.points]
