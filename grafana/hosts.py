"""*Hosts*: what their collectors read, and what runs on them."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import parts
from grafana.parts import FULL, GREEN, ORANGE, RED, UP_DOWN_WORDS, gauges, lines, query, rows

HOST = 'host=~"$host"'
MEMORY = ((None, GREEN), (0.85, ORANGE), (0.95, RED))


def build() -> Dashboard:
    made = parts.dashboard(
        "hosts", "Hosts", "What the collectors read of the hosts, and what runs on them",
        [
            parts.variable("group", "Group", "label_values(host_info, group)"),
            parts.variable("host", "Host", 'label_values(host_info{group=~"$group"}, host)', offered=True),
        ],
    )  # fmt: skip
    made = _overview(made)
    made = _resources(made.with_row(Row("Resources")))
    made = _processes(made.with_row(Row("What runs there")))
    return _reading(made.with_row(Row("How they are read")))


def _overview(made: Dashboard) -> Dashboard:
    values = {
        "State": f"max by (host, group) (host_up{{{HOST}}})",
        "CPUs": f"max by (host) (host_cpu_count{{{HOST}}})",
        "CPU": f"max by (host) (host_cpu_usage_ratio{{{HOST}}})",
        "Memory": f"host:memory_usage:ratio{{{HOST}}}",
        "Fullest disk": f"max by (host) (host:filesystem_usage:ratio{{{HOST}}})",
        "Load per core": f"host:load1_per_cpu:ratio{{{HOST}}}",
        "Started": f"time() - max by (host) (host_boot_timestamp_seconds{{{HOST}}})",
    }
    shares = ("CPU", "Memory", "Fullest disk")
    return parts.add(
        made,
        rows(
            "Hosts", values, {"host": "Host", "group": "Group"}, sort="State", meaning={"State": UP_DOWN_WORDS},
            units={**dict.fromkeys(shares, "percentunit"), "Started": "s", "Load per core": "short"},
            steps={"Memory": MEMORY, "Fullest disk": FULL, "Load per core": ((None, GREEN), (1, ORANGE), (2, RED))},
            links={"Host": "/d/defib-hosts?var-host=${__data.fields.Host}"},
        )
    )  # fmt: skip


def _resources(made: Dashboard) -> Dashboard:
    made = parts.add(
        made,
        lines("CPU", "percentunit", query(f"max by (host) (host_cpu_usage_ratio{{{HOST}}})", "{{host}}"), top=1),
        lines("Load per core", "short", query(f"host:load1_per_cpu:ratio{{{HOST}}}", "{{host}}"),
              steps=((None, GREEN), (1, ORANGE), (2, RED))),
        lines("Memory", "percentunit", query(f"host:memory_usage:ratio{{{HOST}}}", "{{host}}"), top=1, steps=MEMORY),
        lines("Memory available", "bytes", query(f"max by (host) (host_memory_available_bytes{{{HOST}}})", "{{host}}"))
    )  # fmt: skip
    where = "{{host}} {{mountpoint}}"
    return parts.add(
        made,
        gauges("Disks", "percentunit", f"host:filesystem_usage:ratio{{{HOST}}}", where, FULL, width=8),
        gauges("Inodes", "percentunit", f"host:filesystem_files_usage:ratio{{{HOST}}}", where, FULL, width=8),
        lines("Free on disks", "bytes",
              query(f"min by (host, mountpoint) (host_filesystem_available_bytes{{{HOST}}})", where), width=8)
    )  # fmt: skip


def _processes(made: Dashboard) -> Dashboard:
    containers = {
        "State": f"max by (host, container) (host_container_up{{{HOST}}})",
        "Restarts": f"max by (host, container) (host_container_restarts_total{{{HOST}}})",
        "Started": f"time() - max by (host, container) (host_container_started_timestamp_seconds{{{HOST}}})",
        "": f"max by (host, container, image) (host_container_info{{{HOST}}})",
    }
    services = {
        "State": f"service:up:max{{{HOST}}}",
        "Latency": f"service:probe_duration_seconds:avg5m{{{HOST}}}",
    }
    link = {"Service": "/d/defib-service?var-service=${__data.fields.Service}"}
    made = parts.add(
        made,
        rows("Services", services, {"service": "Service", "host": "Host", "provider": "Provider"}, width=12, links=link,
             sort="State", units={"Latency": "s"}, meaning={"State": UP_DOWN_WORDS}),
        rows("Containers", containers, {"host": "Host", "container": "Container", "image": "Image"}, width=12,
             sort="State", units={"Started": "s"}, meaning={"State": UP_DOWN_WORDS})
    )  # fmt: skip
    return parts.add(
        made,
        rows("Units", {"State": f"max by (host, unit) (host_unit_active{{{HOST}}})"}, {"host": "Host", "unit": "Unit"},
             width=12, sort="State", meaning={"State": parts.words({"1": ("active", GREEN), "0": ("not active", RED)})}),
        rows("Programs of supervisor", {"State": f"max by (host, program) (host_program_running{{{HOST}}})"},
             {"host": "Host", "program": "Program"}, width=12, sort="State",
             meaning={"State": parts.words({"1": ("running", GREEN), "0": ("not running", RED)})})
    )  # fmt: skip


def _reading(made: Dashboard) -> Dashboard:
    who = "{{host}} {{collector}}"
    return parts.add(
        made,
        parts.states("Collectors", f"max by (host, collector) (host_collect_success{{{HOST}}})", who, width=12),
        lines("Time that collecting takes", "s",
              query(f"max by (host, collector) (host_collect_duration_seconds{{{HOST}}})", who), width=12),
        lines("Clocks, against the exporter's", "s",
              query(f"max by (host) (host_clock_offset_seconds{{{HOST}}})", "{{host}}"), width=24, height=6, least=None)
    )  # fmt: skip
