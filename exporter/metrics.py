"""Prometheus metrics of the exporter process, and probe durations by provider."""

from prometheus_client import Counter, Gauge, Histogram

from runtime.metrics import ProgramMetrics

_DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_LAG_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class ExporterMetrics(ProgramMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.probe_duration = Histogram(
            "provider_probe_duration_seconds",
            "Duration of probes.",
            ["provider", "category"],
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.schedule_lag = Histogram(
            "defib_exporter_schedule_lag_seconds",
            "Delay between the scheduled time and the start of a probe.",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "defib_exporter_probes_in_flight", "Number of probes currently running.", registry=registry
        )
        self.ssh_connections = Gauge(
            "defib_exporter_ssh_connections", "Number of SSH connections by state.", ["state"], registry=registry
        )
        self.skipped = Counter(
            "defib_exporter_probes_skipped",
            "Number of scheduled probes that were skipped because their time had passed.",
            registry=registry,
        )
        self.heartbeats_created = Gauge(
            "defib_exporter_created_heartbeats", "Number of heartbeats that jobs have created.", registry=registry
        )
        self.heartbeats_not_created = Counter(
            "defib_exporter_created_heartbeats_refused",
            "Number of pings that would have created a heartbeat, but as many as permitted were created.",
            registry=registry,
        )
