"""A probed service: its state, its last results and its recent failures."""

import asyncio
from collections import Counter
from dataclasses import replace

import structlog

from exporter.exposition.service_series import ServiceSeries
from exporter.results import FailureReason, ProbeDetails, ProbeResult
from exporter.scheduler.recent_results import RecentResults
from exporter.service_state import ServiceState
from fleet.inventory.model import Service
from runtime.tasks import SmallEvent

RECENT_FAILURES = 20
LOG_REPEAT = 600.0  # seconds between two log lines about the same failure
RENDER_EVERY = 5.0  # seconds; services that are probed more often are rendered at a scrape
_NO_DETAILS = ProbeDetails()
log = structlog.get_logger()


class ProbedService:
    """The state and counters of one service, and the lock that prevents concurrent probes of it."""

    def __init__(self, service: Service) -> None:
        self.state = ServiceState()
        self.last: ProbeResult | None = None
        self.digest = service.digest  # of the configuration that produced the last result
        self.failures: Counter[FailureReason] = Counter()
        self.recent_failures: tuple[ProbeResult, ...] = ()  # oldest first
        self.recent_results = RecentResults()
        self.lock = asyncio.Lock()
        self.probed_out_of_turn = SmallEvent()  # the next due time has to be computed again
        self.due_by: float | None = None  # an earlier due time than that of the schedule, event loop's clock
        self.task: asyncio.Task[None] | None = None
        self._logged_at = 0.0  # event loop's clock
        self.rendered_at = float("-inf")  # event loop's clock
        self.changed_at: float | None = None  # when `up` was determined or changed, event loop's clock
        self.is_paused = False  # it is probed only on request
        self.set_service(service)

    def set_service(self, service: Service) -> None:
        self.service = service
        # Each probe uses these, and reading them from the configuration takes long.
        self.id, self.kind, self.options = service.id, service.probe.kind, service.probe.options
        self.is_reported = service.probe.is_reported
        self.series = ServiceSeries(service)

    def render(self) -> dict[str, str]:
        """Return the lines of `/metrics` by metric name."""
        state, last = self.visible_state
        return self.series.render(state, last, self.failures, is_paused=self.is_paused)

    @property
    def visible_state(self) -> tuple[ServiceState, ProbeResult | None]:
        """The state and the last result as others see them: during a pause, neither is known."""
        return (_forget(self.state), None) if self.is_paused else (self.state, self.last)

    def make_due(self, at: float) -> None:
        """Have the service probed at `at`, unless it is due earlier."""
        self.due_by = at
        self.probed_out_of_turn.set()

    def take_due_time(self) -> float | None:
        """Return the time set by `make_due`, which counts once; None if none was set."""
        due_by, self.due_by = self.due_by, None
        return due_by

    def set_paused(self, *, paused: bool) -> None:
        """Begin or end a pause; what was seen before is too old afterwards."""
        self.is_paused = paused
        self.state, self.last, self.changed_at = _forget(self.state), None, None

    def apply_result(self, result: ProbeResult, now: float, digest: str) -> None:
        """Apply a result of the configuration `digest`; `now` is of the event loop's clock."""
        options = self.service.probe
        before = self.state
        trace = result.details.evidence.get("traceback")
        # What a service reports itself is not debounced.
        fail_after, recover_after = (1, 1) if self.is_reported else (options.fail_after, options.recover_after)
        if self.is_reported:
            result = replace(result, details=_NO_DETAILS)  # those of 10,000 heartbeats would take megabytes
        self.state = before.after_result(result, fail_after=fail_after, recover_after=recover_after)
        if self.state.up is not before.up:
            self.changed_at = now
        differs = self.last is None or (self.last.success, self.last.reason) != (result.success, result.reason)
        if self.last is not None:
            self.last.details.components.clear()  # a page may have hundreds, and `recent_failures` keeps the rest
        self.last, self.digest = result, digest
        self.recent_results.add(result)
        # Only `defib probe` and the log use these; for 10,000 services they would take much memory.
        result.details.evidence.clear()
        result.details.timeout_failure = None  # an exception references the frames that it passed through
        if result.reason is not None:
            self.failures[result.reason] += 1
            self.recent_failures = (*self.recent_failures[1 - RECENT_FAILURES :], result)
        repeat = not result.success and now - self._logged_at >= LOG_REPEAT
        if differs or self.state.up is not before.up or repeat:
            self._logged_at = now
            log.info(
                "probe_result",
                service=self.id,
                success=result.success,
                up=self.state.up,
                reason=result.reason,
                message=result.message or None,
                **({"traceback": trace} if trace else {}),
            )


def _forget(state: ServiceState) -> ServiceState:
    """Return a state that is undetermined, with its counters."""
    return replace(state, up=None, successes_in_a_row=0, failures_in_a_row=0, last_change=None)
