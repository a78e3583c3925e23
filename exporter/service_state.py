"""The debounced state of a service, computed from its probe results."""

from dataclasses import dataclass

from exporter.results import ProbeResult


@dataclass(frozen=True, slots=True)
class ServiceState:
    """The state of a service after all its probes so far.

    `up` is None until `fail_after` failures or `recover_after` successes in a row have been seen. Times are Unix time.
    """

    up: bool | None = None
    successes_in_a_row: int = 0
    failures_in_a_row: int = 0
    changes: int = 0
    last_change: float | None = None
    last_success: float | None = None
    successes: int = 0
    failures: int = 0

    @property
    def is_steadily_up(self) -> bool:
        """Whether the service is up and its last probe succeeded, so that the full interval applies."""
        return self.up is True and self.failures_in_a_row == 0

    def after_result(self, result: ProbeResult, *, fail_after: int, recover_after: int) -> "ServiceState":
        """Return the state after one more probe result."""
        ended, up = result.started_at + result.duration, self.up
        successes_in_a_row = self.successes_in_a_row + 1 if result.success else 0
        failures_in_a_row = 0 if result.success else self.failures_in_a_row + 1
        if successes_in_a_row >= recover_after:
            up = True
        elif failures_in_a_row >= fail_after:
            up = False
        is_changed = up is not self.up
        return ServiceState(
            up=up,
            successes_in_a_row=successes_in_a_row,
            failures_in_a_row=failures_in_a_row,
            # Determining `up` for the first time is not counted as a change.
            changes=self.changes + (is_changed and self.up is not None),
            last_change=ended if is_changed else self.last_change,
            last_success=ended if result.success else self.last_success,
            successes=self.successes + result.success,
            failures=self.failures + (not result.success),
        )
