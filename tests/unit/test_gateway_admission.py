"""Admission on a simulated clock: the cases that must hold, whatever the requests do."""

import asyncio
import heapq
import itertools
import resource
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fleet.inventory.gateway import RetreatSettings, WhenFull
from gateway.admission import RETRY_AFTER_STOP, Admission, Applicant, Limits, Permit, QueueRules, RefusedError
from gateway.breaker import FAILURES, OPEN_FOR
from gateway.ledger import Ledger, SentFile, key_of
from gateway.retreat import Retreat
from runtime.errors import StartError

URGENT, HIGH, NORMAL, LOW = range(4)


class SimulatedTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class SimulatedClock:
    """A clock whose time passes only in `run_until`."""

    def __init__(self) -> None:
        self.time = 1000.0
        self._numbers = itertools.count()
        self._timers: list[tuple[float, int, SimulatedTimer]] = []

    def now(self) -> float:
        return self.time

    def call_later(self, delay: float, callback: Callable[[], None]) -> SimulatedTimer:
        timer = SimulatedTimer(callback)
        heapq.heappush(self._timers, (self.time + delay, next(self._numbers), timer))
        return timer

    async def run_until(self, at: float) -> None:
        """Let time pass, and every task do what it can at each moment."""
        await settle()
        while self._timers and self._timers[0][0] <= at:
            due, _, timer = heapq.heappop(self._timers)
            self.time = max(self.time, due)
            if timer.callback is not None:
                timer.callback()
            await settle()
        self.time = max(self.time, at)


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


class Harness:
    """Requests to one upstream, and when each was sent or refused, in seconds since the start."""

    def __init__(
        self,
        rate: float = 40,
        *,
        limits: Limits | None = None,
        size: int = 500,
        when_full: WhenFull = "reject",
        wait: float = 60.0,
        low: float | None = None,
        ageing: float = 30.0,
        ledger: Ledger | None = None,
        clock: SimulatedClock | None = None,
    ) -> None:
        self.clock = clock or SimulatedClock()
        self.start = self.clock.now()
        self.rules = QueueRules(size, when_full, (wait, wait, wait, wait if low is None else low), ageing)
        retreat = Retreat(rate, RetreatSettings(), self.clock.now())
        self.admission = Admission(limits or Limits(), self.rules, retreat, self.clock, ledger or Ledger())
        self.sent: list[tuple[str, float]] = []
        self.refused: dict[str, tuple[str, float]] = {}
        self.permits: dict[str, Permit] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def request(
        self,
        name: str,
        rank: int = NORMAL,
        *,
        lasts: bool = False,
        client: str = "",
        tokens: float = 0,
        share: float = 1,
    ) -> None:
        applicant = Applicant(rank, client, share, tokens)
        self.tasks[name] = asyncio.create_task(self._send(name, applicant, lasts=lasts))

    async def _send(self, name: str, applicant: Applicant, *, lasts: bool) -> None:
        try:
            permit = await self.admission.admit(applicant)
        except RefusedError as error:
            self.refused[name] = (error.reason, error.retry_after)
            return
        permit.mark_sent()
        self.sent.append((name, self.elapsed))
        self.permits[name] = permit
        if not lasts:
            permit.close()

    @property
    def elapsed(self) -> float:
        return self.clock.now() - self.start

    async def run_until(self, second: float) -> None:
        await self.clock.run_until(self.start + second)

    def names(self) -> list[str]:
        return [name for name, _ in self.sent]

    def most_in_a_minute(self) -> int:
        times = [at for _, at in self.sent]
        return max((sum(end - 60 < at <= end for at in times) for end in times), default=0)


@pytest.fixture
async def made() -> AsyncIterator[list[Harness]]:
    harnesses: list[Harness] = []
    yield harnesses
    for task in [task for harness in harnesses for task in harness.tasks.values()]:
        task.cancel()
    await settle()


async def test_a_hundred_at_once_at_forty_a_minute(made: list[Harness]) -> None:
    made.append(harness := Harness(wait=300))
    for number in range(100):
        harness.request(str(number))
    await harness.run_until(300)
    assert harness.names() == [str(number) for number in range(100)]
    assert [sum(at == second for _, at in harness.sent) for second in (0, 61, 122)] == [40, 40, 20]
    assert harness.most_in_a_minute() == 40


async def test_while_full_the_priorities_are_served_in_their_order(made: list[Harness]) -> None:
    made.append(harness := Harness(wait=120))
    for number in range(40):
        harness.request(f"first{number}")
    for second, (name, rank) in enumerate(
        [("L1", LOW), ("N1", NORMAL), ("H1", HIGH), ("U1", URGENT), ("L2", LOW), ("H2", HIGH)], 1
    ):
        await harness.run_until(second)
        harness.request(name, rank)
    await harness.run_until(61)
    assert harness.names()[40:] == ["U1", "H1", "H2", "N1", "L1", "L2"]


