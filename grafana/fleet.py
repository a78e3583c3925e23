"""The *Fleet* dashboard: current problems, then all services and their certificates."""

from grafana_foundation_sdk.builders import table
from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import (
    AVAILABILITY_DECIMALS,
    AVAILABILITY_THRESHOLDS,
    BLUE,
    GREEN,
    ORANGE,
    RED,
    STATE_MAPPINGS,
    ZERO_IS_GOOD,
    graph,
    range_query,
    stat_panel,
)
from grafana.promql import highest
from grafana.tables import TIME, Value, table_panel

SELECTED = 'provider=~"$provider", category=~"$category", host=~"$host"'
# Leaves out services on hosts of other groups. A service without a host belongs to no group and is shown.
IN_GROUP = 'unless on (host) host_info{group!~"$group"}'
AUTOMATION = "defib_remediator_automation_enabled"
OF_SERVICE = "service, host, provider, category"
STATE = panels.state(
    f"service:up:max{{{SELECTED}}}", f"service_probe_interval_seconds{{{SELECTED}}}", OF_SERVICE, "service"
)
SERVICE = {"service": "Service", "host": "Host", "provider": "Provider", "category": "Category"}
SEVERITIES = {"critical": 3, "warning": 2, "info": 1}
SEVERITY_MAPPINGS = panels.value_mappings(
    {"3": ("critical", RED), "2": ("warning", ORANGE), "1": ("info", BLUE), "0": ("other", BLUE)}
)
# What an alert is about, beside its service and host; shown in one column.
DETAILS = (
    "component", "container", "unit", "program", "gpu", "instance", "provider", "mountpoint", "device", "collector", "source", "pattern", "channel",
    "integration", "rule_group", "kind", "scope", "xid", "reason", "code", "action", "fault", "against", "probed", "stage",
)  # fmt: skip


def build() -> Dashboard:
    board = panels.dashboard(
        "fleet",
        "Fleet",
        "Current problems, then all services",
        [
            panels.variable("provider", "Provider", "label_values(service_info, provider)"),
            panels.variable("category", "Category", 'label_values(service_info{provider=~"$provider"}, category)'),
            panels.variable("group", "Group", "label_values(host_info, group)"),
            panels.variable("host", "Host", 'label_values(host_info{group=~"$group"}, host)'),
        ],
    )
    board = _problems(board.with_row(Row("Current problems")))
    board = _services(board.with_row(Row("All services")))
    return board.with_row(Row("Certificates")).with_panel(_certificates())


def _problems(board: Dashboard) -> Dashboard:
    hosts = 'host=~"$host", group=~"$group"'
    for title, expression, known in (
        ("Services down", f"service:up:max{{{SELECTED}}} == 0 {IN_GROUP}", "service:up:max"),
        ("Hosts down", f'ALERTS{{alertname="HostDown", alertstate="firing", {hosts}}}', "host_info"),
        ("GPUs unhealthy", f'max by (host, gpu) (gpu_healthy{{host=~"$host"}}) == 0 {IN_GROUP}', "gpu_healthy"),
        (
            "Critical alerts",
            f'ALERTS{{alertstate="firing", severity="critical", host=~"$host"}} {IN_GROUP}',
            'up{job="prometheus"}',
        ),
        ("Given up", "max by (service) (defib_remediator_breaker_open) == 1", AUTOMATION),
    ):
        board = panels.add_panels(
            board, stat_panel(title, "none", f"count({expression}) or 0 * count({known})", ZERO_IS_GOOD)
        )
    automatic = panels.value_mappings({"1": ("on", GREEN), "0": ("off", ORANGE)})
    board = panels.add_panels(
        board,
        stat_panel(
            "Automation",
            "none",
            f"max({AUTOMATION})",
            [(None, ORANGE), (1, GREEN)],
            mappings=automatic,
        ),
        _alerts(),
    )
    changed = f"max by ({OF_SERVICE}) (service_last_change_timestamp_seconds{{{SELECTED}}})"
    down = f"(time() - {changed}) and on (service) (service:up:max{{{SELECTED}}} == 0 {IN_GROUP})"
    none = "0 * count(service:up:max)"
    up = f"service:up:max{{{SELECTED}}}"
    unknown = (
        f"group by (service, host) (service_probe_interval_seconds{{{SELECTED}}}) unless on (service) service:up:max"
    )
    counts = ((f"{up} == 1", "up", "A"), (f"{up} == 0", "down", "B"), (unknown, "unknown", "C"))
    return panels.add_panels(
        board,
        table_panel(
            "Services down",
            {"service": "Service", "host": "Host", "provider": "Provider"},
            {"Down for": Value(down, "s")},
            width=12,
            sort=("Down for",),
        ),
        graph(
            "Services by state",
            "none",
            *(range_query(f"count({expression} {IN_GROUP}) or {none}", name, ref) for expression, name, ref in counts),
            stacked=True,
            height=9,
        ),
    )


