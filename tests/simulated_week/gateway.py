"""What a gateway publishes: 15 agents and a batch job share one key, which others use, too. Only the retreat is real."""

import random
from collections import Counter
from collections.abc import Iterator

from fleet.inventory.gateway import RetreatSettings
from gateway.metrics import Outcome
from gateway.retreat import STATES, Retreat
from tests.metric_names import GATEWAY
from tests.simulated_week.events import DAY, HOUR, MINUTE, MINUTES, Week
from tests.simulated_week.scrapes import Scrapes
from tests.simulated_week.store import Labels, as_labels

OWN = {"job": GATEWAY, "instance": "gateway:9190"}
AGENTS, MOST_EACH = 15, 4  # requests of an agent in a minute
BASE = 40.0
USED = 0.984  # of the rate
BATCH = 10  # requests of low priority in a minute, which wait for two seconds
REFUSED, FAILED = 0.003, 0.004  # shares of the requests
# Each day: others use the key for two minutes, the upstream fails for one, and the agents do much at once for three.
OTHERS, BLIP, BURST = 11 * HOUR, 13 * HOUR, 16 * HOUR
RESTART = 3 * DAY + 12 * HOUR


class SimulatedGateway:
    """One minute after the other. `counts` are the counters since the gateway was started, by name and labels."""

    def __init__(self, week: Week, seed: int) -> None:
        self._week, self._random = week, random.Random(f"{seed} gateway")
        self._retreat = Retreat(BASE, RetreatSettings(), 0.0)
        self._waiting = 0
        self._is_open = False
        self.counts: Counter[str] = Counter()

    def list_values(self, minute: int) -> Iterator[tuple[str, float]]:
        """Live for a minute, and yield the series with their values at its end."""
        at = minute * MINUTE
        if at == RESTART:
            self.counts.clear()
        self._answer(at)
        yield from self.counts.items()
        yield "gateway_queue_depth priority=normal", float(self._waiting)
        yield "gateway_rate_limit_per_minute", self._retreat.rate
        yield "gateway_base_rate_per_minute", BASE
        yield "gateway_breaker_open", float(self._is_open)
        yield "gateway_pause_seconds", 0.0
        for state in STATES:
            yield f"gateway_retreat_state state={state}", float(self._retreat.state == state)

    def _answer(self, at: float) -> None:
        arrived = self._count_arrivals(at)
        is_dead = at in self._week.dead_upstream
        self._is_open = is_dead or at % DAY == BLIP
        if self._is_open:
            status = "connection" if is_dead else "503"
            self._count(f"gateway_upstream_errors_total status={status}", 2)
            self._end("unavailable", arrived)
            return
        places = int(self._retreat.rate * USED)
        waiting = self._waiting + arrived
        sent = min(waiting, places)
        left = waiting - sent
        self._waiting = min(left, places)  # the others would wait for more than a minute
        self._end("timeout", left - self._waiting)
        low = min(BATCH, places - sent)
        self._end("timeout", BATCH - low, "low")
        for number in range(sent + low):
            self._send(at + MINUTE * number / places, "normal" if number < sent else "low")

    def _count_arrivals(self, at: float) -> int:
        of_day = at % DAY
        busy = 0.6 if 9 * HOUR <= of_day < 19 * HOUR else 0.05
        if BURST <= of_day < BURST + 3 * MINUTE:
            busy = 1.0
        return sum(self._random.random() < busy for _ in range(AGENTS * MOST_EACH))

    def _send(self, at: float, priority: str) -> None:
        refused = 0.1 if OTHERS <= at % DAY < OTHERS + 2 * MINUTE else REFUSED
        self._count(f"gateway_queue_wait_seconds_count priority={priority}")
        self._count("gateway_upstream_seconds_count")
        chance = self._random.random()
        is_refused, has_failed = chance < refused, refused <= chance < refused + FAILED
        if is_refused or has_failed:
            self._count(f"gateway_upstream_errors_total status={429 if is_refused else 502}")
        self._end("limited" if is_refused else "upstream_error" if has_failed else "ok", 1, priority)
        if not has_failed and self._retreat.note_answer(at, refused=is_refused) in ("retreating", "floor"):
            self._count("gateway_retreats_total")

    def _end(self, outcome: Outcome, requests: int, priority: str = "normal") -> None:
        for _ in range(requests):
            client = "batch" if priority == "low" else f"agent-{self._random.randrange(AGENTS):02}"
            self._count(f"gateway_requests_total client={client} priority={priority} outcome={outcome}")

    def _count(self, series: str, number: int = 1) -> None:
        self.counts[series] += number


def list_series(week: Week, scrapes: Scrapes, seed: int) -> Iterator[tuple[Labels, list[float | None]]]:
    """Yield the series; a counter is absent until it has counted something."""
    gateway = SimulatedGateway(week, seed)
    found: dict[str, list[float | None]] = {}
    for minute in range(MINUTES):
        for each, value in gateway.list_values(minute):
            values = found.setdefault(each, [None] * MINUTES)
            if scrapes.is_running[minute]:
                values[minute] = value
    for series, values in found.items():
        name, *labels = series.split()
        yield as_labels(name, {**dict(each.split("=") for each in labels), "provider": "nvidia", **OWN}), values
