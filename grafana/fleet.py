"""*Fleet*: what is wrong now, then everything."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import parts
from grafana.parts import AVAILABILITY, GREEN, NONE_IS_WELL, ORANGE, RED, UP_DOWN_WORDS, lines, number, query, rows

CHOSEN = 'provider=~"$provider", category=~"$category", host=~"$host"'
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
    for title, expression in (
        ("Services down", f"service:up:max{{{CHOSEN}}} == 0"),
        ("Hosts down", f"max by (host) (host_up{{{hosts}}}) == 0"),
        ("GPUs unhealthy", 'max by (host, gpu) (gpu_healthy{host=~"$host"}) == 0'),
        ("Critical alerts", 'ALERTS{alertstate="firing", severity="critical"}'),
        ("Breakers open", "max by (service) (defib_remediator_breaker_open) == 1"),
    ):
        made = parts.add(made, number(title, "none", f"count({expression}) or vector(0)", NONE_IS_WELL))
    automatic = parts.words({"1": ("on", GREEN), "0": ("off", ORANGE)})
    made = parts.add(
        made,
        number(
            "Automation", "none", "max(defib_remediator_automation_enabled)", [(None, ORANGE), (1, GREEN)],
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
    down = f"(time() - max by (service, host, provider) (service_last_change_timestamp_seconds)) and on (service) service:up:max{{{CHOSEN}}} == 0"
    return parts.add(
        made,
        rows(
            "Services that are down", {"Down for": down}, {"service": "Service", "host": "Host", "provider": "Provider"},
            width=12, units={"Down for": "s"}, links={"Service": SERVICE, "Host": HOST}, sort="Down for",
        ),
        lines("Services up and down", "none", query(f"count(service:up:max{{{CHOSEN}}} == 1) or vector(0)", "up"),
              query(f"count(service:up:max{{{CHOSEN}}} == 0) or vector(0)", "down", "B"), stacked=True, height=9)
    )  # fmt: skip


def _everything(made: Dashboard) -> Dashboard:
    of_provider = f"by (provider) (service:availability:avg5m{{{CHOSEN}}})"
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
        "State": f"service:up:max{{{CHOSEN}}}",
        "Latency": f"service:probe_duration_seconds:avg5m{{{CHOSEN}}}",
        "1 h": f"service:availability:avg1h{{{CHOSEN}}}",
        "1 d": f"service:availability:avg1d{{{CHOSEN}}}",
        "30 d": f"service:availability:avg30d{{{CHOSEN}}}",
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
