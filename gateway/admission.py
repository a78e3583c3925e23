"""When requests are sent to one upstream: they wait for its limits, its queue, its pauses and its breaker."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fleet.inventory.gateway import WhenFull
from gateway.breaker import Breaker
from gateway.ledger import Ledger, Record
from gateway.retreat import Retreat, State
from gateway.shared import Credit, Demand, SharedWindow
from gateway.traffic import Traffic
from gateway.waiting import Waiter, WaitingLine
from gateway.window import Window

MAX_RETRY_AFTER = 120.0  # seconds after which a refused request may return; openai-python honours no longer ones
# Why a request was refused: no place in the queue, its place given to a higher priority, too long a wait, a pause that
# the upstream asks for, an upstream that fails, or a gateway that is being stopped.
Reason = Literal["queue_full", "dropped", "timeout", "paused", "unavailable", "shutting_down"]
RETRY_AFTER_STOP = 5.0  # seconds


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """The time in seconds, which never goes back, and calls at a later time."""

    def now(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer: ...


class RefusedError(Exception):
    """A request is not sent. `retry_after` is in seconds."""

    def __init__(self, reason: Reason, retry_after: float) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


@dataclass(frozen=True)
class Limits:
    """What an upstream allows, in a minute and at the same time; its rate is the retreat's."""

    tokens: float | None = None
    burst: int | None = None
    concurrency: int | None = None


@dataclass(frozen=True)
class QueueRules:
    """`waits` has the longest wait of each rank, in seconds."""

    size: int
    when_full: WhenFull
    waits: Sequence[float]
    ageing: float


@dataclass(frozen=True, slots=True)
class Applicant:
    """A request that applies for admission. Rank 0 is the highest priority; `tokens` are estimated."""

    rank: int = 2
    client: str = ""
    share: float = 1.0
    tokens: float = 0.0
    has_fallback: bool = False  # another upstream takes it where this one pauses or fails


