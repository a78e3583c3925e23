"""Requests that wait for long: what aiohttp has for them and their connections is freed until they go on.

A handler that has read the request, and has to wait, raises `SuspendedError`. The connection then only notices that its
client leaves. When the request goes on, its headers are parsed again, and the handler is called again; `RESUMED` has
the work with which it goes on. The connection is closed after the response: what had arrived of a further request is
lost.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from aiohttp import web

_OF_CONNECTION = frozenset({b"close", b"keep-alive", b"upgrade", b""})
# What frames the body, which the handler has read, and what belongs to the connection.
_NOT_REPEATED = frozenset(
    {b"content-length", b"expect", b"http2-settings", b"keep-alive", b"transfer-encoding", b"upgrade"}
)


class Work(Protocol):
    """A request that is suspended."""

    def wait(self, resume: Callable[[], None]) -> None:
        """Call `resume` once when the request goes on, which may be immediately."""

    def close(self) -> None:
        """End the request, whose client has gone. `resume` is not called any more."""


class SuspendedError(asyncio.CancelledError):
    """Ends the handling of a request, which goes on later."""

    def __init__(self, work: Work) -> None:
        super().__init__("the request waits")
        self.work = work


RESUMED: web.RequestKey[Work] = web.RequestKey("resumed", object)  # type: ignore[arg-type]  # no class


def may_suspend(request: web.BaseRequest) -> bool:
    """Whether a request can be suspended: its body was read, and its connection is a `Connection`."""
    check: Callable[[], bool] | None = getattr(request.protocol, "may_suspend", None)
    return check is not None and check()


def format_head(request: web.BaseRequest) -> bytes:
    """Return the request line and the headers of a request without its body, after which the connection is closed."""
    major, minor = request.version
    lines = [f"{request.method} {request.raw_path} HTTP/{major}.{minor}".encode("utf-8", "surrogateescape")]
    for name, value in request.raw_headers:
        if name.lower() == b"connection":  # each on its own: together, they might be too long
            named = [part for part in value.split(b",") if part.strip().lower() not in _OF_CONNECTION]
            lines += [b"Connection: " + b",".join(named)] if named else []
        elif name.lower() not in _NOT_REPEATED:
            lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])
