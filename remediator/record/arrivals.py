"""How many alerts were new in the last minutes, in memory: the record must not fill the disk.

A transaction counts its own, which count for others once it is committed: it may be rolled back, and run again.
"""

from collections import Counter

SPAN = 600.0  # seconds after which counting begins anew


class Arrivals:
    """Those of committed transactions: their numbers by subject, and the sizes of their texts by kind."""

    def __init__(self) -> None:
        self.begin = float("-inf")
        self.numbers: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()

    def commit(self, new: "NewArrivals") -> None:
        if not new.numbers and not new.sizes:
            return
        if not self.begin <= new.now < self.begin + SPAN:
            self.begin, self.numbers, self.sizes = new.now, Counter(), Counter()
        self.numbers.update(new.numbers)
        self.sizes.update(new.sizes)


class NewArrivals:
    """Those of one transaction, which sees those that were committed before."""

    def __init__(self, committed: Arrivals, now: float) -> None:
        self.now = now
        self.numbers: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        is_over = not committed.begin <= now < committed.begin + SPAN
        before = Arrivals() if is_over else committed
        self._numbers, self._sizes = before.numbers, before.sizes

    def count(self, subject: str) -> int:
        """Return how many alerts of a subject were new."""
        return self._numbers[subject] + self.numbers[subject]

    def size(self, kind: str) -> int:
        """Return how many characters the labels and annotations of all new alerts of a kind have."""
        return self._sizes[kind] + self.sizes[kind]

    def add(self, subject: str) -> None:
        self.numbers[subject] += 1

    def add_size(self, kind: str, size: int) -> None:
        self.sizes[kind] += size
