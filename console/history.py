"""What Prometheus knows of the past: availability and latency of all services, and charts of one."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from console.charts import Chart, Lines, Point
from fleet.inventory.endpoints import Endpoint
from fleet.json_client import ClientError
from remediator.clients.prometheus import Prometheus, Series
from remediator.reports.availability import DAY, Availability, availability_queries, read_availability
from runtime.logs import LimitedLog
from runtime.shared_reads import SharedReads

REFRESH_EVERY = 300.0
SUMMARY_TIMEOUT, CHART_TIMEOUT = 30.0, 2.0  # seconds; a page waits only for charts
CHART_POINTS = 240
SLOW = "Prometheus is slow"
SPANS: Mapping[str, float] = {
    "1h": 3600.0,
    "6h": 6 * 3600.0,
    "24h": DAY,
    "7d": 7 * DAY,
    "30d": 30 * DAY,
    "90d": 90 * DAY,
}
HOST_SPANS: Mapping[str, float] = {name: SPANS[name] for name in ("1h", "6h", "24h", "7d")}
SHORTEST_STEP = 60.0  # seconds of a host's chart: collectors run less often than probes
DISKS_SHOWN = 5
HIGHEST = 1e12  # a value that something measured may have
NO_LATENCY = Chart("latency", "seconds", ())
log = structlog.get_logger()
limited_log = LimitedLog()


@dataclass(frozen=True)
class ServiceHistory:
    """The availability of a service in the last 24 hours and 30 days, and its latency."""

    day: Availability | None = None
    month: Availability | None = None
    latency: Sequence[Point] = ()


@dataclass(frozen=True)
class ServiceCharts:
    """A service's history between two Unix times; `problem` says why there is none."""

    start: float = 0.0
    end: float = 0.0
    states: Sequence[tuple[float, float, str]] = ()  # from, to, ok or bad
    latency: Chart = NO_LATENCY  # by phase
    problem: str = ""


@dataclass(frozen=True)
class ChartGroup:
    """Charts between two Unix times, such as of what a host used; `problem` says why there are none."""

    start: float = 0.0
    end: float = 0.0
    charts: Sequence[Chart] = ()
    problem: str = ""


