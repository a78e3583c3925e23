"""Whether a service is up: its probes, debounced. Pure."""

from dataclasses import dataclass, replace

from exporter.results import ProbeResult


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What all probes of a service so far amount to.

    `up` is None until `fail_after` failures or `recover_after` successes in a row have decided it. Times are Unix time.
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
    def settled(self) -> bool:
        """Up with no doubt: the next probe may wait for the service's full interval."""
        return self.up is True and self.failures_in_a_row == 0

    def after(self, result: ProbeResult, *, fail_after: int, recover_after: int) -> "ServiceState":
        ended = result.started_at + result.duration
        if result.success:
            row = self.successes_in_a_row + 1
            up = True if row >= recover_after else self.up
            counted = replace(
                self, successes_in_a_row=row, failures_in_a_row=0, successes=self.successes + 1, last_success=ended
            )
        else:
            row = self.failures_in_a_row + 1
            up = False if row >= fail_after else self.up
            counted = replace(self, successes_in_a_row=0, failures_in_a_row=row, failures=self.failures + 1)
        if up is self.up:
            return counted
        # The first decision is no change of state: nothing was known before.
        return replace(counted, up=up, changes=self.changes + (self.up is not None), last_change=ended)
