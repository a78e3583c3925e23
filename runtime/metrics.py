"""The metrics that every program has about itself."""

import time

from prometheus_client import CollectorRegistry, Gauge

from runtime import VERSION


class ProgramMetrics:
    """A metrics registry with the version and the outcome of reloads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        build = Gauge("defib_build_info", "The running version; always 1.", ["version"], registry=self.registry)
        build.labels(VERSION).set(1)
        self._reload_ok = Gauge(
            "defib_config_last_reload_successful",
            "Whether the last load or reload of the configuration succeeded.",
            registry=self.registry,
        )
        self._reload_at = Gauge(
            "defib_config_last_reload_success_timestamp_seconds",
            "Unix time of the last successful load or reload of the configuration.",
            registry=self.registry,
        )

    def record_reload(self, *, successful: bool) -> None:
        self._reload_ok.set(int(successful))
        if successful:
            self._reload_at.set(time.time())
