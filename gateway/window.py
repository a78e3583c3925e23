"""How many requests, or tokens, a sliding window holds, and when the next ones may be sent.

A token bucket does not keep a limit: its capacity and its refill together let nearly twice the rate through in the
first minute. Here, no window of the given length ever holds more than the limit, however the limit changes: before a
request is sent, those of the window that ends with it are counted.
"""

import itertools
from collections import OrderedDict

SPAN = 60.0  # seconds; limits are per minute
# By how much windows are longer: of two requests, the first may arrive late and the second early by that much.
# It costs 1.6 % of the rate.
MARGIN = 1.0
_ROUNDING = 1e-6


class Window:
    """Amounts that were sent within a span of time, those not yet sent included.

    An amount is reserved before it is sent. Until `mark_sent`, it counts as if it were sent at any later time.
    """

    def __init__(self, span: float = SPAN, margin: float = MARGIN) -> None:
        self._length = span + margin
        self._total = 0.0
        self._numbers = itertools.count()
        self._reserved: dict[int, float] = {}
        self._sent: OrderedDict[int, tuple[float, float]] = OrderedDict()  # when, and how much; by time

    def used(self, now: float) -> float:
        """Return the sum of the amounts in the window."""
        self._forget(now)
        return self._total

    def next_time(self, amount: float, limit: float, now: float) -> float:
        """Return from when on the amount fits; infinity if that depends on amounts that are not yet sent.

        An amount above the limit fits into an empty window: it could never be sent otherwise.
        """
        self._forget(now)
        excess = self._total + amount - max(limit, amount)
        if excess <= _ROUNDING:
            return now
        for at, each in self._sent.values():
            excess -= each
            if excess <= _ROUNDING:
                return at + self._length
        return float("inf")

    def next_in_burst(self, burst: int, limit: float, now: float) -> float:
        """Return from when on one more request follows no more than `burst` - 1 others too closely.

        So many requests take as long as the limit allows them on average; infinity if some are not yet sent.
        """
        self._forget(now)
        before = burst - len(self._reserved)
        if before <= 0:
            return float("inf")
        found = next(itertools.islice(reversed(self._sent.values()), before - 1, None), None)
        return now if found is None else found[0] + self._time_of(burst, limit)

    def room_in_burst(self, burst: int, limit: float, now: float) -> int:
        """Return how many requests `next_in_burst` permits now; it may be negative."""
        since = now - self._time_of(burst, limit)
        recent = itertools.takewhile(lambda sent: sent[0] > since, reversed(self._sent.values()))
        return burst - len(self._reserved) - sum(1 for _ in recent)

    def _time_of(self, burst: int, limit: float) -> float:
        return self._length * burst / max(limit, burst)

    def reserve(self, amount: float) -> int:
        """Add an amount that will be sent, and return its number."""
        number = next(self._numbers)
        self._reserved[number] = amount
        self._total += amount
        return number

    def mark_sent(self, number: int, at: float) -> None:
        """Note when an amount was sent: not before those that are noted already."""
        amount = self._reserved.pop(number)
        if self._sent:
            at = max(at, self._sent[next(reversed(self._sent))][0])
        self._sent[number] = (at, amount)

    def add_sent(self, amount: float, at: float) -> None:
        """Add an amount that an earlier process has sent."""
        self.mark_sent(self.reserve(amount), at)

    def cancel(self, number: int) -> None:
        """Remove an amount that was not sent."""
        self._total -= self._reserved.pop(number, 0.0)

    def correct(self, number: int, amount: float) -> None:
        """Replace an amount, if the window still has it."""
        if number in self._reserved:
            self._total += amount - self._reserved[number]
            self._reserved[number] = amount
        elif number in self._sent:
            at, before = self._sent[number]
            self._total += amount - before
            self._sent[number] = (at, amount)

    def _forget(self, now: float) -> None:
        while self._sent:
            number = next(iter(self._sent))
            at, amount = self._sent[number]
            if at + self._length > now:
                break
            del self._sent[number]
            self._total -= amount
        if not self._sent and not self._reserved:
            self._total = 0.0  # without what rounding has left
