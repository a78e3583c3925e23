"""The *Hosts* dashboard: resources, and the services, containers, units and programs on each host."""

from grafana_foundation_sdk.builders import timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import (
    GREEN,
    ORANGE,
    RED,
    STATE_MAPPINGS,
    UP_DOWN_MAPPINGS,
    USAGE_THRESHOLDS,
    bar_gauge,
    graph,
    range_query,
)
from grafana.promql import highest
from grafana.tables import Value, table_panel

HOST = 'host=~"$host"'
MEMORY = ((None, GREEN), (0.85, ORANGE), (0.95, RED))
LOAD = ((None, GREEN), (1, ORANGE), (2, RED))
STATE = panels.state(f"host:up:max{{{HOST}}}", f"host_info{{{HOST}}}", "host, group", "host")
# Neither loopback nor what containers are connected with.
CARDS = 'device!~"lo|veth.*|docker.*|br-.*|cni.*|flannel.*|cali.*"'
DISKS = 'device!~"loop.*|ram.*|sr.*|dm-.*|zram.*"'
TOP = "The 20 highest at the end of the displayed time range."
NODE = f"{TOP} From node_exporter on the hosts."


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
    board = _resources(board.with_row(Row("CPU, memory and disks")))
    board = _traffic(board.with_row(Row("Network, disk I/O and swap")))
    board = _processes(board.with_row(Row("Services and processes")))
    board = _logs(board.with_row(Row("Logs")))
    return _collectors(board.with_row(Row("Collectors")))


def _overview(board: Dashboard) -> Dashboard:
    return panels.add_panels(
        board,
        table_panel(
            "Hosts",
            {"host": "Host", "group": "Group"},
            {
                "State": Value(STATE, mappings=STATE_MAPPINGS),
                "CPUs": Value(f"host_cpu_count{{{HOST}}}"),
                "CPU": Value(f"host_cpu_usage_ratio{{{HOST}}}", "percentunit", 1),
                "Memory": Value(f"host:memory_usage:ratio{{{HOST}}}", "percentunit", 1, MEMORY),
                "Fullest disk": Value(f"host:filesystem_usage:ratio{{{HOST}}}", "percentunit", steps=USAGE_THRESHOLDS),
                "Load per core": Value(f"host:load1_per_cpu:ratio{{{HOST}}}", "short", 2, LOAD),
                "Uptime": Value(f"time() - host_boot_timestamp_seconds{{{HOST}}}", "s"),
            },
            key="host",
            lowest=True,
            sort=("State", "-Fullest disk"),
        ),
        panels.state_timeline(
            "State over time",
            highest(STATE, "host", 25, lowest=True),
            "{{host}}",
            description="25 hosts; those that are down first. Unknown: the host has no shell, or it was not used yet.",
        ),
    )


