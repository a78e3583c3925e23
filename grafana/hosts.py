"""The *Hosts* dashboard: resources, and the services, containers, units and programs on each host."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import (
    GREEN,
    ORANGE,
    RED,
    UP_DOWN_MAPPINGS,
    USAGE_THRESHOLDS,
    bar_gauge,
    graph,
    range_query,
    table_panel,
)

HOST = 'host=~"$host"'
MEMORY = ((None, GREEN), (0.85, ORANGE), (0.95, RED))


def build() -> Dashboard:
    board = panels.dashboard(
        "hosts",
        "Hosts",
        "Resources of hosts, and what runs on them",
        [
            panels.variable("group", "Group", "label_values(host_info, group)"),
            panels.variable("host", "Host", 'label_values(host_info{group=~"$group"}, host)', only_offered=True),
        ],
    )
    board = _overview(board)
    board = _resources(board.with_row(Row("Resources")))
    board = _processes(board.with_row(Row("Services and processes")))
    return _collectors(board.with_row(Row("Collectors")))


def _overview(board: Dashboard) -> Dashboard:
    values = {
        "State": f"max by (host, group) (host_up{{{HOST}}})",
        "CPUs": f"max by (host) (host_cpu_count{{{HOST}}})",
        "CPU": f"max by (host) (host_cpu_usage_ratio{{{HOST}}})",
        "Memory": f"host:memory_usage:ratio{{{HOST}}}",
        "Fullest disk": f"max by (host) (host:filesystem_usage:ratio{{{HOST}}})",
        "Load per core": f"host:load1_per_cpu:ratio{{{HOST}}}",
        "Uptime": f"time() - max by (host) (host_boot_timestamp_seconds{{{HOST}}})",
    }
    shares = ("CPU", "Memory", "Fullest disk")
    return panels.add_panels(
        board,
        table_panel(
            "Hosts",
            values,
            {"host": "Host", "group": "Group"},
            sort="State",
            mappings={"State": UP_DOWN_MAPPINGS},
            units={**dict.fromkeys(shares, "percentunit"), "Uptime": "s", "Load per core": "short"},
            steps={
                "Memory": MEMORY,
                "Fullest disk": USAGE_THRESHOLDS,
                "Load per core": ((None, GREEN), (1, ORANGE), (2, RED)),
            },
            links={"Host": "/d/defib-hosts?var-host=${__data.fields.Host}"},
        ),
    )


def _resources(board: Dashboard) -> Dashboard:
    board = panels.add_panels(
        board,
        graph(
            "CPU", "percentunit", range_query(f"max by (host) (host_cpu_usage_ratio{{{HOST}}})", "{{host}}"), maximum=1
        ),
        graph(
            "Load per core",
            "short",
            range_query(f"host:load1_per_cpu:ratio{{{HOST}}}", "{{host}}"),
            steps=((None, GREEN), (1, ORANGE), (2, RED)),
        ),
        graph(
            "Memory",
            "percentunit",
            range_query(f"host:memory_usage:ratio{{{HOST}}}", "{{host}}"),
            maximum=1,
            steps=MEMORY,
        ),
        graph(
            "Memory available",
            "bytes",
            range_query(f"max by (host) (host_memory_available_bytes{{{HOST}}})", "{{host}}"),
        ),
    )
    where = "{{host}} {{mountpoint}}"
    return panels.add_panels(
        board,
        bar_gauge(
            "Disk usage", "percentunit", f"host:filesystem_usage:ratio{{{HOST}}}", where, USAGE_THRESHOLDS, width=8
        ),
        bar_gauge(
            "Inode usage",
            "percentunit",
            f"host:filesystem_files_usage:ratio{{{HOST}}}",
            where,
            USAGE_THRESHOLDS,
            width=8,
        ),
        graph(
            "Free disk space",
            "bytes",
            range_query(f"min by (host, mountpoint) (host_filesystem_available_bytes{{{HOST}}})", where),
            width=8,
        ),
    )


def _processes(board: Dashboard) -> Dashboard:
    containers = {
        "State": f"max by (host, container) (host_container_up{{{HOST}}})",
        "Restarts": f"max by (host, container) (host_container_restarts_total{{{HOST}}})",
        "Uptime": f"time() - max by (host, container) (host_container_started_timestamp_seconds{{{HOST}}})",
        "": f"max by (host, container, image) (host_container_info{{{HOST}}})",
    }
    services = {
        "State": f"service:up:max{{{HOST}}}",
        "Latency": f"service:probe_duration_seconds:avg5m{{{HOST}}}",
    }
    link = {"Service": "/d/defib-service?var-service=${__data.fields.Service}"}
    board = panels.add_panels(
        board,
        table_panel(
            "Services",
            services,
            {"service": "Service", "host": "Host", "provider": "Provider"},
            width=12,
            links=link,
            sort="State",
            units={"Latency": "s"},
            mappings={"State": UP_DOWN_MAPPINGS},
        ),
        table_panel(
            "Containers",
            containers,
            {"host": "Host", "container": "Container", "image": "Image"},
            width=12,
            sort="State",
            units={"Uptime": "s"},
            mappings={"State": UP_DOWN_MAPPINGS},
        ),
    )
    return panels.add_panels(
        board,
        table_panel(
            "systemd units",
            {"State": f"max by (host, unit) (host_unit_active{{{HOST}}})"},
            {"host": "Host", "unit": "Unit"},
            width=12,
            sort="State",
            mappings={"State": panels.value_mappings({"1": ("active", GREEN), "0": ("not active", RED)})},
        ),
        table_panel(
            "Supervisor programs",
            {"State": f"max by (host, program) (host_program_running{{{HOST}}})"},
            {"host": "Host", "program": "Program"},
            width=12,
            sort="State",
            mappings={"State": panels.value_mappings({"1": ("running", GREEN), "0": ("not running", RED)})},
        ),
    )


def _collectors(board: Dashboard) -> Dashboard:
    who = "{{host}} {{collector}}"
    return panels.add_panels(
        board,
        panels.state_timeline(
            "Collector success", f"max by (host, collector) (host_collect_success{{{HOST}}})", who, width=12
        ),
        graph(
            "Collection time",
            "s",
            range_query(f"max by (host, collector) (host_collect_duration_seconds{{{HOST}}})", who),
            width=12,
        ),
        graph(
            "Clock offset from the exporter",
            "s",
            range_query(f"max by (host) (host_clock_offset_seconds{{{HOST}}})", "{{host}}"),
            width=24,
            height=6,
            minimum=None,
        ),
    )
