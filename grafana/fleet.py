"""*Fleet*: what is wrong now, then everything."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import parts
from grafana.parts import AVAILABILITY, GREEN, NONE_IS_WELL, ORANGE, RED, UP_DOWN_WORDS, lines, number, query, rows

CHOSEN = 'provider=~"$provider", category=~"$category", host=~"$host"'
# Services need not have a host: those on hosts of other groups are left out.
OF_GROUP = 'unless on (host) host_info{group!~"$group"}'
AUTOMATION = "defib_remediator_automation_enabled"
SERVICE = "/d/defib-service?var-service=${__data.fields.Service}"
HOST = "/d/defib-hosts?var-host=${__data.fields.Host}"
SEVERITIES = parts.words({"critical": ("critical", RED), "warning": ("warning", ORANGE), "info": ("info", "blue")})


def build() -> Dashboard:
    made = parts.dashboard(
        "fleet", "Fleet", "What is wrong now, then everything",
        [
            parts.variable("provider", "Provider", "label_values(service_info, provider)"),
            parts.variable("category", "Category", 'label_values(service_info{provider=~"$provider"}, category)'),
            parts.variable("group", "Group", "label_values(host_info, group)"),
            parts.variable("host", "Host", 'label_values(host_info{group=~"$group"}, host)'),
        ],
    )  # fmt: skip
    made = _wrong(made.with_row(Row("What is wrong now")))
    return _everything(made.with_row(Row("Everything")))


def _wrong(made: Dashboard) -> Dashboard:
    hosts = 'host=~"$host", group=~"$group"'
    for title, expression, known in (
        ("Services down", f"service:up:max{{{CHOSEN}}} == 0 {OF_GROUP}", "service:up:max"),
        ("Hosts down", f'ALERTS{{alertname="HostDown", alertstate="firing", {hosts}}}', "host_info"),
        ("GPUs unhealthy", f'max by (host, gpu) (gpu_healthy{{host=~"$host"}}) == 0 {OF_GROUP}', "gpu_healthy"),
        (
            "Critical alerts",
            f'ALERTS{{alertstate="firing", severity="critical", host=~"$host"}} {OF_GROUP}',
            'up{job="prometheus"}',
        ),
        ("Breakers open", "max by (service) (defib_remediator_breaker_open) == 1", AUTOMATION),
    ):
        made = parts.add(made, number(title, "none", f"count({expression}) or 0 * count({known})", NONE_IS_WELL))
    automatic = parts.words({"1": ("on", GREEN), "0": ("off", ORANGE)})
    made = parts.add(
        made,
        number(
            "Automation", "none", f"max({AUTOMATION})", [(None, ORANGE), (1, GREEN)],
            meaning=automatic,
        )
    )  # fmt: skip
    shown = {"alertname": "Alert", "severity": "Severity", "service": "Service", "host": "Host", "gpu": "GPU",
             "mountpoint": "Mount", "component": "Component", "instance": "Instance"}  # fmt: skip
    firing = 'max by (alertname, severity, service, host, gpu, mountpoint, component, instance) (ALERTS{alertstate="firing", alertname!="Watchdog"})'
    made = parts.add(
        made,
        rows(
            "Firing alerts", {"Firing": firing}, shown, sort="Severity",
            meaning={"Severity": SEVERITIES}, links={"Service": SERVICE, "Host": HOST},
            about="What Alertmanager mutes because of another stands here too.",
        )
    )  # fmt: skip
    none = "0 * count(service:up:max)"
    down = f"(time() - max by (service, host, provider) (service_last_change_timestamp_seconds)) and on (service) (service:up:max{{{CHOSEN}}} == 0 {OF_GROUP})"
    return parts.add(
        made,
        rows(
            "Services that are down", {"Down for": down}, {"service": "Service", "host": "Host", "provider": "Provider"},
            width=12, units={"Down for": "s"}, links={"Service": SERVICE, "Host": HOST}, sort="Down for",
        ),
        lines("Services up and down", "none", query(f"count(service:up:max{{{CHOSEN}}} == 1 {OF_GROUP}) or {none}", "up"),
              query(f"count(service:up:max{{{CHOSEN}}} == 0 {OF_GROUP}) or {none}", "down", "B"), stacked=True, height=9)
    )  # fmt: skip


def _everything(made: Dashboard) -> Dashboard:
    of_provider = f"by (provider) (service:availability:avg5m{{{CHOSEN}}} {OF_GROUP})"
    made = parts.add(
        made,
        lines("Availability by provider", "percentunit", query(f"avg {of_provider}", "{{provider}}"), top=1),
        lines(
            "Latency of nineteen probes in twenty, by provider", "s",
            query('provider:probe_duration_seconds:p95{provider=~"$provider", category=~"$category"}',
                  "{{provider}} {{category}}"),
        )
    )  # fmt: skip
    values = {
        "State": f"service:up:max{{{CHOSEN}}} {OF_GROUP}",
        "Latency": f"service:probe_duration_seconds:avg5m{{{CHOSEN}}} {OF_GROUP}",
        "1 h": f"service:availability:avg1h{{{CHOSEN}}} {OF_GROUP}",
        "1 d": f"service:availability:avg1d{{{CHOSEN}}} {OF_GROUP}",
        "30 d": f"service:availability:avg30d{{{CHOSEN}}} {OF_GROUP}",
    }
    columns = {"service": "Service", "host": "Host", "provider": "Provider", "category": "Category"}
    share = ("1 h", "1 d", "30 d")
    return parts.add(
        made,
        rows(
            "Services", values, columns, height=14, sort="State",
            units={"Latency": "s", **dict.fromkeys(share, "percentunit")}, steps=dict.fromkeys(share, AVAILABILITY),
            meaning={"State": UP_DOWN_WORDS}, links={"Service": SERVICE, "Host": HOST},
        )
    )  # fmt: skip
