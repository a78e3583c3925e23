"""How many alerts were new in the last minutes, in memory: the record must not fill the disk."""

from collections import Counter

SPAN = 600.0  # seconds after which counting begins anew


class Arrivals:
    def __init__(self) -> None:
        self._begin = float("-inf")
        self._numbers: Counter[str] = Counter()
        self._size = 0

    def count(self, subject: str, now: float) -> int:
        """Return how many alerts of a subject were new."""
        self._begin_anew(now)
        return self._numbers[subject]

    def size(self, now: float) -> int:
        """Return how many characters the labels and annotations of all of them have."""
        self._begin_anew(now)
        return self._size

    def add(self, subject: str) -> None:
        self._numbers[subject] += 1

    def add_size(self, size: int) -> None:
        self._size += size

    def _begin_anew(self, now: float) -> None:
        if not self._begin <= now < self._begin + SPAN:
            self._begin, self._size = now, 0
            self._numbers.clear()
