"""One probe of one service: its deadline, its outcome, whatever happens."""

import asyncio
import time
from collections.abc import Callable

import structlog

from exporter.probes import PROBES
from exporter.results import ProbeFailure, Reason, Result, Seen
from fleet.model import Service
from fleet.shells import Shell
from runtime.redaction import Redactor

MESSAGE_LIMIT = 500
log = structlog.get_logger()


async def probe(service: Service, shell: Callable[[], Shell], redact: Redactor) -> Result:
    """Probe `service` once; every failure is a Result, with no secret in its message."""
    kind = PROBES[service.probe.kind]
    seen = Seen(redact=redact)
    started_at, started = time.time(), time.perf_counter()
    reason: Reason | None = None
    message = ""
    timeout = service.probe.timeout
    try:
        async with asyncio.timeout(timeout):
            await kind.probe(service.probe.options, timeout, seen, shell)
    except ProbeFailure as failure:
        reason, message = failure.reason, failure.message
    except TimeoutError:
        late = seen.overdue or ProbeFailure("timeout", f"no answer within {timeout:g} s{_how_far(seen)}")
        reason, message = late.reason, late.message
    except Exception as error:  # one broken probe must not end the others
        log.exception("probe broke", service=service.id)
        reason, message = "error", f"the probe itself failed: {type(error).__name__}"
    duration = time.perf_counter() - started
    line = redact(" ".join(message.split()))[:MESSAGE_LIMIT]
    return Result(reason is None, reason, line, started_at, duration, seen)


def _how_far(seen: Seen) -> str:
    return f" (got as far as {list(seen.phases)[-1]})" if seen.phases else ""
