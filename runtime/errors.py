"""The root of every error we raise on purpose."""


class DefibError(Exception):
    """Something a person can understand and mend; its text is safe to show.

    `retryable` says whether trying the same again can help.
    """

    retryable = False


class StartError(DefibError):
    """A program cannot start as it was asked to."""
