"""Limits of pings and of new heartbeats per minute."""


class RateLimitedError(Exception):
    """Too many in a minute. `retry_after` is in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__()
        self.retry_after = retry_after


def admit(used: float, at: float, now: float, per_minute: float) -> float:
    """Return how much of a limit is used after one more, if `used` was at the time `at`; it recovers within a minute.

    Raises RateLimitedError.
    """
    used = max(0.0, used - (now - at) * per_minute / 60)
    if used > per_minute - 1:
        raise RateLimitedError((used - per_minute + 1) * 60 / per_minute)
    return used + 1