async def test_low_requests_are_not_starved(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=60, limits=Limits(burst=1), wait=200, ageing=10))
    harness.request("L", LOW)
    for second in range(200):
        harness.request(f"U{second}", URGENT)
        harness.request(f"V{second}", URGENT) if second < 5 else None
        await harness.run_until(second)
    assert "L" in harness.names()


async def test_waits_end_by_priority(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=1, wait=10, low=2))
    for name, rank in (("sent", NORMAL), ("normal", NORMAL), ("low", LOW)):
        harness.request(name, rank)
    await harness.run_until(1.9)
    assert harness.refused == {}
    await harness.run_until(2)
    assert harness.refused["low"][0] == "timeout"
    await harness.run_until(10)
    assert harness.refused["normal"][0] == "timeout"
    assert 0 < harness.refused["normal"][1] <= 120
    assert sum(harness.admission.depths) == 0


@pytest.mark.parametrize(("when_full", "refused"), [("reject", {"high"}), ("drop-lowest", {"low2"})])
async def test_a_full_queue(made: list[Harness], when_full: WhenFull, refused: set[str]) -> None:
    made.append(harness := Harness(rate=1, size=3, when_full=when_full))
    for name, rank in (("sent", LOW), ("low1", LOW), ("normal", NORMAL), ("low2", LOW), ("high", HIGH)):
        harness.request(name, rank)
        await settle()
    assert set(harness.refused) == refused
    harness.request("low3", LOW)
    await settle()
    assert harness.refused["low3"][0] == "queue_full"
    assert len(harness.sent) == 1


async def test_a_full_queue_with_passthrough(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=2, size=1, when_full="passthrough", wait=300))
    for name in ("one", "two", "waits", "passes"):
        harness.request(name)
        await settle()
    assert harness.names() == ["one", "two", "passes"]
    assert harness.permits["passes"].passthrough
    await harness.run_until(60)
    assert harness.names()[3:] == []
    await harness.run_until(61)
    assert harness.names()[3:] == ["waits"]
    harness.request("full")
    await settle()
    assert harness.admission.requests.used(harness.clock.now()) == 2  # what passed through has counted, too


async def test_nothing_passes_through_while_the_upstream_pauses_or_fails(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=10, size=1, when_full="passthrough", wait=300))
    harness.admission.pause(20)
    for name in ("waits", "refused"):
        harness.request(name)
        await settle()
    assert (harness.sent, harness.refused["refused"][0]) == ([], "queue_full")
    await harness.run_until(20)
    for number in range(FAILURES):
        harness.request(str(number), lasts=True)
    await settle()
    for number in range(FAILURES):
        harness.permits[str(number)].note_failure()
    for name in ("trial", "refused too"):
        harness.request(name, lasts=True)
        await settle()
    assert harness.refused["refused too"][0] == "queue_full"
    await harness.run_until(20 + OPEN_FOR)
    assert harness.names() == ["waits", *map(str, range(FAILURES)), "trial"]
    for name in ("after the trial", "beside the trial"):
        harness.request(name)
        await settle()
    assert harness.refused["beside the trial"][0] == "queue_full"


async def test_a_request_that_is_cancelled_while_it_waits_frees_its_place(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=1, size=1, wait=100))
    harness.request("sent")
    harness.request("leaves")
    await settle()
    harness.tasks["leaves"].cancel()
    await settle()
    harness.request("stays")
    await harness.run_until(61)
    assert harness.names() == ["sent", "stays"]
    assert harness.refused == {}


async def test_a_request_that_is_cancelled_just_when_it_is_admitted_frees_its_slot(made: list[Harness]) -> None:
    made.append(harness := Harness(limits=Limits(concurrency=1)))
    harness.request("first", lasts=True)
    harness.request("second")
    harness.request("third")
    await settle()
    harness.permits["first"].close()  # admits the second, whose task has not run yet
    harness.tasks["second"].cancel()
    await settle()
    assert harness.names() == ["first", "third"]
    assert harness.admission.in_flight == 0
    assert harness.admission.requests.used(harness.clock.now()) == 2


async def test_concurrency_is_limited(made: list[Harness]) -> None:
    made.append(harness := Harness(limits=Limits(concurrency=2)))
    for number in range(4):
        harness.request(str(number), lasts=True)
    await settle()
    assert harness.names() == ["0", "1"]
    harness.permits["0"].close()
    harness.permits["0"].close()
    await settle()
    assert harness.names() == ["0", "1", "2"]
    assert harness.admission.in_flight == 2


