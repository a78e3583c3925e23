"""The base classes of Defib's errors."""

from collections.abc import Mapping


class DefibError(Exception):
    """An error with a message for users, without secrets.

    `retryable` says whether the same operation may succeed later. A command that ends with the error exits with
    `exit_status`, or as usual if that is None.
    """

    retryable = False
    exit_status: int | None = None


class StartError(DefibError):
    """A program cannot start with these arguments or files."""


class ApiError(Exception):
    """Ends a request with a status and `{"error": {"code", "message"}}`."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers
