"""Early probes of the services of a host that has stopped answering: their last results may be from long ago."""

import random
from collections.abc import Iterable

from exporter.results import FailureReason
from exporter.scheduler.probed_service import ProbedService

WITHIN = 5.0  # seconds: early probes of a host are spread, since it may have many services and be one of many hosts
PAUSE = 60.0  # seconds until the same host's services are probed early again, however often it changes
# Reasons of failed probes after which the host itself may be down; others are answers.
SILENT: frozenset[FailureReason | None] = frozenset({"connect", "timeout"})


class EarlyProbes:
    """Makes services due early, and remembers for each host when it last did."""

    def __init__(self, randomness: random.Random) -> None:
        self._random = randomness
        self._last: dict[str, float] = {}

    def start(self, host: str, services: Iterable[ProbedService], now: float) -> None:
        """Make those due that are not being retried anyway; `now` is of the event loop's clock."""
        last = self._last.get(host)
        if last is not None and now - last < PAUSE:
            return
        self._last[host] = now
        for probed in services:
            if probed.state.is_steadily_up:
                probed.make_due(now + self._random.uniform(0, WITHIN))

    def forget(self, hosts: Iterable[str]) -> None:
        for host in hosts:
            self._last.pop(host, None)
