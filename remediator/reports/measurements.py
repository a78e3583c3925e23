"""What Prometheus knows of a span: availability, GPU use, certificates and disks. Each part may be missing alone."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fleet.json_client import ClientError, parsing_response
from remediator.clients.prometheus import Prometheus, Series
from remediator.reports.availability import DAY, Availability, availability_queries, read_availability
from remediator.reports.report import Certificate, Disk, GpuUse, Part

PARTS: tuple[Part, ...] = ("availability", "gpus", "certificates", "disks")
WITHIN = 150.0  # seconds for all queries; reading weeks of thousands of services takes long
AT_ONCE = 2  # queries
GPU_POINTS = 500  # of a container on a GPU, by which its use is measured
CERTIFICATE_WITHIN = 30 * DAY
CERTIFICATE_LIFE_LEFT = 1 / 3  # of a certificate that is valid for less than three months
FULL_WITHIN, FILLED_OVER, LEAST_HISTORY = 14 * DAY, "3d", "1d"
LEAST_FILLED = 0.5  # of a disk that is said to be full soon
LATEST = 253402128000.0  # Unix time that has a date in every time zone
_USE = 'max by (host, gpu, container) (gpu_process_memory_bytes{job="defib-exporter"})'
_UTILIZATION = 'max by (host, gpu) (gpu_utilization_ratio{job="defib-exporter"})'
_FIRING = 'ALERTS{alertname=~"HostDiskFull|HostInodesFull", alertstate="firing"}'
DISK_LABELS = ("host", "mountpoint", "alertname", "severity")
_DISK_ALERTS = f"max by ({', '.join(DISK_LABELS)}) ({_FIRING})"
_FULL_IN = (
    f"host:filesystem_available_bytes:max / -(deriv(host:filesystem_available_bytes:max[{FILLED_OVER}]) < 0)"
    f" < {FULL_WITHIN:.0f} and host:filesystem_usage:ratio > {LEAST_FILLED}"
    f" and host:filesystem_available_bytes:max offset {LEAST_HISTORY}"
)
_WATCHED_DISKS = f"group by (host, mountpoint) ({_DISK_ALERTS}) or group by (host, mountpoint) ({_FULL_IN})"
_EXPIRES = "service:certificate_expiry_timestamp_seconds:min"
_CERTIFICATES = (
    f"{_EXPIRES} < time() + {CERTIFICATE_WITHIN:.0f}"
    f" unless {_EXPIRES} - time() >= service:certificate_lifetime_seconds:min * {CERTIFICATE_LIFE_LEFT:.4f}"
)

# Runs queries for the values at the end of the span.
Query = Callable[[str], Awaitable[list[Series]]]


@dataclass(frozen=True)
class Measurements:
    """`missing` says by part why it is not known."""

    availability: Mapping[str, Availability] = field(default_factory=dict)  # by service
    gpus: Sequence[GpuUse] = ()
    gpu_count: int = 0
    gpu_utilization: float | None = None
    certificates: Sequence[Certificate] = ()  # named by the ids of their services
    disks: Sequence[Disk] = ()
    missing: Mapping[Part, str] = field(default_factory=dict)


async def measure(client: Prometheus, start: float, end: float, services: int, within: float = WITHIN) -> Measurements:
    """Query Prometheus about the time between two Unix times, for at most `within` seconds."""
    slots, deadline = asyncio.Semaphore(AT_ONCE), asyncio.get_running_loop().time() + within
    missing: dict[Part, str] = {}
    found = Measurements()

    async def query(expression: str) -> list[Series]:
        try:
            async with asyncio.timeout_at(deadline), slots:
                return await client.query(expression, within + 1, end)
        except TimeoutError as error:
            raise ClientError(f"no response within {within:g} s") from error

    async def add(part: Part, read: Awaitable[dict[str, Any]]) -> None:
        nonlocal found
        try:
            with parsing_response():
                values = await read
        except ClientError as error:
            missing[part] = f"cannot query Prometheus: {error}"
        else:
            found = replace(found, **values)

    await asyncio.gather(  # what takes longest comes last
        add("certificates", _read_certificates(query)),
        add("disks", _read_disks(query)),
        add("gpus", _read_gpus(query, end - start)),
        add("availability", _read_availability(query, end - start, services)),
    )
    return replace(found, missing=missing)


async def _read_availability(query: Query, span: float, services: int) -> dict[str, Any]:
    ratios, observed = await asyncio.gather(*map(query, availability_queries(span, services)))
    return {"availability": await asyncio.to_thread(read_availability, ratios, observed)}


async def _read_gpus(query: Query, span: float) -> dict[str, Any]:
    step = 60 * max(1, math.ceil(span / GPU_POINTS / 60))
    window = f"[{span:.0f}s:{step}s]"
    while_used = f"({_UTILIZATION} * on (host, gpu) group_right () ({_USE} * 0 + 1))"
    seen, memory, hours, utilization, cards, average = await asyncio.gather(
        *(
            query(expression)
            for expression in (
                f"count by (host, container) (count_over_time(({_USE}){window}))",
                f"sum by (host, container) (avg_over_time(({_USE}){window}))",
                f"sum by (host, container) (count_over_time(({_USE}){window})) * {step} / 3600",
                f"avg by (host, container) (avg_over_time({while_used}{window}))",
                f"count(count_over_time(({_UTILIZATION}){window}))",
                f"avg(avg_over_time(({_UTILIZATION}){window}))",
            )
        )
    )
    return await asyncio.to_thread(_parse_gpus, seen, memory, hours, utilization, cards, average)


def _parse_gpus(
    seen: list[Series],
    memory: list[Series],
    hours: list[Series],
    utilization: list[Series],
    cards: list[Series],
    average: list[Series],
) -> dict[str, Any]:
    by_memory, by_hours, busy = (_by(each, "host", "container") for each in (memory, hours, utilization))
    return {
        "gpus": [
            GpuUse(*key, int(count), by_hours.get(key, 0.0), by_memory.get(key, 0.0), busy.get(key))
            for key, count in _by(seen, "host", "container").items()
        ],
        "gpu_count": int(_single(cards) or 0),
        "gpu_utilization": _single(average),
    }


async def _read_certificates(query: Query) -> dict[str, Any]:
    expires: dict[str, float] = {}
    for each in await query(f"min by (service) ({_CERTIFICATES})"):
        service, at = each.labels.get("service", ""), each.points[-1][1]
        if 0 <= at <= LATEST:
            expires[service] = at
    return {"certificates": [Certificate(service, service, at) for service, at in expires.items()]}


async def _read_disks(query: Query) -> dict[str, Any]:
    firing, full_in, used, available = await asyncio.gather(
        query(_DISK_ALERTS),
        query(_FULL_IN),
        query(f"host:filesystem_usage:ratio and on (host, mountpoint) ({_WATCHED_DISKS})"),
        query(f"host:filesystem_available_bytes:max and on (host, mountpoint) ({_WATCHED_DISKS})"),
    )
    return await asyncio.to_thread(_parse_disks, firing, full_in, used, available)


def _parse_disks(
    firing: list[Series], full_in: list[Series], used: list[Series], available: list[Series]
) -> dict[str, Any]:
    alerts: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # severities by name
    for each in firing:
        host, mountpoint, alert, severity = (each.labels.get(label, "") for label in DISK_LABELS)
        known = alerts[host, mountpoint].get(alert, severity)
        alerts[host, mountpoint][alert] = min(known, severity)  # critical comes before warning
    ends, ratios, left = (_by(each, "host", "mountpoint") for each in (full_in, used, available))
    return {
        "disks": [
            Disk(
                *key, ratios.get(key), left.get(key), ends.get(key), sorted(alerts.get(key, ())),
                min(alerts.get(key, {}).values(), default=""),
            )
            for key in {**alerts, **ends}
        ]
    }  # fmt: skip


def _by(results: Sequence[Series], first: str, second: str = "") -> dict[tuple[str, str], float]:
    """Return the values by the values of two labels, without those that are no finite numbers."""
    return {
        (each.labels.get(first, ""), each.labels.get(second, "")): each.points[-1][1]
        for each in results
        if each.points and math.isfinite(each.points[-1][1])
    }


def _single(results: Sequence[Series]) -> float | None:
    return next(iter(_by(results, "").values()), None)
