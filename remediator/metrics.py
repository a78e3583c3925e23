"""The remediator's metrics of itself."""

from prometheus_client import Counter, Gauge, Histogram

from runtime.metrics import ProgramMetrics

_SECONDS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics(ProgramMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.received = Counter(
            "defib_remediator_alerts_received", "Alerts of deliveries by status.", ["status"], registry=registry
        )
        self.truncated = Counter(
            "defib_remediator_alerts_truncated", "Alerts that Alertmanager left out of deliveries.", registry=registry
        )
        self.refusals = Counter(
            "defib_remediator_webhook_refusals", "Deliveries refused by HTTP status.", ["code"], registry=registry
        )
        for code in ("400", "401", "413", "503"):
            self.refusals.labels(code)  # from nothing there is no increase
        self.incidents = Gauge("defib_remediator_incidents", "Incidents by state.", ["state"], registry=registry)
        self.actions = Counter(
            "defib_remediator_actions", "Actions by outcome.", ["service", "kind", "outcome"], registry=registry
        )
        self.action_duration = Histogram(
            "defib_remediator_action_duration_seconds", "From claim to verified.", buckets=_SECONDS, registry=registry
        )
        self.recovery = Histogram(
            "defib_remediator_recovery_seconds",
            "From an incident's beginning to its end, by who brought the service back.",
            ["by"],
            buckets=_SECONDS,
            registry=registry,
        )
        for by in ("defib", "person", "self"):
            self.recovery.labels(by)
        self.queue_oldest = Gauge(
            "defib_remediator_queue_oldest_seconds",
            "How long an action has waited for a place or for approval.",
            registry=registry,
        )
        self.budget_used = Gauge(
            "defib_remediator_budget_used", "Actions that count against a budget of the fleet.", ["budget"],
            registry=registry,
        )  # fmt: skip
        self.budget_limit = Gauge(
            "defib_remediator_budget_limit", "How many actions a budget of the fleet allows.", ["budget"],
            registry=registry,
        )  # fmt: skip
        self.breaker = Gauge(
            "defib_remediator_breaker_open", "1 while a service's attempts are used up.", ["service"], registry=registry
        )
        self.config_mismatch = Gauge(
            "defib_remediator_config_mismatch",
            "Services of which the exporter has another configuration.",
            registry=registry,
        )
        self.notifications = Counter(
            "defib_remediator_notices", "Attempts to send notifications by outcome.", ["channel", "outcome"],
            registry=registry,
        )  # fmt: skip
        self.outbox_oldest = Gauge(
            "defib_remediator_outbox_oldest_seconds", "Age of the oldest pending notification.", registry=registry
        )
        self.clock_offset = Gauge(
            "defib_remediator_feishu_clock_offset_seconds",
            "How far our clock is ahead of Feishu's, by the date of its last answer.",
            registry=registry,
        )
        self.presses = Counter(
            "defib_remediator_presses", "Buttons pressed on cards by outcome.", ["answer", "outcome"], registry=registry
        )
        self.connected = Gauge(
            "defib_remediator_feishu_connected", "Whether a channel's long connection stands.", ["channel"],
            registry=registry,
        )  # fmt: skip
        self.automation = Gauge("defib_remediator_automation_enabled", "Whether it acts by itself.", registry=registry)
        self.watchdog = Gauge(
            "defib_remediator_watchdog_last_timestamp_seconds", "When the Watchdog last arrived.", registry=registry
        )