def _alerts() -> table.Panel:
    """Return the table of firing alerts: a row for each, since both of its series have all its labels."""
    firing = 'ALERTS{alertstate="firing", alertname!="Watchdog", host=~"$host", severity'
    ranked = [f'{rank} * {firing}="{name}"}}' for name, rank in SEVERITIES.items()]
    others = f'0 * {firing}!~"{"|".join(SEVERITIES)}"}}'
    rank = f"({' or '.join([*ranked, others])}) {IN_GROUP}"
    shown = f"topk($rows, max without (alertstate) ({rank}))"
    since = f"max without (alertstate) (1000 * ALERTS_FOR_STATE) and {shown}"
    return table_panel(
        "Firing alerts",
        {"alertname": "Alert", "service": "Service", "host": "Host", "details": "Details", "team": "Team"},
        {
            "Severity": Value(_with_details(shown), mappings=SEVERITY_MAPPINGS),
            "Since": Value(_with_details(since), TIME),
        },
        whole=True,
        sort=("-Severity", "Since"),
        description="Critical ones first. Includes alerts that Alertmanager mutes.",
    )


def _with_details(expression: str) -> str:
    """Add the label `details`: all labels that tell an alert from others of its service and host."""
    names = ", ".join(f'"{name}"' for name in DETAILS)
    joined = f'label_join({expression}, "details", " ", {names})'
    return f'label_replace({joined}, "details", "$1", "details", " *(.*?) *")'


def _services(board: Dashboard) -> Dashboard:
    of_provider = f"by (provider) (service:availability:avg5m{{{SELECTED}}} {IN_GROUP})"
    latency = 'provider:probe_duration_seconds:p95{provider=~"$provider", category=~"$category"}'
    availability = {
        window: f"service:availability:avg{window}{{{SELECTED}}} {IN_GROUP}" for window in ("1h", "1d", "30d")
    }
    over_time = f"{STATE} or on (service) group by ({OF_SERVICE}) (service:availability:avg1d{{{SELECTED}}})"
    worst = f"1 - service:availability:avg1d{{{SELECTED}}} {IN_GROUP}"
    board = panels.add_panels(
        board,
        graph(
            "Availability by provider",
            "percentunit",
            range_query(highest(f"avg {of_provider}", "provider", lowest=True), "{{provider}}"),
            maximum=1,
            minimum=None,
            decimals=AVAILABILITY_DECIMALS,
            description="The 20 providers with the lowest availability.",
        ),
        graph(
            "Latency (95th percentile) by provider",
            "s",
            range_query(highest(latency, "provider, category"), "{{provider}} {{category}}"),
            description="The 20 slowest.",
        ),
        panels.state_timeline(
            "State over time",
            highest(over_time, "service", 25, rank=worst),
            "{{service}}",
            height=12,
            description="The 25 services with the lowest availability in 24 hours. Unknown: not probed, or not scraped.",
        ),
    )
    # A service that is down counts as its availability, one of unknown state as 1, one that is up as more than 2.
    rank = (
        f"(2 * service:up:max{{{SELECTED}}} + service:availability:avg1h{{{SELECTED}}}"
        f" or on (service) group by ({OF_SERVICE}) (service_probe_interval_seconds{{{SELECTED}}})) {IN_GROUP}"
    )
    shares = {
        title: Value(availability[window], "percentunit", AVAILABILITY_DECIMALS, AVAILABILITY_THRESHOLDS)
        for title, window in (("1 h", "1h"), ("1 d", "1d"), ("30 d", "30d"))
    }
    return panels.add_panels(
        board,
        table_panel(
            "Services",
            SERVICE,
            {
                "State": Value(f"{STATE} {IN_GROUP}", mappings=STATE_MAPPINGS),
                "Latency": Value(f"service:probe_duration_seconds:avg5m{{{SELECTED}}}", "s"),
                **shares,
            },
            key="service",
            rank=rank,
            lowest=True,
            height=14,
            sort=("State", "1 h"),
            description="The worst first.",
        ),
    )


def _certificates() -> table.Panel:
    expiry = f"(service:certificate_expiry_timestamp_seconds:min{{{SELECTED}}} {IN_GROUP})"
    labels = {"service": "Service", "host": "Host", "subject": "Subject", "issuer": "Issuer", "version": "Protocol"}
    return table_panel(
        "Certificates",
        labels,
        {
            "Days left": Value(f"({expiry} - time()) / 86400", "none", 1, [(None, RED), (7, ORANGE), (30, GREEN)]),
            "Expires": Value(f"1000 * {expiry}", "dateTimeAsIso"),
            "": Value(f"service_tls_info{{{SELECTED}}}"),
        },
        key="service",
        lowest=True,
        sort=("Days left",),
        description="The earliest expiry in the chain that the service serves; the soonest first.",
    )
