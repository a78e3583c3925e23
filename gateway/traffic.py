"""What one upstream was sent in the last minute, by client, and how fast it has answered. Times are parameters.

For each request, only counters change: who shows the numbers adds them up.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence

SPAN = 60.0  # seconds
ANSWERS = 500  # of the last minute, whose times are kept
QUANTILES: Mapping[str, float] = {"p50": 0.5, "p95": 0.95}


class Traffic:
    def __init__(self) -> None:
        self._in_flight: Counter[str] = Counter()  # by client
        self._seconds: deque[tuple[float, Counter[str]]] = deque()  # start of each second, and what was sent in it
        self._answers: deque[tuple[float, float]] = deque(maxlen=ANSWERS)  # when, and after how many seconds

    def begin(self, client: str) -> None:
        """Note that a request of a client may be sent."""
        self._in_flight[client] += 1

    def end(self, client: str) -> None:
        self._in_flight[client] -= 1
        if not self._in_flight[client]:
            del self._in_flight[client]

    def note_sent(self, client: str, now: float) -> None:
        if not self._seconds or now >= self._seconds[-1][0] + 1:
            self._forget(now)
            self._seconds.append((now, Counter()))
        self._seconds[-1][1][client] += 1

    def note_answer(self, seconds: float, now: float) -> None:
        """Note how long it took until a response began."""
        self._answers.append((now, seconds))

    def count_in_flight(self) -> Mapping[str, int]:
        return dict(self._in_flight)

    def count_sent(self, now: float) -> Mapping[str, int]:
        """Return how many requests of each client were sent in the last minute."""
        self._forget(now)
        return dict(sum((each for _, each in self._seconds), Counter[str]()))

    def find_latencies(self, now: float) -> Mapping[str, float | None]:
        """Return how long the responses of the last minute took to begin; None without responses."""
        found = sorted(seconds for at, seconds in self._answers if at > now - SPAN)
        return {name: _find_quantile(found, quantile) for name, quantile in QUANTILES.items()}

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= now - SPAN:
            self._seconds.popleft()


def _find_quantile(ordered: Sequence[float], quantile: float) -> float | None:
    return ordered[math.ceil(quantile * len(ordered)) - 1] if ordered else None
