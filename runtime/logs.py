"""Structured logs on stderr: JSON lines for machines, colour for a terminal."""

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog

from runtime.redaction import Redactor
from runtime.terminal import escape_controls

LogEvent = MutableMapping[str, Any]


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
        logger_factory=structlog.PrintLoggerFactory(failsafe),
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
