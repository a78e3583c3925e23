"""The gateway's own refusals, in the format of OpenAI's errors, which its clients understand."""

import math

from aiohttp import web

from gateway.admission import Reason

_REFUSALS: dict[Reason, tuple[int, str]] = {
    "queue_full": (429, "the queue is full"),
    "dropped": (429, "a request with a higher priority has taken the place in the queue"),
    "timeout": (429, "the request has waited as long as its priority may"),
    "paused": (429, "the upstream asks for a pause that is longer than the request may wait"),
    "unavailable": (503, "the upstream has failed repeatedly, and gets no requests for a while"),
    "shutting_down": (503, "the gateway is being stopped"),
}
TOO_MANY_REQUESTS = 429


class GatewayError(Exception):
    """Ends a request with a status and OpenAI's `{"error": …}`.

    `retry_after` is in seconds. Without it, clients are asked not to send the request again by themselves.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    @classmethod
    def of(cls, reason: Reason, retry_after: float) -> "GatewayError":
        """Return the error of a request that was not admitted."""
        status, message = _REFUSALS[reason]
        return cls(status, reason, message, retry_after=retry_after)

    def respond(self) -> web.Response:
        kind = _find_kind(self.status)
        body = {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}
        headers = {}
        if self.retry_after is not None:  # in both forms that clients know
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
            headers["Retry-After-Ms"] = str(max(1, math.ceil(self.retry_after * 1000)))
        elif self.status == TOO_MANY_REQUESTS:
            headers["X-Should-Retry"] = "false"
        return web.json_response(body, status=self.status, headers=headers)


def _find_kind(status: int) -> str:
    if status == TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"  # noqa: PLR2004 - the class of the status