class History:
    """Reads and caches history. `get_endpoint` returns Prometheus' address in force, None without one."""

    def __init__(self, get_endpoint: Callable[[], Endpoint | None]) -> None:
        self._get_endpoint = get_endpoint
        self._lock = asyncio.Lock()
        self._endpoint: Endpoint | None = None
        self._client: Prometheus | None = None
        self._read_at = float("-inf")
        self._charts = SharedReads(running=3, waiting=20, shared_for=5.0)
        self.services: Mapping[str, ServiceHistory] = {}
        self.start = self.end = 0.0  # Unix times between which latencies are

    async def run(self, wait_until_watched: Callable[[], Awaitable[None]]) -> None:
        """Keep the history fresh while somebody watches."""
        while True:
            await wait_until_watched()
            try:
                await self.refresh()
            except Exception:  # the next round may succeed
                if limited_log.admits("history_failed"):
                    log.exception("history_failed")
            await asyncio.sleep(1.0)

    async def refresh(self) -> None:
        """Read the history of all services again if it is old."""
        now = asyncio.get_running_loop().time()
        if now - self._read_at < REFRESH_EVERY:
            return
        self._read_at = now
        client = await self._connect()
        if client is None:
            self.services = {}
            return
        end = time.time()
        try:
            day, day_observed, month, month_observed, latency = await asyncio.gather(
                *(
                    client.query(expression, SUMMARY_TIMEOUT)
                    for span in (DAY, 30 * DAY)
                    for expression in availability_queries(span)
                ),
                client.query_range("service:probe_duration_seconds:avg5m", end - DAY, end, DAY / 48, SUMMARY_TIMEOUT),
            )
        except ClientError as error:
            limited_log.warning("history_not_read", error=str(error))
            self.services = {}  # what is old is not shown as if it were new
            return
        days = await asyncio.to_thread(read_availability, day, day_observed)
        months = await asyncio.to_thread(read_availability, month, month_observed)
        lines = {each.labels.get("service", ""): each for each in latency}
        self.start, self.end = end - DAY, end
        self.services = {
            name: ServiceHistory(
                days.get(name), months.get(name),
                _within(lines[name], end - DAY, end).points if name in lines else (),
            )
            for name in {*days, *months, *lines}
        }  # fmt: skip

    async def read_service(self, service: str, span: float) -> ServiceCharts:
        """Return the charts of a service for the last `span` seconds."""
        try:
            return await self._charts.read(
                ("service", service, span), lambda: self._read_service(service, span), CHART_TIMEOUT
            )
        except TimeoutError:
            return ServiceCharts(problem=SLOW)

    async def _read_service(self, service: str, span: float) -> ServiceCharts:
        end = time.time()
        start, step = end - span, max(15.0, span / CHART_POINTS)
        selector = f"{{service={json.dumps(service)}}}"
        try:
            ups, phases = await self.query_ranges(
                start, end, step,
                f"min_over_time(service:up:max{selector}[{step:.0f}s])",
                f"max by (phase) (service_probe_phase_seconds{selector})",
            )  # fmt: skip
        except ClientError as error:
            return ServiceCharts(problem=str(error))
        points = [point for series in ups for point in series.points]
        latency = Chart("latency", "seconds", name_lines(phases, "phase"))
        return ServiceCharts(start, end, _states_of(sorted(points), step), latency)

    async def read_host(self, host: str, span: float) -> ChartGroup:
        """Return the charts of a host for the last `span` seconds: the average and the maximum of each step."""
        return await self.share(("host", host, span), lambda: self._read_host(host, span))

    async def share(self, key: Hashable, read: Callable[[], Awaitable[ChartGroup]]) -> ChartGroup:
        """Return the charts that `read` returns, or another page has just read."""
        try:
            return await self._charts.read(key, read, CHART_TIMEOUT)
        except TimeoutError:
            return ChartGroup(problem=SLOW)

    async def _read_host(self, host: str, span: float) -> ChartGroup:
        end = time.time()
        start, step = end - span, max(SHORTEST_STEP, span / CHART_POINTS)
        of = f"{{host={json.dumps(host)}}}[{step:.0f}s]"
        memory = f"1 - avg_over_time(host_memory_available_bytes{of}) / avg_over_time(host_memory_total_bytes{of})"
        used = f"1 - min_over_time(host_memory_available_bytes{of}) / max_over_time(host_memory_total_bytes{of})"
        free = f"min_over_time(host_filesystem_available_bytes{of})"
        size = f"max_over_time(host_filesystem_size_bytes{of})"
        gpu_memory = "{0}({0}_over_time(gpu_memory_used_bytes{1}) / {0}_over_time(gpu_memory_total_bytes{1}))"
        expressions = {
            "cpu": (f"avg_over_time(host_cpu_usage_ratio{of})", f"max_over_time(host_cpu_usage_ratio{of})"),
            "memory": (memory, used),
            "gpu": (f"avg(avg_over_time(gpu_utilization_ratio{of}))", f"max(max_over_time(gpu_utilization_ratio{of}))"),
            "gpu_memory": (gpu_memory.format("avg", of), gpu_memory.format("max", of)),
        }
        every = [each for pair in expressions.values() for each in pair]
        try:
            *found, by_disk = await self.query_ranges(
                start, end, step, *every, f"max by (mountpoint) (1 - {free} / {size})"
            )
        except ClientError as error:
            return ChartGroup(problem=str(error))
        pairs = zip(expressions, found[::2], found[1::2], strict=True)
        charts = [
            Chart(name, "ratio", [*name_lines(average, "", "average"), *name_lines(most, "", "maximum")])
            for name, average, most in pairs
        ]
        fullest = sorted(name_lines(by_disk, "mountpoint"), key=lambda line: -line[1][-1][1])[:DISKS_SHOWN]
        charts.append(Chart("disk", "ratio", fullest))
        return ChartGroup(start, end, [each for each in charts if each.lines])

    async def check(self) -> None:
        """Raise ClientError unless Prometheus answers a query."""
        await self.query_ranges(time.time() - 60, time.time(), 60, "vector(1)")

    async def query_ranges(self, start: float, end: float, step: float, *expressions: str) -> list[list[Series]]:
        """Return the values of expressions. Raises ClientError, also if there is no Prometheus, or it is slow."""
        client = await self._connect()
        if client is None:
            raise ClientError("remediator.prometheus_url is not set")
        try:
            async with asyncio.timeout(CHART_TIMEOUT):
                found = await asyncio.gather(
                    *(client.query_range(each, start, end, step, CHART_TIMEOUT) for each in expressions)
                )
        except TimeoutError as error:
            raise ClientError(SLOW) from error
        except ClientError as error:
            raise ClientError(f"cannot query Prometheus: {error}") from error
        return [[_within(each, start - step, end + step) for each in series] for series in found]

    async def _connect(self) -> Prometheus | None:
        async with self._lock:
            endpoint = self._get_endpoint()
            if endpoint is not self._endpoint:
                await self.close()
                self._client = await asyncio.to_thread(Prometheus, endpoint) if endpoint is not None else None
                self._endpoint, self._read_at = endpoint, float("-inf")
            return self._client

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


def _within(series: Series, start: float, end: float) -> Series:
    """Return a series without points that cannot be drawn, whatever the server has sent."""
    points = [(at, value) for at, value in series.points if start <= at <= end and abs(value) <= HIGHEST]  # NaN is not
    return Series(series.labels, points)


def name_lines(results: Sequence[Series], label: str, name: str = "") -> Lines:
    """Return the lines of series that have values, by a label or, if there is one series, under a name."""
    lines = [(each.labels.get(label, name), each.points) for each in results]
    return sorted(line for line in lines if line[1])


def _states_of(points: Sequence[Point], step: float) -> list[tuple[float, float, str]]:
    """Return the intervals in which a service was up or down; where nothing was observed there is none."""
    states: list[tuple[float, float, str]] = []
    for at, value in points:
        state = "ok" if value >= 1 else "bad"
        begin = at - step
        if states and states[-1][2] == state and begin - states[-1][1] < step:
            states[-1] = (states[-1][0], at, state)
        else:
            states.append((begin, at, state))
    return states
