"""The base classes of Defib's errors."""


class DefibError(Exception):
    """An error with a message for users, without secrets.

    `retryable` says whether the same operation may succeed later.
    """

    retryable = False


class StartError(DefibError):
    """A program cannot start with these arguments or files."""
