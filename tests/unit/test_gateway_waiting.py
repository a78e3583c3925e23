"""Who is next: priorities, ageing, shares of clients, and who goes when there are too many."""

import itertools
import tracemalloc
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gateway.waiting import Waiter, WaitingLine

URGENT, HIGH, NORMAL, LOW = range(4)


def line(ageing: float = 30.0) -> WaitingLine[str]:
    return WaitingLine(4, ageing)


def serve(waiting: WaitingLine[str], now: float, share: float = 1.0) -> str:
    waiter = waiting.next()
    assert waiter is not None
    waiting.take(waiter, share, now)
    return waiter.item


def test_the_highest_priority_is_first_and_each_is_first_come_first_served() -> None:
    waiting = line()
    for at, (rank, name) in enumerate(
        [(LOW, "L1"), (NORMAL, "N1"), (HIGH, "H1"), (URGENT, "U1"), (URGENT, "U2"), (HIGH, "H2"), (LOW, "L2")]
    ):
        waiting.add(rank, "", name, float(at))
    assert waiting.depths() == [2, 2, 1, 2]
    assert [serve(waiting, 58.0) for _ in range(7)] == ["U1", "U2", "H1", "H2", "N1", "L1", "L2"]
    assert waiting.next() is None


def test_low_requests_get_a_turn_while_urgent_ones_never_end() -> None:
    waiting = line()
    for number in range(3):
        waiting.add(LOW, "", f"L{number}", 0.0)
    served = []
    for second in range(300):
        waiting.add(URGENT, "", "U", float(second))
        served.append(serve(waiting, float(second)))
    low = [second for second, name in enumerate(served) if name.startswith("L")]
    assert len(low) == 3
    assert low[0] >= 90
    assert all(later - earlier >= 90 for earlier, later in itertools.pairwise(low))


def test_clients_of_one_priority_get_turns_by_their_shares() -> None:
    waiting, shares = line(), {"a": 1.0, "b": 2.0, "c": 1.0}
    for number in range(400):
        waiting.add(NORMAL, "a", "a", float(number) / 1000)
    for client in ("b", "c"):
        for _ in range(200):
            waiting.add(NORMAL, client, client, 1.0)
    served = []
    for _ in range(200):
        waiter = waiting.next()
        assert waiter is not None
        waiting.take(waiter, shares[waiter.client], 2.0)
        served.append(waiter.client)
    assert Counter(served) == {"a": 50, "b": 100, "c": 50}


def test_a_client_that_returns_after_each_turn_gets_no_more_than_its_share() -> None:
    waiting = line()
    for _ in range(200):
        waiting.add(NORMAL, "queued", "queued", 0.0)
    served = []
    for second in range(100):
        if not any(waiter.client == "returning" for waiter in waiting):
            waiting.add(NORMAL, "returning", "returning", float(second))
        served.append(serve(waiting, float(second)))
    assert abs(Counter(served)["returning"] - 50) <= 1


def test_a_client_that_was_absent_has_saved_no_turns() -> None:
    waiting = line()
    waiting.add(NORMAL, "late", "late", 0.0)
    serve(waiting, 0.0)
    for number in range(100):
        waiting.add(NORMAL, "busy", "busy", float(number))
    for number in range(50):
        serve(waiting, float(number))
    for _ in range(10):
        waiting.add(NORMAL, "late", "late", 50.0)
    assert abs(Counter(serve(waiting, 51.0) for _ in range(20))["late"] - 10) <= 1


def test_the_newest_of_the_lowest_priority_goes() -> None:
    waiting = line()
    waiting.add(NORMAL, "a", "N", 0.0)
    waiting.add(LOW, "a", "L1", 1.0)
    newest = waiting.add(LOW, "b", "L2", 2.0)
    assert waiting.find_lowest(HIGH) is newest
    assert waiting.find_lowest(LOW) is None
    assert waiting.remove(newest)
    assert not waiting.remove(newest)
    assert len(waiting) == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.booleans()), max_size=60))
def test_everybody_who_stays_gets_one_turn(arrivals: list[tuple[int, str, bool]]) -> None:
    waiting, stay = line(), []
    for number, (rank, client, leaves) in enumerate(arrivals):
        waiter: Waiter[str] = waiting.add(rank, client, str(number), float(number))
        if leaves:
            assert waiting.remove(waiter)
        else:
            stay.append(str(number))
    assert len(waiting) == len(stay)
    served = [serve(waiting, 100.0) for _ in stay]
    assert sorted(served) == sorted(stay)
    for rank in range(4):
        for client in "abc":
            own = [each for each in served if arrivals[int(each)][:2] == (rank, client)]
            assert own == sorted(own, key=int)


def test_ten_thousand_waiters_that_leave_cost_little() -> None:
    waiting = line()
    tracemalloc.start()
    most = 0
    for _ in range(3):
        waiters = [waiting.add(NORMAL, f"client-{number % 50}", "", 0.0) for number in range(10_000)]
        most, _ = tracemalloc.get_traced_memory()
        for waiter in reversed(waiters):
            waiting.remove(waiter)
        del waiters
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10 * 2**20
    assert left < 2**18
