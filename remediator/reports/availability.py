"""Availability of services, as reports and the console show it.

It is the ratio of the time in which a service was seen up to the time in which it was observed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from remediator.clients.prometheus import Series

DAY = 86400.0
SAMPLE_INTERVAL = 15.0  # seconds between two samples in the shipped configuration
MOST_SAMPLES = 200_000_000  # that one query reads; beyond that, averages of recorded hours are read
POINTS = 720  # of a service, by which the observed time is measured


@dataclass(frozen=True)
class Availability:
    """The ratio of the observed time in which a service was up, and that time in seconds, 0 if too short to say."""

    ratio: float
    observed: float


def availability_queries(span: float, services: int = 0) -> tuple[str, str]:
    """Return the queries for the ratios and for the observed seconds of `services` in the last `span` seconds."""
    if services * span / SAMPLE_INTERVAL > MOST_SAMPLES:
        hours = f"service:availability:hour[{span:.0f}s]"
        return f"avg_over_time({hours})", f"count_over_time({hours}) * 3600"
    step = 60 * max(1, math.ceil(span / POINTS / 60))
    observed = f"count_over_time(service:up:max[{span:.0f}s:{step}s]) * {step}"
    return f"avg_over_time(service:up:max[{span:.0f}s])", observed


def read_availability(ratios: Sequence[Series], observed: Sequence[Series]) -> dict[str, Availability]:
    """Return the availability by service.

    A service that has moved to another host has several series, of which each counts for as long as it was observed.
    """
    seconds = {frozenset(each.labels.items()): each.points[-1][1] for each in observed if each.points}
    found: dict[str, list[Availability]] = {}
    for each in ratios:
        ratio = each.points[-1][1] if each.points else math.nan
        time = seconds.get(frozenset(each.labels.items()), 0.0)
        if 0 <= ratio <= 1 and 0 <= time < math.inf:  # NaN is not
            found.setdefault(each.labels.get("service", ""), []).append(Availability(ratio, time))
    return {service: together for service, each in found.items() if (together := combine(each)) is not None}


def combine(availabilities: Sequence[Availability]) -> Availability | None:
    """Return the availability of several services together; None if none of them was observed."""
    if not availabilities:
        return None
    # Without an observed step, each was observed for less than one.
    weights = [each.observed or 1.0 for each in availabilities]
    ratio = sum(each.ratio * weight for each, weight in zip(availabilities, weights, strict=True)) / sum(weights)
    return Availability(ratio, sum(each.observed for each in availabilities))


def format_availability(ratio: float) -> str:
    """Return a ratio in percent, never rounded up to 100."""
    return f"{math.floor(round(ratio * 10_000, 6)) / 100:g} %"
