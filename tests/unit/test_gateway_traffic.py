"""Who has used an upstream in the last minute, and how fast it has answered."""

from gateway.traffic import ANSWERS, Traffic


def test_requests_count_for_a_minute() -> None:
    traffic = Traffic()
    for second in range(100):
        traffic.note_sent("a", float(second))
        if second % 2:
            traffic.note_sent("b", second + 0.5)
    assert traffic.count_sent(99.9) == {"a": 60, "b": 30}
    assert traffic.count_sent(150.0) == {"a": 9, "b": 5}
    assert traffic.count_sent(160.0) == {}


def test_requests_in_flight_are_those_that_have_not_ended() -> None:
    traffic = Traffic()
    for client in ("a", "a", "b"):
        traffic.begin(client)
    traffic.end("a")
    traffic.end("b")
    assert traffic.count_in_flight() == {"a": 1}


def test_latencies_are_those_of_the_last_minute() -> None:
    traffic = Traffic()
    assert traffic.find_latencies(0.0) == {"p50": None, "p95": None}
    traffic.note_answer(500.0, 0.0)
    for number in range(1, 101):
        traffic.note_answer(number / 10, 30.0)
    assert traffic.find_latencies(61.0) == {"p50": 5.0, "p95": 9.5}
    for _ in range(2 * ANSWERS):
        traffic.note_answer(1.0, 62.0)
    assert traffic.find_latencies(63.0) == {"p50": 1.0, "p95": 1.0}
