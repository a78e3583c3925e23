"""Structured logs on stderr: JSON lines for machines, colour for a terminal."""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, TextIO, cast

import structlog

from runtime.redaction import Redactor
from runtime.terminal import escape_controls

LogEvent = MutableMapping[str, Any]
log = structlog.get_logger()


def configure(redactor: Redactor, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Set up structlog for this process; `redactor` is applied to every string that is logged."""
    stream = stream or sys.stderr
    terminal = stream.isatty()
    failsafe = cast("TextIO", _FailsafeStream(stream))

    def redact(_logger: object, _method: str, event: LogEvent) -> LogEvent:
        return cast("LogEvent", redactor.redact_all(event))

    def escape(_logger: object, _method: str, event: LogEvent) -> LogEvent:
        # The renderer quotes all other values.
        unquoted = {name: event[name] for name in ("event", "exception", "stack") if name in event}
        return {**event, **{name: escape_controls(str(value)) for name, value in unquoted.items()}}

    console = structlog.dev.ConsoleRenderer(repr_native_str=True)
    renderer: Any = console if terminal else structlog.processors.JSONRenderer(default=str)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            redact,
            *([escape] if terminal else ()),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(failsafe),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard library: warnings and errors only.
    logging.basicConfig(handlers=[_Forwarding()], level=logging.WARNING, force=True)
    # A failed TLS handshake is a probe result, not an error of the program.
    logging.getLogger("asyncio").addFilter(lambda record: "SSL handshake failed" not in record.getMessage())
    logging.getLogger("asyncssh").setLevel(logging.ERROR)
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # runtime.web logs what handlers raise


class _Forwarding(logging.Handler):
    """Forwards the standard library's log records to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        fields = {"exception": trace} if trace else {}
        structlog.get_logger(record.name).log(record.levelno, record.getMessage(), logger=record.name, **fields)


class _FailsafeStream:
    """A stream that ignores write errors: its reader may have gone away, or the disk may be full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class LimitedLog:
    """Logs each event at most `limit` times in `interval` seconds, then one line with the number of suppressed events.

    For events that other machines cause as often as they like: their lines must not fill the disk. `event` must
    therefore be a constant. Use it in the event loop.
    """

    def __init__(self, limit: int = 20, interval: float = 60.0) -> None:
        self._limit, self._interval = limit, interval
        self._windows: dict[str, _Window] = {}

    def warning(self, event: str, **fields: object) -> None:
        if self.admits(event):
            log.warning(event, **fields)

    def admits(self, event: str) -> bool:
        """Count an event, and return whether it should be logged."""
        now = time.monotonic()
        window = self._windows.get(event)
        if window is None or now >= window.end:
            if window is not None:
                self._report(event, window)  # its timer is late
            window = self._windows[event] = _Window(now + self._interval)
            asyncio.get_running_loop().call_later(self._interval, self._report, event, window)
        window.count += 1
        return window.count <= self._limit

    def _report(self, event: str, window: "_Window") -> None:
        if self._windows.get(event) is not window:
            return
        del self._windows[event]
        if window.count > self._limit:
            log.warning("events_suppressed", suppressed=event, count=window.count - self._limit, seconds=self._interval)


@dataclass
class _Window:
    end: float
    count: int = 0
