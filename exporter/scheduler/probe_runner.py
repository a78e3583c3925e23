"""One probe of one service: its deadline, its outcome, whatever happens."""

import asyncio
import time
import traceback
from collections.abc import Callable, Mapping

from exporter.probes import PROBES
from exporter.probes.context import Means
from exporter.results import ProbeFailure, Reason, Result, Seen, sayable
from exporter.scheduler.host_readings import Readings, wanted_by_host
from fleet.host.sections import HostReading
from fleet.inventory.model import Host, Service
from fleet.shells import Shell
from fleet.shells.pool import Shells
from runtime.redaction import Redactor

MESSAGE_LIMIT = 500


async def probe(
    service: Service, shell: Callable[[], Shell], reading: Callable[[], HostReading], redact: Redactor
) -> Result:
    """Probe `service` once; every failure is a Result, with no secret in its message."""
    kind = PROBES[service.probe.kind]
    seen = Seen(redact=redact)
    started_at, started = time.time(), time.perf_counter()
    reason: Reason | None = None
    message = ""
    timeout = service.probe.timeout
    means = Means(service.id, service.host, timeout, shell, reading)
    try:
        async with asyncio.timeout(timeout):
            await kind.probe(service.probe.options, means, seen)
    except ProbeFailure as failure:
        reason, message = failure.reason, failure.message
    except TimeoutError:
        late = seen.overdue or ProbeFailure("timeout", f"no answer within {timeout:g} s{_how_far(seen)}")
        reason, message = late.reason, late.message
    except Exception as error:  # noqa: BLE001 - one broken probe must not end the others; its traceback is logged
        seen.evidence["traceback"] = traceback.format_exc()
        reason, message = "error", f"the probe itself failed: {type(error).__name__}"
    duration = time.perf_counter() - started
    if seen.began is not None:
        started_at = min(started_at, seen.began)
    line = sayable(" ".join(seen.redact(message).split()))[:MESSAGE_LIMIT]
    return Result(reason is None, reason, line, started_at, duration, seen)


async def probe_alone(service: Service, hosts: Mapping[str, Host], redact: Redactor) -> Result:
    """Probe `service` once, with shells and readings of its own."""
    shells = Shells(hosts)
    readings = Readings(shells)
    readings.want(wanted_by_host([service]))
    try:
        return await probe(
            service, lambda: shells.get(service.host), lambda: readings.of(service.host, since=0.0), redact
        )
    finally:
        await readings.close()
        await shells.close()


def _how_far(seen: Seen) -> str:
    return f" (got as far as {list(seen.phases)[-1]})" if seen.phases else ""
