"""The metrics that every program has about itself."""

import asyncio
import time

from prometheus_client import CollectorRegistry, Counter, Gauge

from runtime import VERSION

REFUSED = (401, 403, 429)  # statuses: without a credential, without the right, after too many attempts
LAG_PERIOD = 0.1
LAG_WINDOW = 30.0


class ProgramMetrics:
    """A metrics registry with the version, reloads, the lag of the event loop, connections and requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        build = Gauge("defib_build_info", "The running version; always 1.", ["version"], registry=self.registry)
        build.labels(VERSION).set(1)
        self._is_loaded = self._is_web_loaded = True
        self._reload_ok = Gauge(
            "defib_config_last_reload_successful",
            "Whether the last load or reload of the configuration succeeded, and that of the web configuration.",
            registry=self.registry,
        )
        self._reload_at = Gauge(
            "defib_config_last_reload_success_timestamp_seconds",
            "Unix time of the last successful load or reload of the configuration.",
            registry=self.registry,
        )
        self.source_success = Gauge(
            "defib_service_source_success",
            "Whether the last request for the targets of a source in services_from succeeded.",
            ["source"],
            registry=self.registry,
        )

        self._event_loop_lag = Gauge(
            "defib_event_loop_lag_seconds",
            "Largest delay of the event loop in the last 30 to 60 seconds.",
            registry=self.registry,
        )
        self.connections = Gauge("defib_http_connections", "Open connections to the server.", registry=self.registry)
        self.dropped_connections = Counter(
            "defib_http_connections_dropped",
            "Connections that the server closed because of a limit or a slow client, by reason.",
            ["reason"],
            registry=self.registry,
        )
        for reason in ("limit", "handshake", "headers", "body", "response", "pipelining"):
            self.dropped_connections.labels(reason)
        self.malformed_requests = Counter(
            "defib_http_requests_malformed", "Requests that were refused as malformed.", registry=self.registry
        )

        self._refused_requests = Counter(
            "defib_http_requests_refused",
            "Requests that were refused for lack of access, by status: 401, 403, 429.",
            ["code"],
            registry=self.registry,
        )
        for code in REFUSED:
            self._refused_requests.labels(str(code))

    def count_refusal(self, status: int) -> None:
        """Count a request if it ended with a status of refused access."""
        if status in REFUSED:
            self._refused_requests.labels(str(status)).inc()

    def record_reload(self, *, successful: bool) -> None:
        self._is_loaded = successful
        self._reload_ok.set(int(self._is_loaded and self._is_web_loaded))
        if successful:
            self._reload_at.set(time.time())

    def record_web_reload(self, *, successful: bool) -> None:
        """Record whether the web configuration (`--web.config.file`) could be read again."""
        self._is_web_loaded = successful
        self._reload_ok.set(int(self._is_loaded and self._is_web_loaded))

    async def measure_event_loop_lag(self) -> None:
        """Measure for ever by how much the event loop is late.

        The metric has the largest value of a window that is longer than usual scrape intervals, so that no scrape
        misses one.
        """
        window_end, previous, current = time.monotonic() + LAG_WINDOW, 0.0, 0.0
        while True:
            due = time.monotonic() + LAG_PERIOD
            await asyncio.sleep(LAG_PERIOD)
            now = time.monotonic()
            if now >= window_end:
                window_end, previous, current = now + LAG_WINDOW, current, 0.0
            current = max(current, now - due)
            self._event_loop_lag.set(max(previous, current))
