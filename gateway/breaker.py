"""A circuit breaker: an upstream that fails again and again gets no requests for a while, then one on trial."""

FAILURES = 5  # in a row
OPEN_FOR = 30.0  # seconds


class Breaker:
    """Closed at first. Requests may be sent unless it is open, or a trial is in progress."""

    def __init__(self) -> None:
        self._failures = 0
        self._opened_at: float | None = None
        self._is_trying = False

    @property
    def is_open(self) -> bool:
        """Whether the upstream has failed, and no trial has succeeded since."""
        return self._opened_at is not None

    def next_time(self, now: float) -> float:
        """Return from when on a request may be sent; infinity while that depends on a trial."""
        if self._opened_at is None:
            return now
        return float("inf") if self._is_trying else max(now, self._opened_at + OPEN_FOR)

    def begin(self) -> bool:
        """Note that a request is sent, and return whether it is a trial."""
        self._is_trying = self.is_open
        return self._is_trying

    def succeed(self) -> None:
        """Note an answer that is no failure."""
        self._failures, self._opened_at, self._is_trying = 0, None, False

    def fail(self, now: float, *, trial: bool) -> bool:
        """Note a failure, and return whether it opens the breaker. While it is open, only the trial's counts."""
        if self._opened_at is not None and not trial:
            return False
        self._failures += 1
        self._is_trying = False
        if self._failures < FAILURES:
            return False
        self._opened_at = now
        return True

    def abandon(self, *, trial: bool) -> None:
        """Note that a request ended without an answer that shows anything."""
        self._is_trying = self._is_trying and not trial
