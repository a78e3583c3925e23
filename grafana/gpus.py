"""The *GPUs* dashboard: by host, GPU and container."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from grafana import panels
from grafana.panels import GREEN, ORANGE, RED, bar_gauge, graph, range_query, table_panel

GPU = 'host=~"$host", gpu=~"$gpu"'
NAME = "{{host}} {{gpu}}"
TEMPERATURE_THRESHOLDS = ((None, GREEN), (80, ORANGE), (88, RED))
HEALTH = panels.value_mappings({"1": ("healthy", GREEN), "0": ("unhealthy", RED)})


def build() -> Dashboard:
    board = panels.dashboard(
        "gpus",
        "GPUs",
        "GPUs by host, and the memory that each container uses",
        [
            panels.variable("group", "Group", "label_values(host_info, group)"),
            panels.variable("host", "Host", 'label_values(host_info{group=~"$group"}, host)', only_offered=True),
            panels.variable("gpu", "GPU", 'label_values(gpu_info{host=~"$host"}, gpu)'),
        ],
    )
    board = _overview(board)
    board = _utilization(board.with_row(Row("Utilization")))
    board = _containers(board.with_row(Row("Memory by container")))
    return _faults(board.with_row(Row("Faults")))


def _by_gpu(name: str) -> str:
    return f"max by (host, gpu) ({name}{{{GPU}}})"


def _overview(board: Dashboard) -> Dashboard:
    values = {
        "Health": _by_gpu("gpu_healthy"),
        "": f"max by (host, gpu, name, driver_version) (gpu_info{{{GPU}}})",
        "Utilization": _by_gpu("gpu_utilization_ratio"),
        "Memory": f"{_by_gpu('gpu_memory_used_bytes')} / {_by_gpu('gpu_memory_total_bytes')}",
        "Temperature": f'max by (host, gpu) (gpu_temperature_celsius{{{GPU}, sensor="gpu"}})',
        "Power": _by_gpu("gpu_power_watts"),
    }
    return panels.add_panels(
        board,
        table_panel(
            "GPUs",
            values,
            {"host": "Host", "gpu": "GPU", "name": "Name", "driver_version": "Driver"},
            sort="Health",
            units={"Utilization": "percentunit", "Memory": "percentunit", "Temperature": "celsius", "Power": "watt"},
            steps={"Temperature": TEMPERATURE_THRESHOLDS, "Memory": ((None, GREEN), (0.9, ORANGE), (0.98, RED))},
            mappings={"Health": HEALTH},
            links={"Host": "/d/defib-hosts?var-host=${__data.fields.Host}"},
        ),
    )


def _utilization(board: Dashboard) -> Dashboard:
    for title, unit, name in (
        ("Utilization", "percentunit", "gpu_utilization_ratio"),
        ("Memory used", "bytes", "gpu_memory_used_bytes"),
        ("Power", "watt", "gpu_power_watts"),
    ):
        board = panels.add_panels(
            board, graph(title, unit, range_query(_by_gpu(name), NAME), maximum=1 if unit == "percentunit" else None)
        )
    heat = f"max by (host, gpu, sensor) (gpu_temperature_celsius{{{GPU}}})"
    clocks = f'max by (host, gpu, clock) (gpu_clock_hertz{{{GPU}, clock=~"sm|memory"}})'
    board = panels.add_panels(
        board,
        graph("Temperature", "celsius", range_query(heat, f"{NAME} {{{{sensor}}}}"), steps=TEMPERATURE_THRESHOLDS),
    )
    board = panels.add_panels(board, graph("Clocks", "hertz", range_query(clocks, f"{NAME} {{{{clock}}}}")))
    spare = f"{_by_gpu('gpu_power_limit_watts')} - {_by_gpu('gpu_power_watts')}"
    return board.with_panel(graph("Power headroom below the limit", "watt", range_query(spare, NAME)))


def _containers(board: Dashboard) -> Dashboard:
    held = f"max by (host, gpu, container) (gpu_process_memory_bytes{{{GPU}}})"
    return panels.add_panels(
        board,
        graph("Memory by container", "bytes", range_query(held, f"{NAME} {{{{container}}}}"), stacked=True),
        table_panel(
            "Current memory by container",
            {"Memory": held},
            {"host": "Host", "gpu": "GPU", "container": "Container"},
            width=12,
            height=8,
            units={"Memory": "bytes"},
            sort="Memory",
            descending=True,
        ),
    )


def _faults(board: Dashboard) -> Dashboard:
    throttled = (
        f'max by (host, gpu, reason) (gpu_throttle_active{{{GPU}, reason!~"gpu_idle|applications_clocks_setting"}})'
    )
    seconds = f"max by (host, gpu, reason) (rate(gpu_throttle_seconds_total{{{GPU}}}[$__rate_interval]))"
    board = panels.add_panels(
        board,
        graph("Throttle reasons", "none", range_query(throttled, f"{NAME} {{{{reason}}}}"), maximum=1, width=8),
        graph("Share of time throttled", "percentunit", range_query(seconds, f"{NAME} {{{{reason}}}}"), width=8),
        graph("Responding GPUs", "none", range_query('max by (host) (gpu_count{host=~"$host"})', "{{host}}"), width=8),
    )
    ecc = f"max by (host, gpu, kind, scope) (gpu_ecc_errors_total{{{GPU}}})"
    mapped = f"max by (host, gpu, kind) (gpu_remapped_rows{{{GPU}}})"
    xids = f"time() - max by (host, gpu, xid) (gpu_xid_last_timestamp_seconds{{{GPU}}})"
    return panels.add_panels(
        board,
        bar_gauge(
            "Memory errors", "none", ecc, f"{NAME} {{{{kind}}}} {{{{scope}}}}", ((None, GREEN), (1, RED)), width=8
        ),
        bar_gauge(
            "Remapped memory rows", "none", mapped, f"{NAME} {{{{kind}}}}", ((None, GREEN), (1, ORANGE)), width=8
        ),
        table_panel(
            "XIDs in the kernel log",
            {"Ago": xids},
            {"host": "Host", "gpu": "GPU", "xid": "XID"},
            width=8,
            height=8,
            units={"Ago": "s"},
            sort="Ago",
        ),
    )
