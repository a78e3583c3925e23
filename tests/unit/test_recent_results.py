"""The last results of a service: their content, and the memory they take."""

import tracemalloc

from exporter.results import FailureReason, ProbeDetails, ProbeResult
from exporter.scheduler.recent_results import LIMIT, RecentResult, RecentResults

BYTES_LIMIT = 3 * 1024


def result(reason: FailureReason | None, started_at: float = 1.8e9) -> ProbeResult:
    return ProbeResult(reason is None, reason, "", started_at, 0.123456, ProbeDetails())


def test_results_keep_their_time_duration_and_reason() -> None:
    results = RecentResults()
    results.add(result(None, 1800000000.123456))
    results.add(result("connect", 1800000030.5))
    assert list(results) == [
        RecentResult(1800000000.123456, 0.123456, None),
        RecentResult(1800000030.5, 0.123456, "connect"),
    ]


def test_probes_that_could_not_be_carried_out_have_a_mark_of_their_own() -> None:
    results = RecentResults()
    assert results.marks == ""
    reasons: tuple[FailureReason | None, ...] = (None, "status", "shell", "tls", "error", "timeout", None)
    for reason in reasons:
        results.add(result(reason))
    assert results.marks == "+-???-+"


def test_the_oldest_results_are_dropped() -> None:
    results = RecentResults()
    for number in range(LIMIT + 7):
        results.add(result(None, float(number)))
    assert [each.started_at for each in results] == [float(number) for number in range(7, LIMIT + 7)]
    assert results.marks == "+" * LIMIT


def test_the_results_of_a_service_take_at_most_3_kb() -> None:
    services = 200
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = [RecentResults() for _ in range(services)]
        for number in range(2 * LIMIT):
            for results in kept:
                results.add(result("timeout", float(number)))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / services <= BYTES_LIMIT
