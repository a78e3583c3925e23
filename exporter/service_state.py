"""The debounced state of a service, computed from its probe results."""

from dataclasses import dataclass, replace

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
        ended = result.started_at + result.duration
        if result.success:
            in_a_row = self.successes_in_a_row + 1
            up = True if in_a_row >= recover_after else self.up
            counted = replace(
                self, successes_in_a_row=in_a_row, failures_in_a_row=0, successes=self.successes + 1, last_success=ended
            )
        else:
            in_a_row = self.failures_in_a_row + 1
            up = False if in_a_row >= fail_after else self.up
            counted = replace(self, successes_in_a_row=0, failures_in_a_row=in_a_row, failures=self.failures + 1)
        if up is self.up:
            return counted
        # Determining `up` for the first time is not counted as a change.
        return replace(counted, up=up, changes=self.changes + (self.up is not None), last_change=ended)
