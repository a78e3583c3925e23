"""The exporter's metrics of itself, and what it sums up over providers."""

from prometheus_client import Counter, Gauge, Histogram

from runtime.metrics import ProgramMetrics

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_LAG = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class ExporterMetrics(ProgramMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.latency = Histogram(
            "provider_probe_duration_seconds",
            "Duration of probes.",
            ["provider", "category"],
            buckets=_LATENCY,
            registry=registry,
        )
        self.lag = Histogram(
            "defib_exporter_schedule_lag_seconds",
            "How long after its time a probe began.",
            buckets=_LAG,
            registry=registry,
        )
        self.in_flight = Gauge("defib_exporter_probes_in_flight", "Probes running now.", registry=registry)
        self.ssh_connections = Gauge(
            "defib_exporter_ssh_connections", "SSH connections by state.", ["state"], registry=registry
        )
        self.skipped = Counter(
            "defib_exporter_probes_skipped", "Probes left out because their time had passed.", registry=registry
        )