async def test_what_was_not_sent_does_not_count(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=1))
    permit = await harness.admission.admit(Applicant())
    permit.close()
    harness.request("next")
    await settle()
    assert harness.names() == ["next"]


async def test_a_request_that_may_have_arrived_counts(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=1))
    permit = await harness.admission.admit(Applicant())
    permit.begin_sending()
    await harness.run_until(30)
    permit.close()
    harness.request("next", URGENT)
    await harness.run_until(89)
    assert harness.names() == []
    assert harness.elapsed == 89


async def test_tokens_are_limited_and_corrected(made: list[Harness]) -> None:
    made.append(harness := Harness(limits=Limits(tokens=1000)))
    harness.request("first", tokens=600)
    harness.request("second", tokens=600)
    await settle()
    assert harness.names() == ["first"]
    harness.permits["first"].correct_tokens(300)
    harness.request("third", tokens=100)
    await settle()
    assert harness.names() == ["first", "second", "third"]


async def test_a_pause_refuses_those_who_may_not_wait_so_long(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=1, wait=100, low=50))
    harness.request("sent")
    harness.request("normal")
    harness.request("low", LOW)
    await settle()
    harness.admission.pause(70)
    await settle()
    assert harness.refused == {"low": ("paused", 70.0)}
    harness.request("late", LOW)
    await harness.run_until(69)
    assert harness.refused["late"] == ("paused", 70.0)
    assert harness.names() == ["sent"]
    await harness.run_until(70)
    assert harness.names() == ["sent", "normal"]
    harness.admission.pause(3600)
    harness.request("hopeless")
    await settle()
    assert harness.refused["hopeless"] == ("paused", 3600.0)
    harness.admission.reset()
    harness.request("after")
    await harness.run_until(131)
    assert harness.names()[-1] == "after"


async def test_a_failing_upstream_gets_one_trial(made: list[Harness]) -> None:
    made.append(harness := Harness(wait=100, low=10))
    for number in range(FAILURES):
        harness.request(str(number), lasts=True)
    await settle()
    opened = [harness.permits[str(number)].note_failure() for number in range(FAILURES)]
    assert opened == [False] * (FAILURES - 1) + [True]
    harness.request("low", LOW)
    harness.request("trial", lasts=True)
    harness.request("next")
    await harness.run_until(OPEN_FOR)
    assert harness.refused == {"low": ("unavailable", OPEN_FOR)}
    assert harness.names()[FAILURES:] == ["trial"]
    harness.permits["trial"].note_answer(refused=False)  # the response has begun, and may go on for minutes
    await settle()
    assert harness.names()[FAILURES:] == ["trial", "next"]


async def test_a_trial_that_is_cancelled_leaves_the_next_one_its_turn(made: list[Harness]) -> None:
    made.append(harness := Harness())
    for number in range(FAILURES):
        harness.request(str(number), lasts=True)
    await settle()
    for number in range(FAILURES):
        harness.permits[str(number)].note_failure()
    harness.request("trial", lasts=True)
    harness.request("next", lasts=True)
    await harness.run_until(31)
    assert harness.names()[FAILURES:] == ["trial"]
    harness.permits["trial"].close()
    await settle()
    assert harness.names()[FAILURES:] == ["trial", "next"]


async def test_shares_hold_between_clients(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=30, wait=10_000, size=2000))
    for number in range(400):
        for client in "abc":
            harness.request(f"{client}{number}", client=client, share=2 if client == "a" else 1)
    await harness.run_until(600)
    counts = [sum(name.startswith(client) for name in harness.names()) for client in "abc"]
    assert sum(counts) >= 0.98 * 30 * 10
    waited = counts[0] - 10, counts[1] - 10, counts[2] - 10  # the first 30 found a free place
    assert [round(count / sum(waited), 2) for count in waited] == [0.5, 0.25, 0.25]
    assert harness.admission.count_waiting()["a"] == [0, 0, 400 - counts[0], 0]


async def test_a_cut_rate_applies_to_those_who_wait(made: list[Harness]) -> None:
    made.append(harness := Harness(wait=1000))
    for number in range(120):
        harness.request(str(number), lasts=True)
    await settle()
    for number in range(8):
        harness.permits[str(number)].note_answer(refused=True)
    await harness.run_until(61)
    assert len(harness.sent) == 70
    assert harness.admission.retreat.rate == 30


async def test_limits_change_while_requests_wait(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=1, wait=100))
    for name in ("sent", "waits", "waits too"):
        harness.request(name)
    await settle()
    harness.admission.retreat.configure(2, RetreatSettings(), harness.clock.now())
    harness.admission.configure(Limits(), harness.rules)
    await settle()
    assert harness.names() == ["sent", "waits"]


