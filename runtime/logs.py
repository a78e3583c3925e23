"""Structured logs on stderr: JSON lines for machines, colour for a terminal."""

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog

from runtime.redaction import Redactor

LogEvent = MutableMapping[str, Any]


def configure(redactor: Redactor, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Set up structlog for this process; every string that is logged passes through `redactor`."""
    stream = stream or sys.stderr
    terminal = stream.isatty()
    lasting = cast("TextIO", _Lasting(stream))

    def redact(_logger: object, _method: str, event: LogEvent) -> LogEvent:
        return cast("LogEvent", redactor.redact_all(event))

    renderer: Any = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(default=str)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(lasting),
        cache_logger_on_first_use=False,
    )
    # Libraries speak through the standard library: only what is worth waking up for.
    logging.basicConfig(handlers=[_Forwarding()], level=logging.WARNING, force=True)
    # A handshake that fails is a result of ours, not an error of our program.
    logging.getLogger("asyncio").addFilter(lambda record: "SSL handshake failed" not in record.getMessage())
    logging.getLogger("asyncssh").setLevel(logging.ERROR)
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # our middleware logs what handlers raise


class _Forwarding(logging.Handler):
    """Has the standard library's records told as our own are."""

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        more = {"exception": trace} if trace else {}
        structlog.get_logger(record.name).log(record.levelno, record.getMessage(), logger=record.name, **more)


class _Lasting:
    """A stream whose reader may go away, or whose disk may fill: what we do matters more than what we say of it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
