"""The metrics that each program of ours has of itself."""

import time

from prometheus_client import CollectorRegistry, Gauge

from runtime import VERSION


class ProgramMetrics:
    """A registry of its own, so that every test has one, with version and configuration on it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        build = Gauge("defib_build_info", "The running version; always 1.", ["version"], registry=self.registry)
        build.labels(VERSION).set(1)
        self._reload_ok = Gauge(
            "defib_config_last_reload_successful", "Whether the last configuration was taken.", registry=self.registry
        )
        self._reload_at = Gauge(
            "defib_config_last_reload_success_timestamp_seconds", "When it was last taken.", registry=self.registry
        )

    def record_reload(self, *, successful: bool) -> None:
        self._reload_ok.set(int(successful))
        if successful:
            self._reload_at.set(time.time())
