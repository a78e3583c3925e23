"""The remediator's own metrics."""

from prometheus_client import Counter, Gauge, Histogram

from runtime.metrics import ProgramMetrics

_SECONDS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class RemediatorMetrics(ProgramMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.received = Counter(
            "defib_remediator_alerts_received",
            "Alerts received from Alertmanager, by status.",
            ["status"],
            registry=registry,
        )
        self.truncated = Counter(
            "defib_remediator_alerts_truncated",
            "Alerts that Alertmanager left out of its webhooks (max_alerts).",
            registry=registry,
        )
        self.refused_alerts = Counter(
            "defib_remediator_alerts_refused",
            "Alerts that were not stored because too many are open.",
            registry=registry,
        )
        self.refusals = Counter(
            "defib_remediator_webhook_refusals", "Refused webhooks, by HTTP status.", ["code"], registry=registry
        )
        for code in ("400", "401", "413", "503"):
            self.refusals.labels(code)  # increase() needs a first value
        self.incidents = Gauge("defib_remediator_incidents", "Incidents, by state.", ["state"], registry=registry)
        self.actions = Counter(
            "defib_remediator_actions", "Ended actions, by outcome.", ["service", "kind", "outcome"], registry=registry
        )
        self.action_duration = Histogram(
            "defib_remediator_action_duration_seconds",
            "Duration of actions, including their verification.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.recovery = Histogram(
            "defib_remediator_recovery_seconds",
            "Duration of outages, by who recovered the service.",
            ["by"],
            buckets=_SECONDS,
            registry=registry,
        )
        for by in ("defib", "person", "self"):
            self.recovery.labels(by)
        self.queue_oldest = Gauge(
            "defib_remediator_queue_oldest_seconds",
            "How long the oldest waiting action has waited for capacity or approval.",
            registry=registry,
        )
        self.queue_services = Gauge(
            "defib_remediator_queue_services",
            "Services whose restart waits for a limit of their host or of the fleet.",
            registry=registry,
        )
        self.queue_end = Gauge(
            "defib_remediator_queue_end_seconds",
            "Seconds until the last of these restarts may begin.",
            registry=registry,
        )
        self.budget_used = Gauge(
            "defib_remediator_budget_used", "Actions that count towards a limit of the fleet.", ["budget"],
            registry=registry,
        )  # fmt: skip
        self.budget_limit = Gauge(
            "defib_remediator_budget_limit", "Actions that a limit of the fleet allows.", ["budget"],
            registry=registry,
        )  # fmt: skip
        self.breaker = Gauge(
            "defib_remediator_breaker_open",
            "1 while the attempts for a service are used up.",
            ["service"],
            registry=registry,
        )
        self.config_mismatch = Gauge(
            "defib_remediator_config_mismatch",
            "Services whose configuration differs in the exporter.",
            registry=registry,
        )
        self.events_copied = Counter(
            "defib_remediator_events_copied", "Events copied from the exporter.", registry=registry
        )
        self.event_gaps = Counter(
            "defib_remediator_event_gaps", "Copies before which the exporter had lost events.", registry=registry
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
            "How far this machine's clock is ahead of Feishu's, by the date of its last response.",
            registry=registry,
        )
        self.presses = Counter(
            "defib_remediator_presses",
            "Pressed buttons of cards, by outcome.",
            ["answer", "outcome"],
            registry=registry,
        )
        self.connected = Gauge(
            "defib_remediator_feishu_connected", "Whether the long connection of a channel is open.", ["channel"],
            registry=registry,
        )  # fmt: skip
        self.automation = Gauge(
            "defib_remediator_automation_enabled", "Whether automation is enabled.", registry=registry
        )
        self.automation_configured = Gauge(
            "defib_remediator_automation_configured", "Whether remediation.automatic is true.", registry=registry
        )
        self.watchdog = Gauge(
            "defib_remediator_watchdog_last_timestamp_seconds",
            "When the Watchdog alert was last received.",
            registry=registry,
        )
        self.dead_man_pings = Counter(
            "defib_remediator_dead_man_pings",
            "Pings of the watcher outside that were due, by outcome: sent, failed, withheld.",
            ["outcome"],
            registry=registry,
        )