def _graph_by_host(title: str, unit: str, expression: str, by: str = "host", **more: object) -> timeseries.Panel:
    """Return a graph of the hosts with the highest values."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    query = range_query(highest(f"max by ({by}) ({expression})", by), legend)
    return graph(title, unit, query, **{"description": TOP, **more})  # type: ignore[arg-type] # as graph() has them


def _resources(board: Dashboard) -> Dashboard:
    where = "{{host}} {{mountpoint}}"
    board = panels.add_panels(
        board,
        _graph_by_host("CPU", "percentunit", f"host_cpu_usage_ratio{{{HOST}}}", maximum=1, decimals=1),
        _graph_by_host("Load per core", "short", f"host:load1_per_cpu:ratio{{{HOST}}}", steps=LOAD),
        _graph_by_host("Memory", "percentunit", f"host:memory_usage:ratio{{{HOST}}}", maximum=1, steps=MEMORY),
        graph(
            "Memory available",
            "bytes",
            range_query(
                highest(f"max by (host) (host_memory_available_bytes{{{HOST}}})", "host", lowest=True), "{{host}}"
            ),
            description="The 20 hosts with the least.",
        ),
    )
    for title, name in (
        ("Disk usage", "host:filesystem_usage:ratio"),
        ("Inode usage", "host:filesystem_files_usage:ratio"),
    ):
        board = panels.add_panels(
            board,
            bar_gauge(
                title,
                "percentunit",
                f"topk(20, max by (host, mountpoint) ({name}{{{HOST}}}))",
                where,
                USAGE_THRESHOLDS,
                width=8,
                description="The 20 fullest.",
            ),
        )
    free = f"min by (host, mountpoint) (host_filesystem_available_bytes{{{HOST}}})"
    return board.with_panel(
        graph(
            "Free disk space",
            "bytes",
            range_query(highest(free, "host, mountpoint", lowest=True), where),
            width=8,
            description="The 20 file systems with the least.",
        )
    )


def _traffic(board: Dashboard) -> Dashboard:
    for title, unit, of, names in (
        ("Network received", "Bps", CARDS, ("network_receive_bytes_total",)),
        ("Network sent", "Bps", CARDS, ("network_transmit_bytes_total",)),
        (
            "Network errors and drops",
            "pps",
            CARDS,
            tuple(f"network_{way}_{what}_total" for way in ("receive", "transmit") for what in ("errs", "drop")),
        ),
        ("Disk reads", "Bps", DISKS, ("disk_read_bytes_total",)),
        ("Disk writes", "Bps", DISKS, ("disk_written_bytes_total",)),
        ("Time in which a disk is busy", "percentunit", DISKS, ("disk_io_time_seconds_total",)),
    ):
        rates = " + ".join(f"rate(node_{name}{{{HOST}, {of}}}[$__rate_interval])" for name in names)
        share = {"maximum": 1, "decimals": 1} if unit == "percentunit" else {}
        board = board.with_panel(_graph_by_host(title, unit, rates, "host, device", width=8, description=NODE, **share))
    total, free = (f"node_memory_Swap{each}_bytes{{{HOST}}}" for each in ("Total", "Free"))
    swapped = (
        f"rate(node_vmstat_pswpin{{{HOST}}}[$__rate_interval]) + rate(node_vmstat_pswpout{{{HOST}}}[$__rate_interval])"
    )
    return panels.add_panels(
        board,
        _graph_by_host("Swap used", "bytes", f"{total} - {free}", description=NODE),
        _graph_by_host("Pages swapped in and out per second", "short", swapped, description=NODE),
    )


def _processes(board: Dashboard) -> Dashboard:
    container = {
        "State": Value(f"host_container_up{{{HOST}}}", mappings=UP_DOWN_MAPPINGS),
        "Restarts": Value(f"host_container_restarts_total{{{HOST}}}"),
        "Uptime": Value(f"time() - host_container_started_timestamp_seconds{{{HOST}}}", "s"),
        "": Value(f"host_container_info{{{HOST}}}"),
    }
    service = {
        "State": Value(
            panels.state(
                f"service:up:max{{{HOST}}}",
                f"service_probe_interval_seconds{{{HOST}}}",
                "service, host, provider",
                "service",
            ),
            mappings=STATE_MAPPINGS,
        ),
        "Latency": Value(f"service:probe_duration_seconds:avg5m{{{HOST}}}", "s"),
    }
    board = panels.add_panels(
        board,
        table_panel(
            "Services",
            {"service": "Service", "host": "Host", "provider": "Provider"},
            service,
            key="service",
            lowest=True,
            width=12,
            sort=("State",),
        ),
        table_panel(
            "Containers",
            {"host": "Host", "container": "Container", "image": "Image"},
            container,
            key="host, container",
            lowest=True,
            width=12,
            sort=("State",),
        ),
    )
    for title, label, metric, column, running in (
        ("systemd units", "unit", "host_unit_active", "Unit", "active"),
        ("Supervisor programs", "program", "host_program_running", "Program", "running"),
    ):
        states = panels.value_mappings({"1": (running, GREEN), "0": (f"not {running}", RED)})
        board = board.with_panel(
            table_panel(
                title,
                {"host": "Host", label: column},
                {"State": Value(f"{metric}{{{HOST}}}", mappings=states)},
                lowest=True,
                width=12,
                sort=("State",),
            )
        )
    return board


def _logs(board: Dashboard) -> Dashboard:
    return panels.add_panels(
        board,
        _graph_by_host(
            "Matching lines in 5 minutes", "short", f"host:log_matches:increase5m{{{HOST}}}", "host, source, pattern"
        ),
        _graph_by_host(
            "Requests that failed with 5xx", "percentunit", f"host:http_errors:ratio{{{HOST}}}", "host, source", maximum=1,
            decimals=1,
        ),
    )  # fmt: skip


def _collectors(board: Dashboard) -> Dashboard:
    offset = f"host_clock_offset_seconds{{{HOST}}}"
    success = f"max by (host, collector) (host_collect_success{{{HOST}}})"
    return panels.add_panels(
        board,
        panels.state_timeline(
            "Collectors over time",
            highest(success, "host, collector", 25, lowest=True),
            "{{host}} {{collector}}",
            width=12,
            description="25 collectors; those that fail first.",
            mappings=panels.value_mappings({"1": ("succeeded", GREEN), "0": ("failed", RED)}),
            steps=panels.UP_THRESHOLDS,
        ),
        _graph_by_host("Collection time", "s", f"host_collect_duration_seconds{{{HOST}}}", "host, collector"),
        graph(
            "Clock offset from the exporter",
            "s",
            range_query(
                highest(f"max by (host) ({offset})", "host", rank=f"abs({offset})"),
                "{{host}}",
            ),
            width=24,
            height=6,
            minimum=None,
            description=TOP,
        ),
    )
