"""Crash loops: a host restarts a target again and again, and each time it exits within seconds."""

RESTARTS = 3  # by the host; fewer may be a slow dependency


def is_crash_loop(first: int, restarts: int) -> bool:
    """Whether a target is in a crash loop that its host was restarting at two times.

    `first` and `restarts` are the host's count of restarts at these times: if it has grown, the target started and
    exited again in between.
    """
    return restarts >= RESTARTS and restarts > first