class Turn:
    """The turn of a request: it waits until it gets a permit, or is refused."""

    __slots__ = (
        "_admission", "_decided_at", "_decision", "_on_decision", "_timer", "applicant", "began_at", "patience",
        "waiter",
    )  # fmt: skip

    def __init__(self, admission: "Admission", applicant: Applicant, now: float, patience: float) -> None:
        self._admission, self.applicant, self.began_at = admission, applicant, now
        self.patience = patience  # until when it waits for the end of a pause
        self.waiter: Waiter[Turn] | None = None  # while it is in the line
        self._decision: Permit | RefusedError | None = None
        self._decided_at: float | None = None
        self._on_decision: Callable[[], None] | None = None
        self._timer: Timer | None = None

    @property
    def is_decided(self) -> bool:
        return self._decision is not None

    @property
    def waited(self) -> float:
        """For how many seconds it has waited, or did until it was decided."""
        return (self._admission.clock.now() if self._decided_at is None else self._decided_at) - self.began_at

    def decide(self, decision: "Permit | RefusedError") -> None:
        self._decision, self.waiter = decision, None
        self._decided_at = self._admission.clock.now()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._on_decision is not None:
            self._on_decision()
            self._on_decision = None

    def expire_after(self, seconds: float) -> None:
        self._timer = self._admission.clock.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._admission.refuse(self, "timeout")

    def call(self, on_decision: Callable[[], None]) -> None:
        """Call a function when the request is admitted or refused; immediately if it already is."""
        self._on_decision = on_decision
        if self.is_decided:
            on_decision()

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait until the request is admitted or refused, for some seconds at most; return whether it is."""
        if self._decision is None:
            decided = asyncio.Event()
            self._on_decision = decided.set
            try:
                async with asyncio.timeout(seconds):
                    await decided.wait()
            except TimeoutError:
                self._on_decision = None
        return self.is_decided

    def take(self) -> "Permit":
        """Return the permit of a request that is decided. Raises RefusedError."""
        decision = self._decision
        if not isinstance(decision, Permit):
            assert decision is not None  # noqa: S101 - it is decided
            raise decision
        return decision

    def withdraw(self) -> None:
        """Free the place of a request that is not sent any more, or return its permit."""
        self._on_decision = None
        if isinstance(self._decision, Permit):
            self._decision.close()
        elif self._decision is None:
            if self._timer is not None:
                self._timer.cancel()
            self._admission.withdraw(self)


class Admission:
    """Admits requests to one upstream.

    `ledger` remembers for a later process what was sent. `create_shared` returns the window in which several gateways
    count together; its argument is called when that may allow a request.
    """

    def __init__(
        self,
        limits: Limits,
        queue: QueueRules,
        retreat: Retreat,
        clock: Clock,
        ledger: Ledger,
        create_shared: Callable[[Callable[[], None]], SharedWindow] | None = None,
    ) -> None:
        self.limits, self.queue, self.retreat = limits, queue, retreat
        self.breaker = Breaker()
        self.clock, self._ledger = clock, ledger
        self.requests, self.tokens, self.traffic = Window(), Window(), Traffic()
        self.in_flight = 0
        self.paused_until = float("-inf")
        self.is_stopped = False
        self._line: WaitingLine[Turn] = WaitingLine(len(queue.waits), queue.ageing)
        self._timer: Timer | None = None
        self._shared = create_shared(self.wake) if create_shared is not None else None
        for record in ledger.take_earlier():
            self.requests.add_sent(1, record.at)
            self.tokens.add_sent(record.tokens, record.at)
            self.traffic.note_sent(record.client, record.at)

    @property
    def smallest_queue(self) -> int:
        """The smallest size that the queue may have: requests wait at least for the answer of Redis."""
        return 0 if self._shared is None else 1

    @property
    def depths(self) -> Sequence[int]:
        """How many requests of each rank wait."""
        return self._line.depths()

    def count_waiting(self) -> Mapping[str, Sequence[int]]:
        """Return how many requests of each client wait, by rank."""
        return self._line.count_by_client()

    def count_available(self) -> float:
        """Return how many requests may be sent now; while others wait, a further one waits, too."""
        limits, now = self.limits, self.clock.now()
        if any(self.depths) or self._opens_at(now) > now:
            return 0.0
        rate = self._reduce(math.floor(self.retreat.rate))
        room = rate - self.requests.used(now)
        if limits.burst is not None:
            room = min(room, self.requests.room_in_burst(limits.burst, rate, now))
        if limits.concurrency is not None:
            room = min(room, limits.concurrency - self.in_flight)
        return max(0.0, room)

    async def admit(self, applicant: Applicant) -> "Permit":
        """Wait until the request may be sent. Raises RefusedError. A cancelled request frees its place at once."""
        turn = self.apply(applicant)
        try:
            await turn.wait()
        except asyncio.CancelledError:
            turn.withdraw()
            raise
        return turn.take()

    def apply(self, applicant: Applicant) -> Turn:
        """Return the turn of a request, which may be decided already. Raises RefusedError."""
        now = self.clock.now()
        deadline = now + self.queue.waits[applicant.rank]
        turn = Turn(self, applicant, now, now if applicant.has_fallback else deadline)
        self._check_pause(now, turn.patience)
        if not any(self._line.depths()) and self._next_time(applicant, now) <= now:
            turn.decide(self._grant(applicant, 0.0))
            return turn
        if len(self._line) >= self.queue.size and not self._make_room(applicant, now):
            turn.decide(self._grant(applicant, 0.0, passthrough=True))
            return turn
        turn.waiter = self._line.add(applicant.rank, applicant.client, turn, now)
        turn.expire_after(deadline - now)
        self._dispatch()
        return turn

    def _check_pause(self, now: float, patience: float) -> None:
        """Refuse a request that would wait in vain."""
        if self.is_stopped:
            raise RefusedError("shutting_down", RETRY_AFTER_STOP)
        if self.paused_until > patience:
            raise RefusedError("paused", self.paused_until - now)
        trial_at = self.breaker.next_time(now)
        if patience < trial_at and (trial_at < float("inf") or patience == now):
            raise RefusedError("unavailable", min(trial_at - now, MAX_RETRY_AFTER))

    def _make_room(self, applicant: Applicant, now: float) -> bool:
        """Make room in a full queue; return False if the request passes through instead. Raises RefusedError."""
        if self.queue.when_full == "passthrough" and self._opens_at(now) <= now:
            return False
        lowest = self._line.find_lowest(applicant.rank) if self.queue.when_full == "drop-lowest" else None
        if lowest is None:
            raise RefusedError("queue_full", self._estimate_wait())
        self.refuse(lowest.item, "dropped")
        return True

    def _estimate_wait(self) -> float:
        """Return about how long the requests take that wait now."""
        return min(MAX_RETRY_AFTER, (len(self._line) + 1) * 60 / self.retreat.rate)

    def refuse(self, turn: Turn, reason: Reason, retry_after: float | None = None) -> None:
        """Refuse a request that waits."""
        if turn.waiter is not None and self._line.remove(turn.waiter):
            turn.decide(RefusedError(reason, self._estimate_wait() if retry_after is None else retry_after))
            self._dispatch()  # the next one may need less

    def withdraw(self, turn: Turn) -> None:
        """Free the place of a request that waits."""
        if turn.waiter is not None and self._line.remove(turn.waiter):
            turn.waiter = None
            self._dispatch()

    def _opens_at(self, now: float) -> float:
        """Return from when on the upstream takes requests: after a pause, and not while it fails."""
        return max(self.paused_until, self.breaker.next_time(now))

    def _reduce(self, limit: float) -> float:
        """Return what this gateway may send of a limit."""
        return float(limit) if self._shared is None else self._shared.reduce(float(limit))

    def _next_time(self, applicant: Applicant, now: float) -> float:
        """Return from when on a request may be sent; infinity if that depends on others in flight."""
        limits, rate = self.limits, self._reduce(math.floor(self.retreat.rate))
        if limits.concurrency is not None and self.in_flight >= limits.concurrency:
            return float("inf")
        tokens = None if limits.tokens is None else self._reduce(limits.tokens)
        times = [self._opens_at(now), self.requests.next_time(1, rate, now)]
        if limits.burst is not None:
            times.append(self.requests.next_in_burst(limits.burst, rate, now))
        if tokens is not None:
            times.append(self.tokens.next_time(applicant.tokens, tokens, now))
        at = max(times)
        if at <= now and self._shared is not None:
            return self._shared.next_time(Demand(applicant.tokens, rate, tokens), now)
        return at

    def _dispatch(self) -> None:
        """Admit those whose turn it is, and return at the time of the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self.clock.now()
        while (waiter := self._line.next()) is not None:
            applicant = waiter.item.applicant
            at = self._next_time(applicant, now)
            if at > now:
                if at < float("inf"):
                    self._timer = self.clock.call_later(at - now, self._dispatch)
                return
            self._line.take(waiter, applicant.share, now)
            waiter.item.decide(self._grant(applicant, now - waiter.arrived_at))
        if self._shared is not None:
            self._shared.release()

    def _grant(self, applicant: Applicant, waited: float, *, passthrough: bool = False) -> "Permit":
        self.in_flight += 1
        self.traffic.begin(applicant.client)
        numbers = self.requests.reserve(1), self.tokens.reserve(applicant.tokens)
        record = self._ledger.begin(applicant.tokens, applicant.client)
        credit = self._shared.take(applicant.tokens) if self._shared is not None else None
        trial = self.breaker.begin()
        return Permit(self, applicant.client, numbers, record, credit, waited, trial=trial, passthrough=passthrough)

    def pause(self, seconds: float) -> None:
        """Send nothing for a time, and refuse those that would wait in vain."""
        now = self.clock.now()
        self.paused_until = max(self.paused_until, now + seconds)
        self._refuse_late("paused", self.paused_until, now)

    def stop(self) -> None:
        """Admit no more requests, and refuse those that wait."""
        self.is_stopped = True
        for waiter in list(self._line):
            self.refuse(waiter.item, "shutting_down", RETRY_AFTER_STOP)

    def _refuse_late(self, reason: Reason, until: float, now: float) -> None:
        for waiter in [each for each in self._line if each.item.patience < until]:
            self.refuse(waiter.item, reason, until - now)
        self._dispatch()

    def note_failure(self, *, trial: bool) -> bool:
        """Note that the upstream has failed, and return whether that opens the breaker."""
        now = self.clock.now()
        opened = self.breaker.fail(now, trial=trial)
        if opened:
            self._refuse_late("unavailable", self.breaker.next_time(now), now)
        return opened

    def configure(self, limits: Limits, queue: QueueRules) -> None:
        """Put other limits in force; the requests that wait stay, and keep their deadlines."""
        self.limits, self.queue = limits, queue
        self._line.ageing = queue.ageing
        self._dispatch()

    def reset(self) -> None:
        """Return to the base rate, and end pauses."""
        self.retreat.reset(self.clock.now())
        self.paused_until = float("-inf")
        self.breaker.succeed()
        self._dispatch()

    def is_in_use(self) -> bool:
        """Whether requests wait, are in progress, or were sent so recently that they count."""
        return bool(self.in_flight or len(self._line) or self.requests.used(self.clock.now()))

    def close(self) -> None:
        """Note that the upstream is not configured any more."""
        if self._shared is not None:
            self._shared.close()

    def wake(self) -> None:
        """Admit those who wait for what has just changed."""
        self._dispatch()


