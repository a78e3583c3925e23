"""What the collector `logs` counts: lines that match a pattern, and requests of the web server in front of a host's services."""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping

from tests.simulated_week.events import DAY, WEEK, Span, Week

SERVED = ("api", "app")  # the services of a host to which the web server passes requests, each one half
REQUESTS_A_SECOND = 5.0
FAIL_BY_CHANCE = 0.0005
ERRORS_A_DAY = 20
ERRORS_OF_A_STOP = 3

Counter = Callable[[float], float]


def list_counters(week: Week, host: str, seed: int) -> Iterator[tuple[str, Counter, Mapping[str, str]]]:
    """Yield name, number since the week began at a time, and labels of every counter."""
    randomness = random.Random(f"{seed} logs {host}")
    unserved = [span for kind in SERVED for span in _list_unserved(week, f"{host}-{kind}")]
    errors = sorted(
        [
            *(randomness.uniform(0, WEEK) for _ in range(round(ERRORS_A_DAY * WEEK / DAY))),
            *(span.begin for span in unserved for _ in range(ERRORS_OF_A_STOP)),
        ]
    )
    yield "host_log_matches_total", lambda at: float(bisect_right(errors, at)), {
        "source": "app.service", "pattern": "error",
    }  # fmt: skip

    def failed(at: float) -> float:
        each = REQUESTS_A_SECOND / len(SERVED)
        stopped = sum(each * (min(at, span.end) - span.begin) for span in unserved if span.begin < at)
        return float(int(stopped + FAIL_BY_CHANCE * REQUESTS_A_SECOND * at))

    access = {"source": "/var/log/nginx/access.log"}
    yield "host_http_requests_total", lambda at: float(int(REQUESTS_A_SECOND * at)) - failed(at), {
        **access, "code": "200",
    }  # fmt: skip
    yield "host_http_requests_total", failed, {**access, "code": "502"}


def _list_unserved(week: Week, service: str) -> list[Span]:
    """Return when requests to a service fail."""
    return [*week.redeploys.get(service, ()), *week.down.get(service, ())]
