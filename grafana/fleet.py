"""The *Fleet* dashboard: current problems, then all services."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import (
    AVAILABILITY_THRESHOLDS,
    GREEN,
    ORANGE,
    RED,
    UP_DOWN_MAPPINGS,
    ZERO_IS_GOOD,
    graph,
    range_query,
    stat_panel,
    table_panel,
)

SELECTED = 'provider=~"$provider", category=~"$category", host=~"$host"'
# Leaves out services on hosts of other groups. A service without a host belongs to no group and is shown.
IN_GROUP = 'unless on (host) host_info{group!~"$group"}'
AUTOMATION = "defib_remediator_automation_enabled"
SERVICE = "/d/defib-service?var-service=${__data.fields.Service}"
HOST = "/d/defib-hosts?var-host=${__data.fields.Host}"
SEVERITIES = panels.value_mappings(
    {"critical": ("critical", RED), "warning": ("warning", ORANGE), "info": ("info", "blue")}
)


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
    return _services(board.with_row(Row("All services")))


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
        ("Attempts used up", "max by (service) (defib_remediator_breaker_open) == 1", AUTOMATION),
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
    )
    shown = {
        "alertname": "Alert",
        "severity": "Severity",
        "service": "Service",
        "host": "Host",
        "gpu": "GPU",
        "mountpoint": "Mount",
        "component": "Component",
        "instance": "Instance",
    }
    firing = 'max by (alertname, severity, service, host, gpu, mountpoint, component, instance) (ALERTS{alertstate="firing", alertname!="Watchdog"})'
    board = panels.add_panels(
        board,
        table_panel(
            "Firing alerts",
            {"Firing": firing},
            shown,
            sort="Severity",
            mappings={"Severity": SEVERITIES},
            links={"Service": SERVICE, "Host": HOST},
            description="Includes alerts that Alertmanager mutes.",
        ),
    )
    none = "0 * count(service:up:max)"
    down = f"(time() - max by (service, host, provider) (service_last_change_timestamp_seconds)) and on (service) (service:up:max{{{SELECTED}}} == 0 {IN_GROUP})"
    return panels.add_panels(
        board,
        table_panel(
            "Services down",
            {"Down for": down},
            {"service": "Service", "host": "Host", "provider": "Provider"},
            width=12,
            units={"Down for": "s"},
            links={"Service": SERVICE, "Host": HOST},
            sort="Down for",
        ),
        graph(
            "Services up and down",
            "none",
            range_query(f"count(service:up:max{{{SELECTED}}} == 1 {IN_GROUP}) or {none}", "up"),
            range_query(f"count(service:up:max{{{SELECTED}}} == 0 {IN_GROUP}) or {none}", "down", "B"),
            stacked=True,
            height=9,
        ),
    )


def _services(board: Dashboard) -> Dashboard:
    of_provider = f"by (provider) (service:availability:avg5m{{{SELECTED}}} {IN_GROUP})"
    board = panels.add_panels(
        board,
        graph("Availability by provider", "percentunit", range_query(f"avg {of_provider}", "{{provider}}"), maximum=1),
        graph(
            "Latency (95th percentile) by provider",
            "s",
            range_query(
                'provider:probe_duration_seconds:p95{provider=~"$provider", category=~"$category"}',
                "{{provider}} {{category}}",
            ),
        ),
    )
    values = {
        "State": f"service:up:max{{{SELECTED}}} {IN_GROUP}",
        "Latency": f"service:probe_duration_seconds:avg5m{{{SELECTED}}} {IN_GROUP}",
        "1 h": f"service:availability:avg1h{{{SELECTED}}} {IN_GROUP}",
        "1 d": f"service:availability:avg1d{{{SELECTED}}} {IN_GROUP}",
        "30 d": f"service:availability:avg30d{{{SELECTED}}} {IN_GROUP}",
    }
    columns = {"service": "Service", "host": "Host", "provider": "Provider", "category": "Category"}
    share = ("1 h", "1 d", "30 d")
    return panels.add_panels(
        board,
        table_panel(
            "Services",
            values,
            columns,
            height=14,
            sort="State",
            units={"Latency": "s", **dict.fromkeys(share, "percentunit")},
            steps=dict.fromkeys(share, AVAILABILITY_THRESHOLDS),
            mappings={"State": UP_DOWN_MAPPINGS},
            links={"Service": SERVICE, "Host": HOST},
        ),
    )