class Permit:
    """The permission to send one request. Close it when the request has ended."""

    def __init__(
        self,
        admission: Admission,
        client: str,
        numbers: tuple[int, int],
        record: Record,
        credit: Credit | None,
        waited: float,
        *,
        trial: bool,
        passthrough: bool,
    ) -> None:
        self._admission, self._client, self._numbers = admission, client, numbers
        self._record, self._credit = record, credit
        self.waited, self.passthrough = waited, passthrough
        self._trial = trial
        self.is_sent = False
        self._has_begun = self._is_judged = self._is_closed = False

    def begin_sending(self) -> None:
        """Note that a part of the request may have been sent."""
        self._has_begun = True

    def mark_sent(self) -> None:
        """Note that the upstream has received the request by now."""
        if not self.is_sent:
            now = self._admission.clock.now()
            self._admission.requests.mark_sent(self._numbers[0], now)
            self._admission.tokens.mark_sent(self._numbers[1], now)
            self._admission.traffic.note_sent(self._client, now)
            self._record.mark_sent(now)
            if self._credit is not None:
                self._credit.mark_sent(now)
            self._has_begun = self.is_sent = True
            self._admission.wake()

    def note_answer(self, *, refused: bool | None) -> State | None:
        """Note an answer that is no failure of the upstream; return the new state of the retreat if it has changed.

        `refused` says whether the upstream's limit was exceeded; None if the answer says nothing about that.
        """
        admission, self._is_judged = self._admission, True
        was_open = admission.breaker.is_open
        admission.breaker.succeed()
        state = None if refused is None else admission.retreat.note_answer(admission.clock.now(), refused=refused)
        if was_open or state is not None:  # the response itself may last for minutes
            admission.wake()
        return state

    def note_failure(self) -> bool:
        """Note that the upstream has failed, and return whether that opens the breaker."""
        self._is_judged = True
        return self._admission.note_failure(trial=self._trial)

    def correct_tokens(self, tokens: float) -> None:
        """Replace the estimate by what the upstream has counted."""
        self._admission.tokens.correct(self._numbers[1], tokens)
        if self._credit is not None:
            self._credit.correct(tokens)
        self._admission.wake()

    def close(self) -> None:
        """End the request. What was not sent does not count."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._has_begun:
            self.mark_sent()
        else:
            for window, number in zip((self._admission.requests, self._admission.tokens), self._numbers, strict=True):
                window.cancel(number)
            self._record.cancel()
            if self._credit is not None:
                self._credit.cancel()
        if not self._is_judged:
            self._admission.breaker.abandon(trial=self._trial)
        self._admission.in_flight -= 1
        self._admission.traffic.end(self._client)
        self._admission.wake()