Step = tuple[float, int, bool]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 3), st.booleans()), max_size=80), st.integers(1, 20))
async def test_no_minute_exceeds_the_rate_whatever_requests_do(steps: list[Step], rate: int) -> None:
    harness = Harness(rate, wait=100, size=20)
    second = 0.0
    for number, (pause, rank, leaves) in enumerate(steps):
        second += pause
        await harness.run_until(second)
        harness.request(str(number), rank, lasts=number % 3 == 0)
        if leaves:
            await settle()
            harness.tasks[str(number // 2)].cancel()
    await harness.run_until(second + 400)
    assert harness.most_in_a_minute() <= rate
    assert sum(harness.admission.depths) == 0
    for permit in harness.permits.values():
        permit.close()
    assert harness.admission.in_flight == 0
    assert set(harness.names()) | set(harness.refused) >= {
        name for name, task in harness.tasks.items() if not task.cancelled()
    }


async def test_a_stop_refuses_all_that_wait_and_all_that_come(made: list[Harness]) -> None:
    made.append(harness := Harness(rate=1))
    for name in "abc":
        harness.request(name)
    await harness.run_until(1)
    harness.admission.stop()
    harness.request("d")
    await harness.run_until(2)
    assert harness.names() == ["a"]
    assert harness.refused == dict.fromkeys("bcd", ("shutting_down", RETRY_AFTER_STOP))


KEY = key_of("http://a/v1", "key")


@pytest.mark.parametrize("is_killed", [False, True])
async def test_the_rate_holds_after_a_restart(made: list[Harness], tmp_path: Path, is_killed: bool) -> None:
    clock = SimulatedClock()
    file = await asyncio.to_thread(SentFile, tmp_path / "sent", clock.now)
    made.append(before := Harness(rate=5, clock=clock, ledger=Ledger(file, KEY)))
    for number in range(3):
        before.request(str(number))
    await before.run_until(20)
    pending = await before.admission.admit(Applicant())  # killed while it is being sent
    cancelled = await before.admission.admit(Applicant())
    cancelled.close()
    if is_killed:
        assert pending.waited == 0
    else:
        pending.close()
    file.close()
    file = await asyncio.to_thread(SentFile, tmp_path / "sent", clock.now)
    made.append(after := Harness(rate=5, clock=clock, ledger=Ledger(file, KEY)))
    for number in range(5):
        after.request(str(number))
    await after.run_until(40)
    assert after.names() == (["0"] if is_killed else ["0", "1"])
    await after.run_until(41)
    assert len(after.sent) == (4 if is_killed else 5)
    file.close()
    assert Ledger(None).take_earlier() == ()


def test_the_file_grows_and_keeps_upstreams_apart(tmp_path: Path) -> None:
    clock = SimulatedClock()
    file = SentFile(tmp_path / "sent", clock.now)
    others = [key_of("http://b/v1", ""), KEY]
    for number in range(3000):
        Ledger(file, others[number % 3 == 0]).begin(7.0, "coder").mark_sent(clock.now())
    file.close()
    clock.time += 30
    file = SentFile(tmp_path / "sent", clock.now)
    earlier = [file.take_earlier(key) for key in (*others, KEY)]
    assert [len(each) for each in earlier] == [2000, 1000, 0]
    assert {(each.client, each.tokens) for requests in earlier for each in requests} == {("coder", 7.0)}
    file.close()
    clock.time += 32
    file = SentFile(tmp_path / "sent", clock.now)
    assert [len(file.take_earlier(key)) for key in others] == [0, 0]
    file.close()


def test_a_full_disk_stops_no_request(tmp_path: Path) -> None:
    clock = SimulatedClock()
    file = SentFile(tmp_path / "sent", clock.now)
    ledger = Ledger(file, KEY)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "sent").stat().st_size, limit[1]))
    try:
        with capture_logs() as logs:
            records = [ledger.begin(7.0, "coder") for _ in range(1500)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    for number, record in enumerate(records):
        record.mark_sent(clock.now()) if number % 2 else record.cancel()
    ledger.begin(7.0, "coder").mark_sent(clock.now())
    file.close()
    assert [line["event"] for line in logs] == ["sent_not_stored"]
    file = SentFile(tmp_path / "sent", clock.now)
    assert len(file.take_earlier(KEY)) == 513
    file.close()


def test_a_file_has_one_owner_and_may_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "sent"
    path.write_bytes(b"not what it should be" * 1000)
    file = SentFile(path)
    with pytest.raises(StartError, match="another gateway uses"):
        SentFile(path)
    file.close()
    with pytest.raises(StartError, match="there is no folder"):
        SentFile(tmp_path / "nowhere" / "sent")
