"""Running one probe of one service: its deadline, and a result whatever happens."""

import asyncio
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from exporter.probes import PROBES, ProbeContext
from exporter.probes.held_bodies import HELD
from exporter.results import FailureReason, ProbeDetails, ProbeFailure, ProbeResult, replace_unencodable
from exporter.scheduler.host_readings import HostReadings, sections_by_host
from fleet.host.sections import HostReading
from fleet.inventory.model import Host, Service
from fleet.shells import Shell, ShellError
from fleet.shells.pool import Shells
from runtime.redaction import Redactor

MESSAGE_LIMIT = 500  # characters
MESSAGE_EXAMINED = 10_000  # characters that are redacted


def refuse_heartbeat() -> None:
    """Check a heartbeat where no pings are received. Raises ProbeFailure."""
    raise ProbeFailure("error", "only the exporter receives pings: see `defib heartbeat list`")


async def run_probe(
    service: Service,
    shell: Callable[[], Shell],
    reading: Callable[[], HostReading],
    redact: Redactor,
    *,
    check_heartbeat: Callable[[], None] = refuse_heartbeat,
    measured_at: float | None = None,
) -> ProbeResult:
    """Probe `service` once. Every failure becomes a result; secrets in its message are redacted.

    `measured_at` is the Unix time of the state that a heartbeat has, if older than the probe.
    """
    context = ProbeContext(service.id, service.host, service.probe.timeout, shell, reading, check_heartbeat)
    details = ProbeDetails(redact=redact, measured_at=measured_at)
    return await run(service.probe.kind, service.probe.options, context, details)


async def run_options(kind: str, options: Any, timeout: float, redact: Redactor) -> ProbeResult:
    """Run a probe of no service and no host once, as `run_probe` does."""

    def refuse_host() -> Any:
        raise ShellError("the probe has no host")

    context = ProbeContext("", "", timeout, refuse_host, refuse_host, refuse_heartbeat)
    return await run(kind, options, context, ProbeDetails(redact=redact))


async def run(kind: str, options: Any, context: ProbeContext, details: ProbeDetails) -> ProbeResult:
    """Run a probe once. Every failure becomes a result, in which secrets are redacted."""
    started_at, started = time.time(), time.perf_counter()
    reason: FailureReason | None = None
    message = ""
    timeout = context.timeout
    try:
        async with asyncio.timeout(timeout):
            await PROBES[kind].probe(options, context, details)
    except ProbeFailure as failure:
        _forget_frames(failure)
        reason, message = failure.reason, failure.message
    except TimeoutError as error:
        _forget_frames(error)
        late = details.timeout_failure or ProbeFailure(
            "timeout", f"no answer within {timeout:g} s{_last_phase(details)}"
        )
        reason, message = late.reason, late.message
    except Exception as error:  # noqa: BLE001 - a defect in one probe must not stop others; its traceback is logged
        details.evidence["traceback"] = traceback.format_exc()
        _forget_frames(error)
        reason, message = "error", f"internal error in the probe: {type(error).__name__}; see the log"
    finally:
        HELD.release(details)
    duration = time.perf_counter() - started
    if details.measured_at is not None:
        started_at = min(started_at, details.measured_at)
    if message:
        redacted = details.redact.redact_head(message, MESSAGE_EXAMINED)
        message = replace_unencodable(" ".join(redacted.split()))[:MESSAGE_LIMIT]
    return ProbeResult(reason is None, reason, message, started_at, duration, details)


def _forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error and of its causes.

    Their frames have whole responses, which would stay until the next garbage collection.
    """
    left: list[BaseException | None] = [error]
    while left:
        if (each := left.pop()) is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            left += [each.__cause__, each.__context__]


async def probe_once(service: Service, hosts: Mapping[str, Host], redact: Redactor) -> ProbeResult:
    """Probe `service` once outside of a scheduler, with shells and readings of its own."""
    shells = Shells(hosts)
    readings = HostReadings(shells)
    readings.set_sections(sections_by_host([service]))
    try:
        return await run_probe(
            service, lambda: shells.get(service.host), lambda: readings.get(service.host, since=0.0), redact
        )
    finally:
        await readings.close()
        await shells.close()


def _last_phase(details: ProbeDetails) -> str:
    return f" (last phase: {list(details.phases)[-1]})" if details.phases else ""
